//! Refinement from file to file, on untrained models and a handful of prompts: what it trains, who has to
//! agree, and the same bytes whatever stops it and however many ranks share it.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, copy_tree};
use crate::products::{Curated, dense, distance};
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{Factor, read_peft};
use gradtx_pipeline::stages::refine::{self as stage, Job};
use gradtx_run::cluster::World;
use gradtx_run::config::RunArgs;
use gradtx_run::context::Context;
use gradtx_run::ui::Ui;
use gradtx_runtime::artifact::UpdateVector;
use gradtx_runtime::comm::local;
use gradtx_tests::miniature;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Settings with which one round at least trains: untrained models agree on little.
const REFINE: &str = "\n[refine]\nnum_prompts = 12\nsteps_per_round = 3\nglobal_batch_size = 4\nmin_agreements = 2\nmin_confidence = 0.0\n";

fn refine<'a>(translated: &'a str, client: &'a str, out: &'a str) -> [&'a str; 6] {
    ["refine", client, "--translated", translated, "--out", out]
}

#[test]
fn refined_translations_have_a_trained_part() {
    let home = Curated::with("num_subsets = 4", REFINE);
    home.translate(&["client-1"], "one", &[]);
    let args = refine("one", "client-1/update.safetensors", "refined");
    home.done(&args);
    let found = home.json("refined/refinement.json");
    let rounds = found["rounds"].as_array().unwrap();
    assert_eq!((&found["prompts"], rounds.len()), (&12.into(), 2));
    for round in rounds {
        let trained = round["trained_on"] != "nothing";
        assert_eq!(trained, round["loss"].is_number(), "{round}");
        assert!((round["agreed"].as_f64().unwrap() / 12.0 - round["share"].as_f64().unwrap()).abs() < 1e-12);
    }
    assert_ne!(rounds[0]["trained_on"], "nothing", "{found}");

    // The translation's part is what it was; the other has moved from where shadows start.
    let model = DecoderConfig::read(&home.path("llm")).unwrap();
    let [before, after] =
        ["one", "refined"].map(|dir| read_peft(&home.path(dir).join("adapter"), &model).unwrap());
    assert_eq!((after.layout.lora().rank, after.layout.lora().alpha), (18, 288.0));
    let mut moved = 0;
    for block in 0..3 {
        for (one, all) in before.layout.slices().iter().zip(after.layout.slices()) {
            let (x, y) = (
                &before.values[before.layout.range(block, one)],
                &after.values[after.layout.range(block, all)],
            );
            if one.factor == Factor::A {
                assert!(y.starts_with(x), "A of the translation");
            } else {
                let kept = x.chunks(16).zip(y.chunks(18)).all(|(x, y)| y.starts_with(x));
                assert!(kept, "B of the translation");
                moved += y.chunks(18).filter(|row| row[16..].iter().any(|&v| v != 0.0)).count();
            }
        }
    }
    assert!(moved > 0, "B of the new part starts as zero and is trained");
    let update = UpdateVector::read(&home.path("refined/update.safetensors")).unwrap();
    assert_eq!(update.values, after.values);

    // No answer, and no prompt, lies anywhere.
    let names: Vec<String> = std::fs::read_dir(home.path("refined"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, ["adapter", "record.json", "refinement.json", "update.safetensors"]);
    home.done(&["evaluate", "--data", "private.jsonl", "--adapter", "refined/adapter", "--out", "score"]);
    let score = home.json("score/score.json");
    assert_eq!((&score["method"], &score["refined"]), (&"products".into(), &true.into()));
    let sums = miniature::checksums(&home.path("refined"));
    home.done(&args);
    assert_eq!(miniature::checksums(&home.path("refined")), sums, "finished");
    home.done(&[&refine("one", "client-1/update.safetensors", "again")[..], &["--threads", "3"]].concat());
    let bytes = |dir: &str| std::fs::read(home.path(dir).join("update.safetensors")).unwrap();
    assert!(bytes("refined") == bytes("again"), "the same bytes on other threads");
}

#[test]
fn refinement_needs_consent_and_the_same_updates() {
    let home = Curated::with("num_subsets = 4", REFINE);
    home.translate(&["client-1"], "one", &[]);
    home.translate(&["client-2"], "two", &[]);
    home.translate(&["client-1"], "noise", &["--random-update"]);
    let refused = |args: &[&str], words: &[&str]| home.stage_refused(args, 1, words);
    refused(
        &refine("two", "client-2/update.safetensors", "out"),
        &["client-2", "has not agreed", "--allow-refinement"],
    );
    refused(&refine("one", "client-2/update.safetensors", "out"), &["one", "made of other updates"]);
    refused(&refine("noise", "client-1/update.safetensors", "out"), &["noise was translated"]);
    home.done(&refine("one", "client-1/update.safetensors", "out"));
    refused(
        &refine("out", "client-1/update.safetensors", "twice"),
        &["no translation that could be refined"],
    );
    assert!(!home.path("twice").exists());
}

#[test]
fn where_too_few_answers_agree_nothing_is_trained() {
    let settings = REFINE
        .replace("min_agreements = 2", "min_agreements = 12")
        .replace("min_confidence = 0.0", "min_confidence = 1.0");
    let home = Curated::with("num_subsets = 4", &settings);
    home.translate(&["client-1"], "one", &[]);
    home.done(&refine("one", "client-1/update.safetensors", "refined"));
    let found = home.json("refined/refinement.json");
    if found["rounds"][0]["agreed"] != 12 {
        assert_eq!(found["rounds"][0]["trained_on"], "nothing");
        let (before, after) = (home.dense("one"), {
            let update = UpdateVector::read(&home.path("refined/update.safetensors")).unwrap();
            dense(&home.layout(18), &update.values)
        });
        assert!(distance(&before, &after) == 0.0, "the translation as it was");
    }
}

/// What a directory holds, by the place of every file in it.
fn files(dir: &Path) -> BTreeMap<PathBuf, String> {
    let sums = miniature::checksums(dir).into_iter();
    sums.map(|(path, sum)| (path.strip_prefix(dir).unwrap().to_owned(), sum)).collect()
}

/// Starts a refinement, and kills it once something is so. Fails if it ended before.
fn killed_when(home: &Home, args: &[&str], is_time: impl Fn() -> bool, later: Duration) {
    let mut command = home.command(&[&["refine", "--run", "run", "--threads", "1"], &args[1..]].concat());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let began = Instant::now();
    while !is_time() {
        assert!(began.elapsed() < Duration::from_secs(120), "it never happened");
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(later);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().code(), None, "it was killed");
}

/// In the first round, after it, in the second one, and after that: one refinement, killed again and again.
#[test]
fn a_killed_refinement_ends_with_the_same_bytes() {
    let long = REFINE.replace("steps_per_round = 3", "num_rounds = 3\nsteps_per_round = 1500");
    let home = Curated::with("num_subsets = 4", &long);
    home.translate(&["client-1"], "one", &[]);
    let client = "client-1/update.safetensors";
    let began = Instant::now();
    home.done(&[&refine("one", client, "whole")[..], &["--threads", "1"]].concat());
    // Well within a round, also where the machine was busier before.
    let soon = (began.elapsed() / 8).min(Duration::from_millis(50));
    let found = home.json("whole/refinement.json");
    assert!(
        found["rounds"].as_array().unwrap().iter().all(|round| round["trained_on"] != "nothing"),
        "{found}"
    );

    let args = refine("one", client, "killed");
    let checkpoint = home.path("killed/round.safetensors");
    let content = || std::fs::read(&checkpoint).unwrap_or_default();
    killed_when(&home, &args, || home.path("killed/record.json").is_file(), soon);
    assert!(!checkpoint.exists(), "killed in the first round");
    killed_when(&home, &args, || checkpoint.is_file(), Duration::ZERO);
    let first = content();
    killed_when(&home, &args, || true, soon);
    assert!(content() == first, "killed in the second round");
    killed_when(&home, &args, || content() != first, Duration::ZERO);

    // Of a damaged checkpoint nothing is believed; the other directory continues with the last round.
    copy_tree(&home.path("killed"), &home.path("damaged"));
    let mut bytes = content();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(home.path("damaged/round.safetensors"), bytes).unwrap();
    let rounds = |out: &str| {
        let said = home.done(&refine("one", client, out));
        [1, 2, 3].map(|round| said.contains(&format!("refine: round {round}: ")))
    };
    assert_eq!((rounds("killed"), rounds("damaged")), ([false, false, true], [true, true, true]));
    let whole = files(&home.path("whole"));
    assert!(whole.len() >= 6, "{whole:?}");
    assert_eq!((files(&home.path("killed")), files(&home.path("damaged"))), (whole.clone(), whole.clone()));

    // The comparison sees what it should see.
    home.done(&[&refine("one", client, "other")[..], &["--set", "refine.steps_per_round=1499"]].concat());
    assert_ne!(files(&home.path("other")), whole);
}

#[test]
fn any_number_of_ranks_refines_to_the_same_bytes() {
    let home = Curated::with("num_subsets = 4", &format!("{REFINE}synthetic_prompts = 5\n"));
    home.translate(&["client-1"], "one", &[]);
    home.done(&refine("one", "client-1/update.safetensors", "alone"));
    let wanted = files(&home.path("alone"));
    let on_ranks = |size: usize, out: &str, other_steps: bool| {
        let job = Job {
            updates: vec![home.path("client-1/update.safetensors")],
            translated: home.path("one"),
            out: home.path(out),
            fold: None,
        };
        let set = if other_steps { vec!["refine.steps_per_round=2".to_string()] } else { vec![] };
        let args = RunArgs {
            run: home.path("run"),
            config: Some(home.path("settings.toml")),
            preset: None,
            device: None,
            dtype: None,
            tuples: None,
            translator: None,
            set,
        };
        std::thread::scope(|scope| {
            for comm in local(size) {
                let (job, args) = (&job, &args);
                scope.spawn(move || {
                    let world = World::of(Box::new(comm));
                    let ui = Ui::new("refine", true, false);
                    stage::run_on_ranks(&Context::new(Some(1), ui, &world), &world, args, job).unwrap();
                    assert_eq!(world.end(Ok(()), |_| 1), 0);
                });
            }
        });
        files(&home.path(out))
    };
    for size in [1, 2, 3] {
        assert_eq!(on_ranks(size, &format!("ranks-{size}"), false), wanted, "{size} ranks");
    }
    // Finished: nothing is done again.
    assert_eq!(on_ranks(3, "ranks-2", false), wanted);
    assert_ne!(on_ranks(2, "other", true), wanted, "the comparison sees other steps");
}

/// Long answers: some letters, which are other ones in every row, and a last answer after `####`.
fn with_long_answers(home: &Path) {
    for model in ["tiny", "llm"] {
        let path = home.join(model).join("tokenizer.json");
        let text = std::fs::read_to_string(&path).unwrap();
        // A word that no answer of these tasks has.
        assert!(text.contains("\"!\""));
        std::fs::write(&path, text.replace("\"!\"", "\"####\"")).unwrap();
    }
    for name in ["public.jsonl", "private.jsonl"] {
        let path = home.join(name);
        let rows = std::fs::read_to_string(&path).unwrap();
        let long = |row: &str| {
            let mut row: Value = serde_json::from_str(row).unwrap();
            let question = row["question"].as_str().unwrap();
            let letters: Vec<&str> = question.split(' ').rev().take(4).collect();
            row["answer"] = format!("{} #### a ;", letters.join(" ")).into();
            format!("{row}\n")
        };
        std::fs::write(&path, rows.lines().map(long).collect::<String>()).unwrap();
    }
    // Both models must learn how answers end.
    let path = home.join("settings.toml");
    let settings = std::fs::read_to_string(&path).unwrap();
    let longer = settings
        .replace("[curate.llm]\nmax_steps = 3", "[curate.llm]\nmax_steps = 1000")
        .replace("[finetune.tiny]\nmax_steps = 150", "[finetune.tiny]\nmax_steps = 1000")
        + "[lora]\nr = 8\ntarget_modules = \"all-linear\"\n";
    assert!(
        longer.matches("max_steps = 1000").count() == 2 && longer.contains("answer_extraction = \"whole\"")
    );
    std::fs::write(&path, longer).unwrap();
}

#[test]
fn long_answers_agree_by_what_follows_the_hashes() {
    let more = format!("{REFINE}num_rounds = 1\n");
    let home = Curated::edited("num_subsets = 4", &more, with_long_answers);
    home.translate(&["client-1"], "one", &[]);
    let by = |form: &str| {
        let out = format!("by-{form}");
        let extraction = format!("evaluate.answer_extraction={form}");
        let args = refine("one", "client-1/update.safetensors", &out);
        home.done(&[&args[..], &["--set", &extraction]].concat());
        home.json(&format!("{out}/refinement.json"))
    };
    let (hashes, whole) = (by("after_hashes"), by("whole"));
    let agreed = |found: &Value| found["rounds"][0]["agreed"].as_u64().unwrap();
    assert!(agreed(&hashes) >= 2 && agreed(&hashes) > agreed(&whole), "{hashes} {whole}");
    assert_eq!(hashes["rounds"][0]["trained_on"], "agreed");
}

#[test]
fn prompts_of_the_llm_are_filtered_and_asked() {
    let home = Curated::with("num_subsets = 4", &format!("{REFINE}synthetic_prompts = 6\n"));
    home.translate(&["client-1"], "one", &[]);
    let client = "client-1/update.safetensors";
    home.done(&refine("one", client, "refined"));
    let found = home.json("refined/refinement.json");
    let count = |what: &str| found["synthetic"][what].as_u64().unwrap();
    let left_out: u64 = ["empty", "too_long", "malformed", "duplicates"].map(count).iter().sum();
    assert_eq!(count("written"), count("kept") + left_out, "{found}");
    assert!((1..=6).contains(&count("kept")) && left_out > 0, "{found}");
    assert_eq!(found["prompts"].as_u64(), Some(12 + count("kept")));
    assert!(found["rounds"][0]["agreed"].as_u64().unwrap() <= 12 + count("kept"));

    // What is kept is none of the public prompts, and nothing but words.
    let prompts: Vec<String> = serde_json::from_value(home.json("refined/synthetic_prompts.json")).unwrap();
    assert_eq!(prompts.len() as u64, count("kept"));
    let public = std::fs::read_to_string(home.path("public.jsonl")).unwrap();
    for prompt in &prompts {
        assert!(!prompt.is_empty() && !public.contains(&format!("\"{prompt}\"")), "{prompt}");
        assert!(prompt.split(' ').all(|word| !["<bos>", "<unk>", ">", ";"].contains(&word)), "{prompt}");
    }
    // Again the same, on other threads; from other public prompts others.
    home.done(&[&refine("one", client, "again")[..], &["--threads", "3"]].concat());
    assert_eq!(files(&home.path("again")), files(&home.path("refined")));
    home.done(&[&refine("one", client, "other")[..], &["--set", "refine.num_prompts=11"]].concat());
    assert_ne!(home.json("other/synthetic_prompts.json"), home.json("refined/synthetic_prompts.json"));
    // Without any, the record is as it was before there were such prompts.
    home.done(&[&refine("one", client, "none")[..], &["--set", "refine.synthetic_prompts=0"]].concat());
    let record = home.json("none/record.json");
    assert_eq!(record["settings"]["refine"]["synthetic_prompts"], Value::Null);
    assert!(!home.path("none/synthetic_prompts.json").exists());
}
