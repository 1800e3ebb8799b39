//! The directory that inputs are put into: a small finished run, one that was interrupted, and
//! a file of every form that the program reads.

use crate::targets::{PRIVATE, Target};
use gradtx_tests::{copy_files, fixture};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");

/// Copies a directory with all below it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let place = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &place);
        } else {
            std::fs::copy(entry.path(), place).unwrap();
        }
    }
}

/// The seed files of a target.
pub fn seeds(home: &Path, target: &Target) -> Vec<Vec<u8>> {
    let paths = target.seeds.iter().map(|seed| home.join(resolve(home, seed)));
    paths.map(|path| std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).collect()
}

/// A path in the home directory, with the first file that fits where its last name has a `*`.
pub fn resolve(home: &Path, path: &str) -> PathBuf {
    let Some((before, after)) = path.split_once('*') else { return path.into() };
    let (dir, begin) = before.rsplit_once('/').unwrap();
    let names = std::fs::read_dir(home.join(dir)).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    let fits = |name: &&String| name.starts_with(begin) && name.ends_with(after);
    Path::new(dir).join(names.iter().find(fits).unwrap_or_else(|| panic!("{path}: no such file")))
}

/// Makes the home directory.
pub fn make(home: &Path) {
    run(home, "demo . --world smoke");
    copy_files(&fixture("qwen2_text/model"), &home.join("model"));
    copy_files(&fixture("qwen2_text/adapter"), &home.join("adapter"));
    copy_files(&fixture("own/llm"), &home.join("llm"));
    copy_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus"), &home.join("rows"));
    std::fs::create_dir(home.join("configs")).unwrap();
    for family in ["llama", "mistral", "qwen3"] {
        let config = fixture(&format!("{family}/model/config.json"));
        std::fs::copy(config, home.join(format!("configs/{family}.json"))).unwrap();
    }
    for form in ["encodings", "tasks"] {
        copy_files(&fixture(&format!("parquet/{form}")), &home.join("parquet"));
    }
    sharded(home);
    texts(home);
    run(home, "split --data rows/pair.jsonl --out split --clients 1");
    clients(home);
    emulator(home);
    interrupted(home);
}

/// What a client and its provider exchange, and what a client keeps.
fn clients(home: &Path) {
    run(home, "init-clients --run run --out package");
    let private = find(&home.join("world/private"), "train.jsonl");
    std::fs::copy(private, home.join("private.jsonl")).unwrap();
    run(
        home,
        "finetune --run package --set models.tiny=world/tiny --data private.jsonl --out client --save-adapter",
    );
    run(
        home,
        "audit --run package --insert-canaries 12 --data private.jsonl --out canaries.jsonl --key key.json --seed 1",
    );
    run(home, &format!("{PRIVATE} --dp-noise-multiplier 2 --dp-delta 1e-2"));
    // It is made again, from its checkpoint.
    std::fs::remove_file(home.join("private/update.safetensors")).unwrap();
    run(home, "translate --run run client/update.safetensors --method ridge --out run/several");
}

/// An emulator, and the edge that a client trained through it.
fn emulator(home: &Path) {
    let settings = "--config world/settings.toml --set emulator.edge=[1,0] --set emulator.num_tokens=400";
    run(home, &format!("emulate --run offsite {settings}"));
    run(
        home,
        "finetune --run offsite-client --config world/settings.toml --base offsite/emulator/model --data private.jsonl \
         --set finetune.use_peft=false --out edge",
    );
}

/// The first file of this name below a directory.
fn find(dir: &Path, name: &str) -> PathBuf {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let found = entries.iter().find_map(|path| match path.is_dir() {
        true => Some(find(path, name)),
        false => path.ends_with(name).then(|| path.clone()),
    });
    found.unwrap_or_else(|| panic!("{}: no {name}", dir.display()))
}

fn run(home: &Path, words: &str) {
    let ended = command(home, words).output().unwrap();
    assert!(ended.status.success(), "{words}: {}", String::from_utf8_lossy(&ended.stderr));
}

