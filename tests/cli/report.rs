//! A walk-through without `--out`: every result lies in the run, and the report finds all of it.

#![allow(clippy::unwrap_used)]

use gradtx_run::command_log::{COMMANDS_FILE, LoggedCommand};
use gradtx_tests::miniature;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self { dir: tempfile::tempdir().unwrap() };
        miniature::write(home.dir.path());
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn gradtx(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradtx-under-test"));
        command.args(args).current_dir(self.dir.path()).output().unwrap()
    }

    fn done(&self, args: &[&str]) -> String {
        let output = self.gradtx(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
        said
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

#[test]
fn results_without_out_lie_in_the_run() {
    let home = Home::new();
    home.done(&["curate", "--run", "run", "--config", "settings.toml"]);
    home.done(&["train", "--run", "run"]);
    let adapter = |place: &str| format!("run/clients/private/{place}/adapter");
    for model in ["tiny", "llm"] {
        let data = ["--data", "private.jsonl", "--model", model, "--save-adapter"];
        home.done(&[&["finetune", "--run", "run"][..], &data].concat());
        let (base, tuned) = (["--model", model], adapter(&format!("finetuned/{model}")));
        let evaluate = ["evaluate", "--run", "run", "--data", "private.jsonl"];
        home.done(&[&evaluate[..], &base].concat());
        home.done(&[&evaluate[..], &base, &["--adapter", &tuned]].concat());
    }
    let update = "run/clients/private/finetuned/tiny/update.safetensors";
    home.done(&["translate", "--run", "run", update]);
    home.done(&["translate", "--run", "run", update, "--random-update"]);
    for what in ["grad-transformer", "random-student"] {
        let adapter = adapter(&format!("translated/{what}"));
        home.done(&["evaluate", "--run", "run", "--data", "private.jsonl", "--adapter", &adapter]);
    }
    for what in
        ["base-tiny", "base-llm", "finetuned-tiny", "finetuned-llm", "grad-transformer", "random-student"]
    {
        assert!(home.path(&format!("run/clients/private/evaluated/{what}/score.json")).is_file(), "{what}");
    }

    let said = home.done(&["report", "--run", "run", "--csv", "csv", "--predictions=3"]);
    assert!(said.contains("run/report-predictions.html holds private texts"), "{said}");
    let report: Value = serde_json::from_str(&home.text("run/report.json")).unwrap();
    assert_eq!((&report["missing"], &report["notes"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    assert_eq!(report["scores"][0]["rows"].as_array().unwrap().len(), 6);
    // The page has no text of an example, the page of predictions has; both need nothing else.
    let line: Value = serde_json::from_str(
        home.text("run/clients/private/evaluated/base-llm/predictions.jsonl").lines().next().unwrap(),
    )
    .unwrap();
    let prompt = line["prompt"].as_str().unwrap().replace('<', "&lt;").replace('>', "&gt;");
    let (page, predictions) = (home.text("run/report.html"), home.text("run/report-predictions.html"));
    assert!(!prompt.is_empty() && predictions.contains(&prompt) && !page.contains(&prompt));
    assert_eq!(predictions.matches("<article").count(), 3);
    assert!(!predictions.contains("<script") && !page.contains("<script"));
    assert!(
        home.text("csv/scores.csv").contains("LLM + Grad-Transformer,all,7,"),
        "{}",
        home.text("csv/scores.csv")
    );

    // Every command that worked on the run was noted, failures too; the report is none of them.
    let failed = home.gradtx(&["translate", "--run", "run", "nowhere.safetensors"]);
    assert_eq!(failed.status.code(), Some(1));
    let commands: Vec<LoggedCommand> = home
        .text(&format!("run/{COMMANDS_FILE}"))
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
    let home = Home::new();
    for args in [&["--predictions=0"][..], &["--predictions=many"]] {
        assert_eq!(
            home.gradtx(&[&["report", "--run", "run"], args].concat()).status.code(),
            Some(2),
            "{args:?}"
        );
    }
    home.done(&["curate", "--run", "run", "--config", "settings.toml"]);
    std::fs::write(home.path("file"), "").unwrap();
    let output = home.gradtx(&["report", "--run", "run", "--csv", "file"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("file"), "{said}");
}
