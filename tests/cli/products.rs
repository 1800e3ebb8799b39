//! Translation by products from file to file, on untrained models and a handful of examples: the
//! adapter does what the weighted sum of the shadow teachers' products does, it is of another rank
//! than theirs, and every stage after it takes it.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, copy_tree, expect_failure, expect_success};
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{BlockLayout, LoraConfig, read_peft};
use gradtx_runtime::artifact::{Role, TupleStore, UpdateVector};
use gradtx_tests::miniature::{self, SETTINGS};
use serde_json::Value;
use std::path::Path;

/// A run with its tuples, and two clients' updates.
pub struct Curated(Home);

impl std::ops::Deref for Curated {
    type Target = Home;
    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Curated {
    /// With so many shadow subsets of random rows, each a group of its own, and two clients' updates.
    fn new(subsets: &str) -> Self {
        Self::with(subsets, "")
    }

    /// The same with more settings.
    pub fn with(subsets: &str, more: &str) -> Self {
        Self::edited(subsets, more, |_| ())
    }

    /// The same with models, data or settings that are changed before anything is done.
    pub fn edited(subsets: &str, more: &str, edit: impl Fn(&Path)) -> Self {
        let settings = SETTINGS
            .replace("group_by = \"task\"", "group_by = \"random\"")
            .replace("num_subsets = 5", subsets);
        // Clients that learn to end their answers, and have room to do so.
        let settings = settings
            .replace("max_new_tokens = 4", "max_new_tokens = 12")
            .replace("[finetune.tiny]\nmax_steps = 3", "[finetune.tiny]\nmax_steps = 150");
        let home = Home::with_settings(&(settings + more));
        edit(home.dir());
        home.done(&["curate"]);
        let rows = home.read("private.jsonl");
        let half: Vec<&str> = rows.lines().take(4).collect();
        home.write("other.jsonl", &half.join("\n"));
        home.done(&["finetune", "--data", "private.jsonl", "--out", "client-1", "--allow-refinement"]);
        home.done(&["finetune", "--data", "other.jsonl", "--out", "client-2"]);
        Self(home)
    }

    pub fn translate(&self, clients: &[&str], out: &str, more: &[&str]) {
        let updates: Vec<String> = clients.iter().map(|c| format!("{c}/update.safetensors")).collect();
        let mut args = vec!["translate", "--method", "products", "--out", out];
        args.extend(updates.iter().map(String::as_str));
        args.extend(more);
        self.done(&args);
    }

    pub fn layout(&self, rank: usize) -> BlockLayout {
        let model = DecoderConfig::read(&self.path("llm")).unwrap();
        let lora = LoraConfig { rank, alpha: 16.0 * rank as f64, ..LoraConfig::default() };
        BlockLayout::new(&model, &lora).unwrap()
    }

    /// The matrices of a translation, one after the other.
    pub fn dense(&self, out: &str) -> Vec<f64> {
        let update = UpdateVector::read(&self.path(out).join("update.safetensors")).unwrap();
        assert_eq!((update.meta.space.rank, update.meta.space.alpha), (16, 256.0));
        dense(&self.layout(16), &update.values)
    }
}

/// The products of an adapter's factors, one after the other.
pub fn dense(layout: &BlockLayout, values: &[f32]) -> Vec<f64> {
    let mut out = vec![];
    for block in 0..layout.blocks() {
        for pair in layout.slices().chunks(2) {
            let (a, b) = (&values[layout.range(block, &pair[0])], &values[layout.range(block, &pair[1])]);
            let [rank, inputs] = pair[0].shape;
            for row in b.chunks(rank) {
                for i in 0..inputs {
                    out.push((0..rank).map(|k| f64::from(row[k]) * f64::from(a[k * inputs + i])).sum());
                }
            }
        }
    }
    out
}

/// Euclidean distance.
pub fn distance(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn the_adapter_does_what_the_weighted_products_do() {
    let home = Curated::new("num_subsets = 6");
    home.translate(&["client-1"], "one", &[]);
    let details = home.json("one/products.json");
    let weights: Vec<f64> = serde_json::from_value(details["weights"].clone()).unwrap();
    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9 && weights.len() == 6);
    let tried = details["penalty"]["tried"].as_array().unwrap();
    assert_eq!((tried.len(), &details["penalty"]["left_out"]), (5, &Value::from(6)));
    assert!(tried.iter().all(|t| t["error"].as_f64().unwrap() > 0.0), "losses of the LLM");
    assert_eq!(home.json("run/products/penalty.json"), details["penalty"]);

    let store = TupleStore::open(&home.path("run/shadow")).unwrap();
    let (init, layout) = (store.init(Role::Teacher).unwrap(), home.layout(2));
    let (mut want, mut factors) = (vec![], vec![0.0f32; layout.total()]);
    for (pair, weight) in weights.iter().enumerate() {
        let mut adapter = vec![0.0; layout.total()];
        store.read(Role::Teacher, pair, store.steps() - 1, &mut adapter).unwrap();
        adapter.iter_mut().zip(&init).for_each(|(x, start)| *x += start);
        factors.iter_mut().zip(&adapter).for_each(|(sum, x)| *sum += *weight as f32 * x);
        let product = dense(&layout, &adapter);
        want.resize(product.len(), 0.0);
        want.iter_mut().zip(product).for_each(|(sum, x)| *sum += weight * x);
    }
    let found = home.dense("one");
    let norm = distance(&want, &vec![0.0; want.len()]);
    // Six products of rank 2 have rank 12 at most.
    assert!(distance(&found, &want) < 1e-5 * norm);
    assert!(distance(&dense(&layout, &factors), &want) > 1e-3 * norm, "the factors' sum is not it");
}

#[test]
fn every_stage_takes_an_adapter_of_another_rank() {
    let home = Curated::new("num_subsets = 4");
    home.translate(&["client-1"], "one", &["--threads", "3"]);
    let adapter =
        read_peft(&home.path("one/adapter"), &DecoderConfig::read(&home.path("llm")).unwrap()).unwrap();
    assert_eq!((adapter.layout.lora().rank, adapter.layout.lora().alpha), (16, 256.0));
    home.done(&["evaluate", "--data", "private.jsonl", "--adapter", "one/adapter", "--out", "score"]);
    let score = home.json("score/score.json");
    assert_eq!((&score["kind"], &score["method"]), (&"translated".into(), &"products".into()));
    home.done(&["merge", "--adapter", "one/adapter", "--out", "merged"]);
    home.done(&["evaluate", "--data", "private.jsonl", "--base", "merged", "--out", "merged-score"]);
    assert_eq!(home.json("merged-score/score.json")["right"], score["right"]);
    for name in ["run", "one", "one/update.safetensors", "one/adapter", "run/products"] {
        home.ok(&["inspect", name]);
    }
    // Again: finished. In another run directory on another number of threads: the same bytes.
    let before = miniature::checksums(&home.path("one"));
    home.translate(&["client-1"], "one", &[]);
    assert_eq!(miniature::checksums(&home.path("one")), before);
    let other = Curated::new("num_subsets = 4");
    other.translate(&["client-1"], "one", &["--threads", "1"]);
    let bytes = |home: &Home, name: &str| home.bytes(name);
    for name in ["one/adapter/adapter_model.safetensors", "one/products.json", "run/products/penalty.json"] {
        assert!(bytes(&home, name) == bytes(&other, name), "{name}");
    }
    // An update of the LLM is not translated, whatever its rank.
    let args = ["translate", "one/update.safetensors", "--method", "products", "--out", "twice"];
    home.stage_refused(&args, 1, &["an update of the LLM"]);
}

#[test]
fn products_of_clients_are_averaged_or_added() {
    let home = Curated::new("num_subsets = 5");
    let clients = ["client-1", "client-2"];
    home.translate(&clients[..1], "one", &[]);
    home.translate(&clients[1..], "two", &[]);
    home.translate(&clients, "mean", &[]);
    home.translate(&clients, "sum", &["--combine", "sum"]);
    let [one, two, mean, sum] = ["one", "two", "mean", "sum"].map(|name| home.dense(name));
    let norm = distance(&mean, &vec![0.0; mean.len()]);
    let middle: Vec<f64> = one.iter().zip(&two).map(|(x, y)| 0.5 * (x + y)).collect();
    let both: Vec<f64> = one.iter().zip(&two).map(|(x, y)| x + y).collect();
    assert!(distance(&mean, &middle) < 1e-5 * norm && distance(&sum, &both) < 1e-5 * norm);
    assert!(distance(&one, &two) > 1e-3 * norm, "the clients differ");
}

#[test]
fn the_penalty_is_what_the_settings_say() {
    let home = Curated::new("num_subsets = 6");
    let translate = |choice: &str, out: &str| {
        let settings = home.read("settings.toml");
        home.write("other.toml", &format!("{settings}\n[translate]\npenalty = {choice}\n"));
        let run = format!("run-{out}");
        copy_tree(&home.path("run"), &home.path(&run));
        std::fs::remove_file(home.path(&run).join("run.toml")).unwrap();
        let args = ["--config", "other.toml", "--method", "products", "client-1/update.safetensors"];
        home.gradtx(&[&["translate", "--run", &run], &args[..], &["--out", out]].concat())
    };
    let done = |choice: &str, out: &str| expect_success(&[choice], &translate(choice, out));
    done("0.25", "fixed");
    let fixed = home.json("fixed/products.json");
    assert_eq!((&fixed["penalty"]["penalty"], &fixed["penalty"]["left_out"]), (&0.25.into(), &0.into()));
    assert!(!home.path("run-fixed/products").exists());
    done("\"mse\"", "mse");
    let mse = home.json("mse/products.json");
    assert_eq!(mse["penalty"]["tried"].as_array().unwrap().len(), 5);
    assert!(home.dense("fixed") != home.dense("mse"));
    let most = translate("\"most\"", "most");
    expect_failure(&["most"], &most, 2, &["expected \"loss\", \"mse\" or a number"]);
    // Without the public data the loss cannot be had.
    std::fs::rename(home.path("public.jsonl"), home.path("elsewhere")).unwrap();
    expect_failure(&["loss"], &translate("\"loss\"", "loss"), 1, &["translate.penalty=0.01"]);
    done("0.01", "without");
}
