//! Mutated files for every parser: none may panic, abort, take over 10 s or over 2 GiB.
//!
//! Deterministic and bounded: an input follows from a seed, the name of its target and a number.
//! Inputs are read by child processes of this test ([`child`]), since aborts and overflows of the
//! stack cannot be caught; the parent ([`driver`]) notices how each ended. `cargo test` runs
//! [`INPUTS`] of them; `make fuzz` runs rounds of other seeds for `FUZZ_SECONDS`, from
//! `FUZZ_SEED` on. What fails is kept in `fuzz/failures` of the target directory; a file of
//! `regressions/` is replayed by the target that its name begins with.

#![allow(clippy::unwrap_used)]

mod child;
mod driver;
mod forms;
mod home;
mod mutate;
mod random;
mod targets;

use child::{Inputs, JOB};
use driver::{LIMIT, Verdict, run_job};
use std::path::Path;
use std::time::{Duration, Instant};
use targets::TARGETS;

/// Inputs of one round, all targets together.
const INPUTS: usize = 10_000;

/// Whether this process is a child, or was started by one: then there is one test only.
fn is_child() -> bool {
    std::env::var_os(JOB).is_some()
}

/// The child's entry.
#[test]
fn child() {
    let Some(job) = std::env::var_os(JOB) else { return };
    child::work(&serde_json::from_str(job.to_str().unwrap()).unwrap());
    // Threads that inputs left behind are not waited for.
    std::process::exit(0);
}

#[test]
fn ten_thousand_mutated_files() {
    if is_child() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    home::make(home.path());
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (began, seconds) = (Instant::now(), number("FUZZ_SECONDS").unwrap_or(0));
    let first = number("FUZZ_SEED").unwrap_or(1);
    let mut failures = vec![];
    for seed in first.. {
        let (done, found) = driver::run(home.path(), seed, INPUTS);
        println!("seed {seed}: {done} inputs, {} kinds of failures, {:.0?}", found.len(), began.elapsed());
        found.iter().for_each(|f| println!("  {}: {:?}\n    {}", f.target, f.verdict, f.file.display()));
        assert!(done >= INPUTS);
        failures.extend(found);
        if began.elapsed().as_secs() >= seconds {
            break;
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Every target reads what is not mutated: otherwise mutations would test one refusal only.
#[test]
fn seed_files_are_read() {
    if is_child() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    home::make(home.path());
    let mut refused = vec![];
    for target in TARGETS {
        let verdicts = run_job(home.path(), target.name, Inputs::Seeds, LIMIT);
        if verdicts.iter().all(|(_, verdict)| *verdict != Verdict::Read) {
            refused.push(format!("{}: {verdicts:?}", target.name));
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
}

/// What failed once: an error or a success today.
#[test]
fn regressions() {
    if is_child() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    home::make(home.path());
    let mut failures = vec![];
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some((target, _)) = name.rsplit_once('-') else { continue };
        assert!(TARGETS.iter().any(|t| t.name == target), "{name}: no such target");
        for (_, verdict) in run_job(home.path(), target, Inputs::File(path), LIMIT) {
            if verdict.is_failure() {
                failures.push(format!("{name}: {verdict:?}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The other way round: what may not happen is noticed, each kind as what it is.
#[test]
fn failures_of_every_kind_are_noticed() {
    if is_child() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let input = home.path().join("input");
    let end_of = |control: &str, bytes: &[u8]| {
        std::fs::write(&input, bytes).unwrap();
        let limit = Duration::from_secs(if control == "control-hang" { 2 } else { 30 });
        let verdicts = run_job(home.path(), control, Inputs::File(input.clone()), limit);
        assert_eq!(verdicts.len(), 1, "{control}: {verdicts:?}");
        verdicts.into_iter().next().unwrap().1
    };
    assert_eq!(end_of("control-good", b"x"), Verdict::Read);
    assert_eq!(end_of("control-error", b"x"), Verdict::Refused);
    assert_eq!(end_of("control-panic", b"x"), Verdict::Read);
    let panic = end_of("control-panic", b"x\x07");
    assert!(matches!(&panic, Verdict::Panic(what) if what.contains("a byte 7")), "{panic:?}");
    assert_eq!(end_of("control-hang", b"x"), Verdict::Hang);
    let memory = end_of("control-memory", b"x");
    assert!(matches!(&memory, Verdict::Died(how) if how.contains("memory")), "{memory:?}");
    let stack = end_of("control-stack", b"x");
    assert!(matches!(&stack, Verdict::Died(how) if how.contains("signal 6")), "{stack:?}");
}
