//! Where tests run the program as a person would: a directory, commands in it, and what they said.

#![allow(clippy::unwrap_used)]

use gradtx_tests::miniature;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");

/// Runs the program in a directory.
pub fn gradtx(dir: &Path, args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).current_dir(dir).output().unwrap()
}

/// What a command wrote to standard output.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a command wrote to standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Both, one after the other.
pub fn said(output: &Output) -> String {
    stdout(output) + &stderr(output)
}

/// Fails unless a command ended well. What it wrote to standard output.
#[track_caller]
pub fn expect_success(args: &[&str], output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(output));
    stdout(output)
}

/// Fails unless a command ended with this code and an error of all of these words. The error.
#[track_caller]
pub fn expect_failure(args: &[&str], output: &Output, code: i32, words: &[&str]) -> String {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    expect_words(args, &said, words);
    said
}

/// Fails unless all of these words were said.
#[track_caller]
pub fn expect_words(args: &[&str], said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
    }
}

/// A directory with all below it, to be changed.
pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy_tree(&path, &to) } else { _ = std::fs::copy(&path, &to).unwrap() }
    }
}

/// A directory of a test's own.
pub struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    /// With nothing in it.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// With two untrained models, public and private data, and `settings.toml`.
    pub fn miniature() -> Self {
        let home = Self::empty();
        miniature::write(home.dir());
        home
    }

    /// The same with these settings.
    pub fn with_settings(settings: &str) -> Self {
        let home = Self::miniature();
        home.write("settings.toml", settings);
        home
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// Writes a file, and the directories above it.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// The program in this directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(self.dir());
        command
    }

    /// Runs the program.
    pub fn gradtx(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a stage in the run `run`, with `settings.toml`.
    pub fn stage(&self, args: &[&str]) -> Output {
        self.gradtx(&[&args[..1], &["--run", "run", "--config", "settings.toml"], &args[1..]].concat())
    }

    /// A command that must end well. What it wrote to standard output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        expect_success(args, &self.gradtx(args))
    }

    /// A stage that must end well.
    #[track_caller]
    pub fn done(&self, args: &[&str]) -> String {
        expect_success(args, &self.stage(args))
    }

    /// A command that must end with this code and an error of these words. The error.
    #[track_caller]
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) -> String {
        expect_failure(args, &self.gradtx(args), code, words)
    }

    /// The same of a stage.
    #[track_caller]
    pub fn stage_refused(&self, args: &[&str], code: i32, words: &[&str]) -> String {
        expect_failure(args, &self.stage(args), code, words)
    }
}
