//! What people and scripts see of the program around its results: who works where and how
//! far, JSON, hints, what fits, and that a kill or a full disk costs nothing that is finished.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, PROGRAM, stderr, stdout};
use gradtx_tests::{copy_files, fixture};
use gradtx_world::tasks::{Part, Sampler, Task};
use gradtx_world::tokenizer;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SETTINGS: &str = r#"
[models]
tiny = "model"
llm = "model"
[data]
public = "public.jsonl"
instruction = "none"
prompt = "template"
max_length = 64
[curate]
num_subsets = 3
examples_per_subset = 4
num_snapshots = 4
jobs_per_batch = 2
[curate.tiny]
max_steps = 4
global_batch_size = 2
[curate.llm]
max_steps = 4
global_batch_size = 2
[finetune.tiny]
max_steps = 2
global_batch_size = 2
[translator]
d_model = 16
d_ff = 24
d_kv = 8
num_heads = 2
num_layers = 1
num_decoder_layers = 1
[evaluate]
max_new_tokens = 4
per_device_eval_batch_size = 3
"#;

/// More steps than a test takes.
const LONG: [&str; 2] = ["--set", "curate.tiny.max_steps=30000"];

impl Home {
    /// With a tiny model, data and a run file.
    fn of_one_model() -> Self {
        let home = Self::empty();
        copy_files(&fixture("qwen2/model"), &home.path("model"));
        tokenizer::write(&home.path("model")).unwrap();
        let mut sampler = Sampler::new(1);
        let row = |_| {
            let sample = sampler.of_task(Task::all()[0], Part::Train);
            json!({ "task": "a", "question": sample.question(), "answer": sample.answer() })
        };
        let rows: Vec<Value> = (0..8).map(row).collect();
        home.write("public.jsonl", &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
        home.write("settings.toml", SETTINGS);
        home
    }

    /// `curate` in the run `run`, with more arguments.
    fn curate(&self, more: &[&str]) -> Command {
        let mut command = self.command(&["curate", "--run", "run", "--config", "settings.toml"]);
        command.args(more);
        command
    }

    /// The status of the stage in a directory of the run, as an object.
    fn status(&self, stage: &str, more: &[&str]) -> Value {
        let output = self.gradtx(&[&["status", "run", "--json"], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let event: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&event["event"], &event["stage"]), (&json!("result"), &json!("status")));
        let rows = event["stages"].as_array().unwrap();
        rows.iter().find(|row| row["stage"] == stage).unwrap_or_else(|| panic!("{event}")).clone()
    }

    /// Waits until the curation has made steps.
    fn wait_until_it_works(&self) -> Value {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(50));
            if self.path("run/shadow/progress.json").exists() {
                let row = self.status("curate", &[]);
                if row["progress"]["done"].as_u64() > Some(0) {
                    return row;
                }
            }
        }
        panic!("no progress within a minute");
    }

    fn start(&self, more: &[&str]) -> Running {
        let mut command = self.curate(&[&LONG[..], more].concat());
        Running(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }
}

/// A process that does not outlive its test.
struct Running(Option<Child>);

