//! The report of whole, partly done, damaged and empty run directories.

mod files;

use self::files::{Files, SECRET, SUBSETS};
use super::html::page;
use super::predictions::{Example, Predictions};
use super::*;
use crate::table::Entry;
use gradtx_pipeline::records::RefineInputs;
use gradtx_run::record::{self, State};
use gradtx_run::stage::Inputs;
use gradtx_runtime::artifact::write_json;
use serde_json::{Value, json};

/// What a page must be, whatever is on it.
fn check_page(report: &Report) -> String {
    let page = page(report).unwrap();
    // A note about a file may report that it found NaN there.
    let told = page.split("id=\"not-used\"").next().unwrap();
    assert!(!told.contains("NaN") && !told.contains("inf<"), "what is no number is on the page");
    for wrong in ["<script", "http://", "https://", "src=", SECRET] {
        assert!(!page.contains(wrong), "`{wrong}` is on the page");
    }
    for tag in ["section", "figure", "svg", "table", "tr", "td", "th", "div", "p", "li", "ul", "text"] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "<{tag}>");
    }
    let mut ids: Vec<&str> = page.split(" id=\"").skip(1).map(|t| t.split('"').next().unwrap()).collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id twice");
    page
}

#[test]
fn a_whole_run() {
    let files = Files::whole();
    let report = files.report();
    assert_eq!((report.missing.clone(), report.notes.clone()), (vec![], vec![]));
    let headline = &report.scores[0].headline;
    assert!((headline.pgr.unwrap() - 100.0 * 0.3 / 0.34).abs() < 1e-9);
    assert_eq!((headline.examples, headline.clients), (150, 3));
    let tuples = report.tuples.as_ref().unwrap();
    assert_eq!((tuples.tuples, tuples.tasks), (12, Some(2)));
    assert_eq!(tuples.student.steps, [3, 4]);
    let cosines = tuples.teacher.cosines.as_ref().unwrap();
    assert!(cosines.within_centred.unwrap().low > cosines.between_centred.unwrap().high);
    let translator = report.translator.as_ref().unwrap();
    assert_eq!((translator.best.as_ref().unwrap().step, translator.not_finite), (6, 1));
    assert_eq!(report.clients.each.len(), 6);
    assert_eq!(report.shadow.llm.as_ref().unwrap().jobs, SUBSETS);
    let rows = report.rows.shadow.as_ref().unwrap();
    assert_eq!((rows.subsets, rows.smallest, rows.largest), (SUBSETS, 2, 2));
    assert_eq!((report.times.tokens[0].tokens, report.times.tokens[0].tokens_per_s), (200, Some(200.0)));
    assert_eq!(report.times.translator.as_ref().unwrap().seconds, Some(9.0 * 32.0 / 64.0));
    let page = check_page(&report);
    assert!(page.contains("&lt;script&gt;alert(1)") && page.matches("<svg").count() == 13);
    let json = serde_json::to_string(&report).unwrap();
    assert!(!json.contains(SECRET) && !json.contains(&files.dir.path().display().to_string()));
}

#[test]
fn report_bytes_follow_from_files_except_for_times() {
    let content = |files: &Files| {
        let mut value = serde_json::to_value(files.report()).unwrap();
        assert_eq!(value["schema"], 1);
        assert!(value.as_object_mut().unwrap().remove("times").is_some());
        value.to_string()
    };
    let (first, second) = (Files::whole(), Files::whole());
    let before = content(&first);
    assert_eq!(content(&second), before);
    second.lines("shadow/throughput-tiny.jsonl", [json!({ "tokens": 5, "seconds": 9.0 })]);
    assert_eq!(content(&second), before);
    second.score(1, Entry::GRAD_TRANSFORMER, Some(0.7));
    assert_ne!(content(&second), before);
    // The report's own files are no input.
    write_json(&first.run().join("report.json"), &first.report()).unwrap();
    assert_eq!(content(&first), before);
}

