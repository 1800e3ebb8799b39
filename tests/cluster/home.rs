//! A directory as a user of the cluster has it: models, data, clients, a run file; and what
//! is done there.

use crate::cluster::{Cluster, both};
use gradtx_tests::miniature::{self, SETTINGS};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program under test.
pub const GRADTX: &str = env!("CARGO_BIN_EXE_gradtx-under-test");
/// What one rank without a GPU of its own asks for, in place of what the scripts suggest.
pub const SMALL: [&str; 3] = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"];

/// A user's directory.
pub struct Home {
    dir: tempfile::TempDir,
}

/// The directory of the shipped scripts.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("slurm")
}

impl Home {
    pub fn new() -> Self {
        let home = Self { dir: tempfile::tempdir().unwrap() };
        miniature::write(home.dir.path());
        for name in ["ada", "bob"] {
            let client = home.path("clients").join(name);
            std::fs::create_dir_all(&client).unwrap();
            for file in ["train.jsonl", "test.jsonl"] {
                std::fs::copy(home.path("private.jsonl"), client.join(file)).unwrap();
            }
        }
        home
    }

    /// With a training of so many steps and a checkpoint after each.
    pub fn with_long_training(steps: u32) -> Self {
        let home = Self::new();
        let long = format!("max_steps = {steps}\nglobal_batch_size = 4\nsave_minutes = 0\n");
        let settings = SETTINGS.replace("max_steps = 6\nglobal_batch_size = 4\n", &long);
        let settings = settings.replace("eval_steps = 3", "eval_steps = 100");
        assert!(settings.contains("save_minutes") && settings.contains("eval_steps = 100"));
        std::fs::write(home.path("settings.toml"), settings).unwrap();
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Checksums of all files below a directory, by their names there.
    pub fn sums(&self, name: &str) -> BTreeMap<PathBuf, String> {
        let dir = self.path(name);
        let sums = miniature::checksums(&dir).into_iter();
        sums.map(|(path, sum)| (path.strip_prefix(&dir).unwrap().to_owned(), sum)).collect()
    }

    /// Runs a stage here and now, without the cluster.
    pub fn done(&self, stage: &str) {
        let mut command = Command::new(GRADTX);
        command.args([stage, "--run", "run", "--config", "settings.toml"]).current_dir(self.dir.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{stage}: {}", both(&output));
    }

    /// Writes a shell script that stands in for the program, and returns its path.
    pub fn stand_in(&self, text: &str) -> PathBuf {
        let path = self.path("stand-in");
        // What the first line of a job's log asks every program for.
        let version = "[ \"${1:-}\" != --version ] || { echo 'gradtx 0.0.0-stand-in'; exit 0; }";
        std::fs::write(&path, format!("#!/bin/bash\n{version}\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A command of the cluster, in this directory, with the program under test.
    pub fn command(&self, cluster: &Cluster, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = cluster.command(program);
        command.current_dir(self.dir.path()).env("GRADTX", GRADTX).env("GRADTX_SLURM", scripts());
        command
    }

    /// `sbatch OPTIONS SCRIPT ARGUMENTS`, with changes to its environment; the job's id.
    pub fn sbatch(
        &self,
        cluster: &Cluster,
        options: &[&str],
        script: &str,
        arguments: &[&str],
        env: &[(&str, &Path)],
    ) -> String {
        let mut command = self.command(cluster, "sbatch");
        command.arg("--parsable").args(SMALL).args(options).arg(scripts().join(script)).args(arguments);
        command.envs(env.iter().copied());
        cluster.done(&mut command).trim().to_string()
    }

    /// What the batch job itself said, in all its starts.
    pub fn said(&self, job: &str) -> String {
        self.read(self.dir.path(), &format!("-{job}.log"))
    }

    /// What a rank of a job said; `which` ends its log's name, e.g. `-17.0.log`.
    pub fn log(&self, which: &str) -> String {
        self.read(&self.path("run/logs"), which)
    }

    /// The same, if it has started to say anything.
    pub fn find_log(&self, which: &str) -> Option<String> {
        let mut paths = std::fs::read_dir(self.path("run/logs")).ok()?.flatten().map(|entry| entry.path());
        let path = paths.find(|path| path.to_string_lossy().ends_with(which))?;
        std::fs::read_to_string(path).ok()
    }

    fn read(&self, dir: &Path, end: &str) -> String {
        let names = || std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let found: Vec<PathBuf> = names().filter(|path| path.to_string_lossy().ends_with(end)).collect();
        let [path] = &found[..] else {
            panic!("{}: expected one file *{end} among {:?}", dir.display(), names().collect::<Vec<_>>());
        };
        std::fs::read_to_string(path).unwrap()
    }
}
