//! What is named as `--run` and is no run: it is called by its name, and nothing is made.

#![allow(clippy::unwrap_used)]

use crate::home::Home;

/// Every stage that takes a run, on this one.
fn commands(run: &str) -> Vec<Vec<&str>> {
    let data = "private.jsonl";
    vec![
        vec!["curate", "--run", run],
        vec!["train", "--run", run],
        vec!["train", "--run", run, "--set", "train.learning_rate=0.1"],
        vec!["finetune", "--run", run, "--data", data, "--out", "out"],
        vec!["evaluate", "--run", run, "--data", data, "--out", "out"],
        vec!["translate", "--run", run, "update.safetensors", "--out", "out"],
        vec!["merge", "--run", run, "--adapter", "adapter", "--out", "out"],
        vec!["report", "--run", run],
        vec!["plan", "--run", run, "--gpu", "h100", "--tokens-per-example", "9"],
        vec!["submit", "--run", run, "--stage", "curate", "--dry-run"],
    ]
}

fn refuses(home: &Home, run: &str, words: &[&str]) {
    for args in commands(run) {
        let output = home.gradtx(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
        }
        assert!(!home.path("out").exists(), "{args:?}: an output directory was made");
    }
}

#[test]
fn mistyped_runs_are_not_made_and_get_a_suggestion() {
    let home = Home::miniature();
    std::fs::create_dir(home.path("run-seven")).unwrap();
    std::fs::copy(home.path("settings.toml"), home.path("run-seven/run.toml")).unwrap();
    refuses(&home, "run-sevn", &["no such directory", "did you mean run-seven?"]);
    refuses(&home, "quite-another", &["no such directory", "--config FILE"]);
    assert!(!home.path("run-sevn").exists() && !home.path("quite-another").exists());
}

#[test]
fn directories_of_other_kinds_are_named() {
    let home = Home::miniature();
    std::fs::create_dir(home.path("empty")).unwrap();
    std::fs::write(
        home.path("sweep.toml"),
        "[[sweep]]\nbase = \"settings.toml\"\ntrain.learning_rate = [0.1, 0.2]\n",
    )
    .unwrap();
    assert!(home.gradtx(&["sweep", "sweep.toml", "--out", "sweep"]).status.success());
    refuses(&home, "sweep", &["directory of a sweep", "learning_rate=0.1"]);
    refuses(&home, "tiny", &["model directory", "models.tiny"]);
    refuses(&home, "settings.toml", &["is a file"]);
    refuses(&home, "empty", &["empty directory", "--config FILE"]);
    assert_eq!(std::fs::read_dir(home.path("empty")).unwrap().count(), 0);
    let doctor = home.gradtx(&["doctor", "--run", "sweep"]);
    assert_eq!(doctor.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("directory of a sweep"));
    let status = home.gradtx(&["status", "swep"]);
    assert!(String::from_utf8_lossy(&status.stderr).contains("no such directory"));
}

#[test]
fn what_makes_runs_still_makes_them() {
    let home = Home::miniature();
    let output = home.gradtx(&["curate", "--run", "new", "--config", "settings.toml", "--threads", "1"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(home.path("new/run.toml").is_file());
    // A stage's directory in it is not the run.
    refuses(&home, "new/shadow", &["stage curate", "did you mean", "new"]);
    let again = home.gradtx(&["curate", "--run", "new", "--threads", "1"]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
}