#[test]
fn what_is_missing_is_said() {
    let files = Files::new();
    let report = files.report();
    let page = check_page(&report);
    for what in ["no run.toml", "gradtx evaluate", "gradtx curate", "gradtx train", "gradtx finetune"] {
        assert!(report.missing.iter().any(|m| m.contains(what)), "{what}: {:?}", report.missing);
    }
    assert!(page.contains("no scores yet") && !page.contains("<svg"));

    files.settings();
    files.lines("shadow/metrics/tiny-00000.jsonl", [json!({ "subset": 0, "step": 1, "loss": 1.5 })]);
    files.put("shadow/record.json", r#"{"stage":"curate","version":"1","settings":{},"outputs":{}}"#);
    let report = files.report();
    assert!(report.missing.iter().any(|m| m.contains("TinyLM: 1 of 6 jobs")), "{:?}", report.missing);
    assert!(report.missing.iter().any(|m| m.contains("`curate` has not finished")));
    assert_eq!(check_page(&report).matches("<svg").count(), 1);
}

#[test]
fn what_is_damaged_is_named_and_the_rest_is_there() {
    let files = Files::whole();
    files.put("run.toml", "no = [\n");
    files.put("shadow/metrics/llm-00000.jsonl", "{\"subset\": 0,\n");
    files.put("shadow/subsets.json", "7");
    files.put("clients/1/tiny/update.safetensors", "no");
    files.put("clients/2/llm/record.json", "[]");
    files.put("clients/3/evaluated/old/score.json", "{\"examples\": 3}");
    let shard = files.run().join("shadow/shards/00002.teacher.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&shard, bytes).unwrap();
    let report = files.report();
    for what in
        ["run.toml", "llm-00000", "subsets.json", "1/tiny/update", "2/llm/record", "old/score", "tuples"]
    {
        assert!(report.notes.iter().any(|note| note.contains(what)), "{what}: {:#?}", report.notes);
    }
    let home = files.dir.path().display().to_string();
    assert!(report.notes.iter().all(|note| !note.contains('\n')));
    assert!(report.tuples.is_none() && report.scores[0].headline.pgr.is_some());
    assert!(!check_page(&report).contains(&home), "{:#?}", report.notes);
}

#[test]
fn scores_that_are_not_numbers_do_not_break_the_page() {
    let files = Files::whole();
    files.score(2, Entry::GRAD_TRANSFORMER, None);
    let report = files.report();
    assert_eq!(report.scores[0].headline.clients, 2);
    check_page(&report);
    for client in 1..=3 {
        files.score(client, Entry::GRAD_TRANSFORMER, None);
    }
    let report = files.report();
    assert_eq!(report.scores[0].headline.pgr, None);
    assert!(check_page(&report).contains("no score yet"));
}

#[test]
fn evaluations_elsewhere_are_found() {
    let (run, other) = (Files::new(), Files::whole());
    let report = Report::of(&run.run(), &[&other.run(), &other.run()]).unwrap();
    assert_eq!((report.scores[0].table.data.len(), report.notes.len()), (3, 0));
    assert!(report.tuples.is_none() && report.clients.each.len() == 6);
    assert!(Report::of(&run.run(), &[Path::new("/nowhere/at/all")]).is_err());
    check_page(&report);
}

/// `predictions.jsonl` of one model and client.
fn put_predictions(files: &Files, client: usize, entry: Entry, lines: &[Value]) {
    let dir = format!("clients/{client}/evaluated/{}", entry.label().replace(' ', "-"));
    files.lines(&format!("{dir}/predictions.jsonl"), lines.to_vec());
}

fn answer(line: u64, prediction: &str, reference: &str) -> Value {
    json!({
        "line": line, "prompt": format!("<user> question {line}"), "prediction": prediction,
        "reference": reference, "right": prediction == reference, "rouge1": 0.5, "ended": line != 3,
    })
}

fn predictions(files: &Files, most: usize) -> Predictions {
    Predictions::of(&mut Source::open(&files.run(), &[]).unwrap(), most)
}

#[test]
fn answers_of_all_models_stand_beside_each_other() {
    let files = Files::new();
    let small = Entry::Finetuned(gradtx_run::role::Role::Tiny);
    for entry in [Entry::GRAD_TRANSFORMER, small, Entry::RANDOM_STUDENT] {
        files.score(1, entry, Some(0.5));
    }
    let references = ["a b", "<c>", "d", "e"];
    let all = |wrong: usize, text: &str| -> Vec<Value> {
        let line = |(i, reference): (usize, &&str)| {
            answer(i as u64 + 1, if i == wrong { text } else { reference }, reference)
        };
        references.iter().enumerate().map(line).collect()
    };
    put_predictions(&files, 1, Entry::GRAD_TRANSFORMER, &all(0, "a <x>"));
    put_predictions(&files, 1, small, &all(1, "none"));
    files.put("clients/1/evaluated/LLM-+-random-student/predictions.jsonl", "{\"line\": 1}\n");
    let found = predictions(&files, 100);
    assert_eq!((found.sets.len(), found.notes.len()), (1, 1), "{:?}", found.notes);
    assert!(found.notes[0].contains("not predictions"), "{:?}", found.notes);
    let set = &found.sets[0];
    assert_eq!((set.all, set.models.clone()), (4, vec![small, Entry::GRAD_TRANSFORMER]));
    assert_eq!(set.examples.iter().map(Example::is_disputed).collect::<Vec<_>>(), [true, true, false, false]);

    let page = html::predictions_page(&found).unwrap();
    for part in [
        "<article class=\"example disputed missed\">",
        "&lt;user&gt; question 1",
        "<ins>&lt;x&gt;</ins>",
        "<del>b</del>",
        "wrong, cut at the limit",
        "Private texts",
    ] {
        let there = page.contains(part);
        // Line 3 is right by both models and was cut.
        assert_eq!(there, part != "wrong, cut at the limit", "{part}: {page}");
    }
    assert!(page.contains("right, cut at the limit") && !page.contains("<script"));
    let some = predictions(&files, 2);
    assert_eq!(some.sets[0].examples.iter().map(|example| example.line).collect::<Vec<_>>(), [1, 3]);
    assert!(html::predictions_page(&some).unwrap().contains("2 of 4 examples, evenly spaced"));
    // The report itself has none of it.
    assert!(!check_page(&files.report()).contains("question 1"));
    assert!(html::predictions_page(&predictions(&Files::new(), 3)).unwrap().contains("no predictions"));
}

#[test]
fn csv_files_have_the_numbers_of_the_report() {
    let files = Files::whole();
    let report = files.report();
    let dir = files.dir.path().join("csv");
    csv::write(&dir, &report).unwrap();
    let lines = |name: &str| -> Vec<String> {
        std::fs::read_to_string(dir.join(name)).unwrap().lines().map(String::from).collect()
    };
    let scores = lines("scores.csv");
    assert_eq!(scores[0], "metric,model,test_data,examples,score,interval,pgr,pgr_interval");
    assert!(scores[1].starts_with("exact_match,TinyLM fine-tuned (P_S),all,150,50,0,,"), "{}", scores[1]);
    assert_eq!(scores.len(), 1 + 4 * 4);
    assert_eq!(lines("clients.csv").len(), 1 + 6);
    assert_eq!(lines("losses.csv")[1], "shadow,tiny,1,2,2,2,");
    let translator = lines("translator.csv");
    assert_eq!((translator.len(), translator[4].as_str()), (10, "4,,3,,,"));
    assert_eq!(translator[3], "3,0.3333333333333333,3,,0.9,0.1");
    assert_eq!(lines("throughput.csv")[1], "curate,tiny,group,1,tokens,200");
}

#[test]
fn refinements_commands_and_learning_rates_are_shown() {
    use gradtx_pipeline::stages::refine::REFINEMENT_FILE;
    let files = Files::whole();
    let line = json!({
        "started": "2026-01-02 03:04:05", "seconds": 61.0, "host": "node<1>", "ranks": 8, "threads": 4,
        "command": ["gradtx", "curate", "--config=/home/me/run.toml", "/home/me/data"], "version": "9.9",
        "slurm_job": "4711", "exit_code": 75,
    });
    files.lines("commands.jsonl", [line]);
    let rate = |step: usize| json!({ "step": step, "loss": 1.0, "learning_rate": 1e-3 / step as f64 });
    files.lines("translator/metrics.jsonl", (1..=4).map(rate));
    files.lines("clients/2/tiny/metrics.jsonl", (1..=4).map(rate));
    files.put(
        &format!("clients/1/refined/{REFINEMENT_FILE}"),
        r#"{"prompts": 8, "answered": 7, "sure": 0.5, "rounds": [{"agreed": 6, "share": 0.75, "trained_on": "agreed", "loss": 0.5}]}"#,
    );
    let inputs = serde_json::from_value::<RefineInputs>(refine_inputs()).unwrap();
    let dir = files.run().join("clients/1/refined");
    let State::Open(mut output) = record::open(&dir, "refine", inputs.value().unwrap()).unwrap() else {
        panic!("finished")
    };
    output.assume(vec!["prompt: that of <the model>".into()]).unwrap();
    output.finish(&[REFINEMENT_FILE.into()]).unwrap();
    let report = files.report();
    assert_eq!(report.notes, [""; 0]);
    assert_eq!(report.refinements[0].rounds[0].agreed, 6);
    let page = check_page(&report);
    for part in [
        "75.0\u{a0}%",
        "prompt: that of &lt;the model&gt;",
        "node&lt;1&gt;, SLURM job 4711",
        "gradtx curate --config=run.toml data",
        "8 × 4",
        "id=\"learning-rate-t\"",
        "id=\"translator-rate-t\"",
        "href=\"#refinement\"",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("/home/me") && !serde_json::to_string(&report).unwrap().contains("/home/me"));
    files.put("commands.jsonl", "{}\n");
    files.put(&format!("clients/1/refined/{REFINEMENT_FILE}"), "{}");
    let notes = files.report().notes;
    assert!(notes.len() == 2 && notes.iter().any(|note| note.contains(REFINEMENT_FILE)), "{notes:?}");
}

fn refine_inputs() -> Value {
    let defaults = json!(gradtx_run::config::Config::default());
    json!({
        "seed": 1, "data": "d", "format": "auto", "instruction": "published", "prompt": "auto", "max_length": 1,
        "refine": defaults["refine"], "recipe": defaults["finetune"]["llm"], "evaluate": defaults["evaluate"],
        "updates": [], "translated": [], "method": "products", "tiny": "t", "llm": "l",
        "lora": json!(gradtx_train::model_spec::AdapterInputs::default()), "device": defaults["device"],
    })
}

#[test]
fn translators_on_held_out_groups_are_reported() {
    use gradtx_run::role::Role::{Llm, Tiny};
    use gradtx_train::baselines::Method;
    let files = Files::whole();
    let [ridge, products] = ["ridge", "products"].map(|name| Method::named(name).unwrap());
    let clients: Vec<Value> = (0..4)
        .map(|i| {
            let home = format!("cross-validation/fold-{}/shadow-{i:05}", i % 2 + 1);
            let good = i > 0;
            for (entry, score) in [
                (Entry::Finetuned(Tiny), 0.5),
                (Entry::Finetuned(Llm), 1.0),
                (Entry::translated(ridge), if good { 0.75 } else { 0.5 }),
                (Entry::translated(products), if good { 1.0 } else { 0.5 }),
                (Entry::Refined(products), 1.0),
            ] {
                files.score_in(&home, 10 + i, entry, Some(score));
            }
            let agreement = if good { 0.4 } else { 0.05 };
            json!({ "name": format!("task {i}"), "fold": i % 2 + 1, "shadow": i,
                "data": format!("test-{}", 10 + i), "distance": 0.5, "agreement": agreement })
        })
        .collect();
    assert!(files.report().cross_validation.is_none(), "it is not finished");
    files.put("cross-validation/clients.json", &json!(clients).to_string());
    let report = files.report();
    assert_eq!(report.notes, [""; 0]);
    assert_eq!(report.scores[0].table.data.len(), 3, "groups of shadows are no clients");
    let summary = report.cross_validation.as_ref().unwrap();
    assert_eq!((summary.clients, summary.against.as_str()), (4, "LLM + ridge regression"));
    let page = check_page(&report);
    for part in [
        "href=\"#cross-validation\"",
        "LLM + products, refined",
        "less ridge",
        "62.5",
        "share of answers that agree",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let dir = files.dir.path().join("csv");
    csv::write(&dir, &report).unwrap();
    let text = std::fs::read_to_string(dir.join("cross-validation.csv")).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 4, "{text}");
    let of_products = rows.iter().find(|row| row[0] == "LLM + products").unwrap();
    // 0, 100, 100, 100 against 0, 50, 50, 50.
    assert_eq!((of_products[2], of_products[5], of_products[7]), ("75", "3", "37.5"));
    assert_eq!((of_products[10], of_products[11]), ("3", "0"));
    // Damaged: said, and the rest of the report is there.
    files.put("cross-validation/clients.json", "{}");
    let report = files.report();
    assert!(
        report.cross_validation.is_none() && report.notes[0].contains("clients.json"),
        "{:?}",
        report.notes
    );
}

#[test]
fn comparisons_have_all_translators_of_clients() {
    use gradtx_train::baselines::Method;
    let (one, two) = (Files::whole(), Files::whole());
    let products = Method::named("products").unwrap();
    for client in 1..=3 {
        two.score(client, Entry::translated(products), Some(0.7));
        two.score(client, Entry::Refined(products), Some(0.8));
    }
    two.score_in("cross-validation/fold-1/shadow-00000", 9, Entry::Refined(products), Some(0.1));
    let found = comparison::Comparison::of(&[one.run(), two.run()]).unwrap();
    let models: Vec<Vec<&str>> = found
        .runs
        .iter()
        .map(|run| run.scores.iter().filter_map(|score| score.model.as_deref()).collect())
        .collect();
    assert_eq!(models[0], ["LLM + Grad-Transformer", "LLM + random student"]);
    assert!(models[1].contains(&"LLM + products") && models[1].contains(&"LLM + products, refined"));
    assert!(found.runs[1].scores.iter().all(|score| score.clients == 3), "{:?}", found.text());
}

#[test]
fn tuples_and_translators_of_another_run_are_reported() {
    let (whole, other) = (Files::whole(), Files::new());
    other.put("run.toml", &format!("[reuse]\ntuples = {0:?}\ntranslator = {0:?}\n", whole.run()));
    let report = other.report();
    assert_eq!(report.tuples.as_ref().unwrap().subsets, SUBSETS);
    assert_eq!(
        (report.translator.as_ref().unwrap().steps, report.shadow.tiny.as_ref().unwrap().jobs),
        (9, 6)
    );
    assert_eq!(report.notes, [""; 0]);
    check_page(&report);
}
