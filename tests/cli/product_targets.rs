//! Grad-Transformers that predict coordinates of products, from file to file, on untrained models and a
//! handful of examples: what they predict is read out as an adapter of another rank, and nothing of a
//! published Grad-Transformer is different.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::read_peft;
use gradtx_tests::miniature::{self, SETTINGS};
use serde_json::Value;
use std::process::Stdio;

/// A curated run, and a client of it.
struct Trained(Home);

impl std::ops::Deref for Trained {
    type Target = Home;
    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Trained {
    /// With shadow subsets of random rows, each a group of its own, a client's update, and more settings of `[train]`.
    fn new(train: &str) -> Self {
        let settings = SETTINGS
            .replace("group_by = \"task\"", "group_by = \"random\"")
            .replace("num_subsets = 5", "num_subsets = 6")
            .replace("[train]\n", &format!("[train]\n{train}\n"));
        let home = Home::with_settings(&settings);
        home.done(&["curate"]);
        home.done(&["finetune", "--data", "private.jsonl", "--out", "client"]);
        Self(home)
    }

    fn translate(&self, method: &str, out: &str, more: &[&str]) {
        let args = ["translate", "client/update.safetensors", "--method", method, "--out", out];
        self.done(&[&args, more].concat());
    }
}

#[test]
fn predicted_coordinates_become_an_adapter() {
    let home = Trained::new("targets = \"products\"");
    home.done(&["train"]);
    let config = home.json("run/translator/config.json");
    assert_eq!(config["targets"], "products");
    assert_eq!(
        [&config["teacher_blocks"], &config["teacher_width"]],
        [3, 5],
        "six groups have five components"
    );
    home.translate("grad-transformer", "one", &[]);
    let adapter =
        read_peft(&home.path("one/adapter"), &DecoderConfig::read(&home.path("llm")).unwrap()).unwrap();
    assert_eq!((adapter.layout.lora().rank, adapter.layout.lora().alpha), (16, 256.0));
    assert!(!home.path("run/products").exists(), "no regression has a part in it");
    home.done(&["evaluate", "--data", "private.jsonl", "--adapter", "one/adapter", "--out", "score"]);
    assert_eq!(home.json("score/score.json")["method"], "grad-transformer");
    home.done(&["merge", "--adapter", "one/adapter", "--out", "merged"]);
    for name in ["run", "run/translator", "one", "one/update.safetensors"] {
        home.ok(&["inspect", name]);
    }
    let adapter = "adapter/adapter_model.safetensors";
    home.translate("grad-transformer", "threads", &["--threads", "3"]);
    assert!(home.bytes(&format!("one/{adapter}")) == home.bytes(&format!("threads/{adapter}")));
    home.translate("grad-transformer", "narrow", &["--set", "translate.lora_r=3"]);
    assert!(home.bytes(&format!("one/{adapter}")).len() > home.bytes(&format!("narrow/{adapter}")).len());
    // Named for what it is, it is the same; other forms are not there.
    home.translate("grad-transformer-products", "named", &[]);
    assert!(home.bytes(&format!("one/{adapter}")) == home.bytes(&format!("named/{adapter}")));
    let update = "client/update.safetensors";
    home.stage_refused(
        &["translate", update, "--method", "grad-transformer-residual", "--out", "other"],
        1,
        &["run/translator", "predicts residual, found products", "train.targets=residual"],
    );
    // Another run may take the translator, with the tuples that it is of.
    let other = ["translate", "--run", "other", update, "--translator", "run", "--out"];
    home.ok(&[&other[..], &["elsewhere"]].concat());
    assert!(home.bytes(&format!("one/{adapter}")) == home.bytes(&format!("elsewhere/{adapter}")));
    let settings = ["--config", "settings.toml", "--tuples", "other", "--set", "curate.num_subsets=4"];
    home.ok(&[&["curate", "--run", "other"], &settings[..]].concat());
    home.refused(&[&other[..], &["mixed"]].concat(), 1, &["other tuples", "--tuples RUN"]);
    // What coordinates mean is as much a part of a translator as its weights.
    let file = home.path("run/translator/components.safetensors");
    let mut damaged = home.bytes("run/translator/components.safetensors");
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&file, damaged).unwrap();
    home.stage_refused(
        &["translate", update, "--method", "grad-transformer", "--out", "damaged"],
        1,
        &["components.safetensors", "gradtx train"],
    );
}

