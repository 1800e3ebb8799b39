//! Run directories, devices, batch scripts, and how the program ends.

use crate::common::{Case, End, PROGRAM, UPDATE, end_of};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

// A typo in `--run`.

#[test]
fn no_stage_makes_a_run_by_a_typo() {
    let case = Case::smoke();
    case.copy("a/run", "runs/first");
    let data = "a/world/private/client-1/test.jsonl";
    let stages = [
        format!("finetune --data {data} --out o"),
        format!("evaluate --data {data} --out o"),
        format!("translate {UPDATE} --out o"),
        "merge --adapter a/run/clients/client-1/translated/mean/adapter --out o".into(),
        "train".into(),
        "curate".into(),
        "report".into(),
    ];
    for stage in stages {
        for typo in ["runs/frist", "nowhere/at/all"] {
            let end = case.run(&format!("{stage} --run {typo}"));
            assert_eq!(end.code, Some(2), "{end:#?}");
            end.says(&[typo]);
            assert!(
                !case.path(typo).exists() && !case.path("nowhere").exists() && !case.path("o").exists(),
                "{stage}"
            );
        }
    }
}

#[test]
fn the_right_name_is_guessed() {
    let case = Case::smoke();
    case.copy("a/run", "runs/first");
    case.run("train --run runs/frist").refused().says(&["runs/first|`first`"]);
}

/// What a directory is when it is no run.
#[test]
fn directories_that_are_no_run_are_named() {
    let case = Case::smoke();
    std::fs::create_dir(case.path("hollow")).unwrap();
    case.write("file", "x");
    let kinds = [
        ("hollow", "empty"),
        ("file", "file"),
        ("a/world/tiny", "model"),
        ("a/run/translator", "train|translator"),
        ("a/run/clients/client-1/finetuned/tiny", "finetune"),
    ];
    for (dir, kind) in kinds {
        for stage in ["train", "report"] {
            let end = case.run(&format!("{stage} --run {dir}"));
            assert_eq!(end.code, Some(2), "{end:#?}");
            end.says(&[dir, kind]);
        }
    }
    assert!(std::fs::read_dir(case.path("hollow")).unwrap().next().is_none(), "nothing is made");
    assert!(!case.path("a/world/tiny/run.toml").exists());
}

/// The control: a run file makes a run.
#[test]
fn a_run_file_makes_a_run() {
    let case = Case::new();
    case.finetune("one.jsonl", "c", &["--set", "finetune.tiny.max_steps=1"]).well();
    assert!(case.path("r-c/run.toml").is_file());
}

// Devices.

#[test]
fn gpus_that_the_settings_would_not_use() {
    let case = Case::smoke();
    // Without a `sbatch`: nothing is submitted in earnest.
    let submit = |device: &str, words: &str| {
        let line = format!(
            "submit --run r --config a/run/run.toml --set device.kind={device} --stage curate {words}"
        );
        let mut command = case.command(&line.split(' ').collect::<Vec<_>>());
        command.env("PATH", "");
        end_of(command).refused()
    };
    for words in ["--nodes 8 --gpus-per-node 4", "--gpus-per-node 1", "--array 4 --gpus-per-node 1"] {
        submit("cpu", words).says(&["device.kind", "GPU"]);
        assert!(!case.path("r").exists(), "nothing is made");
    }
    submit("cuda", "--gpus-per-node 0").says(&["cuda", "GPU"]);
}

#[test]
fn a_plan_for_gpus_that_would_not_be_used() {
    let case = Case::smoke();
    let end = case.run(
        "plan --config a/run/run.toml --set device.kind=cpu --gpu h100 --nodes 8 --tokens-per-example 10",
    );
    end.says(&["device.kind"]);
    // The control: a plan for the processor.
    case.run("plan --config a/run/run.toml --set device.kind=cpu --gpu cpu --tokens-per-example 10").well();
}

#[test]
fn the_device_is_said() {
    let case = Case::new();
    let few = ["--set", "finetune.tiny.max_steps=1"];
    case.finetune("one.jsonl", "c", &few).well().says(&["device", "cpu"]);
    case.finetune("one.jsonl", "d", &[&few[..], &["--device", "auto"]].concat()).well();
    assert_eq!(case.values("c/update.safetensors"), case.values("d/update.safetensors"));
    assert!(case.read("r-d/run.toml").contains("auto"));
}

