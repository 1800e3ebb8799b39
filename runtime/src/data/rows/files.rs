//! Which files a data set consists of, and which split each is.
//!
//! A path is a file, or a directory of data files. In a directory these are the data files
//! that lie in it; where there are none, those in `data/`, in directories named after splits
//! (`train/`, `test/`), or in its only subdirectory with data. Several other subdirectories
//! are several data sets (the configurations of a hub repository), of which one must be named.
//!
//! A file's split is in its name, or in that of its directory, as the `datasets` library has
//! it: `train-00000-of-00001.parquet`, `my_test.jsonl`, `validation/0001.csv`. [`choose`] takes
//! one split where there are several.

use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Names of data files in a directory end like this; `.gz` or `.zst` may follow.
const EXTENSIONS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];
/// Endings of compressed files.
const COMPRESSED: [&str; 2] = [".gz", ".zst"];
/// Files beside data that hold no rows: of downloads, and of this program.
const NOT_DATA: [&str; 9] = [
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "metadata.json",
    "croissant.json",
    "state.json",
    "split.json",
    "record.json",
    "world.json",
];

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// What is trained on.
    Train,
    /// What choices between trained models are made with.
    Validation,
    /// What is tested on.
    Test,
}

impl Split {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }

    /// The split that a word of a name stands for.
    fn of_word(word: &str) -> Option<Self> {
        match word {
            "train" | "training" => Some(Self::Train),
            "validation" | "valid" | "val" | "dev" => Some(Self::Validation),
            "test" | "testing" | "eval" | "evaluation" => Some(Self::Test),
            _ => None,
        }
    }

    /// The split that a name stands for; None if there is none in it, or several.
    fn of_name(name: &str) -> Option<Self> {
        let words = name.split(|c: char| !c.is_alphanumeric()).map(str::to_lowercase);
        let found: BTreeSet<Self> = words.filter_map(|word| Self::of_word(&word)).collect();
        if found.len() == 1 { found.first().copied() } else { None }
    }
}

/// Which split is taken where a data set has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SplitChoice {
    /// Those for training, or in `evaluate` those for testing, where a data set has both.
    #[default]
    Auto,
    /// Files of the train split.
    Train,
    /// Files of the test split.
    Test,
    /// Files of the validation split.
    Validation,
    /// All files.
    All,
}

/// What a data set is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To train on it, or to divide it.
    Training,
    /// To test a model on it.
    Testing,
}

/// The files of a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Those that are read, in order.
    pub files: Vec<PathBuf>,
    /// The split that was taken, where others are there.
    pub split: Option<Split>,
    /// Files of other splits.
    pub left_out: Vec<PathBuf>,
}

/// A data file, and the split that it is.
struct Found {
    path: PathBuf,
    split: Option<Split>,
}

/// The files of a data set, of all splits: a path is a file, or a directory of data files,
/// which come in the order of their names. It is an error if there is none.
pub fn data_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    Ok(choose(paths, SplitChoice::All, Purpose::Training)?.files)
}