#[test]
fn residuals_are_added_to_the_translation_by_products() {
    let home = Trained::new("targets = \"residual\"\nmax_components = 2");
    home.done(&["train"]);
    let config = home.json("run/translator/config.json");
    assert_eq!((&config["targets"], &config["teacher_width"]), (&"residual".into(), &2.into()));
    // Its penalty is that of the translation by products: chosen once.
    let penalty = home.bytes("run/products/penalty.json");
    home.translate("grad-transformer", "sum", &[]);
    home.translate("products", "products", &[]);
    assert!(home.bytes("run/products/penalty.json") == penalty);
    let update = |name: &str| home.bytes(&format!("{name}/update.safetensors"));
    assert!(update("sum") != update("products"), "something is added");
    // Where other settings choose it, it is another translator.
    home.stage_refused(
        &["train", "--set", "translate.penalty=0.25"],
        3,
        &["other settings", "penalty", "0.25"],
    );
}

#[test]
fn a_killed_training_on_coordinates_resumes() {
    let home = Trained::new("save_minutes = 0\nmixup_prob = 0.8\ntargets = \"residual\"");
    let settings = home.read("settings.toml").replace("max_steps = 6\n", "max_steps = 80\n");
    home.write("settings.toml", &(settings + "[translate]\npenalty = \"mse\"\n"));
    home.done(&["train"]);
    let sums = || miniature::checksums(&home.path("run/translator"));
    let undisturbed = sums();
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    let mut child = home
        .command(&["train", "--run", "run", "--config", "settings.toml"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Whichever is there: one that is named may come and go while nobody looks.
    let checkpoints = home.path("run/translator/checkpoints");
    let is_saved = || {
        let mut entries = std::fs::read_dir(&checkpoints).into_iter().flatten().flatten();
        entries.any(|entry| entry.path().extension().is_some_and(|end| end == "safetensors"))
    };
    while !is_saved() {
        assert!(child.try_wait().unwrap().is_none(), "killed before its end");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let said = home.done(&["train"]);
    assert!(said.contains("going on after step"), "{said}");
    assert_eq!(sums(), undisturbed);
}

#[test]
fn coordinates_need_the_llm_and_two_groups() {
    let home = Trained::new("targets = \"products\"");
    home.stage_refused(
        &["train", "--set", "models.llm=nowhere"],
        2,
        &["train.targets = products", "models.llm is not there"],
    );
    home.stage_refused(&["train", "--set", "train.targets=prodcuts"], 2, &["train.targets"]);
    home.stage_refused(&["train", "--set", "train.max_components=0"], 2, &["train.max_components = 0"]);
}

#[test]
fn held_out_groups_compare_all_forms() {
    let home = Trained::new("");
    let methods = "grad-transformer,grad-transformer-products,grad-transformer-residual,products";
    let text = home.done(&[
        "cross-validate",
        "--folds",
        "2",
        "--methods",
        methods,
        "--refine",
        "none",
        "--examples",
        "3",
        "--data",
        "public.jsonl",
        "--set",
        "translate.penalty=0.01",
    ]);
    for name in ["LLM + Grad-Transformer of products", "LLM + products + Grad-Transformer"] {
        assert!(text.contains(name), "{name} in {text}");
    }
    let fold = "run/cross-validation/fold-1";
    for (dir, targets) in [
        ("translator", Value::Null),
        ("translator-products", "products".into()),
        ("translator-residual", "residual".into()),
    ] {
        assert_eq!(home.json(&format!("{fold}/{dir}/config.json"))["targets"], targets);
        let record = home.json(&format!("{fold}/{dir}/record.json"));
        assert_eq!(record["settings"]["train"]["targets"], targets, "{dir}");
        assert_eq!(record["settings"]["train"]["max_components"].is_null(), targets.is_null(), "{dir}");
    }
    assert_eq!(home.json("run/cross-validation/fold-1/translator-products/config.json")["teacher_width"], 2);
}