// Batch scripts.

/// Submits with more words to a `sbatch` that keeps the script; the scripts it got.
fn submit(case: &Case, run: &str, more: &[&str]) -> (End, Vec<String>) {
    for script in scripts_in(case) {
        std::fs::remove_file(script).unwrap();
    }
    if case.path(run).is_dir() {
        case.remove(run);
    }
    case.write("bin/sbatch", "#!/bin/bash\nprintf '%s\\n' \"$@\" >> \"$CASE/words\"\nfor last; do :; done\nif [ -f \"$last\" ]; then cp \"$last\" \"$CASE/script.$RANDOM$RANDOM\"; else cat > \"$CASE/script.$RANDOM$RANDOM\"; fi\necho 7\n");
    std::fs::set_permissions(case.path("bin/sbatch"), PermissionsExt::from_mode(0o755)).unwrap();
    let words =
        ["submit", "--run", run, "--config", "a/run/run.toml", "--stage", "curate", "--gpus-per-node=0"];
    let mut command = case.command(&[&words[..], more].concat());
    let path = format!("{}:{}", case.path("bin").display(), std::env::var("PATH").unwrap());
    command.env("PATH", path).env("CASE", case.path(""));
    let end = end_of(command);
    (end, scripts_in(case).iter().map(|path| std::fs::read_to_string(path).unwrap()).collect())
}

fn scripts_in(case: &Case) -> Vec<PathBuf> {
    let files = std::fs::read_dir(case.path("")).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.file_name().unwrap().as_bytes().starts_with(b"script.")).collect()
}

/// Lines that `sbatch` takes for options: those before the first command.
fn options(script: &str) -> Vec<&str> {
    let head = script.lines().skip(1).take_while(|line| line.is_empty() || line.starts_with('#'));
    head.filter(|line| line.starts_with("#SBATCH")).collect()
}

#[test]
fn words_of_a_submission_stay_words() {
    let case = Case::smoke();
    let (end, scripts) = submit(&case, "plain", &["--partition=gpu", "--account=a1", "--time=1:00:00"]);
    end.well();
    assert_eq!(scripts.len(), 1);
    let (count, commands) = (options(&scripts[0]).len(), scripts[0].lines().count());
    let hostile = [
        "x\ntouch PWNED\n#",
        "x\n#SBATCH --wrap=touch",
        "x\" --uid=root \"",
        "x' --chdir=/ '",
        "x --exclusive --uid=0",
        "$(touch PWNED)",
        "`touch PWNED`",
        "x; touch PWNED",
        "x\rtouch PWNED",
        "",
        "--help",
    ];
    for word in hostile {
        for option in ["--partition", "--account", "--time"] {
            let (end, scripts) = submit(&case, "plain", &[&format!("{option}={word}")]);
            end.ended();
            for script in scripts {
                assert!(
                    options(&script).len() <= count && script.lines().count() <= commands,
                    "{option}={word:?}: {script}"
                );
                assert!(
                    options(&script).iter().all(|line| line.matches("--").count() <= 1),
                    "{option}={word:?}: {script}"
                );
            }
            assert!(!case.path("PWNED").exists());
        }
    }
}

#[test]
fn extra_options_are_single_options() {
    let case = Case::smoke();
    for word in ["--qos=a\ntouch PWNED", "--qos=a --uid=0", "--qos=\"a", "qos=a", "--comment=$(touch PWNED)"]
    {
        let (end, scripts) = submit(&case, "plain", &[&format!("--sbatch={word}")]);
        end.ended();
        for script in scripts {
            let lines = options(&script);
            assert!(
                lines.iter().all(|line| line.matches("--").count() <= 1 && !line.contains("$(")),
                "{word:?}: {script}"
            );
            assert!(!script.lines().any(|line| line.starts_with("touch")), "{word:?}: {script}");
        }
    }
}

