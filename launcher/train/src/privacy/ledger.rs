//! [`Ledger`]: how many steps of a private training were spent, written before each of them.
//!
//! In: a file beside the result. Its first line says what the steps are, every other line is a step. A line is written
//! before anything is drawn for its step and on the disk before its noise is drawn, so a training that is killed at any
//! moment and resumed has never forgotten a step: what it repeats it pays for again.

use anyhow::{Context as _, Result};
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{MAX_LINES_BYTES, read_regular};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Name of the file.
pub const LEDGER_FILE: &str = "privacy-ledger.jsonl";

/// The spent steps of one private training.
pub struct Ledger {
    path: PathBuf,
    file: File,
    spent: u64,
}

impl Ledger {
    /// Opens the ledger in a directory, or begins one. `of` is what a step is: mechanism, data.
    ///
    /// # Errors
    /// If it cannot be written, or is of another mechanism.
    pub fn open(dir: &Path, of: &Value) -> Result<Self> {
        let path = dir.join(LEDGER_FILE);
        let head = format!("{of}\n");
        let found = if path.is_file() { read_regular(&path, MAX_LINES_BYTES)? } else { vec![] };
        let mut file =
            OpenOptions::new().create(true).append(true).open(&path).with_context(|| show(&path))?;
        let spent = match found.strip_prefix(head.as_bytes()) {
            Some(steps) => {
                // A line that was cut off by a crash counts too.
                let whole = steps.iter().filter(|&&byte| byte == b'\n').count();
                let is_cut = steps.last().is_some_and(|&byte| byte != b'\n');
                if is_cut {
                    file.write_all(b"\n")?;
                }
                (whole + is_cut as usize) as u64
            }
            // Its first line was not finished, so no step was.
            None if head.as_bytes().starts_with(&found) => {
                file.write_all(&head.as_bytes()[found.len()..]).with_context(|| show(&path))?;
                0
            }
            None => {
                let what = format!("{}: is of another private training", path.display());
                return Err(failed(what, "give another directory with --out: the costs of both add up"));
            }
        };
        file.sync_all().with_context(|| show(&path))?;
        if let Ok(dir) = File::open(dir) {
            dir.sync_all()?;
        }
        Ok(Self { path, file, spent })
    }

    /// Steps that are spent.
    pub fn spent(&self) -> u64 {
        self.spent
    }

    /// Spends a step; returns its number, from 0, which no other step has. Nothing of the step may be used before
    /// [`Self::sync`] has returned.
    pub fn spend(&mut self) -> Result<u64> {
        let step = self.spent;
        self.file
            .write_all(format!("{{\"step\":{}}}\n", step + 1).as_bytes())
            .with_context(|| show(&self.path))?;
        self.spent += 1;
        Ok(step)
    }

    /// Waits until all spent steps are on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| show(&self.path))
    }
}

fn show(path: &Path) -> String {
    format!("{}: cannot write", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn steps_are_never_forgotten_wherever_a_crash_cuts() {
        let dir = tempfile::tempdir().unwrap();
        let of = json!({ "noise_multiplier": 1.5 });
        let path = dir.path().join(LEDGER_FILE);
        let mut ledger = Ledger::open(dir.path(), &of).unwrap();
        let steps: Vec<u64> = (0..12).map(|_| ledger.spend().unwrap()).collect();
        assert_eq!(steps, (0..12).collect::<Vec<_>>());
        drop(ledger);
        let whole = std::fs::read(&path).unwrap();
        let head = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let begun =
                whole[head.min(cut)..cut].split(|&byte| byte == b'\n').filter(|l| !l.is_empty()).count();
            let mut ledger = Ledger::open(dir.path(), &of).unwrap();
            assert_eq!(ledger.spent(), begun as u64, "cut at {cut}");
            assert_eq!(ledger.spend().unwrap(), begun as u64);
            assert_eq!(Ledger::open(dir.path(), &of).unwrap().spent(), begun as u64 + 1, "cut at {cut}");
        }
        let error = Ledger::open(dir.path(), &json!({ "noise_multiplier": 1.0 })).err().unwrap();
        assert!(error.to_string().contains("another private training"), "{error}");
    }
}
