//! [`Parts`]: the checkpoint of a step, in as many files as ranks wrote it.
//!
//! ```text
//! step-000000040.safetensors           of one rank
//! step-000000040.0-of-2.safetensors    of two ranks: what rank 0 owns
//! step-000000040.1-of-2.safetensors
//! ```
//!
//! A part holds, of every flat buffer, the ranges that its rank owns, one after the other.
//! Its state has those ranges, and what the whole program knows, which is the same in all
//! parts.

use super::{Checkpoint, Values, save};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The checkpoint of a step: its files are known by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Saved {
    /// Steps that were done.
    pub step: u64,
    /// Ranks that wrote it, a file each.
    pub parts: usize,
}

/// The JSON of a part.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// What is in this part, of each flat buffer.
    ranges: Vec<Range<usize>>,
    /// What the program knows beside its buffers.
    state: Value,
}

/// Path of a part, counted from 0.
pub fn part_path(dir: &Path, saved: Saved, part: usize) -> PathBuf {
    let Saved { step, parts } = saved;
    dir.join(match parts {
        1 => format!("step-{step:09}.safetensors"),
        _ => format!("step-{step:09}.{part}-of-{parts}.safetensors"),
    })
}

/// The checkpoint and the part that a file's name gives.
fn parse(name: &str) -> Option<(Saved, usize)> {
    let name = name.strip_prefix("step-")?.strip_suffix(".safetensors")?;
    let Some((step, part)) = name.split_once('.') else {
        return Some((Saved { step: name.parse().ok()?, parts: 1 }, 0));
    };
    let (part, parts) = part.split_once("-of-")?;
    Some((Saved { step: step.parse().ok()?, parts: parts.parse().ok()? }, part.parse().ok()?))
}

/// Files of checkpoints in a directory, by what their names report.
fn files(dir: &Path) -> Result<Vec<(Saved, usize, PathBuf)>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Error::io("list", dir, e)),
    };
    let mut files = vec![];
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list", dir, e))?.path();
        let named = path.file_name().and_then(|name| parse(name.to_str()?));
        // Other spellings of the same numbers are not ours.
        let named = named.filter(|(saved, part)| part_path(dir, *saved, *part) == path);
        files.extend(named.map(|(saved, part)| (saved, part, path)));
    }
    Ok(files)
}

/// The checkpoints in a directory of which all parts are there, in the order of their steps;
/// none if there is no such directory.
pub fn saved(dir: &Path) -> Result<Vec<Saved>> {
    let mut found: BTreeMap<Saved, BTreeSet<usize>> = BTreeMap::new();
    for (saved, part, _) in files(dir)? {
        found.entry(saved).or_default().insert(part);
    }
    let is_complete = |(saved, parts): &(Saved, BTreeSet<usize>)| {
        saved.parts > 0 && parts.len() == saved.parts && parts.iter().all(|part| *part < saved.parts)
    };
    Ok(found.into_iter().filter(is_complete).map(|(saved, _)| saved).collect())
}

