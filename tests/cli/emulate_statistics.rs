//! GradOT: statistics by several ranks, killed, damaged, used again; what `emulate` says without making anything.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_kernels::rng::Stream;
use gradtx_pipeline::stages::emulate;
use gradtx_run::cluster::World;
use gradtx_run::config::RunArgs;
use gradtx_run::context::Context;
use gradtx_run::ui::Ui;
use gradtx_runtime::artifact::{NewTensor, TensorFile, write_tensors};
use gradtx_runtime::comm::local;
use gradtx_tests::miniature::{SETTINGS, checksums};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// Two layers of three are compressed; several streams.
const EMULATOR: &str = "\n[emulator]\nedge = [1, 0]\nratio = 0.5\nnum_tokens = 300\n";

fn home() -> Home {
    let home = Home::miniature();
    let settings = SETTINGS.to_owned() + "[device]\nmax_tokens_per_microbatch = 64\n" + EMULATOR;
    home.write("settings.toml", &settings);
    home
}

/// Checksums by place in a directory.
fn files(home: &Home, dir: &str) -> BTreeMap<PathBuf, String> {
    let dir = home.path(dir);
    let all = checksums(&dir).into_iter();
    all.map(|(path, sum)| (path.strip_prefix(&dir).unwrap().to_owned(), sum)).collect()
}

/// `emulate` with other settings, into another directory.
fn emulate(home: &Home, out: &str, set: &[&str], more: &[&str]) -> String {
    let set: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
    home.done(&[&["emulate", "--out", out], &set[..], more].concat())
}

#[test]
fn any_number_of_ranks_makes_the_same_emulator() {
    let home = home();
    for ranks in [1, 2, 3] {
        std::thread::scope(|scope| {
            for comm in local(ranks) {
                let home = &home;
                scope.spawn(move || {
                    let world = World::of(Box::new(comm));
                    let context = Context::new(Some(1), Ui::new("emulate", true, false), &world);
                    let run = RunArgs {
                        config: Some(home.path("settings.toml")),
                        ..RunArgs::stored(&home.path(&format!("run-{ranks}")))
                    };
                    let job = emulate::Job {
                        run,
                        out: None,
                        statistics: None,
                        dense: false,
                        dry_run: false,
                        try_lambda: vec![],
                    };
                    let done = emulate::run_on_ranks(&context, &world, &job);
                    assert_eq!(world.end(done, |error| panic!("{error:#}")), 0);
                });
            }
        });
    }
    let [one, two, three] = ["run-1", "run-2", "run-3"].map(|run| files(&home, run));
    assert!(one.len() > 10, "{one:?}");
    assert_eq!(one, two);
    assert_eq!(one, three);
    // And as one process does it; the comparison sees what it should see.
    home.done(&["emulate"]);
    assert_eq!(files(&home, "run/emulator"), files(&home, "run-1/emulator"));
    home.ok(&["emulate", "--run", "other", "--config", "settings.toml", "--set", "seed=4"]);
    assert_ne!(files(&home, "other/emulator/statistics"), files(&home, "run-1/emulator/statistics"));
}

#[test]
fn killed_at_random_moments_it_makes_the_same() {
    let home = home();
    emulate(&home, "calm", &[], &[]);
    let mut random = Stream::new(5);
    let args = ["emulate", "--run", "run", "--config", "settings.toml", "--out", "killed", "--quiet"];
    let (mut kills, mut ended) = (0, 0);
    while kills < 12 && ended < 40 {
        let mut child = home.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(1 + 20_000 * (1 + kills)) as u64));
        // SIGKILL.
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            ended += 1;
            std::fs::remove_dir_all(home.path("killed")).unwrap();
        } else {
            kills += 1;
        }
    }
    assert!(kills >= 3, "{kills} kills");
    emulate(&home, "killed", &[], &[]);
    assert_eq!(files(&home, "killed"), files(&home, "calm"));
}

