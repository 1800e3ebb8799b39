//! Translators compared on held-out groups of shadows, on untrained models and a handful of examples: a
//! translator never sees what is held out, every group is a client once, and nothing is done twice.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_runtime::artifact::{Role, TupleStore, UpdateVector};
use gradtx_tests::miniature;
use serde_json::Value;

fn home() -> Home {
    let more = "[translate]\npenalty = 0.01\n[refine]\nnum_prompts = 6\nmin_agreements = 1\n";
    Home::with_settings(&(miniature::SETTINGS.to_owned() + more))
}

/// The mean of the last LLM updates of these shadows.
fn mean(store: &TupleStore, shadows: &[usize]) -> Vec<f32> {
    let mut sum = vec![0.0f64; store.space(Role::Teacher).values()];
    for step in 0..store.steps() {
        for &shadow in shadows {
            let mut values = vec![0.0; sum.len()];
            store.read(Role::Teacher, shadow, step, &mut values).unwrap();
            sum.iter_mut().zip(values).for_each(|(s, x)| *s += f64::from(x));
        }
    }
    sum.into_iter().map(|s| (s / (shadows.len() * store.steps()) as f64) as f32).collect()
}

#[test]
fn every_group_is_held_out_once() {
    let home = home();
    home.done(&["curate"]);
    let args = [
        "cross-validate",
        "--folds",
        "2",
        "--methods",
        "grad-transformer,mean,nearest,ridge,products",
        "--refine",
        "products",
        "--examples",
        "3",
    ];
    let text = home.done(&args);
    assert!(text.contains("LLM + products, refined") && text.contains("less ridge"), "{text}");
    let clients = home.json("run/cross-validation/clients.json");
    let clients = clients.as_array().unwrap();
    let mut names: Vec<&str> = clients.iter().map(|client| client["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["+0 (x);", "+0 =x;"]);
    assert!(clients.iter().all(|client| client["distance"].is_f64() && client["agreement"].is_f64()));

    // Groups take subsets in turn: 0, 2, 4 are of one task, 1 and 3 of the other.
    let store = TupleStore::open(&home.path("run/shadow")).unwrap();
    for client in clients {
        let (fold, shadow) = (client["fold"].as_u64().unwrap(), client["shadow"].as_u64().unwrap() as usize);
        let dir = format!("run/cross-validation/fold-{fold}/shadow-{shadow:05}");
        let others: &[usize] = if shadow == 0 { &[1, 3] } else { &[0, 2, 4] };
        let found =
            UpdateVector::read(&home.path(&format!("{dir}/translated/mean/update.safetensors"))).unwrap();
        let close = |want: Vec<f32>| found.values.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(mean(&store, others)) && !close(mean(&store, &[0, 1, 2, 3, 4])), "{dir}");
        let record = home.json(&format!("{dir}/translated/products/record.json"));
        let held_out: Vec<usize> = serde_json::from_value(record["settings"]["held_out"].clone()).unwrap();
        assert!((0..5).all(|i| held_out.contains(&i) != others.contains(&i)), "{held_out:?}");
        // Its update is the shadow's, and its score is of examples that it was not trained on.
        let update =
            UpdateVector::read(&home.path(&format!("{dir}/finetuned/tiny/update.safetensors"))).unwrap();
        let mut values = vec![0.0; store.space(Role::Student).values()];
        store.read(Role::Student, shadow, store.steps() - 1, &mut values).unwrap();
        assert_eq!(update.values, values);
        let score = home.json(&format!("{dir}/evaluated/products/score.json"));
        assert_eq!((&score["examples"], &score["data_name"]), (&3.into(), &client["name"]));
    }
    let before = miniature::checksums(&home.path("run/cross-validation"));
    home.done(&args);
    assert_eq!(miniature::checksums(&home.path("run/cross-validation")), before);
}

/// The root mean square of a client's update less its shadow's.
fn change(home: &Home, variant: &str, client: &Value, role: &str) -> f64 {
    let dir = format!("run/cross-validation/{variant}/{}/finetuned/{role}", client["dir"].as_str().unwrap());
    let found = UpdateVector::read(&home.path(&format!("{dir}/update.safetensors"))).unwrap();
    let store = TupleStore::open(&home.path("run/shadow")).unwrap();
    let side = if role == "tiny" { Role::Student } else { Role::Teacher };
    let mut own = vec![0.0; store.space(side).values()];
    let shadow = client["shadow"].as_u64().unwrap() as usize;
    store.read(side, shadow, store.steps() - 1, &mut own).unwrap();
    let squares = found.values.iter().zip(&own).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    (squares / own.len() as f64).sqrt()
}

#[test]
fn clients_unlike_the_shadows_have_rows() {
    let home = home();
    home.done(&["curate"]);
    let names = ["as-curated", "longer", "shorter", "half-noise", "noise", "fewer-prompts", "unseen-value"];
    let clients = names.join(",");
    let mut args = vec!["cross-validate", "--folds", "2", "--methods", "ridge,products", "--examples", "3"];
    args.extend(["--clients", &clients, "--without-prompts", "<rev>,<copy>", "--leave-out", "(x);"]);
    args.extend(["--set", "refine.num_prompts=20"]);
    let text = home.done(&args);
    assert!(names.iter().all(|name| text.contains(&format!("| {name} "))), "{text}");
    let all = home.json("run/cross-validation/variants.json");
    let found: Vec<&str> =
        all["variants"].as_array().unwrap().iter().map(|v| v["variant"].as_str().unwrap()).collect();
    assert_eq!(found, names);
    assert!(
        all["variants"].as_array().unwrap().iter().all(|v| v["translators"].as_array().unwrap().len() == 3)
    );

    let of = |variant: &str| home.json(&format!("run/cross-validation/{variant}/clients.json"));
    for variant in &names[1..] {
        let clients = of(variant);
        let trained_otherwise = ["longer", "shorter", "half-noise", "noise"].contains(variant);
        for client in clients.as_array().unwrap() {
            assert_eq!(change(&home, variant, client, "tiny") > 0.0, trained_otherwise, "{variant}");
            assert!(change(&home, variant, client, "llm") == 0.0, "{variant}");
        }
    }
    let of_all = |variant| -> f64 {
        of(variant).as_array().unwrap().iter().map(|client| change(&home, variant, client, "tiny")).sum()
    };
    let ratio = of_all("noise") / of_all("half-noise");
    assert!((ratio - 2.0).abs() < 0.6, "{ratio}");
    let steps = |variant: &str| {
        let dir = of(variant)[0]["dir"].as_str().unwrap().to_string();
        let record = home.json(&format!("run/cross-validation/{variant}/{dir}/finetuned/tiny/record.json"));
        record["settings"]["recipe"]["max_steps"].clone()
    };
    assert_eq!((steps("longer"), steps("shorter")), (12.into(), 2.into()));

    // Both tasks ask with all structures: without two of them there is less to ask.
    let prompts = |variant: &str, client: &Value| {
        let dir = format!("run/cross-validation/{variant}/{}", client["dir"].as_str().unwrap());
        home.json(&format!("{dir}/translated/products-refined/refinement.json"))["prompts"].as_u64().unwrap()
    };
    let fewer = of("fewer-prompts");
    assert!(
        fewer.as_array().unwrap().iter().any(|client| prompts("fewer-prompts", client) < prompts("", client))
    );
    // One group is left out by its name: 1 and 3 are of the other task.
    let unseen = of("unseen-value");
    assert_eq!((unseen.as_array().unwrap().len(), &unseen[0]["name"]), (1, &"+0 (x);".into()));
    let before = miniature::checksums(&home.path("run/cross-validation"));
    home.done(&args);
    assert_eq!(miniature::checksums(&home.path("run/cross-validation")), before);
}

#[test]
fn a_mixture_is_of_two_held_out_groups() {
    let home = home();
    home.done(&["curate", "--set", "curate.group_by=random"]);
    let mut args = vec!["cross-validate", "--folds", "2", "--methods", "ridge", "--refine", "none"];
    args.extend(["--clients", "as-curated,mixture", "--data", "public.jsonl", "--examples", "5"]);
    args.extend(["--set", "curate.group_by=random"]);
    home.done(&args);
    let clients = home.json("run/cross-validation/mixture/clients.json");
    assert_eq!(clients.as_array().unwrap().len(), 5);
    for client in clients.as_array().unwrap() {
        let (name, dir) = (client["name"].as_str().unwrap(), client["dir"].as_str().unwrap());
        assert_eq!(name.matches("shadow").count(), 2, "{name}");
        let finetuned = format!("run/cross-validation/mixture/{dir}/finetuned");
        let [tiny, llm] = ["tiny", "llm"].map(|role| home.json(&format!("{finetuned}/{role}/record.json")));
        assert_eq!(tiny["settings"]["rows"], llm["settings"]["rows"]);
        assert!(
            change(&home, "mixture", client, "tiny") > 0.0 && change(&home, "mixture", client, "llm") > 0.0
        );
    }
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let home = home();
    home.stage_refused(&["cross-validate"], 1, &["no tuple store", "gradtx curate"]);
    home.done(&["curate"]);
    home.stage_refused(&["cross-validate", "--folds", "3"], 2, &["--folds is 3", "2 to 2"]);
    let rows = home.read("public.jsonl");
    home.write("part.jsonl", rows.lines().next().unwrap());
    let args = ["cross-validate", "--folds", "2", "--data", "part.jsonl"];
    home.stage_refused(&args, 1, &["part.jsonl: no test example of group `+0 (x);`", "--data"]);
    home.stage_refused(&["cross-validate", "--refine", "rigde"], 2, &["expected none, grad-transformer"]);
    let clients = |more: &[&'static str]| [&["cross-validate", "--folds", "2", "--clients"], more].concat();
    home.stage_refused(&clients(&["mixture"]), 1, &["group `", "is held out alone", "fewer folds"]);
    home.stage_refused(&clients(&["fewer-prompts"]), 2, &["--without-prompts"]);
    home.stage_refused(
        &clients(&["fewer-prompts", "--without-prompts", "<none>"]),
        2,
        &["0 of", "public prompts"],
    );
    home.stage_refused(&clients(&["unseen-value"]), 2, &["--leave-out"]);
    home.stage_refused(
        &clients(&["unseen-value", "--leave-out", "+7"]),
        2,
        &["no group has a name with `+7`"],
    );
    home.stage_refused(
        &clients(&["unseen-value", "--leave-out", "+0"]),
        2,
        &["all groups have names with `+0`"],
    );
}
