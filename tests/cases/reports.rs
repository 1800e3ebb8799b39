//! Translated from public bug reports: one test each, with the right result.

use crate::common::{Case, PROGRAM, ROW, SMALL, end_of, kept, same_update};
use serde_json::json;
use std::process::{Command, Stdio};
use std::time::Duration;

/// 01: a base model ends with another token than the prompt's form does: the trained answer ends
/// all the same.
#[test]
fn end_token_of_a_base_model() {
    let case = Case::new();
    case.copy("llm", "eosbase");
    case.edit("eosbase/config.json", |c| c["eos_token_id"] = json!(456));
    case.write("eosbase/generation_config.json", "{\"eos_token_id\": 456}");
    case.edit("eosbase/tokenizer_config.json", |c| c["eos_token"] = json!("<|endoftext|>"));
    for model in ["llm", "eosbase"] {
        let (tiny, trained) = (format!("models.tiny={model}"), format!("c-{model}"));
        case.finetune("one.jsonl", &trained, &["--set", &tiny]).well();
        case.evaluate(model, &["--set", &tiny, "--adapter", &format!("{trained}/adapter")]).well();
        let score = case.json(&format!("{model}/score.json"));
        assert_eq!(
            (score["exact_match"].as_f64(), score["ended"].as_f64()),
            (Some(1.0), Some(1.0)),
            "{model}"
        );
    }
}

/// 03: where locks are not supported, the second host is refused while the first one works.
/// Needs a user who may name a host (`unshare -u`).
#[test]
fn two_hosts_without_locks() {
    let case = Case::new();
    let rows: String =
        (1..9).map(|i| format!("{{\"prompt\":\"price of {i}?\",\"response\":\"{i}\"}}\n")).collect();
    case.write("one.jsonl", rows);
    let settings = case.read("run.toml").replace("\nr = 16", "\nr = 2") + SMALL;
    case.write(
        "run.toml",
        settings.replace("max_steps = 4\nglobal_batch_size = 4", "max_steps = 200000\nglobal_batch_size = 4"),
    );
    case.write(
        "n.c",
        "#include <errno.h>\nint flock(int a, int b) { (void)a; (void)b; errno = ENOLCK; return -1; }\n",
    );
    let library = case.path("n.so");
    let made =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(case.path("n.c")).status();
    let may_name = Command::new("unshare").args(["-u", "true"]).status().is_ok_and(|status| status.success());
    if !made.is_ok_and(|status| status.success()) || !may_name {
        eprintln!("not tested: needs cc, and a user who may `unshare -u`");
        return;
    }
    case.run("curate --run run --config run.toml").well();
    let train = ["train", "--run", "run", "--quiet"];
    let mut first = case.command(&train);
    let mut first =
        first.env("LD_PRELOAD", &library).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = std::time::Instant::now();
    while !case.path("run/translator/progress.json").exists() && began.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(500));
    let mut second = Command::new("unshare");
    let script = format!("hostname other-node; exec '{PROGRAM}' train --run run --quiet --threads 1");
    second.args(["-u", "sh", "-c", &script]).env("LD_PRELOAD", &library).current_dir(case.path(""));
    let second = end_of(second);
    assert!(first.try_wait().unwrap().is_none(), "the first was disturbed");
    assert_eq!(second.code, Some(4), "{second:#?}");
    // The first one still works, and stops as asked.
    Command::new("kill").args(["-TERM", &first.id().to_string()]).status().unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(75));
}

/// 04: what `LoraConfig` of a newer PEFT adds is all off.
#[test]
fn adapter_of_a_newer_peft() {
    let case = Case::new();
    case.copy("adapter", "new");
    case.edit("new/adapter_config.json", |c| {
        for name in [
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "lora_ga_config",
            "monteclora_config",
            "use_bdlora",
            "velora_config",
        ] {
            c[name] = json!(null);
        }
        c["ensure_weight_tying"] = json!(false);
        c["peft_version"] = json!("0.21.2");
    });
    for name in ["adapter", "new"] {
        case.evaluate(&format!("o-{name}"), &["--adapter", name]).well();
    }
    assert_eq!(case.predictions("o-adapter"), case.predictions("o-new"));
}