#[test]
fn damaged_and_foreign_statistics_are_not_used() {
    let home = home();
    emulate(&home, "calm", &[], &[]);
    emulate(&home, "other", &["seed=4"], &[]);
    let want = files(&home, "calm");
    // As an emulator that was stopped before it was written.
    let stopped = |change: &dyn Fn(&dyn Fn(&str) -> PathBuf)| {
        emulate(&home, "again", &[], &[]);
        std::fs::remove_file(home.path("again/report.json")).unwrap();
        change(&|name| home.path("again/statistics").join(name));
        home.done(&["emulate", "--out", "again"]);
        assert_eq!(files(&home, "again"), want);
    };
    for name in ["001.safetensors", "002.parts.safetensors"] {
        stopped(&|path| {
            let mut bytes = std::fs::read(path(name)).unwrap();
            let at = bytes.len() - 7;
            bytes[at] ^= 4;
            std::fs::write(path(name), bytes).unwrap();
        });
        stopped(&|path| {
            let bytes = std::fs::read(path(name)).unwrap();
            std::fs::write(path(name), &bytes[..bytes.len() / 2]).unwrap();
        });
        stopped(&|path| std::fs::remove_file(path(name)).unwrap());
        stopped(&|path| {
            let bytes = std::fs::read(home.path("other/statistics").join(name)).unwrap();
            std::fs::write(path(name), bytes).unwrap();
        });
    }
    // Of another seed, by their own record.
    let args = ["emulate", "--out", "third", "--statistics", "other/statistics"];
    home.stage_refused(&args, 3, &["other/statistics", "seed = 4", "--statistics"]);
}

#[test]
fn other_emulators_are_made_of_the_same_statistics() {
    let home = home();
    home.done(&["emulate"]);
    let statistics = files(&home, "run/emulator/statistics");
    for set in
        ["emulator.ratio=0.8", "emulator.score=magnitude", "emulator.lambda=0", "emulator.allocate=layer"]
    {
        let words = home.stage_refused(&["emulate", "--set", set], 3, &["run/emulator", "--statistics"]);
        assert!(words.contains("--out"), "{words}");
        let said = emulate(&home, set, &[set], &["--statistics", "run/emulator/statistics"]);
        assert!(said.contains("the statistics are there"), "{said}");
        assert!(!home.path(set).join("statistics").exists());
    }
    assert_eq!(files(&home, "run/emulator/statistics"), statistics);
    emulate(&home, "whole", &["emulator.ratio=0.8"], &[]);
    let from = |dir: &str| files(&home, &format!("{dir}/model"));
    assert_eq!(from("emulator.ratio=0.8"), from("whole"));
    assert_ne!(from("emulator.ratio=0.8"), from("run/emulator"));
}

#[test]
fn kinds_have_ratios_and_lambdas_of_their_own() {
    let home = home();
    let from = ["--statistics", "of-all"];
    emulate(&home, "both", &[], &from);
    emulate(&home, "whole-attention", &["emulator.attention.ratio=1"], &from);
    let of = |dir: &str| home.json(&format!("{dir}/report.json"));
    let report = of("whole-attention");
    for layer in report["layers"].as_array().unwrap() {
        for (name, matrix) in layer["attention"].as_object().unwrap() {
            assert_eq!((&matrix["components"], matrix["rank"].as_u64()), (&matrix["of"], Some(0)), "{name}");
        }
    }
    let channels = |report: &Value| report["layers"][0]["channels"].clone();
    assert_eq!(channels(&report), channels(&of("both")));
    let config = home.json("whole-attention/model/config.json");
    assert!(config["gradot"]["ratio"].as_f64().unwrap() > 0.5, "{}", config["gradot"]["ratio"]);
    emulate(&home, "lambdas", &["emulator.attention.lambda=0", "emulator.mlp.lambda=0.5"], &from);
    let [both, own] = ["both", "lambdas"].map(|dir| of(dir)["lambda"].clone());
    assert_eq!(own["attention"], 0.0);
    let ratio = own["mlp"].as_f64().unwrap() / both["mlp"].as_f64().unwrap();
    assert!((ratio - 2.0).abs() < 1e-9, "{ratio}");
    // The same λ, named in the units of the terms.
    let set = [
        "emulator.lambda_absolute=true",
        &format!("emulator.attention.lambda={}", both["attention"]),
        &format!("emulator.mlp.lambda={}", both["mlp"]),
    ];
    emulate(&home, "absolute", &set, &from);
    let weights = |dir: &str| home.bytes(&format!("{dir}/model/model.safetensors"));
    assert_eq!(weights("absolute"), weights("both"));
}