impl Running {
    fn pid(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    fn signal(mut self, signal: &str) -> Output {
        let child = self.0.take().unwrap();
        let sent = Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap();
        assert!(sent.success());
        child.wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Every line of an output as an object.
fn events(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn hidden_or_progress(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.starts_with('.') || n == "progress.json" || n == "failed.json").collect()
}

#[test]
fn a_running_stage_is_seen_is_alone_and_can_be_killed() {
    let home = Home::of_one_model();
    let first = home.start(&[]);
    let row = home.wait_until_it_works();
    assert_eq!(row["state"], "running");
    let progress = &row["progress"];
    assert_eq!((&progress["pid"], &progress["part"]), (&json!(first.pid()), &json!("curate")));
    assert!(progress["rate"].as_f64().unwrap() > 0.0 && row["seconds_left"].as_f64().unwrap() > 0.0);
    assert_eq!(row["parts"][0], json!({ "name": "tiny", "done": 0, "total": 3 }));
    assert_eq!(home.status("train", &[])["state"], "not_begun");
    let text = stdout(&home.gradtx(&["status", "run"]));
    for wanted in ["curate", "running", "0 of 3 shards of tiny", "steps/s", "left", &first.pid().to_string()]
    {
        assert!(text.contains(wanted), "no `{wanted}` in: {text}");
    }

    let second = home.curate(&LONG).output().unwrap();
    let said = stderr(&second);
    assert_eq!(second.status.code(), Some(4), "{said}");
    assert!(said.contains(&format!("process {}", first.pid())) && said.contains("hint:"), "{said}");
    assert_eq!(home.status("curate", &[])["state"], "running", "the second attempt changed nothing");

    first.signal("-KILL");
    let row = home.status("curate", &[]);
    assert_eq!(row["state"], "stopped");
    assert!(row["progress"]["done"].as_u64() > Some(0), "it is known where it stopped: {row}");
    assert!(stdout(&home.gradtx(&["status", "run"])).contains("the same command again"));

    // What a kill left behind hinders nobody.
    let again = home.start(&["--json"]);
    let mine = |row: &Value| row["progress"]["pid"] == again.pid();
    while !mine(&home.wait_until_it_works()) {}
    let ended = again.signal("-INT");
    assert_eq!(ended.status.code(), Some(130));
    let error = events(&stderr(&ended)).pop().unwrap();
    assert_eq!((&error["event"], &error["code"]), (&json!("error"), &json!(130)));
    assert!(error["hint"].as_str().unwrap().contains("same command"), "{error}");
    assert_eq!(home.start(&[]).signal_after_start(&home), Some(75));
}

impl Running {
    /// Terminates it once it works; its exit code.
    fn signal_after_start(self, home: &Home) -> Option<i32> {
        while home.wait_until_it_works()["progress"]["pid"] != self.pid() {}
        self.signal("-TERM").status.code()
    }
}

#[test]
fn finished_stages_leave_nothing_and_say_so_in_json() {
    let home = Home::of_one_model();
    let output = home.curate(&["--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let events = events(&stdout(&output));
    let result = events.last().unwrap();
    assert_eq!((&result["event"], &result["stage"]), (&json!("result"), &json!("curate")));
    assert_eq!((&result["pairs"], &result["tuples"]), (&json!(3), &json!(12)));
    assert!(result["seconds"].as_f64().unwrap() > 0.0);
    for file in result["files"].as_array().unwrap() {
        assert!(home.path(file.as_str().unwrap()).is_file(), "{file}");
    }
    assert!(events.iter().any(|e| e["event"] == "message" && e["stage"] == "curate"), "{events:?}");
    assert_eq!(hidden_or_progress(&home.path("run/shadow")), [""; 0]);
    let row = home.status("curate", &[]);
    assert_eq!((&row["state"], &row["parts"][1]["done"]), (&json!("finished"), &json!(3)));

    // Again: nothing to do, and only the result without --json but with --quiet.
    let again = home.curate(&["--json"]).output().unwrap();
    assert_eq!(self::events(&stdout(&again)).last().unwrap()["seconds"], Value::Null);
    let quiet = home.curate(&["--quiet"]).output().unwrap();
    assert_eq!(stdout(&quiet).lines().count(), 1, "{}", stdout(&quiet));
}

#[test]
fn damage_is_seen_at_a_glance_or_with_a_closer_look() {
    let home = Home::of_one_model();
    assert!(home.curate(&[]).status().unwrap().success());
    let shard = home.path("run/shadow/shards/00001.teacher.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    assert_eq!(home.status("curate", &[])["state"], "finished", "sizes are as they were");
    let row = home.status("curate", &["--verify"]);
    assert_eq!(
        (&row["state"], &row["damaged"]),
        (&json!("damaged"), &json!(["shards/00001.teacher.safetensors"]))
    );
    std::fs::write(&shard, &bytes[1..]).unwrap();
    assert_eq!(home.status("curate", &[])["state"], "damaged");
    std::fs::remove_file(&shard).unwrap();
    let row = home.status("curate", &[]);
    assert_eq!((&row["state"], &row["parts"][1]["done"]), (&json!("damaged"), &json!(2)));
    assert!(home.curate(&[]).status().unwrap().success());
    assert_eq!(home.status("curate", &["--verify"])["state"], "finished");
}

#[test]
fn a_full_disk_is_an_error_that_status_remembers() {
    let home = Home::of_one_model();
    // Shards are larger than 4 KiB; the record and the error are not.
    let line = format!("ulimit -f 8; exec {PROGRAM} curate --run run --config settings.toml");
    let limited = Command::new("sh").arg("-c").arg(line).current_dir(home.dir()).output().unwrap();
    let said = stderr(&limited);
    assert_eq!(limited.status.code(), Some(1), "{:?} {said}", limited.status);
    for wanted in ["error:", "shards/0000", "too large", "hint:", "same command"] {
        assert!(said.contains(wanted), "no `{wanted}` in: {said}");
    }
    let row = home.status("curate", &[]);
    assert_eq!(row["state"], "failed", "{row}");
    assert!(row["failed"]["error"]["message"].as_str().unwrap().contains("shards/0000"), "{row}");
    let text = stdout(&home.gradtx(&["status", "run"]));
    assert!(text.contains("FAILED") && text.contains("too large"), "{text}");
    assert!(home.curate(&[]).status().unwrap().success());
    assert_eq!(home.status("curate", &[])["state"], "finished");
    assert_eq!(hidden_or_progress(&home.path("run/shadow")), [""; 0]);
}

/// Runs a command that must fail, and looks for words in the one error that it prints.
fn must_say(home: &Home, args: &[&str], code: i32, words: &[&str]) {
    let output = home.gradtx(args);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
    }
    for word in ["os error", "usize", "panicked"] {
        assert!(!said.contains(word), "{args:?}: `{word}` in: {said}");
    }
    assert!(said.starts_with("error: ") && said.matches("error: ").count() == 1, "{args:?}: {said}");
}

#[test]
fn mistakes_in_settings_are_named_with_what_was_meant() {
    let home = Home::of_one_model();
    let curate = |set: &str, words: &[&str]| {
        let args = ["curate", "--run", "x", "--config", "settings.toml", "--set", set];
        must_say(&home, &args, 2, &[&[set.split_once('=').map_or(set, |(k, _)| k)], words].concat());
        assert!(!home.path("x").exists(), "nothing is stored of {set}");
    };
    curate("curate.subset=3", &["hint: did you mean `curate.num_subsets`?"]);
    curate("rank=3", &["hint: did you mean `lora.r`?"]);
    curate("train.flavour=3", &["expected one of", "per_device_train_batch_size"]);
    curate("train=3", &["`train` is a section", "per_device_train_batch_size"]);
    curate("curate.num_subsets=many", &["\"many\"", "a whole number"]);
    curate("curate.num_subsets=-3", &["-3", "a whole number"]);
    curate("nonsense", &["KEY=VALUE"]);
    home.write("typo.toml", "[curate]\nsubset = 3\n");
    let args = ["curate", "--run", "x", "--config", "typo.toml"];
    must_say(&home, &args, 2, &["typo.toml", "line 2", "hint: did you mean `curate.num_subsets`?"]);
    must_say(
        &home,
        &["train", "--run", "x", "--config", "none.toml"],
        2,
        &["none.toml", "No such file", "hint:"],
    );
    must_say(&home, &["train", "--run", "x", "--config", "model"], 2, &["model", "is a directory"]);
    must_say(&home, &["curtae", "--run", "x"], 2, &["curtae", "'curate'"]);
    let json = home.gradtx(&["--json", "train", "--run", "x", "--set", "seeed=3"]);
    let error = &events(&stderr(&json))[0];
    assert_eq!((&error["code"], &error["hint"]), (&json!(2), &json!("did you mean `seed`?")));
    let json = home.gradtx(&["--json", "frobnicate"]);
    assert!(events(&stderr(&json))[0]["message"].as_str().unwrap().contains("frobnicate"));
}

#[test]
fn mistakes_in_files_are_named_with_what_was_expected() {
    let home = Home::of_one_model();
    home.write("empty.jsonl", "");
    home.write("file", "");
    std::fs::create_dir_all(home.path("empty")).unwrap();
    let curate = |run: &str, set: &str, code, words: &[&str]| {
        must_say(&home, &["curate", "--run", run, "--config", "settings.toml", "--set", set], code, words);
    };
    curate("a", "models.tiny=nowhere", 2, &["models.tiny", "nowhere", "no such directory", "hint:"]);
    curate("b", "models.llm=empty", 2, &["models.llm", "no config.json", "hint:"]);
    curate("c", "models.llm=file", 2, &["models.llm", "file: this is a file", "hint:"]);
    curate("d", "data.public=empty.jsonl", 1, &["empty.jsonl", "is empty"]);
    curate("e", "data.public=none.jsonl", 1, &["none.jsonl", "No such file"]);
    curate("f", "data.public=empty", 1, &["empty", "irectory"]);
    curate("g", "curate.group_by=tsk", 2, &["curate.group_by", "tsk", "hint:", "task"]);
    curate(
        "h",
        "curate.examples_per_subset=900",
        2,
        &["curate.examples_per_subset", "900", "public.jsonl", "8"],
    );
    curate("file/x", "seed=1", 1, &["file/x", "file is a file"]);
    // A mistake is not stored: the same command with the right setting begins.
    curate("i", "lora.target_modules=[\"nope\"]", 2, &["`nope`", "q_proj, k_proj", "all-linear"]);
    let right = "lora.target_modules=[\"q_proj\"]";
    let corrected = ["curate", "--run", "i", "--config", "settings.toml", "--set", right];
    assert!(home.gradtx(&corrected).status.success());
    let corrected = ["curate", "--run", "a", "--config", "settings.toml", "--set", "models.tiny=model"];
    assert!(home.gradtx(&corrected).status.success());

    assert!(home.curate(&[]).status().unwrap().success());
    let finetune = ["finetune", "--run", "run", "--data", "public.jsonl", "--out"];
    must_say(&home, &[&finetune[..], &["file"]].concat(), 1, &["file", "is a file"]);
    must_say(
        &home,
        &[&finetune[..], &["run/shadow"]].concat(),
        3,
        &["- stage = curate", "+ stage = finetune"],
    );
    let translate = |update: &str, words: &[&str]| {
        must_say(&home, &["translate", update, "--run", "run", "--method", "mean", "--out", "t"], 1, words);
    };
    translate("model", &["model: is a directory", "safetensors"]);
    translate("public.jsonl", &["public.jsonl", "not an intact safetensors file"]);
    translate("model/model.safetensors", &["not an update vector"]);
    translate("none.safetensors", &["none.safetensors", "No such file"]);
    must_say(&home, &["status", "nowhere"], 1, &["nowhere", "no such directory"]);
    must_say(&home, &["status", "file"], 1, &["found a file"]);
    must_say(&home, &["status", "empty"], 1, &["no stage has worked here", "hint:"]);
}

#[test]
fn the_doctor_says_what_fits() {
    let home = Home::of_one_model();
    // A build for GPUs misses them where there are none; other problems nobody has here.
    let lacks = |output: &Output| cfg!(feature = "cuda") as usize * stdout(output).matches("PROBLEM").count();
    let plain = home.gradtx(&["doctor"]);
    assert_eq!(plain.status.code(), Some(lacks(&plain).min(1) as i32), "{}", stdout(&plain));
    for topic in ["program", "processor", "instructions", "memory", "disk", "GPU", "NCCL", "MPI", "SLURM"] {
        assert!(stdout(&plain).contains(topic), "no `{topic}` in: {}", stdout(&plain));
    }
    let fine = home.gradtx(&["doctor", "--run", "settings.toml", "--model", "model", "--json"]);
    let result = &events(&stdout(&fine))[0];
    assert_eq!(result["problems"], lacks(&plain), "{}", stdout(&fine));
    let checks = result["checks"].as_array().unwrap();
    let train = checks.iter().find(|check| check["topic"] == "train").unwrap();
    assert!(train["facts"]["bytes"].as_u64().unwrap() > 1000, "{train}");
    assert!(checks.iter().any(|check| check["topic"] == "fine-tune model"));

    home.write("large.toml", &SETTINGS.replace("batch_size = 3\n", "batch_size = 300000000\n"));
    let large = home.gradtx(&["doctor", "--run", "large.toml"]);
    assert_eq!(large.status.code(), Some(1));
    let said = stdout(&large);
    assert!(
        said.contains("PROBLEM")
            && said.contains("evaluate llm")
            && said.contains("evaluate.per_device_eval_batch_size"),
        "{said}"
    );
    assert_eq!(home.gradtx(&["doctor", "--model", "nowhere"]).status.code(), Some(1));
    assert_eq!(home.gradtx(&["doctor", "--run", "nowhere"]).status.code(), Some(1));
}

#[test]
fn the_command_line_describes_itself() {
    let home = Home::of_one_model();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = home.gradtx(&["completions", shell]);
        assert_eq!(script.status.code(), Some(0), "{shell}");
        assert!(stdout(&script).contains("finetune"), "{shell}");
    }
    assert_eq!(home.gradtx(&["man", "manual"]).status.code(), Some(0));
    let page = std::fs::read_to_string(home.path("manual/gradtx-curate.1")).unwrap();
    assert!(page.contains("\\-\\-config"), "{page}");
    let help = stdout(&home.gradtx(&["--help"]));
    for (code, meaning) in gradtx_run::failure::EXIT_CODES {
        assert!(
            help.contains(&code.to_string()) && help.contains(&meaning[..20.min(meaning.len())]),
            "{help}"
        );
    }
}
