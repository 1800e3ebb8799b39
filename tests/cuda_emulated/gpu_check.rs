//! `make gpu-check` without a GPU: the directory is put together from these very executables, copied
//! elsewhere, and its script run on the stand-in driver as on a bare machine, by another user,
//! without cargo, network or anything to write to but its results. A fault in one part must leave the
//! results of the others.

#![allow(clippy::unwrap_used)]

use gradtx_emulator::copy_parts;
use serde_json::Value;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Who runs the script where the tests are run by root.
const NOBODY: u32 = 65_534;

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn is_root() -> bool {
    // Only root may give a directory away.
    let probe = tempfile::tempdir().unwrap();
    chown(probe.path(), Some(NOBODY), Some(NOBODY)).is_ok()
}

/// The newest executable of the kernels' own tests, which lies beside this one.
fn kernel_tests() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let entries = std::fs::read_dir(own.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let is_built = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("cuda_ops-") && path.extension().is_none()
    };
    let built = |path: &PathBuf| path.metadata().and_then(|of| of.modified()).ok();
    let newest = entries.filter(is_built).max_by_key(built);
    newest.expect("build it first: cargo test -p gradtx-kernels --features cuda --test cuda_ops --no-run")
}

/// A directory of `make gpu-check`, which nobody may write to.
fn assembled() -> &'static Path {
    static MADE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, home) = MADE.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let [parts, cubins, made] = ["parts", "cubins", "gpu-check"].map(|name| directory.path().join(name));
        // No device is asked for its code.
        std::fs::create_dir(&cubins).unwrap();
        copy_parts(&parts);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/gpu-check/assemble.sh");
        let output = Command::new(script)
            .arg(env!("CARGO_BIN_EXE_gradtx-under-test"))
            .args([&kernel_tests(), &std::env::current_exe().unwrap(), &cubins, &parts, &made])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        (directory, made)
    });
    home
}

/// A copy of it in another place, and a directory for results.
struct Elsewhere {
    directory: TempDir,
}

/// What a run has left, and how it ended.
struct Found {
    code: Option<i32>,
    said: String,
    lines: Vec<Value>,
    table: String,
    files: Vec<String>,
    time: Duration,
}

impl Elsewhere {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("elsewhere").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        assert!(succeeds(Command::new("cp").arg("-r").arg(assembled()).arg(directory.path())));
        let results = directory.path().join("results");
        std::fs::create_dir(&results).unwrap();
        if is_root() {
            chown(&results, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        Self { directory }
    }

    fn home(&self) -> PathBuf {
        self.directory.path().join("gpu-check")
    }

    fn results(&self) -> PathBuf {
        self.directory.path().join("results")
    }

    /// Runs the script, with these variables, in nobody's environment.
    fn run(&self, options: &[&str], variables: &[(&str, &str)]) -> Found {
        assert!(succeeds(Command::new("chmod").args(["-R", "a-w"]).arg(self.home())));
        let mut words: Vec<String> = vec![];
        if is_root() {
            // Without a network, where this machine lets root take it away.
            if succeeds(Command::new("unshare").args(["-n", "true"])) {
                words.extend(["unshare", "-n"].map(String::from));
            }
            words.extend(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(String::from));
        }
        words.push(self.home().join("run.sh").display().to_string());
        words.extend(["--emulated".to_string()]);
        words.extend(options.iter().map(|option| option.to_string()));
        words.push(self.results().display().to_string());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir("/").env_clear().env("PATH", "/usr/bin:/bin");
        command.env("HOME", "/nonexistent").envs(variables.iter().copied());
        let begin = Instant::now();
        let output = command.output().unwrap();
        let time = begin.elapsed();
        let read = |name: &str| std::fs::read_to_string(self.results().join(name)).unwrap_or_default();
        let lines = read("results.jsonl");
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        let entries = std::fs::read_dir(self.results()).unwrap();
        let mut files: Vec<String> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        files.sort();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let said = format!("{said}\n{}", read("log.txt"));
        let lines = lines.lines().map(parse).collect();
        Found { code: output.status.code(), said, lines, table: read("table.md"), files, time }
    }
}

impl Found {
    /// Names of a part's steps with this status.
    fn with(&self, part: &str, status: &str) -> Vec<&str> {
        let of = |line: &&Value| line["part"] == part && line["status"] == status;
        self.lines.iter().filter(of).map(|line| line["name"].as_str().unwrap()).collect()
    }

    fn measured(&self, name: &str) -> bool {
        self.lines.iter().any(|line| line["name"] == name && line["median_s"].is_number())
    }