#[test]
fn sampled_labels_are_the_llm_s_own() {
    let home = home();
    emulate(&home, "empirical", &[], &[]);
    emulate(&home, "sampled", &["emulator.fisher=sampled"], &[]);
    emulate(&home, "again", &["emulator.fisher=sampled"], &["--threads", "2"]);
    let tensor = |dir: &str, name: &str| {
        let file = TensorFile::open(&home.path(dir).join("statistics/001.safetensors")).unwrap();
        file.tensor(name).unwrap().to_f32().unwrap()
    };
    let near = |name: &str, to: &str, from: &str| {
        let (a, b) = (tensor(from, name), tensor(to, name));
        let norm: f32 = b.iter().map(|b| b * b).sum();
        a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() <= 1e-9 * norm
    };
    // Inputs and the gradient are of the data in both.
    for name in ["qkv.inputs", "o.inputs", "qkv.gradient", "o.gradient_of_first_half", "mlp.first"] {
        assert!(near(name, "empirical", "sampled"), "{name}");
    }
    for name in ["q_proj.outputs", "o_proj.outputs", "mlp.second"] {
        assert!(!near(name, "empirical", "sampled"), "{name}");
    }
    assert_eq!(files(&home, "sampled"), files(&home, "again"));
    // Draws are of examples, not of the streams that they are packed into.
    emulate(&home, "packed", &["emulator.fisher=sampled", "device.max_tokens_per_microbatch=512"], &[]);
    assert!(near("q_proj.outputs", "sampled", "packed"));
    emulate(&home, "seed", &["emulator.fisher=sampled", "seed=9"], &[]);
    assert!(!near("q_proj.outputs", "sampled", "seed"));
}

#[test]
fn a_dry_run_says_sizes_and_makes_nothing() {
    let home = home();
    let said = home.done(&["emulate", "--dry-run"]);
    for word in ["LLM:", "3 layers, edge 1 + 0", "emulator: about", "0 of 2 layers", "1 pass over the data"] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    assert!(!home.path("run/emulator").exists());
    home.done(&["emulate"]);
    let said = home.done(&["emulate", "--dry-run", "--json"]);
    let found: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let report = home.json("run/emulator/report.json");
    assert_eq!(found["layers"]["statistics_are_there"], 2);
    assert_eq!(found["support"]["tokens"], report["support"]["tokens"]);
    // Predicted sizes against those that came of it.
    let tensors = |dir: &str, name: &str| {
        let file = TensorFile::open(&home.path(dir).join(name)).unwrap();
        (file.size() - file.header().len()) as f64
    };
    let names = ["001.safetensors", "002.safetensors", "001.parts.safetensors", "002.parts.safetensors"];
    let bytes: f64 = names.iter().map(|name| tensors("run/emulator/statistics", name)).sum();
    let predicted = found["bytes"]["statistics"].as_f64().unwrap();
    assert!((bytes / predicted - 1.0).abs() < 0.01, "{bytes} and {predicted}");
    let llm = tensors("llm", "model.safetensors") / 4.0;
    assert_eq!(found["parameters"]["llm"].as_f64().unwrap(), llm);
    let lost = report["parameters"]["middle"].as_f64().unwrap();
    let predicted = llm - found["parameters"]["emulator"].as_f64().unwrap();
    assert!((predicted - 0.5 * lost).abs() <= 1.0, "{predicted} of {lost}");
}

#[test]
fn lambdas_are_tried_from_one_set_of_statistics() {
    let home = home();
    let said = home.done(&["emulate", "--try-lambda", "0,0.25,2", "--json"]);
    let found: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let tried = found["tried"].as_array().unwrap().clone();
    assert_eq!(tried.len(), 3);
    assert!(tried[0]["absolute"]["mlp"] == 0.0 && tried[1]["absolute"]["mlp"] != 0.0);
    let names: Vec<_> = std::fs::read_dir(home.path("run/emulator")).unwrap().flatten().collect();
    let names: Vec<_> = names.iter().map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert_eq!(names, ["statistics"]);
    // They are what emulators with these settings are.
    let said = home.done(&["emulate"]);
    assert!(said.contains("the statistics are there"), "{said}");
    let report = home.json("run/emulator/report.json");
    for name in ["edge_gradient_cosine", "emulator_loss", "llm_loss"] {
        assert_eq!(report[name], tried[1][name], "{name}");
    }
    assert!((report["kept"].as_f64().unwrap() - tried[1]["kept"].as_f64().unwrap()).abs() < 1e-12);
    let table = home.done(&["emulate", "--try-lambda", "0.25"]);
    assert!(table.contains("public loss") && table.contains("0.25"), "{table}");
    home.stage_refused(&["emulate", "--try-lambda=-1"], 2, &["--try-lambda", "from 0"]);
}

