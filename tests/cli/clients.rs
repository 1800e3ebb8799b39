//! Clients and the provider: the package that a client starts from, updates of several clients as one,
//! what is said of them, and an audit that finds canaries. On untrained models and a handful of examples.

#![allow(clippy::unwrap_used)]

use gradtx_runtime::artifact::{Privacy, UpdateVector};
use gradtx_tests::miniature::{self, SETTINGS};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Home {
    dir: tempfile::TempDir,
}

/// Exit code and everything that was said.
struct End {
    code: Option<i32>,
    text: String,
}

impl End {
    fn says(&self, words: &[&str]) {
        assert!(self.code != Some(0), "{}", self.text);
        assert!(words.iter().all(|word| self.text.contains(word)), "{words:?}: {}", self.text);
    }
}

impl Home {
    fn new(settings: &str) -> Self {
        let home = Self { dir: tempfile::tempdir().unwrap() };
        miniature::write(home.dir.path());
        std::fs::write(home.path("settings.toml"), settings).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, line: &str) -> End {
        let output = Command::new(env!("CARGO_BIN_EXE_gradtx-under-test"))
            .args(line.split(' '))
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].map(|out| String::from_utf8_lossy(&out).into_owned());
        End { code: output.status.code(), text: text.concat() }
    }

    fn done(&self, line: &str) -> String {
        let end = self.run(line);
        assert_eq!(end.code, Some(0), "{line}: {}", end.text);
        end.text
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.bytes(name)).unwrap()
    }

    fn update(&self, name: &str) -> UpdateVector {
        UpdateVector::read(&self.path(name)).unwrap()
    }

    /// Another client's update, made of one's values.
    fn poison(&self, from: &str, to: &str, change: impl Fn(usize, f32) -> f32) {
        let mut update = self.update(from);
        update.values.iter_mut().enumerate().for_each(|(i, x)| *x = change(i, *x));
        update.write(&self.path(to)).unwrap();
    }
}

/// No file of a directory has this in it.
fn nowhere(dir: &Path, words: &str) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            nowhere(&path, words);
        } else {
            let bytes = std::fs::read(&path).unwrap();
            let found = bytes.windows(words.len()).any(|window| window == words.as_bytes());
            assert!(!found, "{} has {words}", path.display());
        }
    }
}

#[test]
fn a_package_gives_the_provider_s_update() {
    let home = Home::new(SETTINGS);
    home.done("curate --run run --config settings.toml");
    home.done("finetune --run run --data private.jsonl --out own");
    home.done("init-clients --run run --out package");
    nowhere(&home.path("package"), &home.dir.path().display().to_string());
    nowhere(&home.path("package"), "public.jsonl");
    home.run("init-clients --run run --out package").says(&["package", "not overwritten"]);
    let facts = home.done("inspect package");
    assert!(facts.contains("package for clients") && facts.contains("intact"), "{facts}");

    // On another machine the package has another place, and the provider's run is not there.
    std::fs::create_dir(home.path("client")).unwrap();
    std::fs::rename(home.path("package"), home.path("client/package")).unwrap();
    home.run("finetune --run client/package --data private.jsonl")
        .says(&["models.tiny", "--set models.tiny=DIR"]);
    let other = "finetune --run client/package --set models.tiny=llm --data private.jsonl --out x";
    home.run(other).says(&["base model: expected", "give the TinyLM"]);
    home.done("finetune --run client/package --set models.tiny=tiny --data private.jsonl");
    let made = "client/package/clients/private/finetuned/tiny/update.safetensors";
    assert_eq!(home.bytes(made), home.bytes("own/update.safetensors"));
    // It keeps the model, and may be moved again.
    std::fs::rename(home.path("client/package"), home.path("moved")).unwrap();
    home.done("finetune --run moved --data private.jsonl --out again --save-adapter");
    assert_eq!(home.bytes("again/update.safetensors"), home.bytes("own/update.safetensors"));
    home.done("translate --run run --method mean again/update.safetensors --out upgraded");

    // A client with another program: from the adapter in the package, and back.
    home.done("convert --run moved --adapter again/adapter --examples 7 --out peft.safetensors");
    let (one, other) = (home.update("peft.safetensors"), home.update("own/update.safetensors"));
    assert_eq!(one.meta, other.meta);
    let norm = other.values.iter().map(|x| x * x).sum::<f32>().sqrt();
    let far = one.values.iter().zip(&other.values).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    assert!(far < 1e-5 * norm, "{far} {norm}");
    home.done("convert --run moved --update peft.safetensors --out adapter");

    let initial = home.path("moved/initial/adapter_model.safetensors");
    let mut bytes = std::fs::read(&initial).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&initial, bytes).unwrap();
    home.run("finetune --run moved --data private.jsonl --out y")
        .says(&["adapter_model", "copy the package again"]);
    home.run("inspect moved").says(&["NOT INTACT", "adapter_model"]);
}

