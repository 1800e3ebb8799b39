//! Runs the blocks of a page, in order, in a directory of its own.

use crate::page::{Block, Mark, Page};
use gradtx_tests::miniature;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program under test, which pages call `gradtx`.
const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");
/// Rows of the data set that pages divide.
const ROWS: usize = 120;

/// A page's directory and what it can call.
struct Home {
    dir: tempfile::TempDir,
    path: String,
    python: Option<PathBuf>,
}

/// What went wrong, with the line of the page.
pub fn faults(page: &Page) -> Vec<String> {
    let is_run = |block: &Block| matches!(block.mark, Mark::Run | Mark::Setup);
    if !page.blocks.iter().any(is_run) {
        return vec![];
    }
    let home = Home::new();
    let mut faults = vec![];
    let mut said = String::new();
    for block in &page.blocks {
        let place = format!("{}:{}", page.name, block.line);
        match &block.mark {
            Mark::File(name) => home.write(name, &block.text),
            Mark::Output => {
                if let Some(line) = missing(&said, &block.text) {
                    faults.push(format!(
                        "{place}: the page says `{line}`, the commands before it said:\n{said}"
                    ));
                }
            }
            Mark::Run | Mark::Setup => {
                let Some(output) = home.run(block) else { continue };
                said = String::from_utf8_lossy(&output.stdout).into_owned();
                if !output.status.success() {
                    faults.push(format!("{place}: {}:\n{}\n{said}", output.status, block.text));
                    // What comes after it builds upon it.
                    return faults;
                }
            }
            Mark::None | Mark::Skip => {}
        }
    }
    faults
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        miniature::write(dir.path());
        let tools = dir.path().join(".tools");
        std::fs::create_dir(&tools).unwrap();
        symlink(PROGRAM, tools.join("gradtx")).unwrap();
        let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap_or_default());
        let home = Self { dir, path, python: python() };
        home.write_downloads();
        home
    }

    /// A data set of two tasks, to be divided.
    fn write_downloads(&self) {
        let public = std::fs::read_to_string(self.dir.path().join("public.jsonl")).unwrap();
        let rows: Vec<&str> = public.lines().cycle().take(ROWS).collect();
        // Rows that are the same are one row to `split`.
        let numbered = rows.iter().enumerate().map(|(i, row)| {
            let mut row: serde_json::Value = serde_json::from_str(row).unwrap();
            row["number"] = i.into();
            format!("{row}\n")
        });
        self.write("downloads/rows.jsonl", &numbered.collect::<String>());
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{}\n", text.trim_end_matches('\n'))).unwrap();
    }

    /// Runs a block; nothing if what runs it is not here.
    fn run(&self, block: &Block) -> Option<std::process::Output> {
        let mut command = match block.language.as_str() {
            "python" => {
                let mut command = Command::new(self.python.as_ref()?);
                command.arg("-c").arg(&block.text);
                command
            }
            _ => {
                let mut command = Command::new("bash");
                command.args(["-euo", "pipefail", "-c", &format!("exec 2>&1\n{}", block.text)]);
                command
            }
        };
        // A conversation ends where its input does.
        command.stdin(Stdio::null());
        command.current_dir(self.dir.path()).env("PATH", &self.path).env("HOME", self.dir.path());
        let mut output = command.output().unwrap();
        output.stdout.extend(&output.stderr);
        Some(output)
    }
}

/// A Python that can read tensors.
fn python() -> Option<PathBuf> {
    let python = PathBuf::from(std::env::var_os("GRADTX_PYTHON").unwrap_or("python3".into()));
    let found = Command::new(&python).args(["-c", "import numpy, safetensors.numpy"]).output();
    let works = found.is_ok_and(|output| output.status.success());
    if !works {
        eprintln!(
            "{} has no numpy and safetensors: Python of pages is not run",
            Path::new(&python).display()
        );
    }
    works.then_some(python)
}

/// The first line of `wanted` that does not follow in `said`: lines in their order, where a line `…`
/// stands for any lines, and `…` within a line for any text.
fn missing<'a>(said: &str, wanted: &'a str) -> Option<&'a str> {
    let said: Vec<&str> = said.lines().map(str::trim_end).collect();
    let mut at = 0;
    let mut any = false;
    for line in wanted.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        if line.trim() == "…" {
            any = true;
            continue;
        }
        let rest = said.get(at..).unwrap_or_default();
        let found = match any {
            true => rest.iter().position(|said| is_like(said, line)),
            false => rest.iter().position(|said| !said.is_empty()).filter(|&i| is_like(rest[i], line)),
        };
        let Some(found) = found else { return Some(line) };
        (at, any) = (at + found + 1, false);
    }
    None
}

/// Whether a line is as a page has it, apart from what `…` stands for and from spaces.
fn is_like(said: &str, wanted: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (said, wanted) = (plain(said), plain(wanted));
    let parts: Vec<&str> = wanted.split('…').map(str::trim).collect();
    let mut rest = said.as_str();
    for (i, part) in parts.iter().enumerate() {
        let is_last = i + 1 == parts.len();
        let at = match (i, is_last) {
            (0, _) => rest.starts_with(part).then_some(0),
            (_, true) => rest.ends_with(part).then(|| rest.len() - part.len()),
            _ => rest.find(part),
        };
        let Some(at) = at else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

#[test]
fn output_is_compared_by_lines() {
    let said = "one\n\ntwo 2.5 s\nthree\nfour\n";
    for good in ["one\ntwo … s", "…\nthree\nfour", "one\n…\nfour", "…", "one\ntwo  2.5   s"] {
        assert_eq!(missing(said, good), None, "{good}");
    }
    for (bad, line) in
        [("two 2.5 s", "two 2.5 s"), ("one\nthree", "three"), ("…\nfive", "five"), ("on", "on")]
    {
        assert_eq!(missing(said, bad), Some(line), "{bad}");
    }
}
