//! Planning and sweeps as a person runs them: nothing but settings, two `config.json` and,
//! where it is there, data.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_plan::cost::calibrate::published;
use gradtx_world::tasks::vocabulary;
use gradtx_world::tokenizer;
use serde_json::{Value, json};
use std::time::Instant;

/// A directory with the configurations of two models, and a run file.
fn models(tiny: &str, llm: &str) -> Home {
    let home = Home::empty();
    for (name, model) in [("tiny", tiny), ("llm", llm)] {
        let config = published(model).unwrap().to_json("bfloat16");
        home.write(&format!("{name}/config.json"), &config.to_string());
    }
    home.write("run.toml", "[models]\ntiny = \"tiny\"\nllm = \"llm\"\n");
    home
}

/// With tokenizers and public data of two tasks.
fn models_with_data() -> Home {
    let home = models("qwen2.5-0.5b", "qwen2.5-1.5b");
    ["tiny", "llm"].iter().for_each(|name| tokenizer::write(&home.path(name)).unwrap());
    let words = vocabulary();
    let text = |from: usize, count: usize| words[from..from + count].join(" ");
    let row = |i: usize| {
        let task = ["short", "long"][i % 2];
        json!({ "task": task, "prompt": text(i % 5, 4 + 6 * (i % 2)), "response": format!(" {} ;", text(3, 2)) })
    };
    let rows: String = (0..20).map(|i| format!("{}\n", row(i))).collect();
    home.write("public.jsonl", &rows);
    let settings = "[models]\ntiny = \"tiny\"\nllm = \"llm\"\n[data]\npublic = \"public.jsonl\"\n\
                    prompt = \"plain\"\n[curate]\ngroup_by = \"task\"\n";
    home.write("run.toml", settings);
    home
}

/// What the command says when it refuses with this code.
fn refused(home: &Home, args: &[&str], code: i32) -> String {
    home.refused(args, code, &[])
}

/// The last line of a command's output.
fn json(home: &Home, args: &[&str]) -> Value {
    serde_json::from_str(home.ok(args).lines().last().unwrap()).unwrap()
}

fn wait_free(p: &Value) -> f64 {
    p["curation"]["idle_share"].as_f64().unwrap()
}

const PLAN: [&str; 5] = ["plan", "--config", "run.toml", "--tokens-per-example", "240"];

#[test]
fn clusters_are_planned_fast_without_weights() {
    let home = models("qwen2.5-3b", "qwen2.5-7b");
    let args = [&PLAN[..], &["--nodes", "8", "--gpus-per-node", "8", "--gpu", "a100-80g"]].concat();
    let started = Instant::now();
    let said = home.ok(&args);
    let took = started.elapsed().as_secs_f64();
    assert!(took < 1.0, "{took} s");
    for wanted in
        ["64 ranks", "curate llm", "GPU hours", "assumed", "memory of a rank", "waiting", "warning: "]
    {
        assert!(said.contains(wanted), "no `{wanted}` in: {said}");
    }
    assert!(!said.contains("measured"), "nothing was measured: {said}");
    let before: Vec<_> = std::fs::read_dir(home.dir()).unwrap().collect();
    assert_eq!(before.len(), 3, "planning writes nothing");
    let p = json(&home, &[&args[..], &["--json"]].concat());
    assert_eq!((p["ranks"].as_u64(), p["curation"]["groups"].as_u64()), (Some(64), Some(76)));
    let set = ["--json", "--set", "curate.jobs_per_batch=4"];
    assert!(wait_free(&json(&home, &[&args[..], &set].concat())) < wait_free(&p));
}

#[test]
fn what_was_measured_is_used_and_named() {
    let home = models("qwen2.5-3b", "qwen2.5-7b");
    let results = "{\"device\": \"NVIDIA H100 80GB HBM3\"}\n{\"work\": \"lora\", \"tflops\": 500}\n";
    std::fs::create_dir_all(home.path("benches/results/x")).unwrap();
    std::fs::write(home.path("benches/results/x/raw.jsonl"), results).unwrap();
    let args = [&PLAN[..], &["--gpu", "h100", "--json"]].concat();
    let rate = |p: &Value| p["rates"][0]["per_second"].as_f64().unwrap();
    let found = json(&home, &args);
    assert_eq!((rate(&found), found["stages"][0]["basis"].as_str()), (500e12, Some("measured")));
    assert_eq!(found["stages"][2]["basis"], "assumed");
    std::fs::write(home.path("mine.jsonl"), results.replace("500", "250")).unwrap();
    let mine = json(&home, &[&args[..], &["--calibrate", "mine.jsonl"]].concat());
    assert_eq!((rate(&mine), mine["rates"][0]["from"].as_str()), (250e12, Some("mine.jsonl")));
    let seconds = |p: &Value| p["stages"][1]["seconds"].as_f64().unwrap();
    assert!((seconds(&mine) / seconds(&found) - 2.0).abs() < 1e-9);
    // Another device's results say nothing.
    let other = json(&home, &[&PLAN[..], &["--gpu", "h200", "--json"]].concat());
    assert_eq!(other["rates"][0]["basis"], "assumed");
    std::fs::write(home.path("broken.jsonl"), "{").unwrap();
    let said = refused(&home, &[&args[..], &["--calibrate", "broken.jsonl"]].concat(), 1);
    assert!(said.contains("broken.jsonl: line 1"), "{said}");
}