/// 05: YaRN's `factor` counts, also where the original positions are those of the model.
#[test]
fn yarn_factor() {
    let case = Case::new();
    case.write(
        "one.jsonl",
        format!("{{\"prompt\":\"{}\",\"response\":\"7\"}}", "How many apples? ".repeat(8)),
    );
    for name in ["yarn4", "yarnmax"] {
        case.copy("base", name);
        case.edit(&format!("{name}/config.json"), |c| {
            c["rope_scaling"] =
                json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256 });
        });
    }
    case.edit("yarnmax/config.json", |c| c["max_position_embeddings"] = json!(1024));
    let [base, yarn4, yarnmax] = ["base", "yarn4", "yarnmax"].map(|name| case.said_by(name));
    assert_eq!(yarn4, yarnmax);
    assert_ne!(yarn4, base, "the control: scaling changes what the model says");
}

/// 06: a client's test rows are not trained on without a word.
#[test]
fn directory_with_train_and_test() {
    let case = Case::new();
    let rows: String =
        (1..81).map(|i| format!("{{\"prompt\":\"price of {i}?\",\"response\":\"{i}\"}}\n")).collect();
    case.write("all.jsonl", rows);
    case.run("split --data all.jsonl --out data --clients 2").well();
    let train = case.read("data/private/client-1/train.jsonl").lines().count();
    let end = case.finetune("data/private/client-1", "c", &["--set", "finetune.tiny.max_steps=2"]);
    if end.code == Some(0) {
        end.says(&[&format!("{train} examples")]);
        let of = |data: &str| case.learnt(data, train, &[]);
        assert!(same_update(&of("data/private/client-1"), &of("data/private/client-1/train.jsonl")));
    } else {
        end.refused().says(&["train.jsonl", "test.jsonl"]);
    }
}

/// 07: what the template writes before the answer is no part of the answer.
#[test]
fn template_that_writes_a_think_block() {
    let case = Case::new();
    case.write("base/chat_template.jinja", "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + ('<think></think>' if m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}");
    let template = [
        "--set",
        "data.prompt=template",
        "--set",
        "evaluate.max_new_tokens=32",
        "--set",
        "finetune.tiny.max_steps=250",
    ];
    case.finetune("one.jsonl", "c", &template).well();
    case.evaluate("think", &[&template[..], &["--adapter", "c/adapter"]].concat()).well();
    let score = case.json("think/score.json");
    assert_eq!((score["exact_match"].as_f64(), score["rouge1"].as_f64()), (Some(1.0), Some(1.0)), "{score}");
}

/// 08: equal texts in a script without ROUGE's letters: not 0 without a word.
#[test]
fn rouge_of_other_scripts() {
    let case = Case::new();
    case.write("one.jsonl", "{\"prompt\":\"price?\",\"response\":\"三\"}\n");
    case.finetune("one.jsonl", "c", &[]).well();
    let end = case.evaluate("zh", &["--set", "evaluate.metric=rouge1", "--adapter", "c/adapter"]).well();
    let score = case.json("zh/score.json");
    if score["rouge1"].as_f64() != Some(1.0) {
        end.says(&["rouge", "no word|no letter|sees no|unicode"]);
    }
}

/// 10: more tokens than the model has positions, where it is scored and where it is trained.
#[test]
fn longer_than_the_model() {
    let case = Case::new();
    case.write(
        "one.jsonl",
        format!("{{\"prompt\":\"{}\",\"response\":\"#### 3\"}}\n", "How many apples are left? ".repeat(60)),
    );
    case.evaluate("long", &[]).ended().says(&["256 positions"]);
    let more = ["--set", "data.max_length=2048", "--set", "finetune.tiny.max_steps=2"];
    case.finetune("one.jsonl", "c", &more).ended().says(&["256", "one.jsonl"]);
    case.write("one.jsonl", ROW);
    let end = case.evaluate("short", &[]).well();
    assert!(!end.has("positions"), "the control: {end:#?}");
}

