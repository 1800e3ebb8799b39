//! A walk-through without `--out`: every result lies in the run, and the report finds all of it.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, expect_success, stderr};
use gradtx_run::command_log::{COMMANDS_FILE, LoggedCommand};
use serde_json::Value;

/// A command that must end well; what it wrote to standard error.
fn done(home: &Home, args: &[&str]) -> String {
    let output = home.gradtx(args);
    expect_success(args, &output);
    stderr(&output)
}

#[test]
fn results_without_out_lie_in_the_run() {
    let home = Home::miniature();
    done(&home, &["curate", "--run", "run", "--config", "settings.toml"]);
    done(&home, &["train", "--run", "run"]);
    let adapter = |place: &str| format!("run/clients/private/{place}/adapter");
    for model in ["tiny", "llm"] {
        let data = ["--data", "private.jsonl", "--model", model, "--save-adapter"];
        done(&home, &[&["finetune", "--run", "run"][..], &data].concat());
        let (base, tuned) = (["--model", model], adapter(&format!("finetuned/{model}")));
        let evaluate = ["evaluate", "--run", "run", "--data", "private.jsonl"];
        done(&home, &[&evaluate[..], &base].concat());
        done(&home, &[&evaluate[..], &base, &["--adapter", &tuned]].concat());
    }
    let update = "run/clients/private/finetuned/tiny/update.safetensors";
    done(&home, &["translate", "--run", "run", update]);
    done(&home, &["translate", "--run", "run", update, "--random-update"]);
    for what in ["grad-transformer", "random-student"] {
        let adapter = adapter(&format!("translated/{what}"));
        done(&home, &["evaluate", "--run", "run", "--data", "private.jsonl", "--adapter", &adapter]);
    }
    for what in
        ["base-tiny", "base-llm", "finetuned-tiny", "finetuned-llm", "grad-transformer", "random-student"]
    {
        assert!(home.path(&format!("run/clients/private/evaluated/{what}/score.json")).is_file(), "{what}");
    }

    let said = done(&home, &["report", "--run", "run", "--csv", "csv", "--predictions=3"]);
    assert!(said.contains("run/report-predictions.html holds private texts"), "{said}");
    let report: Value = serde_json::from_str(&home.read("run/report.json")).unwrap();
    assert_eq!((&report["missing"], &report["notes"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    assert_eq!(report["scores"][0]["rows"].as_array().unwrap().len(), 6);
    // The page has no text of an example, the page of predictions has; both need nothing else.
    let line: Value = serde_json::from_str(
        home.read("run/clients/private/evaluated/base-llm/predictions.jsonl").lines().next().unwrap(),
    )
    .unwrap();
    let prompt = line["prompt"].as_str().unwrap().replace('<', "&lt;").replace('>', "&gt;");
    let (page, predictions) = (home.read("run/report.html"), home.read("run/report-predictions.html"));
    assert!(!prompt.is_empty() && predictions.contains(&prompt) && !page.contains(&prompt));
    assert_eq!(predictions.matches("<article").count(), 3);
    assert!(!predictions.contains("<script") && !page.contains("<script"));
    assert!(
        home.read("csv/scores.csv").contains("LLM + Grad-Transformer,all,7,"),
        "{}",
        home.read("csv/scores.csv")
    );

    // Every command that worked on the run was noted, failures too; the report is none of them.
    let failed = home.gradtx(&["translate", "--run", "run", "nowhere.safetensors"]);
    assert_eq!(failed.status.code(), Some(1));
    let commands: Vec<LoggedCommand> = home
        .read(&format!("run/{COMMANDS_FILE}"))
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let codes = commands.iter().map(|command| command.exit_code);
    assert_eq!(codes.filter(|code| *code != 0).collect::<Vec<_>>(), [1]);
    assert_eq!(commands[0].command[..3], ["gradtx", "curate", "--run"]);
    assert_eq!(commands.len(), 13);
    assert!(page.contains("gradtx curate --run run --config settings.toml"));
}

#[test]
fn requests_that_make_no_page_are_refused() {
    let home = Home::miniature();
    for args in [&["--predictions=0"][..], &["--predictions=many"]] {
        assert_eq!(
            home.gradtx(&[&["report", "--run", "run"], args].concat()).status.code(),
            Some(2),
            "{args:?}"
        );
    }
    done(&home, &["curate", "--run", "run", "--config", "settings.toml"]);
    std::fs::write(home.path("file"), "").unwrap();
    let output = home.gradtx(&["report", "--run", "run", "--csv", "file"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("file"), "{said}");
}