/// The files of a data set that are read. A path to one file is that file. Of directories and
/// lists, with [`SplitChoice::Auto`]:
///
/// * files of one split, or without a split in their names: all of them;
/// * files of several splits: the train split for training; the test split, else the
///   validation split, for testing;
/// * where there is none for the purpose, where files without a split stand beside them, or
///   where a list names files of several splits itself: an error that names them.
pub fn choose(paths: &[PathBuf], choice: SplitChoice, purpose: Purpose) -> Result<Chosen> {
    let (mut found, mut named) = (vec![], 0);
    for path in paths {
        if path.is_dir() {
            found.extend(files_in(path)?);
        } else {
            let stem = path.file_name().unwrap_or_default().to_string_lossy();
            found.push(Found { split: Split::of_name(&stem), path: path.clone() });
            named += 1;
        }
    }
    if found.is_empty() {
        return Err(Error::invalid("data", "no file is given"));
    }
    let all = |found: Vec<Found>| Chosen {
        files: found.into_iter().map(|f| f.path).collect(),
        ..Chosen::default()
    };
    if choice == SplitChoice::All || paths.len() == named && named == 1 {
        return Ok(all(found));
    }
    let mut splits: BTreeMap<Split, &Path> = BTreeMap::new();
    for file in found.iter().rev() {
        file.split.map(|split| splits.insert(split, &file.path));
    }
    let wanted = match (choice, purpose) {
        (SplitChoice::Train, _) => Some(Split::Train),
        (SplitChoice::Test, _) => Some(Split::Test),
        (SplitChoice::Validation, _) => Some(Split::Validation),
        _ if splits.len() < 2 && (named == paths.len() || found.iter().all(|f| f.split.is_some())) => None,
        _ if splits.is_empty() => None,
        (_, Purpose::Training) => Some(Split::Train),
        (_, Purpose::Testing) if splits.contains_key(&Split::Test) => Some(Split::Test),
        (_, Purpose::Testing) => Some(Split::Validation),
    };
    let Some(wanted) = wanted else {
        return Ok(all(found));
    };
    if let Some(why) = unclear(&found, &splits, wanted, choice, named) {
        return Err(Error::invalid("data.split", why));
    }
    // With a choice of one split, files without any are of that split.
    let is_taken = |f: &Found| f.split.is_none_or(|split| split == wanted);
    let (taken, left): (Vec<Found>, Vec<Found>) = found.into_iter().partition(is_taken);
    let left_out = left.into_iter().map(|f| f.path).collect();
    Ok(Chosen { split: Some(wanted), left_out, ..all(taken) })
}

/// Why it is not clear which files are the wanted split.
fn unclear(
    found: &[Found],
    splits: &BTreeMap<Split, &Path>,
    wanted: Split,
    choice: SplitChoice,
    named: usize,
) -> Option<String> {
    let listed = |files: &mut dyn Iterator<Item = &Path>| {
        files.map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    };
    let name = wanted.name();
    let without = found.iter().find(|f| f.split.is_none());
    if !splits.contains_key(&wanted) && (choice == SplitChoice::Auto || without.is_none()) {
        let files = listed(&mut splits.values().copied().chain(without.map(|f| f.path.as_path())));
        return Some(format!(
            "there is no {name} split, only {files}; name the files, or set data.split = \"all\""
        ));
    }
    if choice != SplitChoice::Auto {
        return None;
    }
    if named > 0 && splits.len() > 1 {
        let files = listed(&mut splits.values().copied());
        return Some(format!(
            "the list has files of several splits ({files}); leave out those that are not meant, or set data.split \
             to \"{name}\" or \"all\""
        ));
    }
    let without = without?;
    let files = listed(&mut splits.values().copied().chain([without.path.as_path()]));
    Some(format!(
        "which files are the {name} split? Some names say a split and others do not ({files}); name the files, or \
         set data.split to \"{name}\" or \"all\""
    ))
}

fn files_in(dir: &Path) -> Result<Vec<Found>> {
    let here = entries(dir, None)?;
    if !here.files.is_empty() {
        return Ok(here.files);
    }
    let (mut of_splits, mut others) = (vec![], vec![]);
    let mut arrow = here.arrow;
    for below in &here.dirs {
        let name = below.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let split = Split::of_name(&name);
        let inside = entries(below, split)?;
        arrow = arrow.or(inside.arrow);
        match (inside.files.is_empty(), split.is_some()) {
            (true, _) => {}
            (false, true) => of_splits.extend(inside.files),
            (false, false) => others.push((name, inside.files)),
        }
    }
    if !of_splits.is_empty() {
        return Ok(of_splits);
    }
    if let Some(at) = others.iter().position(|(name, _)| name == "data") {
        return Ok(others.swap_remove(at).1);
    }
    match (others.pop(), others.is_empty()) {
        (Some((_, files)), true) => Ok(files),
        (Some((last, _)), false) => {
            let names = others.iter().map(|(name, _)| name.as_str()).chain([last.as_str()]);
            let names: Vec<String> = names.map(|name| dir.join(name).display().to_string()).collect();
            let why = format!("holds several data sets; name one of them: {}", names.join(", "));
            Err(Error::file(dir, why))
        }
        (None, _) => Err(Error::file(
            dir,
            match arrow {
                Some(file) => format!("{} {}", file.display(), super::source::ARROW),
                None => format!(
                    "there is no data file (*.{}) in this directory, nor in one directly below it",
                    EXTENSIONS.join(", *.")
                ),
            },
        )),
    }
}