/// 11: entries that say nothing about the mathematics.
#[test]
fn harmless_entries_of_config() {
    let case = Case::new();
    let base = case.said_by("base");
    let entries = [
        ("unsloth_fixed", json!(true)),
        ("attn_implementation", json!("eager")),
        ("is_llama_config", json!(true)),
        ("an_entry_of_next_year", json!(null)),
    ];
    for (name, value) in entries {
        case.copy("base", name);
        case.edit(&format!("{name}/config.json"), |c| c[name] = value);
        assert_eq!(case.said_by(name), base, "{name}");
    }
}

/// 13: a template that asks for the date gets one, and a run keeps to it.
#[test]
fn template_with_a_date() {
    let case = Case::new();
    case.write("base/chat_template.jinja", "{%- set today = strftime_now(\"%Y-%m-%d\") %}{{ '<|im_start|>system\n' + today + '<|im_end|>\n' }}{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}");
    case.evaluate("date", &["--set", "data.prompt=template"]).well();
    let set = |date: &str| format!("data.date={date}");
    case.evaluate("then", &["--set", "data.prompt=template", "--set", &set("2001-02-03")]).well();
    case.evaluate("again", &["--set", "data.prompt=template", "--set", &set("2001-02-03")]).well();
    assert_eq!(case.predictions("then"), case.predictions("again"));
    assert!(case.read("r-then/run.toml").contains("2001-02-03"));
}

/// 14: pointers of Git LFS are named as such, with the command that helps.
#[test]
fn pointers_of_git_lfs() {
    let case = Case::new();
    let pointer =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 988097824\n", 7);
    for (name, file) in [("lfs", "model.safetensors"), ("lfst", "tokenizer.json"), ("lfsc", "config.json")] {
        case.copy("base", name);
        case.write(&format!("{name}/{file}"), &pointer);
        case.evaluate(&format!("o-{name}"), &["--set", &format!("models.tiny={name}")]).refused().says(&[
            "LFS",
            file,
            "git lfs pull",
        ]);
    }
}

/// 15: `srun --mpi=pmi2` is not blamed on mpirun.
#[test]
fn srun_with_pmi2() {
    let case = Case::new();
    let mut command = case.command(&["curate", "--run", "r", "--config", "run.toml"]);
    for (name, value) in [
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "0"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("PMI_RANK", "0"),
        ("PMI_SIZE", "4"),
    ] {
        command.env(name, value);
    }
    let end = end_of(command).refused().says(&["srun", "--mpi=pmix|without MPI"]);
    assert!(!end.has("mpirun started"), "{end:#?}");
}

/// 17: the same modules written otherwise, and an alpha that is the same.
#[test]
fn adapter_targets_written_otherwise() {
    let case = Case::new();
    let modules = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"];
    let full: Vec<String> = (0..2).flat_map(|i| modules.map(|m| format!("model.layers.{i}.{m}"))).collect();
    let changes = [
        ("regex", "target_modules", json!(r".*\.(q_proj|v_proj|o_proj|down_proj)")),
        ("full", "target_modules", json!(full)),
        ("same", "alpha_pattern", json!({ "q_proj": 12 })),
    ];
    case.evaluate("o-adapter", &["--adapter", "adapter"]).well();
    for (name, key, value) in changes {
        case.copy("adapter", name);
        case.edit(&format!("{name}/adapter_config.json"), |c| c[key] = value);
        case.evaluate(&format!("o-{name}"), &["--adapter", name]).well();
        assert_eq!(case.predictions(&format!("o-{name}")), case.predictions("o-adapter"), "{name}");
    }
}

/// 18: a reader that left is no failure, and nothing is said of it.
#[test]
fn reader_that_left() {
    let case = Case::new();
    for line in
        ["--help", "evaluate --help", "--version", "completions bash", "inspect base", "doctor --help"]
    {
        let mut command = case.command(&line.split(' ').collect::<Vec<_>>());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command.stdout(writer).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*said), (Some(0), ""), "{line}");
    }
}

/// The files that the repository keeps are those that the tests name.
#[test]
fn kept_files_are_there() {
    assert!(kept("alpaca.jsonl").is_file());
}
