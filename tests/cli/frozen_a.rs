//! Runs whose adapters freeze A: every stage, what their files say, and what does not belong together.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{Factor, PeftAdapter, read_peft, write_peft};
use gradtx_runtime::artifact::{Role, TupleStore, UpdateVector};
use gradtx_tests::miniature::{self, SETTINGS};
use serde_json::Value;
use std::path::PathBuf;

/// Small models, with q and v adapted in 2 blocks of 8 and 3 of 16 columns, and one key head of two.
const FROZEN: &str = "\n[lora]\nfreeze_a = true\nr = 3\n[refine]\nnum_prompts = 12\nsteps_per_round = 2\n\
                      global_batch_size = 4\nmin_agreements = 2\nmin_confidence = 0.0\n";
const WIDTHS: [usize; 2] = [3 * (8 + 4), 3 * (16 + 8)];

/// A run that freezes A, and `whole.toml` for one that does not.
struct Frozen(Home);

impl std::ops::Deref for Frozen {
    type Target = Home;
    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Frozen {
    fn new() -> Self {
        let home = Home::with_settings(&(SETTINGS.to_owned() + FROZEN));
        home.write("whole.toml", &(SETTINGS.to_owned() + "\n[lora]\nr = 3\n"));
        Self(home)
    }

    fn update(&self, dir: &str) -> UpdateVector {
        UpdateVector::read(&self.path(dir).join("update.safetensors")).unwrap()
    }

    fn adapter(&self, dir: &str, model: &str) -> PeftAdapter {
        read_peft(&self.path(dir), &DecoderConfig::read(&self.path(model)).unwrap()).unwrap()
    }

    fn score(&self, adapter: &str, out: &str) -> Value {
        self.done(&["evaluate", "--data", "private.jsonl", "--adapter", adapter, "--out", out]);
        self.json(&format!("{out}/score.json"))
    }
}

/// The values of one factor of all matrices.
fn all_of(adapter: &PeftAdapter, factor: Factor) -> Vec<f32> {
    let layout = &adapter.layout;
    let of = |block| layout.slices().iter().filter(|s| s.factor == factor).map(move |slice| (block, slice));
    let places = (0..layout.blocks()).flat_map(of);
    places.flat_map(|(block, slice)| adapter.values[layout.range(block, slice)].to_vec()).collect()
}

#[test]
fn every_stage_trains_translates_and_scores_b_alone() {
    let home = Frozen::new();
    home.done(&["curate"]);
    let store = TupleStore::open(&home.path("run/shadow")).unwrap();
    let spaces = Role::BOTH.map(|role| store.space(role).clone());
    assert_eq!(
        spaces.each_ref().map(|space| (space.width, space.freeze_a)),
        WIDTHS.map(|width| (width, true))
    );
    home.done(&["train"]);
    home.done(&[
        "finetune",
        "--data",
        "private.jsonl",
        "--out",
        "client",
        "--save-adapter",
        "--allow-refinement",
    ]);
    home.done(&["convert", "--model", "tiny", "--initial", "--out", "start"]);
    let (start, client) = (home.adapter("start", "tiny"), home.adapter("client/adapter", "tiny"));
    assert_eq!(all_of(&client, Factor::A), all_of(&start, Factor::A));
    assert!(all_of(&start, Factor::B).iter().all(|&x| x == 0.0) && client != start);
    assert_eq!(all_of(&client, Factor::B), home.update("client").values);

    home.done(&["convert", "--model", "llm", "--initial", "--out", "start-llm"]);
    let of_start = all_of(&home.adapter("start-llm", "llm"), Factor::A);
    for method in ["mean", "nearest", "ridge", "products", "grad-transformer"] {
        home.done(&["translate", "client/update.safetensors", "--method", method, "--out", method]);
        let (adapter, update) = (home.adapter(&format!("{method}/adapter"), "llm"), home.update(method));
        assert_eq!(update.meta.space, spaces[1], "{method}");
        assert_eq!(all_of(&adapter, Factor::A), of_start, "{method}");
        assert_eq!(all_of(&adapter, Factor::B), update.values, "{method}");
        assert_eq!(home.score(&format!("{method}/adapter"), &format!("score-{method}"))["method"], method);
    }
    // The weighted sum of the shadows' B, with no decomposition.
    let details = home.json("products/products.json");
    assert_eq!(details["rank"], 3);
    let weights: Vec<f64> = serde_json::from_value(details["weights"].clone()).unwrap();
    let mut want = vec![0.0f64; spaces[1].values()];
    for (pair, weight) in weights.iter().enumerate() {
        let mut shadow = vec![0.0; want.len()];
        store.read(Role::Teacher, pair, store.steps() - 1, &mut shadow).unwrap();
        want.iter_mut().zip(shadow).for_each(|(sum, x)| *sum += weight * f64::from(x));
    }
    let found = home.update("products").values;
    assert!(found.iter().zip(&want).all(|(x, y)| (f64::from(*x) - y).abs() <= 1e-6 * y.abs().max(1e-3)));

    let args = ["refine", "client/update.safetensors", "--translated", "products", "--out", "refined"];
    home.done(&args);
    assert_eq!(home.adapter("refined/adapter", "llm").layout.lora().rank, 6);
    assert_eq!(home.score("refined/adapter", "score-refined")["refined"], true);
    home.done(&["merge", "--adapter", "products/adapter", "--out", "merged"]);
    for name in ["run", "client", "client/update.safetensors", "products/adapter"] {
        home.ok(&["inspect", name]);
    }
    assert!(home.ok(&["inspect", "run/shadow"]).contains("B alone is trained"));
    assert!(home.ok(&["inspect", "client/update.safetensors"]).contains("freeze_a"));
}

#[test]
fn conversion_keeps_a_where_it_is() {
    let home = Frozen::new();
    home.done(&["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"]);
    home.done(&[
        "convert",
        "--model",
        "tiny",
        "--adapter",
        "client/adapter",
        "--examples",
        "7",
        "--out",
        "back",
    ]);
    assert_eq!(UpdateVector::read(&home.path("back")).unwrap(), home.update("client"));
    home.done(&["convert", "--model", "tiny", "--update", "back", "--out", "again"]);
    let tensors = |dir: &str| home.bytes(&format!("{dir}/adapter_model.safetensors"));
    assert!(tensors("again") == tensors("client/adapter"));
    home.done(&["diff", "client", "client/adapter", "--model", "tiny"]);

    // A trainer that moved A.
    let mut moved = home.adapter("client/adapter", "tiny");
    let a = moved.layout.range(1, &moved.layout.slices()[0]);
    moved.values[a.start] += 1e-3;
    std::fs::create_dir(home.path("moved")).unwrap();
    write_peft(&home.path("moved"), &moved.layout, &moved.values, "tiny").unwrap();
    let convert =
        ["convert", "--run", "run", "--model", "tiny", "--adapter", "moved", "--examples", "7", "--out", "x"];
    home.refused(&convert, 1, &["moved: A of block 1", "lora.freeze_a = true", "every lora_A frozen"]);
    assert!(!home.path("x").exists());
}

#[test]
fn updates_of_b_alone_and_of_both_do_not_mix() {
    let home = Frozen::new();
    home.done(&["curate"]);
    let whole = |args: &[&str]| {
        let (stage, rest) = args.split_first().unwrap();
        home.ok(&[&[*stage, "--run", "run-whole", "--config", "whole.toml"], rest].concat())
    };
    whole(&["curate"]);
    whole(&["finetune", "--data", "private.jsonl", "--out", "of-both"]);
    home.done(&["finetune", "--data", "private.jsonl", "--out", "of-b"]);
    let translate = |run: &str, client: &str, words: &[&str]| {
        let update = format!("{client}/update.safetensors");
        home.refused(&["translate", "--run", run, &update, "--method", "ridge", "--out", "x"], 1, words);
        assert!(!home.path("x").exists());
    };
    translate(
        "run",
        "of-both",
        &["of-both/update.safetensors", "expected B alone", "found A and B", "run.toml"],
    );
    translate("run-whole", "of-b", &["of-b/update.safetensors", "expected A and B", "found B alone"]);
    let files = ["of-b/update.safetensors", "of-both/update.safetensors"];
    home.refused(&["diff", files[0], files[1]], 1, &["different forms", "B alone"]);
    // A finished stage is not mixed with another setting.
    let other = ["curate", "--run", "run", "--set", "lora.freeze_a=false"];
    home.refused(&other, 3, &["lora.freeze_a"]);
}

#[test]
fn a_killed_curation_of_b_alone_ends_with_the_same_bytes() {
    let home = Frozen::new();
    home.done(&["curate"]);
    let before = miniature::checksums(&home.path("run/shadow/shards"));
    // What is missing is made again, on other threads and in other company.
    let shards: Vec<PathBuf> = before.keys().take(3).cloned().collect();
    shards.iter().for_each(|shard| std::fs::remove_file(shard).unwrap());
    home.done(&["curate", "--threads", "3"]);
    assert_eq!(miniature::checksums(&home.path("run/shadow/shards")), before);
}
