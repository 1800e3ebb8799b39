//! The program as a person runs it: exit codes, and what it says.

#![allow(clippy::unwrap_used)]

use crate::home::{PROGRAM, stderr};
use gradtx_runtime::artifact::{NewTensor, write_tensors};
use safetensors::Dtype;
use std::path::Path;
use std::process::{Command, Output};

fn gradtx(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn help_is_no_error_and_nonsense_is() {
    let help = gradtx(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let said = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(said.contains("curate") && said.contains("Exit codes"), "{said}");
    assert_eq!(gradtx(&["frobnicate"]).status.code(), Some(2));
}

/// What the parser prints on standard output by itself.
const PRINTED: [&[&str]; 5] =
    [&["--help"], &["-h"], &["evaluate", "--help"], &["help", "train"], &["--version"]];

#[test]
fn help_ends_well_when_its_reader_has_left() {
    for args in PRINTED {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(PROGRAM);
        let output = command.args(args).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn help_that_cannot_be_written_is_an_error() {
    for args in PRINTED {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(PROGRAM);
        let output = command.args(args).stdout(full).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("error: standard output: cannot write: No space left"), "{args:?}: {said}");
    }
}

/// A curation as one of `size` processes, if the environment says so.
fn one_of_several(variables: &[(&str, &str)]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["curate", "--run", "r", "--config", "none.toml"]).current_dir(&dir);
    let started_by =
        |name: &str| ["SLURM_", "PMI", "OMPI_", "FLUX_", "PALS_"].iter().any(|start| name.starts_with(start));
    for (name, _) in std::env::vars().filter(|(name, _)| started_by(name)) {
        command.env_remove(name);
    }
    // Open MPI itself refuses root, and looks for SLURM's daemon.
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.env("OMPI_MCA_ess", "singleton");
    command.envs(variables.iter().copied()).output().unwrap()
}

#[test]
fn processes_without_mpi_name_who_started_them() {
    let step =
        [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_STEP_NUM_TASKS", "4")];
    let pmi = [("PMI_RANK", "0"), ("PMI_SIZE", "4")];
    let output = one_of_several(&[&step[..], &pmi].concat());
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("srun started 4 processes") && said.contains("srun --mpi=pmix"), "{said}");
    assert!(!said.contains("mpirun"), "{said}");

    let said = stderr(&one_of_several(&pmi));
    assert!(
        said.contains("mpiexec started 4 processes") && said.contains("mpirun of the same MPI"),
        "{said}"
    );

    // In a shell of salloc it is one process, and gets as far as its settings.
    let output = one_of_several(&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]);
    let said = stderr(&output);
    assert!(said.contains("none.toml") && !said.contains("started"), "{said}");
}

#[test]
fn an_unknown_key_is_named_with_its_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("my.toml");
    std::fs::write(&file, "seed = 3\n\n[train]\nlr = 0.1\n").unwrap();
    let run = dir.path().join("run");
    let output = gradtx(&["curate", "--run", text(&run), "--config", text(&file)]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    for wanted in ["my.toml", "`lr`", "line 4", "`train.learning_rate = 0.1`"] {
        assert!(said.contains(wanted), "no `{wanted}` in: {said}");
    }
    assert!(!run.join("run.toml").exists(), "a configuration that cannot be used is not stored");
}

#[test]
fn an_unknown_override_and_a_bad_value_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let with = |set: &str| stderr(&gradtx(&["train", "--run", text(&run), "--set", set]));
    let said = with("train.lr=0.1");
    assert!(said.contains("unknown key `lr`") && said.contains("`train.learning_rate = 0.1`"), "{said}");
    assert!(with("train.learning_rate=fast").contains("train.learning_rate=fast"));
    assert!(with("lora.r=0").contains("lora.r"));
    assert!(with("nonsense").contains("KEY=VALUE"));
}

#[test]
fn a_stage_that_cannot_begin_stores_no_settings() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let file = dir.path().join("settings.toml");
    std::fs::write(&file, "seed = 1\n").unwrap();
    let first = gradtx(&["curate", "--run", text(&run), "--config", text(&file)]);
    assert_eq!(first.status.code(), Some(2), "there is no model: {}", stderr(&first));
    assert!(!run.exists(), "nothing is made");
    std::fs::create_dir(&run).unwrap();
    std::fs::copy(&file, run.join("run.toml")).unwrap();
    let other = gradtx(&["train", "--run", text(&run), "--set", "seed=9"]);
    assert_eq!(other.status.code(), Some(1), "there are no tuples: {}", stderr(&other));
    assert_eq!(std::fs::read_to_string(run.join("run.toml")).unwrap(), "seed = 1\n");
}

#[test]
fn a_report_says_what_is_missing_and_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    assert_eq!(gradtx(&["report", "--run", text(&run)]).status.code(), Some(2), "there is no run");
    std::fs::create_dir(&run).unwrap();
    let empty = gradtx(&["report", "--run", text(&run)]);
    assert_eq!(empty.status.code(), Some(2));
    assert!(stderr(&empty).contains("is an empty directory"), "{}", stderr(&empty));
    assert_eq!(std::fs::read_dir(&run).unwrap().count(), 0, "a report does not make a run of a directory");
    std::fs::write(run.join("run.toml"), "seed = 1\n").unwrap();
    let output = gradtx(&["report", "--run", text(&run)]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(said.contains("gradtx curate") && said.contains("report.html"), "{said}");
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("gradtx curate"));
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(run.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["schema"], 1);
    let out = dir.path().join("page.json");
    assert_eq!(gradtx(&["report", "--run", text(&run), "--out", text(&out)]).status.code(), Some(2));
}

fn tensor_file(path: &Path, values: &[f32]) {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensor: NewTensor<'_> = ("w".into(), Dtype::F32, vec![values.len()], &bytes);
    write_tensors(path, &[tensor], &Default::default()).unwrap();
}

#[test]
fn inspect_tells_good_from_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.safetensors");
    tensor_file(&file, &[1.0, 2.0, 3.0]);
    let good = gradtx(&["inspect", text(&file)]);
    let said = String::from_utf8_lossy(&good.stdout).into_owned();
    assert_eq!(good.status.code(), Some(0), "{said}");
    assert!(said.contains("intact") && said.contains("F32") && said.contains("[3]"), "{said}");

    tensor_file(&file, &[1.0, f32::NAN, 3.0]);
    let nan = gradtx(&["inspect", text(&file), "--json"]);
    assert_eq!(nan.status.code(), Some(1));
    let said = String::from_utf8_lossy(&nan.stdout).into_owned();
    assert!(said.contains("\"problems\"") && said.contains("finite"), "{said}");

    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    let short = gradtx(&["inspect", text(&file)]);
    assert_eq!(short.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&short.stdout).contains("truncated"));
    assert_eq!(gradtx(&["inspect", text(&dir.path().join("none"))]).status.code(), Some(1));
}