/// A run with six groups of shadows, and five clients that learn from parts of one task.
fn five_clients() -> Home {
    let settings = SETTINGS
        .replace("group_by = \"task\"", "group_by = \"random\"")
        .replace("num_subsets = 5", "num_subsets = 6");
    let home = Home::new(&settings);
    home.done("curate --run run --config settings.toml");
    let text = std::fs::read_to_string(home.path("public.jsonl")).unwrap();
    let rows: Vec<&str> = text.lines().collect();
    for i in 0..5 {
        let own = [&rows[i..i + 6], &rows[12..15]].concat();
        std::fs::write(home.path(&format!("data-{i}.jsonl")), own.join("\n")).unwrap();
        home.done(&format!("finetune --run run --data data-{i}.jsonl --out client-{i}"));
    }
    home
}

const UPDATES: [&str; 5] = [
    "client-0/update.safetensors",
    "client-1/update.safetensors",
    "client-2/update.safetensors",
    "client-3/update.safetensors",
    "client-4/update.safetensors",
];

#[test]
fn several_clients_become_one_and_are_compared() {
    let home = five_clients();
    let all = UPDATES.join(" ");
    let translate = |updates: &str, out: &str, more: &str| {
        home.done(&format!("translate --run run --method ridge {updates} --out {out}{more}"))
    };
    let said = translate(&all, "mean", "");
    let found = home.json("mean/clients.json");
    assert_eq!(found["combine"], "mean");
    let clients = found["clients"].as_array().unwrap();
    let names: Vec<&str> = clients.iter().map(|client| client["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["client-0", "client-1", "client-2", "client-3", "client-4"]);
    for client in clients {
        assert_eq!((client["examples"].as_u64(), client["share"].as_f64()), (Some(9), Some(0.2)));
        let distance = &client["distance"];
        assert!(distance["mahalanobis"].as_f64().unwrap() > 0.0, "{distance}");
        assert!((0.0..=1.0).contains(&distance["outside"].as_f64().unwrap()), "{distance}");
        assert!(distance["predicted_error"].as_f64().unwrap() > 0.0, "{distance}");
        let name = client["name"].as_str().unwrap();
        assert!(said.contains(&format!("translate: {name}: norm")), "{said}");
    }
    assert!(found["cosines"][0][0].as_f64().unwrap() > 0.999);
    assert_eq!(found["cosines"][1][3], found["cosines"][3][1]);
    assert_eq!((&found["usual"]["shadows"], &found["usual"]["groups"]), (&6.into(), &6.into()));
    assert!(found["combined"]["norm"].as_f64().unwrap() > 0.0);
    assert!(home.path("run/distances/calibration.json").is_file());

    // The same with products as by updates: their weights follow the updates linearly.
    let products = |out: &str, more: &str| {
        home.done(&format!(
            "translate --run run --method products --set translate.penalty=0.1 {all} --out {out}{more}"
        ));
        home.json(&format!("{out}/products.json"))["weights"].as_array().unwrap().clone()
    };
    let sum = |weights: &[Value]| weights.iter().map(|w| w.as_f64().unwrap()).sum::<f64>();
    assert!((sum(&products("products-mean", "")) - 1.0).abs() < 1e-9);
    assert!((sum(&products("products-sum", " --combine sum")) - 5.0).abs() < 1e-9);
    assert!((sum(&products("products-median", " --combine median")) - 1.0).abs() < 1e-9);
    assert!((sum(&products("products-centre", " --combine geometric-median")) - 1.0).abs() < 1e-9);

    translate(&all, "weighted", " --combine weighted --weights 1,0,0,0,0");
    translate(UPDATES[0], "alone", "");
    assert_eq!(
        home.update("weighted/update.safetensors").values,
        home.update("alone/update.safetensors").values
    );
    let shares = |out: &str| home.json(&format!("{out}/clients.json"))["clients"][0]["share"].as_f64();
    assert_eq!(shares("weighted"), Some(1.0));
    translate(&all, "trimmed", " --combine trimmed-mean --trim 0.4");
    translate(&all, "median", " --combine median");
    assert_eq!(
        home.update("trimmed/update.safetensors").values,
        home.update("median/update.safetensors").values
    );
    assert_eq!(shares("median"), None);
    // Another choice is another result.
    let same_place = format!("translate --run run --method ridge {all} --out median");
    home.run(&same_place).says(&["combine"]);
    home.run(&format!("{same_place} --combine weighted --weights 1,2")).says(&["2 weights of 5 updates"]);
    home.run(&format!("{same_place} --clip-norm 0")).says(&["--clip-norm", "above 0"]);

    home.done("report --run run --scores mean");
    let page = String::from_utf8(home.bytes("run/report.html")).unwrap();
    assert!(page.contains("href=\"#updates\"") && page.contains("Mahalanobis"));
    let report = home.json("run/report.json");
    assert_eq!(report["updates"][0]["clients"].as_array().unwrap().len(), 5, "{}", report["updates"]);
}

#[test]
fn poisoned_updates_are_refused_or_named() {
    let home = five_clients();
    let others = UPDATES[..4].join(" ");
    let with = |poisoned: &str, out: &str, more: &str| {
        home.run(&format!("translate --run run --method ridge {others} {poisoned} --out {out}{more}"))
    };
    home.poison(UPDATES[4], "scaled.safetensors", |_, x| 1000.0 * x);
    with("scaled.safetensors", "a", "").says(&[
        "scaled.safetensors",
        "times the largest",
        "--allow-outliers",
    ]);
    let accepted = with("scaled.safetensors", "b", " --allow-outliers --combine geometric-median");
    assert_eq!(accepted.code, Some(0), "{}", accepted.text);
    assert!(accepted.text.contains("warning: scaled: far from the shadow updates"), "{}", accepted.text);
    // It decides the mean, and neither the geometric median nor the mean of clipped updates.
    let norm = |out: &str| home.json(&format!("{out}/clients.json"))["combined"]["norm"].as_f64().unwrap();
    let honest = home.update(UPDATES[0]).values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    assert_eq!(with("scaled.safetensors", "c", " --allow-outliers").code, Some(0));
    assert_eq!(with("scaled.safetensors", "d", " --allow-outliers --clip-norm median").code, Some(0));
    assert!(norm("c") > 50.0 * honest && norm("b") < 2.0 * honest && norm("d") < 2.0 * honest);

    home.poison(UPDATES[4], "flipped.safetensors", |_, x| -x);
    let flipped = with("flipped.safetensors", "e", "");
    assert!(
        flipped.text.contains("warning: flipped: points away from the other clients"),
        "{}",
        flipped.text
    );
    home.poison(UPDATES[0], "copy.safetensors", |i, x| if i == 0 { x + 1e-6 } else { x });
    let copied = with("copy.safetensors", "f", "");
    assert!(copied.text.contains("warning: copy: more like client-0"), "{}", copied.text);
    with(UPDATES[0], "g", "").says(&["the same update as", "--allow-duplicates"]);

    // Not a number, in a file whose checksum is right for all that one can tell.
    let bytes = home.bytes(UPDATES[4]);
    let mut nan = bytes.clone();
    let at = nan.len() - 4;
    nan[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(home.path("nan.safetensors"), nan).unwrap();
    with("nan.safetensors", "h", "").says(&["nan.safetensors", "finite"]);
}

#[test]
fn translations_do_without_the_tuples_of_a_translator() {
    let home = Home::new(SETTINGS);
    home.done("curate --run run --config settings.toml");
    home.done("train --run run");
    home.done("finetune --run run --data private.jsonl --out client");
    home.done("translate --run run client/update.safetensors --out first");
    std::fs::rename(home.path("run/shadow"), home.path("elsewhere")).unwrap();
    let said = home.done("translate --run run client/update.safetensors --out second");
    assert!(said.contains("not compared with the shadow updates: "), "{said}");
    assert_eq!(home.bytes("first/update.safetensors"), home.bytes("second/update.safetensors"));
    assert!(home.json("second/clients.json")["not_compared"].is_string());
    assert!(home.json("second/clients.json")["clients"][0]["norm"].as_f64().unwrap() > 0.0);
}

const MEMORISING: &str = r#"
[models]
tiny = "w/tiny"
llm = "w/llm"
[data]
instruction = "none"
prompt = "template"
max_length = 64
[lora]
r = 16
lora_dropout = 0.0
target_modules = "all-linear"
[finetune.tiny]
max_steps = 1000
global_batch_size = 8
learning_rate = 0.005
"#;

#[test]
fn an_audit_finds_what_a_client_memorised() {
    // The model of the smallest world: it is wide enough to learn thirty canaries by heart.
    let home = Home::new(MEMORISING);
    home.done("world w --world smoke");
    home.done("audit --insert-canaries 60 --data private.jsonl --out with.jsonl --key key.json --seed 4");
    home.run("audit --insert-canaries 60 --data private.jsonl --out with.jsonl").says(&["not overwritten"]);
    home.done("finetune --run run --config settings.toml --data with.jsonl --out leaky");
    home.done("finetune --run run --data private.jsonl --out careful");
    home.done(
        "finetune --run run --data with.jsonl --out private --dp-epsilon 2 --dp-delta 1e-3 \
         --set finetune.tiny.loss_reduction=sequence --set finetune.tiny.max_steps=100",
    );
    let audit = |update: &str| {
        home.done(&format!(
            "audit --run run --update {update}/update.safetensors --key key.json --out {update}.json"
        ));
        home.json(&format!("{update}.json"))
    };
    let best = |found: &Value| {
        let of = |attack: &Value| attack["auc"].as_f64().unwrap();
        found["attacks"].as_array().unwrap().iter().map(of).fold(0.0, f64::max)
    };
    let leaky = audit("leaky");
    assert!(best(&leaky) >= 0.9, "{leaky}");
    assert!(leaky["epsilon"]["at_least"].as_f64().unwrap() > 0.3, "{leaky}");
    // A private client has learned them no better than it promised.
    let private = audit("private");
    let (stated, bound) = (private["privacy"]["epsilon"].as_f64(), private["epsilon"]["at_least"].as_f64());
    assert!(bound.unwrap() <= stated.unwrap() && stated.unwrap() <= 2.0, "{private}");
    assert!(private["refutes_statement"] == false && leaky["refutes_statement"] == false);
    // A statement that the attacks refute is named.
    let mut forged = home.update("leaky/update.safetensors");
    forged.meta.privacy = home.update("private/update.safetensors").meta.privacy;
    if let Privacy::DpSgd { epsilon, .. } = &mut forged.meta.privacy {
        *epsilon = 0.1;
    }
    forged.write(&home.path("forged.safetensors")).unwrap();
    let said = home.done("audit --run run --update forged.safetensors --key key.json");
    assert!(said.contains("refutes this statement"), "{said}");
    // The control has seen none of the canaries: there is nothing to find.
    let careful = audit("careful");
    assert!(best(&careful) < 0.72, "{careful}");
    assert!(careful["epsilon"]["at_least"].as_f64().unwrap() < 0.3, "{careful}");
    let line = "audit --run run --update leaky/update.safetensors --members private.jsonl --non-members public.jsonl";
    let said = home.done(line);
    assert!(said.contains("7 examples that were trained on, 20 that were not"), "{said}");
    assert!(!said.contains("ε is at least"), "only coins bound ε: {said}");
    home.run("audit --run run --update leaky/update.safetensors").says(&["--key", "--members"]);
    home.run("audit --run run --update leaky/update.safetensors --key settings.toml")
        .says(&["settings.toml"]);
}