/// Paths of runs: refused, or scripts that `bash` reads as they are meant.
#[test]
fn paths_of_runs_in_scripts() {
    for run in [
        "with space",
        "it's",
        "a\"b",
        "$(touch PWNED)",
        "`touch PWNED`",
        "per%cent",
        "new\nline",
        "back\\slash",
        "-dash",
    ] {
        let case = Case::smoke();
        let (end, scripts) = submit(&case, &format!("./{run}"), &[]);
        let submitted = end.ended().code == Some(0);
        assert_eq!(submitted, !scripts.is_empty(), "{run:?}");
        for script in scripts {
            case.write(
                "read.sh",
                script
                    .split_inclusive('\n')
                    .map(|line| {
                        if line.trim_start().starts_with("srun ") { format!(": {line}") } else { line.into() }
                    })
                    .collect::<String>(),
            );
            let read = Command::new("bash")
                .arg("-n")
                .arg("read.sh")
                .current_dir(case.path(""))
                .stderr(Stdio::null())
                .status()
                .unwrap();
            assert!(read.success(), "{run:?}: {script}");
            assert!(!script.lines().any(|line| line.starts_with("line")), "{run:?}: {script}");
        }
        assert!(!case.path("PWNED").exists(), "{run:?}");
    }
}

// How the program ends.

#[test]
fn a_full_disk_is_a_failure() {
    let case = Case::new();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    for line in ["inspect base", "--help", "plan --help", "--version"] {
        let output = case.command(&line.split(' ').collect::<Vec<_>>()).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(!output.stderr.is_empty(), "{line}: a word about it");
    }
}

#[test]
fn a_reader_that_left_stops_no_stage() {
    let case = Case::new();
    let mut command = case.command(&[
        "finetune",
        "--run",
        "r",
        "--config",
        "run.toml",
        "--data",
        "one.jsonl",
        "--out",
        "c",
        "--set",
        "finetune.tiny.max_steps=2",
    ]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = command.stdout(writer).stderr(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(case.path("c/update.safetensors").is_file());
}

/// Starts a process that looks as if it were on another node, without locks.
fn elsewhere(case: &Case, script: &str) -> Option<Command> {
    case.write(
        "n.c",
        "#include <errno.h>\nint flock(int a, int b) { (void)a; (void)b; errno = ENOTSUP; return -1; }\n",
    );
    let library = case.path("n.so");
    let made =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(case.path("n.c")).status();
    let may = Command::new("unshare").args(["-u", "true"]).status().is_ok_and(|s| s.success());
    if !made.is_ok_and(|s| s.success()) || !may {
        eprintln!("not tested: needs cc, and a user who may `unshare -u`");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-u", "sh", "-c", script]).env("LD_PRELOAD", library).current_dir(case.path(""));
    Some(command)
}

/// What another node left behind when it died is no sign of life for ever, whatever its clock said.
#[test]
fn progress_of_a_dead_node_is_overcome() {
    for seconds in [-86_400i64, 86_400 * 365] {
        let case = Case::smoke();
        let Some(first) = elsewhere(
            &case,
            &format!("hostname far; exec '{PROGRAM}' train --run a/run --threads 1 --quiet"),
        ) else {
            return;
        };
        let settings = case.read("a/run/run.toml");
        let (before, train) = settings.split_once("[train]").unwrap();
        case.remove("a/run/translator");
        case.write(
            "a/run/run.toml",
            format!("{before}[train]{}", train.replacen("max_steps = 4", "max_steps = 400000", 1)),
        );
        let mut first = { first }.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let progress = "a/run/translator/progress.json";
        while !(case.path(progress).exists() && case.path("a/run/translator/record.json").exists()) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        first.kill().unwrap();
        first.wait().unwrap();
        case.edit(progress, |p| {
            fn shift(value: &mut serde_json::Value, seconds: i64) {
                match value {
                    serde_json::Value::Number(n) if n.as_i64().is_some_and(|n| n > 1_600_000_000) => {
                        *value = (n.as_i64().unwrap() + seconds).into();
                    }
                    serde_json::Value::Object(map) => map.values_mut().for_each(|v| shift(v, seconds)),
                    _ => {}
                }
            }
            shift(p, seconds);
        });
        case.write("a/run/run.toml", &settings);
        // The directory's record is of the longer training.
        case.remove("a/run/translator/record.json");
        let near = elsewhere(
            &case,
            &format!("hostname near; exec '{PROGRAM}' train --run a/run --threads 1 --quiet"),
        )
        .unwrap();
        let end = end_of(near);
        assert_eq!(end.code, Some(0), "{seconds}: {end:#?}");
    }
}