/// Removes all files of checkpoints but these, incomplete ones too.
pub fn remove_others(dir: &Path, keep: &[Saved]) -> Result<()> {
    for (saved, _, path) in files(dir)? {
        if !keep.contains(&saved) {
            std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// Writes one part: of every buffer the values of `ranges`, one after the other; `state` is
/// the same for all parts. The directory must exist.
pub fn save_part(
    path: &Path,
    ranges: &[Range<usize>],
    buffers: &[(&str, &[f32])],
    state: &Value,
) -> Result<()> {
    let len: usize = ranges.iter().map(Range::len).sum();
    if let Some((name, values)) = buffers.iter().find(|(_, values)| values.len() != len) {
        let why = format!("buffer `{name}` has {} values, its ranges {len}", values.len());
        return Err(Error::file(path, why));
    }
    let buffers: Vec<_> = buffers.iter().map(|(name, values)| (*name, Values::F32(values))).collect();
    let state = State { ranges: ranges.to_vec(), state: state.clone() };
    let state = serde_json::to_value(state).map_err(|e| Error::file(path, e.to_string()))?;
    save(path, &buffers, &state)
}

/// A whole checkpoint, open for reading.
#[derive(Debug)]
pub struct Parts {
    /// Every part with its ranges.
    parts: Vec<(Vec<Range<usize>>, Checkpoint)>,
    state: Value,
    total: usize,
}

impl Parts {
    /// Opens all parts, verifies their checksums, and that together they hold flat buffers
    /// from the first element to the last.
    pub fn load(dir: &Path, saved: Saved) -> Result<Self> {
        let mut parts = Vec::with_capacity(saved.parts);
        let mut common = None;
        for part in 0..saved.parts {
            let path = part_path(dir, saved, part);
            let file = Checkpoint::load(&path)?;
            let State { ranges, state } = serde_json::from_value(file.state().clone())
                .map_err(|e| Error::file(&path, format!("not a part of a checkpoint: {e}")))?;
            if *common.get_or_insert_with(|| state.clone()) != state {
                return Err(Error::file(&path, "was not written together with the other parts of its step"));
            }
            parts.push((ranges, file));
        }
        let mut ranges: Vec<&Range<usize>> = parts.iter().flat_map(|(ranges, _)| ranges).collect();
        ranges.sort_by_key(|range| (range.start, range.end));
        let mut total = 0;
        for range in ranges {
            if range.start != total || range.end < total {
                let why = format!("its parts do not hold every element once: {range:?} follows {total}");
                return Err(Error::file(&part_path(dir, saved, 0), why));
            }
            total = range.end;
        }
        Ok(Self { parts, state: common.unwrap_or_default(), total })
    }

    /// What the program knew beside its buffers.
    pub fn state(&self) -> &Value {
        &self.state
    }

    /// Elements of each flat buffer.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Values of these ranges of a flat buffer, one after the other; bits are kept. The ranges
    /// need not be those of any part.
    ///
    /// # Panics
    /// When a range ends after the buffer.
    pub fn read(&self, name: &str, ranges: &[Range<usize>]) -> Result<Vec<f32>> {
        let mut out = vec![0.0; ranges.iter().map(Range::len).sum()];
        let mut rest = &mut out[..];
        for wanted in ranges {
            assert!(wanted.end <= self.total, "{wanted:?} of {} elements", self.total);
            let (values, after) = rest.split_at_mut(wanted.len());
            rest = after;
            for (held, file) in &self.parts {
                let len = held.iter().map(Range::len).sum();
                let mut at = 0;
                for range in held {
                    let (start, end) = (wanted.start.max(range.start), wanted.end.min(range.end));
                    if start < end {
                        let place = &mut values[start - wanted.start..end - wanted.start];
                        file.read_f32_from(name, len, at + start - range.start, place)?;
                    }
                    at += range.len();
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TOTAL: usize = 500;

    fn value(step: u64, i: usize) -> f32 {
        (i as f32 + 1000.0 * step as f32).sin()
    }

    /// What part `part` of `parts` owns: every so many tens.
    fn owned(part: usize, parts: usize) -> Vec<Range<usize>> {
        (0..TOTAL / 10).filter(|i| i % parts == part).map(|i| 10 * i..10 * i + 10).collect()
    }

    fn write(dir: &Path, step: u64, parts: usize, part: usize) {
        let ranges = owned(part, parts);
        let values: Vec<f32> = ranges.iter().cloned().flatten().map(|i| value(step, i)).collect();
        let buffers = [("m", &values[..]), ("v", &values[..])];
        let path = part_path(dir, Saved { step, parts }, part);
        save_part(&path, &ranges, &buffers, &json!({ "step": step })).unwrap();
    }

    #[test]
    fn what_some_ranks_wrote_others_read() {
        let dir = tempfile::tempdir().unwrap();
        for parts in 1..=4 {
            (0..parts).for_each(|part| write(dir.path(), 7, parts, part));
            let found = Parts::load(dir.path(), Saved { step: 7, parts }).unwrap();
            assert_eq!((found.total(), &found.state()["step"]), (TOTAL, &json!(7)));
            let all = 0..TOTAL;
            for ranges in [vec![all.clone()], vec![3..4, 9..31, 77..77, 490..TOTAL], owned(1, 3)] {
                let values = found.read("v", &ranges).unwrap();
                let want: Vec<f32> = ranges.iter().cloned().flatten().map(|i| value(7, i)).collect();
                assert_eq!(values, want, "{parts} parts, {ranges:?}");
            }
            assert!(found.read("w", &[all]).unwrap_err().to_string().contains("`w`"));
        }
    }

    #[test]
    fn a_step_counts_when_all_parts_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = |step, parts| Saved { step, parts };
        assert!(saved(&dir.path().join("none")).unwrap().is_empty());
        write(dir.path(), 3, 1, 0);
        write(dir.path(), 4, 2, 0);
        for part in 0..3 {
            write(dir.path(), 2, 3, part);
            write(dir.path(), 5, 4, part);
        }
        std::fs::write(dir.path().join("step-x.safetensors"), "not ours").unwrap();
        for other in ["step-+00000009.safetensors", "step-9.safetensors", ".gradtx-step-000000009.tmp"] {
            std::fs::write(dir.path().join(other), "not ours").unwrap();
        }
        assert_eq!(saved(dir.path()).unwrap(), [at(2, 3), at(3, 1)]);
        write(dir.path(), 4, 2, 1);
        assert_eq!(saved(dir.path()).unwrap(), [at(2, 3), at(3, 1), at(4, 2)]);
        remove_others(dir.path(), &[at(3, 1), at(4, 2)]).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 7, "three parts and foreign files");
        assert_eq!(saved(dir.path()).unwrap(), [at(3, 1), at(4, 2)]);
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let two = Saved { step: 1, parts: 2 };
        let refused = |word: &str| {
            let message = Parts::load(dir.path(), two).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        };
        write(dir.path(), 1, 2, 0);
        refused("cannot");
        // Another rank's, a later step's, a damaged one.
        std::fs::copy(part_path(dir.path(), two, 0), part_path(dir.path(), two, 1)).unwrap();
        refused("0..10 follows 10");
        write(dir.path(), 9, 2, 1);
        let later = part_path(dir.path(), Saved { step: 9, parts: 2 }, 1);
        std::fs::copy(later, part_path(dir.path(), two, 1)).unwrap();
        refused("not written together");
        write(dir.path(), 1, 2, 1);
        Parts::load(dir.path(), two).unwrap();
        let path = part_path(dir.path(), two, 1);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() - 100;
        bytes[middle] ^= 4;
        std::fs::write(&path, &bytes).unwrap();
        refused("checksum");
        assert!(save_part(&path, &owned(0, 2), &[("m", &[0.0; 3])], &json!({})).is_err());
    }
}
