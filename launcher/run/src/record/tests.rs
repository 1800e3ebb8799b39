use super::*;
use serde_json::json;

fn opened(dir: &Path, settings: Value) -> Output {
    match open(dir, "test", settings).unwrap() {
        State::Open(output) => output,
        State::Finished => panic!("expected work to do"),
    }
}

#[test]
fn finished_work_is_recognised_and_damage_reopens_it() {
    let dir = tempfile::tempdir().unwrap();
    let output = opened(dir.path(), json!({"a": 1}));
    std::fs::write(dir.path().join("x"), "result").unwrap();
    output.finish(&["x".into()]).unwrap();
    let finished = || matches!(open(dir.path(), "test", json!({"a": 1})).unwrap(), State::Finished);
    assert!(finished());
    // As a kill leaves it after the last thing that was done.
    for name in [LOCK_FILE, "progress.json"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    assert!(finished());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "the record and the result");
    std::fs::write(dir.path().join("x"), "resulT").unwrap();
    opened(dir.path(), json!({"a": 1}));
}

/// They are no settings: work continues with others, and the same result stays finished.
#[test]
fn devices_of_all_attempts_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let text = || std::fs::read_to_string(dir.path().join(RECORD_FILE)).unwrap();
    let mut output = opened(dir.path(), json!({"a": 1}));
    let before = text();
    output.computed_on(BTreeSet::new()).unwrap();
    assert_eq!(text(), before, "on a CPU");
    assert!(!before.contains("computed_on"), "{before}");
    output.computed_on(["GPU 1".into()].into()).unwrap();
    // Stopped, and resumed elsewhere.
    drop(output);
    std::fs::write(dir.path().join("x"), "result").unwrap();
    let mut output = opened(dir.path(), json!({"a": 1}));
    output.computed_on(["GPU 2".into()].into()).unwrap();
    output.finish(&["x".into()]).unwrap();
    let record = read(&dir.path().join(RECORD_FILE)).unwrap();
    assert_eq!(record.computed_on, ["GPU 1".to_string(), "GPU 2".into()].into());
    assert!(matches!(open(dir.path(), "test", json!({"a": 1})).unwrap(), State::Finished));
}

/// A finished directory with a file `sub/x`.
fn finished() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let output = opened(dir.path(), json!({"a": 1, "xxh3": "", "lr": 0.1}));
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/x"), "result").unwrap();
    output.finish(&["sub/x".into()]).unwrap();
    dir
}

#[test]
fn a_record_that_was_changed_is_refused() {
    let dir = finished();
    let path = dir.path().join(RECORD_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let record = read(&path).unwrap();
    assert!(record.damaged(dir.path()).is_empty());
    let refused = |changed: String, say: &str| {
        assert_ne!(changed, text);
        std::fs::write(&path, changed).unwrap();
        let error = read(&path).unwrap_err();
        assert!(format!("{error:#}").contains(say), "{error:#}");
    };
    for at in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at] ^= 1 << (at % 7);
        std::fs::write(&path, &bytes).unwrap();
        assert!(read(&path).is_err(), "byte {at}: {}", String::from_utf8_lossy(&bytes));
    }
    refused(text.replace("\"test\"", "\"curate\""), "damaged, or changed by hand");
    refused(text.replace(&record.xxh3, ""), "has no checksum");
    for name in ["../x", "/etc/passwd", "sub/../../x", "./x", "", ".."] {
        refused(text.replace("sub/x", name), "within its directory");
    }
    std::fs::write(&path, &text).unwrap();
    assert_eq!(read(&path).unwrap(), record);
}

#[test]
fn finished_files_are_regular_files_of_the_directory() {
    let dir = finished();
    let file = dir.path().join("sub/x");
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(elsewhere.path(), "result").unwrap();
    let record = read(&dir.path().join(RECORD_FILE)).unwrap();
    assert!(record.problems(dir.path(), |_| true).is_empty());
    for (target, say) in
        [(elsewhere.path(), "outside of its directory"), (Path::new("/dev/zero"), "a device")]
    {
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(target, &file).unwrap();
        let problems = record.problems(dir.path(), |_| true);
        assert!(problems.len() == 1 && problems[0].contains(say), "{problems:?}");
        assert_eq!(record.damaged(dir.path()), ["sub/x"]);
    }
    assert!(record.problems(dir.path(), |name| name != "sub/x").is_empty());
}

#[test]
fn what_a_killed_process_left_half_written_goes() {
    let dir = finished();
    let left = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, "half").unwrap();
        path
    };
    let names = [".gradtx-a.tmp", "sub/.gradtx-b.tmp"].map(left);
    std::fs::remove_file(dir.path().join("sub/x")).unwrap();
    opened(dir.path(), json!({"a": 1, "xxh3": "", "lr": 0.1}));
    assert!(names.iter().all(|path| !path.exists()));
}

#[test]
fn other_settings_are_refused_with_a_diff() {
    let dir = tempfile::tempdir().unwrap();
    opened(dir.path(), json!({"a": {"lr": 1}, "b": 2}));
    let message = open(dir.path(), "test", json!({"a": {"lr": 3}, "b": 2})).err().unwrap().to_string();
    assert!(message.contains("- a.lr = 1\n  + a.lr = 3"), "{message}");
    assert!(!message.contains("b ="), "{message}");
}