/// What a directory has, in the order of names.
#[derive(Default)]
struct Entries {
    files: Vec<Found>,
    dirs: Vec<PathBuf>,
    arrow: Option<PathBuf>,
}

/// `split` is that of the directory, where its name has one.
fn entries(dir: &Path, split: Option<Split>) -> Result<Entries> {
    let mut found = Entries::default();
    let mut paths = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        paths.push(entry.map_err(|e| Error::io("list", dir, e))?.path());
    }
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || NOT_DATA.contains(&name.as_str()) {
            continue;
        }
        let lower = name.to_lowercase();
        let stem = COMPRESSED.iter().find_map(|end| lower.strip_suffix(end)).unwrap_or(&lower);
        let extension = stem.rsplit_once('.').map_or("", |(_, extension)| extension);
        if path.is_dir() {
            found.dirs.push(path);
        } else if extension == "arrow" {
            found.arrow.get_or_insert(path);
        } else if EXTENSIONS.contains(&extension) {
            // A link that leads nowhere is named when it is opened; pipes and devices too.
            found.files.push(Found { split: Split::of_name(&name).or(split), path });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::read_rows;
    use super::*;

    /// A directory with these files, each with one row.
    fn made(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{{\"i\": \"{name}\"}}\n")).unwrap();
        }
        dir
    }

    fn chosen(names: &[&str], choice: SplitChoice, purpose: Purpose) -> Result<Vec<String>> {
        let dir = made(names);
        let found = choose(&[dir.path().to_owned()], choice, purpose)?;
        let name = |path: &PathBuf| path.strip_prefix(dir.path()).unwrap().display().to_string();
        Ok(found.files.iter().map(name).collect())
    }

    #[test]
    fn directories_are_their_data_files_by_name() {
        let dir =
            made(&["b-00001.jsonl", "a.json", "b-00000.jsonl", "README.md", ".hidden.jsonl", "split.json"]);
        for name in ["README.md", ".hidden.jsonl", "dataset_info.json", "LICENSE", ".gitattributes"] {
            std::fs::write(dir.path().join(name), "{").unwrap();
        }
        let files = data_files(&[dir.path().to_owned()]).unwrap();
        let name = |f: &PathBuf| read_rows(f).unwrap()[0].columns["i"].as_str().unwrap().to_string();
        assert_eq!(files.iter().map(name).collect::<Vec<_>>(), ["a.json", "b-00000.jsonl", "b-00001.jsonl"]);
        let one = dir.path().join("a.json");
        assert_eq!(data_files(std::slice::from_ref(&one)).unwrap(), [one]);
        let empty = tempfile::tempdir().unwrap();
        let message = data_files(&[empty.path().to_owned()]).unwrap_err().to_string();
        assert!(message.contains("*.parquet"), "{message}");
        assert!(data_files(&[]).is_err());
    }

    #[test]
    fn the_split_fits_the_purpose() {
        use Purpose::{Testing, Training};
        use SplitChoice::{All, Auto, Validation};
        let pools = ["test.jsonl", "train.jsonl"];
        let hub = [
            "data/test-00000-of-00001.parquet",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/validation-00000-of-00001.parquet",
        ];
        for (names, choice, purpose, wanted) in [
            (&pools[..], Auto, Training, &pools[1..]),
            (&pools, Auto, Testing, &pools[..1]),
            (&pools, All, Training, &pools),
            (&hub, Auto, Training, &hub[1..3]),
            (&hub, Auto, Testing, &hub[..1]),
            (&hub, Validation, Training, &hub[3..]),
            (&hub[1..], Auto, Testing, &hub[3..]),
            (
                &["a.csv.gz", "latest.jsonl", "contest.json"],
                Auto,
                Training,
                &["a.csv.gz", "contest.json", "latest.jsonl"],
            ),
            (&["math_train.csv", "math_dev.csv"], Auto, Training, &["math_train.csv"]),
            (&["train/0.csv", "train/1.csv", "eval/0.csv"], Auto, Training, &["train/0.csv", "train/1.csv"]),
            (&["test.jsonl"], Auto, Training, &["test.jsonl"]),
            (&["main/train-0.parquet"], Auto, Training, &["main/train-0.parquet"]),
        ] {
            assert_eq!(chosen(names, choice, purpose).unwrap(), wanted, "{names:?} {choice:?} {purpose:?}");
        }
    }

    #[test]
    fn what_is_unclear_names_the_files() {
        use Purpose::{Testing, Training};
        for (names, choice, purpose, words) in [
            (
                &["test.jsonl", "validation.jsonl"][..],
                SplitChoice::Auto,
                Training,
                &["test.jsonl", "validation.jsonl"][..],
            ),
            (&["train.jsonl", "more.jsonl"], SplitChoice::Auto, Training, &["train.jsonl", "more.jsonl"]),
            (&["a.jsonl", "test.jsonl"], SplitChoice::Auto, Testing, &["a.jsonl", "test.jsonl"]),
            (&["train.jsonl"], SplitChoice::Test, Testing, &["no test split", "train.jsonl"]),
            (
                &["main/train.csv", "socratic/train.csv"],
                SplitChoice::Auto,
                Training,
                &["main", "socratic", "name one"],
            ),
            (
                &["client-1/train.csv", "client-2/test.csv"],
                SplitChoice::All,
                Training,
                &["client-1", "client-2"],
            ),
            (
                &["data-00000-of-00001.arrow", "state.json"],
                SplitChoice::Auto,
                Training,
                &[".arrow", "to_parquet"],
            ),
            (&["train/data-00000-of-00001.arrow"], SplitChoice::Auto, Training, &[".arrow", "to_parquet"]),
        ] {
            let message = chosen(names, choice, purpose).unwrap_err().to_string();
            for word in words {
                assert!(message.contains(word), "{names:?}: no `{word}` in {message}");
            }
        }
    }

    #[test]
    fn lists_mean_what_they_name() {
        let dir = made(&["train.jsonl", "test.jsonl", "more.jsonl"]);
        let at = |name: &str| dir.path().join(name);
        let choose = |names: &[&str], choice| {
            choose(&names.iter().map(|name| at(name)).collect::<Vec<_>>(), choice, Purpose::Training)
        };
        let one = choose(&["test.jsonl"], SplitChoice::Auto).unwrap();
        assert_eq!((one.files, one.split), (vec![at("test.jsonl")], None));
        assert_eq!(choose(&["more.jsonl", "train.jsonl"], SplitChoice::All).unwrap().files.len(), 2);
        let message = choose(&["train.jsonl", "test.jsonl"], SplitChoice::Auto).unwrap_err().to_string();
        assert!(message.contains("train.jsonl") && message.contains("test.jsonl"), "{message}");
        let set = choose(&["train.jsonl", "test.jsonl", "more.jsonl"], SplitChoice::Train).unwrap();
        assert_eq!(
            (set.files, set.left_out),
            (vec![at("train.jsonl"), at("more.jsonl")], vec![at("test.jsonl")])
        );
    }

    #[test]
    fn links_in_circles_end() {
        let dir = made(&["a/train.jsonl"]);
        std::os::unix::fs::symlink("..", dir.path().join("a/up")).unwrap();
        std::os::unix::fs::symlink(".", dir.path().join("b")).unwrap();
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        assert_eq!(data_files(&[dir.path().to_owned()]).unwrap(), [dir.path().join("a/train.jsonl")]);
    }
}