fn command(home: &Path, words: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["--threads", "1", "--quiet"]).args(words.split(' ')).current_dir(home);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A model whose weights are in shards.
fn sharded(home: &Path) {
    let dir = home.join("sharded");
    copy_files(&home.join("model"), &dir);
    let shard = "model-00001-of-00001.safetensors";
    std::fs::rename(dir.join("model.safetensors"), dir.join(shard)).unwrap();
    let bytes = std::fs::read(dir.join(shard)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let map: serde_json::Map<String, Value> =
        tensors.names().into_iter().map(|name| (name.to_string(), json!(shard))).collect();
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Small files, one of each kind that nothing above has made.
fn texts(home: &Path) {
    let sweep = "[[sweep]]\nbase = \"settings.toml\"\nname = \"a\"\ntrain.learning_rate = [1e-3, 2e-3]\ntrain.max_steps = 4\n\
                 [[sweep]]\nbase = \"settings.toml\"\npreset = \"paper\"\nseed = [1, 2]\n";
    let failed =
        json!({ "message": "x: y", "hint": "z", "code": 1, "stage": "train", "time": 1_700_000_000 });
    let bench = json!({ "who": "gradtx", "name": "large gemm", "work": "gemm", "device": "cpu", "threads": 2,
        "dtype": "f32", "shape": "2048x2048x2048", "median_s": 0.1, "runs": 5, "tflops": 0.16,
        "share_of_peak": 0.5, "gb_per_s": 17.0, "version": "0.1.0", "date": "2026-11-21" });
    let template = "{%- if tools %}{{ tools|tojson }}{%- endif %}{%- for m in messages %}{%- if m.role == 'user' %}\
                    {{ '<|im_start|>user\n' + m.content|trim + '<|im_end|>\n' }}{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n' \
                    ~ m.content ~ '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}\
                    {{ '<|im_start|>assistant\n' }}{%- endif %}";
    // The world's models know none of the words in rows.
    let rows = "[models]\ntiny = \"model\"\nllm = \"llm\"\n[data]\npublic = \"one.jsonl\"\nmax_length = 4096\n\
                [lora]\nr = 2\ntarget_modules = [\"q_proj\"]\n[finetune]\ntiny.max_steps = 1\ntiny.global_batch_size = 1\n";
    let files = [
        ("rows.toml", rows.into()),
        ("world/sweep.toml", sweep.into()),
        ("world/fuzz.toml", std::fs::read_to_string(home.join("world/settings.toml")).unwrap()),
        ("failed.json", failed.to_string()),
        ("bench.jsonl", format!("{bench}\n")),
        ("templates/tools.jinja", template.into()),
        ("one.jsonl", "{\"prompt\": \"price?\", \"response\": \"7\"}\n".into()),
        ("words/inspect", "inspect\nrun/translator".into()),
        ("words/plan", "plan\n--config\nworld/settings.toml\n--gpu\ncpu\n--tokens-per-example\n9".into()),
        (
            "words/evaluate",
            "evaluate\n--run\nrun\n--data\none.jsonl\n--out\nout\n--set\nevaluate.batch=1".into(),
        ),
        ("words/split", "split\n--data\none.jsonl\n--out\nout\n--clients\n2\n--seed\n1".into()),
    ];
    for (name, text) in files {
        let path = home.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

/// A training that was killed once it had written a checkpoint.
fn interrupted(home: &Path) {
    for steps in [12, 50, 200, 800] {
        let _ = std::fs::remove_dir_all(home.join("half"));
        copy(&home.join("run"), &home.join("half"));
        std::fs::remove_dir_all(home.join("half/translator")).unwrap();
        std::fs::remove_dir_all(home.join("half/clients")).unwrap();
        let file = home.join("half/run.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        let (before, train) = text.split_once("[train]").unwrap();
        let train = train.replacen("max_steps = 4", &format!("max_steps = {steps}"), 1);
        let train = train.replacen("save_minutes = 10.0", "save_minutes = 0.0", 1);
        std::fs::write(&file, format!("{before}[train]{train}")).unwrap();
        let mut training = command(home, "train --run half").spawn().unwrap();
        let checkpoints = home.join("half/translator/checkpoints");
        let part = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("step-");
        let is_there = || {
            std::fs::read_dir(&checkpoints)
                .is_ok_and(|mut dir| dir.any(|e| e.is_ok_and(|e| part(&e.file_name()))))
        };
        while training.try_wait().unwrap().is_none() && !is_there() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // It may have ended by itself.
        let _ = training.kill();
        training.wait().unwrap();
        if is_there() && home.join("half/translator/progress.json").is_file() {
            return;
        }
    }
    panic!("no training was interrupted between its first checkpoint and its end");
}