#[test]
fn examples_are_counted_where_the_data_is_there() {
    let home = models_with_data();
    let p = json(&home, &["plan", "--config", "run.toml", "--gpu", "cpu", "--json"]);
    assert_eq!(p["examples_counted"], true);
    assert!(p["examples"][0].as_str().unwrap().starts_with("20 examples"), "{}", p["examples"]);
    // Sixteen examples a step, as long as those of the file.
    let per_example = p["stages"][0]["tokens"].as_f64().unwrap() / (300.0 * 137.0 * 16.0);
    assert!(
        (per_example - 10.0).abs() < 1e-9,
        "four or ten words asked, two and an end answered: {per_example}"
    );
    // A run directory's settings do as well as a file's.
    std::fs::write(home.path("sweep.toml"), "[[sweep]]\nbase = \"run.toml\"\n").unwrap();
    home.ok(&["sweep", "sweep.toml", "--out", "runs"]);
    let same = json(&home, &["plan", "--run", "runs/run", "--gpu", "cpu", "--json"]);
    assert_eq!(same["stages"][0]["tokens"], p["stages"][0]["tokens"]);
    std::fs::remove_file(home.path("llm/tokenizer.json")).unwrap();
    let said = refused(&home, &["plan", "--config", "run.toml", "--gpu", "cpu"], 1);
    assert!(said.contains("tokenizer.json") && said.contains("--tokens-per-example"), "{said}");
}

#[test]
fn what_cannot_be_planned_is_said() {
    let home = models("qwen2.5-0.5b", "qwen2.5-7b");
    let said = refused(&home, &["plan", "--config", "run.toml", "--gpu", "h100"], 2);
    assert!(said.contains("data.public") && said.contains("--tokens-per-example"), "{said}");
    let said = refused(&home, &["plan", "--gpu", "h100", "--tokens-per-example", "9"], 2);
    assert!(said.contains("--config"), "{said}");
    let none = [&PLAN[..], &["--gpu", "h100", "--set", "models.tiny=nowhere"]].concat();
    let said = refused(&home, &none, 1);
    assert!(said.contains("nowhere: there is no such directory"), "{said}");
    assert_eq!(home.gradtx(&[&PLAN[..], &["--gpu", "tpu"]].concat()).status.code(), Some(2));
    let labels = [&PLAN[..], &["--gpu", "h100", "--labels-per-example", "240"]].concat();
    assert!(refused(&home, &labels, 2).contains("fewer than the 240"));
    let large = ["--gpu", "a100-40g", "--set", "device.max_tokens_per_microbatch=65536"];
    let said = home.ok(&[&PLAN[..], &large].concat());
    assert!(said.contains("TOO MUCH") && said.contains("device.max_tokens_per_microbatch = "), "{said}");
}

const SWEEP: &str =
    "[[sweep]]\nbase = \"run.toml\"\ntrain.learning_rate = [2e-5, 4e-5]\ncurate.num_subsets = [60, 30]\n";

