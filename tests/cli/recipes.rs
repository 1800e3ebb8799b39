//! Starting a run of one's own: recipes, and what settings are explained with.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx::init::{RECIPES, hours};
use gradtx_plan::cost::calibrate::published;
use gradtx_run::config::Config;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;

fn refused(home: &Home, args: &[&str], words: &[&str]) {
    home.refused(args, 2, words);
}

/// Sizes of a recipe's models, in the place of the models.
fn write_models(config: &Config) {
    for dir in [&config.models.tiny, &config.models.llm] {
        let name = dir.file_name().unwrap().to_str().unwrap().to_lowercase();
        let sizes = published(name.strip_suffix("-instruct").unwrap()).unwrap();
        write(&dir.join("config.json"), &sizes.to_json("bfloat16").to_string());
    }
    let t5 = &config.translator.pretrained_path;
    if !t5.as_os_str().is_empty() {
        assert!(t5.ends_with("flan-t5-large"), "{}", t5.display());
        write(&t5.join("config.json"), &flan_t5_large().to_string());
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn flan_t5_large() -> Value {
    json!({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": true,
        "d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": 24,
        "num_decoder_layers": 24, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "vocab_size": 32128, "tie_word_embeddings": false,
        "initializer_factor": 1.0, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    })
}

/// The plan that a recipe's comment names, of the recipe.
fn plan_of(home: &Home, recipe: &str) -> Value {
    let line = recipe.lines().find_map(|line| line.strip_prefix("#   gradtx plan ")).unwrap();
    let words: Vec<&str> = ["plan"].into_iter().chain(line.split_whitespace()).chain(["--json"]).collect();
    serde_json::from_str(home.ok(&words).lines().last().unwrap()).unwrap()
}

#[test]
fn recipes_cost_what_they_say() {
    let mut stale = String::new();
    for (name, recipe) in RECIPES {
        let home = Home::empty();
        home.ok(&["init", "--recipe", name]);
        assert_eq!(std::fs::read_to_string(home.path("run.toml")).unwrap(), recipe);
        let config = Config::read(&home.path("run.toml")).unwrap();
        config.check().unwrap();
        write_models(&config);
        let plan = plan_of(&home, recipe);
        let predicted = plan["gpu_hours"].as_f64().unwrap();
        let unfit: Vec<&str> =
            plan["stages"].as_array().unwrap().iter().filter(|s| !fits(s)).map(title).collect();
        assert!(unfit.is_empty(), "{name}: {unfit:?} do not fit: {}", plan["warnings"]);
        let stated = hours(recipe).unwrap();
        if (predicted / stated - 1.0).abs() > 0.02 {
            stale += &format!("{name} {predicted:.1}\n");
        }
    }
    assert!(
        stale.is_empty(),
        "the GPU hours of launcher/recipes/*.toml are not those of `gradtx plan`:\n{stale}"
    );
}

fn fits(stage: &Value) -> bool {
    let memory = &stage["memory"];
    memory["need"].as_u64().unwrap() <= memory["available"].as_u64().unwrap()
}

fn title(stage: &Value) -> &str {
    stage["name"].as_str().unwrap()
}

#[test]
fn a_run_file_is_written_once_with_a_schema_beside_it() {
    let home = Home::empty();
    let said = home.ok(&["init", "--recipe", "rehearsal", "--out", "mine.toml", "--schema"]);
    assert!(said.contains("mine.toml and ./gradtx.schema.json"), "{said}");
    let written = std::fs::read_to_string(home.path("mine.toml")).unwrap();
    assert!(written.starts_with("#:schema ./gradtx.schema.json\n# Rehearsal"), "{written}");
    let schema = std::fs::read_to_string(home.path("gradtx.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    assert_eq!(schema["properties"]["lora"]["properties"]["r"]["type"], "integer");
    refused(&home, &["init", "--out", "mine.toml"], &["mine.toml: is there already", "--out"]);
    refused(&home, &["init", "--out", "no/run.toml"], &["no: there is no such directory"]);
    refused(&home, &["init", "--recipe", "qwen2.5-3b-7"], &["no such recipe", "did you mean qwen2.5-3b-7b?"]);
    refused(&home, &["init", "--recipe", "llama"], &["no such recipe", "--list"]);
    let listed = home.ok(&["init", "--list"]);
    assert!(RECIPES.iter().all(|(name, _)| listed.contains(name)), "{listed}");
}

#[test]
fn settings_are_explained() {
    let home = Home::empty();
    let said = home.ok(&["config", "--explain", "curate.num_subsets"]);
    assert!(said.starts_with("curate.num_subsets = 300    (whole number)\n  Shadow subsets"), "{said}");
    refused(&home, &["config", "--explain", "adapter.rank"], &["no such setting", "did you mean `lora.r`?"]);
    refused(&home, &["config"], &["--defaults", "--schema", "--explain"]);
    let defaults = home.ok(&["config", "--defaults"]);
    std::fs::write(home.path("all.toml"), &defaults).unwrap();
    assert_eq!(Config::read(&home.path("all.toml")).unwrap(), resolved(&home));
    let schema: Value = serde_json::from_str(&home.ok(&["config", "--schema"])).unwrap();
    assert_eq!(schema["additionalProperties"], false);
    assert!(home.ok(&["config", "--markdown"]).starts_with("# Configuration\n"));
}

/// The defaults, as a run file with nothing in it gives them.
fn resolved(home: &Home) -> Config {
    std::fs::write(home.path("none.toml"), "").unwrap();
    Config::read(&home.path("none.toml")).unwrap()
}

/// Steps in a stage's record.
fn recorded_steps(home: &Home, record: &str, section: &str) -> u64 {
    let text = std::fs::read_to_string(home.path(record)).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    record["settings"].pointer(section).unwrap()["max_steps"].as_u64().unwrap()
}

#[test]
fn epochs_become_steps_of_the_data_that_is_there() {
    let home = Home::empty();
    gradtx_tests::miniature::write(home.dir());
    let run = |stage: &str, more: &[&str]| {
        home.ok(&[&[stage, "--run", "run", "--config", "epochs.toml", "--threads", "1"], more].concat())
    };
    // 5 subsets of 6 examples, 2 snapshots, one subset held out.
    let settings = gradtx_tests::miniature::SETTINGS
        .replace("[curate.tiny]\nmax_steps = 4", "[curate.tiny]\nnum_train_epochs = 2")
        .replace("[train]\nmax_steps = 6", "[train]\nnum_train_epochs = 2.5\nwarmup_ratio = 0.3")
        .replace("[finetune.tiny]\nmax_steps = 3", "[finetune.tiny]\nnum_train_epochs = 1");
    std::fs::write(home.path("epochs.toml"), &settings).unwrap();
    let said = run("curate", &[]);
    assert!(said.contains("curate tiny: 2 epochs of 6 examples are 4 steps of 3"), "{said}");
    assert_eq!(recorded_steps(&home, "run/shadow/record.json", "/curate/tiny"), 4);
    let said = run("train", &[]);
    assert!(said.contains("train: 2.5 epochs of 8 tuples are 5 steps of 4"), "{said}");
    assert_eq!(recorded_steps(&home, "run/translator/record.json", "/train"), 5);
    let rows = std::fs::read_to_string(home.path("private.jsonl")).unwrap().lines().count();
    let said = run("finetune", &["--data", "private.jsonl", "--out", "client"]);
    let steps = rows.div_ceil(4);
    assert!(said.contains(&format!("1 epoch of {rows} examples are {steps} steps of 4")), "{said}");
    assert_eq!(recorded_steps(&home, "client/record.json", "/recipe"), steps as u64);

    // The same settings again: nothing is made again, and nothing is said to be of other settings.
    assert!(run("train", &[]).contains("is finished"));
    let status = home.ok(&["status", "run"]);
    assert!(!status.contains("other settings"), "{status}");

    // By steps the same numbers are the same tuples.
    let by_steps = settings.replace("num_train_epochs = 2\n", "max_steps = 4\n");
    std::fs::write(home.path("steps.toml"), by_steps).unwrap();
    home.ok(&["curate", "--run", "steps", "--config", "steps.toml", "--threads", "1"]);
    let shards = |run: &str| -> Vec<(OsString, String)> {
        let found = gradtx_tests::miniature::checksums(&home.path(&format!("{run}/shadow/shards")));
        found.into_iter().map(|(path, sum)| (path.file_name().unwrap().to_owned(), sum)).collect()
    };
    assert_eq!(shards("run"), shards("steps"));

    std::fs::write(
        home.path("both.toml"),
        settings.replace("num_train_epochs = 2\n", "num_train_epochs = 2\nmax_steps = 4\n"),
    )
    .unwrap();
    refused(
        &home,
        &["curate", "--run", "both", "--config", "both.toml"],
        &["curate.tiny: max_steps = 4 and num_train_epochs = 2: expected one of them"],
    );
}