#[test]
fn a_report_says_what_it_can_be_relied_on_for() {
    let home = home();
    home.done(&["emulate"]);
    let report = home.json("run/emulator/report.json");
    for kind in ["attention", "mlp"] {
        let agreement = report["first_order_agreement"][kind].as_f64().unwrap();
        assert!((-1.0..=1.0).contains(&agreement), "{report}");
    }
    for layer in report["layers"].as_array().unwrap() {
        for product in ["qkv", "o", "gate_up", "down"] {
            // 17 examples of 15 tokens or so.
            let share = layer["first_position_share"][product].as_f64().unwrap();
            assert!(share > 0.005 && share < 0.6, "{product}: {layer}");
        }
    }
    // Kept whole it is as able as the LLM, and says so.
    let output =
        home.stage(&["emulate", "--out", "whole", "--set", "emulator.ratio=1", "--set", "emulator.lambda=0"]);
    let said = crate::home::said(&output);
    assert!(output.status.success() && said.contains("is not above the LLM's"), "{said}");
}

#[test]
fn inspect_plan_and_doctor_know_emulators() {
    let home = home();
    home.done(&["emulate"]);
    let has = |said: &str, words: &[&str]| {
        words.iter().for_each(|word| assert!(said.contains(word), "no `{word}` in: {said}"));
    };
    let all = home.ok(&["inspect", "run/emulator"]);
    has(
        &all,
        &[
            "emulator with statistics",
            "edge_gradient_cosine",
            "emulator (GradOT)",
            "statistics for emulators",
        ],
    );
    let model = home.ok(&["inspect", "run/emulator/model"]);
    has(
        &model,
        &["first 1 and last 0 of 3 layers", "of the LLM with fingerprint", "ranks q", "of 24 channels"],
    );
    let name = "run/emulator/statistics/001.safetensors";
    let mut bytes = home.bytes(name);
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(home.path(name), bytes).unwrap();
    home.refused(&["inspect", name], 1, &["not intact"]);
    let doctor = crate::home::stdout(&home.gradtx(&["doctor", "--run", "settings.toml"]));
    has(&doctor, &["emulate", "2 layers in 1 pass over the data"]);
    let plan = home.ok(&["plan", "--config", "settings.toml", "--gpu", "cpu"]);
    has(&plan, &["emulate 2 layers, 1 pass over 300 tokens"]);
    // Where all layers are the edge there is nothing to make.
    let all = home.ok(&["plan", "--config", "settings.toml", "--gpu", "cpu", "--set", "emulator.edge=[2,2]"]);
    assert!(!all.contains("emulate"), "{all}");
}

#[test]
fn sums_that_overflow_name_layer_and_product() {
    let home = home();
    let path = home.path("llm/model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let names = file.names();
    let changed: Vec<(String, Vec<u8>)> = names
        .iter()
        .map(|name| {
            let tensor = file.tensor(name).unwrap();
            let values = tensor.to_f32().unwrap();
            let factor = if name.contains("layers.1.mlp.up_proj") { 1e30 } else { 1.0 };
            (name.clone(), values.iter().flat_map(|x| (x * factor).to_le_bytes()).collect())
        })
        .collect();
    let tensors: Vec<NewTensor<'_>> = changed
        .iter()
        .map(|(name, bytes)| {
            let tensor = file.tensor(name).unwrap();
            (name.clone(), tensor.dtype, tensor.shape.to_vec(), &bytes[..])
        })
        .collect();
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    home.stage_refused(&["emulate"], 1, &["llm", "layer", "product", "not finite", "device.dtype"]);
    assert!(!home.path("run/emulator/report.json").exists());
}

#[test]
fn clients_use_the_prompt_form_of_the_statistics() {
    let home = home();
    home.done(&["emulate"]);
    let finetune = |form: &str| {
        let set = format!("data.prompt={form}");
        let out = format!("client-{form}");
        let args = ["finetune", "--run", &out, "--config", "settings.toml", "--base", "run/emulator/model"];
        home.gradtx(&[&args[..], &["--data", "private.jsonl", "--out", &out, "--set", &set]].concat())
    };
    assert!(finetune("template").status.success());
    let refused = finetune("plain");
    let said = crate::home::stderr(&refused);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    for word in ["run/emulator/model", "`template`", "`plain`", "data.prompt = \"template\""] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

#[test]
fn settings_of_kinds_have_bounds() {
    let home = home();
    for (set, words) in [
        ("emulator.attention.ratio=1.5", ["emulator.attention.ratio = 1.5", "at most 1"]),
        ("emulator.mlp.ratio=-0.1", ["emulator.mlp.ratio = -0.1", "above 0"]),
        ("emulator.mlp.lambda=-2", ["emulator.mlp.lambda = -2", "-1 for emulator.lambda"]),
        ("emulator.fisher=exact", ["fisher", "sampled"]),
        ("emulator.lambda=-0.5", ["emulator.lambda = -0.5", "from 0"]),
    ] {
        home.stage_refused(&["emulate", "--set", set], 2, &words);
    }
}