#[test]
fn sweeps_are_written_once_listed_and_followed() {
    let home = models("qwen2.5-0.5b", "qwen2.5-1.5b");
    std::fs::write(home.path("s.toml"), SWEEP).unwrap();
    let sweep = |more: &[&str]| home.ok(&[&["sweep", "s.toml", "--out", "runs"], more].concat());
    let listed = sweep(&["--list"]);
    assert_eq!(listed.lines().count(), 4);
    assert!(
        listed.contains(
            "learning_rate=0.00002,num_subsets=60  curate.num_subsets = 60, train.learning_rate = 0.00002"
        ),
        "{listed}"
    );
    assert!(!home.path("runs").exists(), "a list writes nothing");
    assert!(sweep(&["--status"]).lines().all(|line| line.ends_with("not written")));

    assert!(sweep(&[]).contains("4 runs in runs, 4 new"));
    let file = home.path("runs/learning_rate=0.00004,num_subsets=30/run.toml");
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(written.contains("num_subsets = 30") && written.contains("learning_rate = 0.00004"), "{written}");
    let index: Value =
        serde_json::from_str(&std::fs::read_to_string(home.path("runs/sweep.json")).unwrap()).unwrap();
    assert_eq!(index["runs"][3]["name"], "learning_rate=0.00004,num_subsets=30");
    assert_eq!(index["runs"][3]["settings"]["curate.num_subsets"], 30);
    assert!(sweep(&[]).contains("0 new"));

    // Files as the stages leave them.
    let curation = index["curations"][0]["name"].as_str().unwrap();
    assert_eq!(
        index["curations"][0]["runs"],
        json!(["learning_rate=0.00002,num_subsets=60", "learning_rate=0.00004,num_subsets=60"])
    );
    let shards = home.path("runs/curations").join(curation).join("shadow/shards");
    std::fs::create_dir_all(&shards).unwrap();
    for name in ["00000.student.safetensors", "00001.student.safetensors", ".tmp.student.safetensors"] {
        std::fs::write(shards.join(name), "").unwrap();
    }
    let record = json!({ "stage": "curate", "version": "0", "settings": {}, "outputs": {} });
    std::fs::write(shards.parent().unwrap().join("record.json"), record.to_string()).unwrap();
    let status = sweep(&["--status"]);
    assert!(
        status
            .contains("learning_rate=0.00002,num_subsets=60  curate: 2 of 60 shards of tiny, 0 of 60 of llm"),
        "{status}"
    );
    assert!(
        status.contains("learning_rate=0.00004,num_subsets=60  curate: 2 of 60 shards of tiny"),
        "{status}"
    );
    assert_eq!(status.lines().filter(|line| line.ends_with("not started")).count(), 2);

    let plan = ["plan", "--sweep", "s.toml", "--gpu", "h100", "--tokens-per-example", "240"];
    let said = home.ok(&plan);
    assert!(said.contains("4 runs: ") && said.contains("learning_rate=0.00004,num_subsets=30"), "{said}");
    let p = json(&home, &[&plan[..], &["--json"]].concat());
    let hours = |i: usize| p["runs"][i]["prediction"]["gpu_hours"].as_f64().unwrap();
    let curation = |i: usize| -> f64 {
        let stages = p["runs"][i]["prediction"]["stages"].as_array().unwrap().clone();
        let curate = stages.iter().filter(|stage| stage["name"].as_str().unwrap().starts_with("curate"));
        curate.map(|stage| stage["gpu_hours"].as_f64().unwrap()).sum()
    };
    // The runs are two of each curation, and pay for it once.
    let shared: Vec<bool> = (0..4).map(|i| p["runs"][i]["shares_curation"].as_bool().unwrap()).collect();
    assert_eq!(shared.iter().filter(|shares| **shares).count(), 2);
    let sum: f64 = (0..4).map(|i| hours(i) - if shared[i] { curation(i) } else { 0.0 }).sum();
    assert!((p["gpu_hours"].as_f64().unwrap() - sum).abs() < 1e-9 && p["curations"] == 2);
    assert!((0..4).all(|i| curation(i) > 0.0));
    // The first two have twice the subsets of the last two; training is the same in all.
    assert!(hours(0) > hours(2) * 1.5 && hours(0) < hours(2) * 2.0 && hours(0) == hours(1));
}

#[test]
fn changed_sweeps_are_refused_before_any_write() {
    let home = models("qwen2.5-0.5b", "qwen2.5-1.5b");
    std::fs::write(home.path("s.toml"), SWEEP).unwrap();
    home.ok(&["sweep", "s.toml", "--out", "runs"]);
    // Other names: new runs beside the old ones.
    std::fs::write(home.path("s.toml"), format!("{SWEEP}evaluate.per_device_eval_batch_size = [8, 16]\n"))
        .unwrap();
    home.ok(&["sweep", "s.toml", "--out", "runs"]);
    assert!(home.path("runs/learning_rate=0.00002,num_subsets=30,per_device_eval_batch_size=8").is_dir());
    std::fs::write(home.path("s.toml"), SWEEP.replace("[60, 30]", "[60, 30, 10]") + "seed = 5\n").unwrap();
    let said = refused(&home, &["sweep", "s.toml", "--out", "runs"], 3);
    assert!(said.contains("- seed = 1") && said.contains("+ seed = 5") && said.contains("hint:"), "{said}");
    assert!(!home.path("runs/learning_rate=0.00002,num_subsets=10").exists());
    let said = home.ok(&["sweep", "s.toml", "--out", "runs", "--status"]);
    assert!(said.contains("other settings"), "{said}");
    std::fs::write(home.path("s.toml"), SWEEP.replace("train.learning_rate", "train.learning_rat")).unwrap();
    let said = refused(&home, &["sweep", "s.toml", "--out", "runs"], 2);
    assert!(said.contains("s.toml: sweep 1") && said.contains("learning_rat`"), "{said}");
}