    fn assert_code(&self, code: i32) {
        assert_eq!(self.code, Some(code), "{}", self.said);
    }
}

#[test]
fn everything_runs_on_a_bare_machine() {
    let found = Elsewhere::new().run(&[], &[]);
    found.assert_code(0);
    assert_eq!(found.files, ["log.txt", "results.jsonl", "table.md"]);
    for part in ["machine", "ceilings", "correct", "speed"] {
        assert!(!found.with(part, "passed").is_empty(), "{part}: {}", found.said);
        assert_eq!(found.with(part, "failed"), [""; 0], "{}", found.said);
    }
    let tests = found.with("correct", "passed");
    for module in ["matrix", "attention", "lora", "rmsnorm", "rows", "flat", "t5_attention", "models", "demo"]
    {
        assert!(tests.iter().any(|test| test.starts_with(module)), "{module}: {tests:?}");
    }
    let compared = |line: &&Value| line["within"] == true && line["bound"].is_number();
    let cases = found.lines.iter().filter(compared).count();
    assert!(cases > 100, "{cases} comparisons");
    for name in ["large gemm", "finetune", "train", "generate", "translate", "adamw"] {
        assert!(found.measured(name), "{name}: {}", found.said);
    }
    assert!(found.table.contains("not measured yet"), "targets are those of real sizes: {}", found.table);
    assert!(found.table.contains("comparisons with the CPU"), "{}", found.table);
    assert!(found.time < Duration::from_secs(300), "{:?}", found.time);
}

/// Without its driver nothing can be measured, and every part says so at once.
#[test]
fn a_machine_without_a_driver() {
    let elsewhere = Elsewhere::new();
    std::fs::remove_file(elsewhere.home().join("emulated/libcuda.so")).unwrap();
    let found = elsewhere.run(&["--tests", "flat"], &[]);
    found.assert_code(12);
    assert!(!found.with("machine", "passed").is_empty(), "{}", found.said);
    assert_eq!(found.with("ceilings", "failed"), ["product and copy"]);
    assert_eq!(found.with("speed", "failed").len(), 5, "{}", found.said);
    assert!(found.said.contains("no CUDA driver here"), "{}", found.said);
    assert!(found.table.contains("| ceilings |"), "{}", found.table);
}

/// Without cuBLASLt kernels of our own multiply, and nothing fails.
#[test]
fn a_machine_without_a_library() {
    let elsewhere = Elsewhere::new();
    std::fs::remove_file(elsewhere.home().join("emulated/libcublasLt.so")).unwrap();
    let found = elsewhere.run(&["--only", "speed"], &[]);
    found.assert_code(0);
    assert!(found.measured("finetune") && found.measured("train"), "{}", found.said);
}

/// Of another directory, under the name of another version, behind one that does not work.
#[test]
fn a_library_that_the_loader_does_not_find() {
    let elsewhere = Elsewhere::new();
    let places = ["broken", "nvidia/cu13/lib"].map(|name| elsewhere.directory.path().join(name));
    places.iter().for_each(|place| std::fs::create_dir_all(place).unwrap());
    std::fs::write(places[0].join("libcublasLt.so.12"), "not a library").unwrap();
    let library = elsewhere.home().join("emulated/libcublasLt.so");
    std::fs::rename(library, places[1].join("libcublasLt.so.13")).unwrap();
    let list = std::env::join_paths(&places).unwrap().into_string().unwrap();
    let found = elsewhere.run(&["--only", "profile"], &[("GRADTX_CUDA_LIBRARIES", &list)]);
    found.assert_code(0);
    assert!(found.said.contains("matrix products by cuBLASLt"), "{}", found.said);
    let without = elsewhere.run(&["--only", "profile"], &[]);
    assert!(without.said.contains("kernels of our own"), "{}", without.said);

    let asked = Command::new("python3")
        .arg(elsewhere.home().join("libraries.py"))
        .arg("directories")
        .env("PYTHONPATH", elsewhere.directory.path())
        .output();
    // Python is not needed where there is none.
    if let Ok(output) = asked {
        let directories = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(directories.contains(&places[1].display().to_string()), "{directories}");
    }
}

#[test]
fn a_kernel_that_fails() {
    let found = Elsewhere::new().run(&["--tests", "flat rows"], &[("EMU_FAIL", "gelu")]);
    found.assert_code(13);
    let failed = ["rows::gated_activations", "rows::gated_activations_with_dropout"];
    assert_eq!(found.with("correct", "failed"), failed, "{}", found.said);
    assert!(found.with("correct", "passed").contains(&"rows::dropout"), "{}", found.said);
    assert_eq!(found.with("speed", "failed").len(), 3, "train, translate, kernels: {}", found.said);
    assert!(found.measured("finetune") && found.measured("generate"), "{}", found.said);
    assert!(found.said.contains("a planted failure"), "{}", found.said);
}

#[test]
fn a_kernel_that_hangs() {
    let variables = [("EMU_HANG", "dropout"), ("GPU_CHECK_GROUP_SECONDS", "15")];
    let found = Elsewhere::new().run(&["--only", "correct", "--tests", "rows flat"], &variables);
    found.assert_code(13);
    let stopped = ["rows::dropout", "rows::gated_activations_with_dropout"];
    assert_eq!(found.with("correct", "stopped"), stopped, "{}", found.said);
    assert!(found.with("correct", "passed").contains(&"rows::gated_activations"), "{}", found.said);
    assert!(found.with("correct", "passed").iter().any(|name| name.starts_with("flat")), "{}", found.said);
}

/// A table of what there is, in time.
#[test]
fn no_time_left() {
    let found = Elsewhere::new().run(&["--minutes", "0.2"], &[("EMU_HANG", "gemm")]);
    // 12 seconds, and what a busy machine needs to end it all.
    assert!(found.time < Duration::from_secs(40), "{:?}", found.time);
    assert!(!found.with("machine", "passed").is_empty(), "{}", found.said);
    assert!(!found.with("speed", "no time left").is_empty(), "{}", found.said);
    assert!(found.code != Some(0) && found.table.contains("no time left"), "{}", found.said);
}

#[test]
fn wrong_commands_are_refused() {
    let elsewhere = Elsewhere::new();
    for (options, says) in [
        (&["--only", "all"][..], "expected correct, speed or profile"),
        (&["--minutes", "soon"], "expected a number above 0"),
        (&["--faster"], "no such option"),
    ] {
        let found = elsewhere.run(options, &[]);
        found.assert_code(2);
        assert!(found.said.contains(says), "{}", found.said);
        assert_eq!(found.files, [""; 0], "{options:?}");
    }
}

/// For `make gpu-check`: puts the parts of the emulator into the directory that `GPU_CHECK_PARTS` names.
#[test]
#[ignore = "run by make gpu-check"]
fn emulated_parts() {
    let to = std::env::var_os("GPU_CHECK_PARTS").expect("GPU_CHECK_PARTS names a directory");
    copy_parts(Path::new(&to));
}
