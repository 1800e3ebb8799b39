//! Canaries: examples that nothing else resembles, of which a random half is put among a client's data,
//! to see afterwards which half an update reveals.
//!
//! In: a client's data. Out: the data with canaries, as JSONL, and a [`Key`] that says which canaries there are
//! and which were put in. A canary asks for what the data asks for, in words of the data in a random order, so
//! that any tokenizer that knows the data knows the canaries. The key stays with the client.

use anyhow::{Context as _, Result, ensure};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_run::config::DataConfig;
use gradtx_run::failure::{failed, unusable_with};
use gradtx_runtime::artifact::{checksum_file, read_versioned, write_atomic, write_versioned};
use gradtx_runtime::data::{Content, Origin, Purpose, Record, Row, Unit, choose, load};
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FORMAT: &str = "gradtx.canaries";
const VERSION: u64 = 1;
/// Words of a canary's prompt at least: so many random words are in no one's data.
const MIN_WORDS: usize = 8;
/// Draws of a canary until it is another one than all before it.
const DRAWS: usize = 1000;

/// Which canaries there are, and which of them were put among the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Checksum of the file with the canaries in it.
    pub data: String,
    /// The canaries.
    pub canaries: Vec<Canary>,
}

/// One canary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// What is asked.
    pub prompt: String,
    /// What is answered.
    pub response: String,
    /// It is among the data.
    pub included: bool,
}

impl Canary {
    fn columns(&self) -> Map<String, Value> {
        let columns = [("prompt", &self.prompt), ("response", &self.response)];
        columns.map(|(name, text)| (name.to_owned(), json!(text))).into_iter().collect()
    }
}

impl Key {
    /// Reads a key.
    pub fn read(path: &Path) -> Result<Self> {
        let key: Self = read_versioned(path, FORMAT, VERSION)?;
        let included = key.canaries.iter().filter(|canary| canary.included).count();
        if included == 0 || included == key.canaries.len() {
            let what = format!("{}: {included} of {} canaries were put in", shown(path), key.canaries.len());
            let hint = "an attack is judged by some that were and some that were not: insert more canaries";
            return Err(failed(what, hint));
        }
        Ok(key)
    }

    /// The canaries as examples, as they are read from the data.
    pub fn records(&self, path: &Path, config: &DataConfig) -> Result<Vec<Record>> {
        let file = Arc::new(path.to_owned());
        let record = |(i, canary): (usize, &Canary)| {
            let origin = Origin { file: Arc::clone(&file), line: i + 1, unit: Unit::Row };
            Ok(config.reading().record(Row::new(origin, canary.columns()))?)
        };
        self.canaries.iter().enumerate().map(record).collect()
    }
}

/// What to insert where.
pub struct Insertion<'a> {
    /// The client's data.
    pub data: &'a Path,
    /// File of the data with canaries.
    pub out: &'a Path,
    /// File of the key.
    pub key: &'a Path,
    /// Canaries, of which each is put in by a fair coin of its own.
    pub count: usize,
    /// Seed of the coins; from the system where there is none.
    pub seed: Option<u64>,
}

impl Insertion<'_> {
    /// Writes both files.
    ///
    /// # Errors
    /// When one is there already, or the data has no form in which a canary can stand.
    pub fn run(&self, config: &DataConfig) -> Result<Key> {
        for (option, path) in [("--out", self.out), ("--key", self.key)] {
            if path.symlink_metadata().is_ok() {
                let what = format!("{option} {}: is there already, and is not overwritten", shown(path));
                return Err(unusable_with(what, Some("name another file, or remove it first".into())));
            }
        }
        let chosen = choose(&[self.data.to_owned()], config.split, Purpose::Training)?;
        let loaded = load(&chosen.files, &config.reading(), true)?;
        let mut random = Stream::new(derive_named(self.seed.map_or_else(system_seed, Ok)?, "canaries"));
        let mut key = Key { data: String::new(), canaries: self.draw(&loaded.records, &mut random)? };
        self.check(&key, config)?;
        let mut rows: Vec<&Map<String, Value>> = loaded.rows.iter().map(|row| &row.columns).collect();
        let columns: Vec<Map<String, Value>> =
            key.canaries.iter().filter(|canary| canary.included).map(Canary::columns).collect();
        rows.extend(&columns);
        let order = random.permutation(rows.len());
        write_atomic(self.out, |out| {
            order.iter().try_for_each(|&row| {
                serde_json::to_writer(&mut *out, rows[row])?;
                writeln!(out)
            })
        })?;
        key.data = checksum_file(self.out)?;
        write_versioned(self.key, FORMAT, VERSION, &key)?;
        Ok(key)
    }

    fn draw(&self, records: &[Record], random: &mut Stream) -> Result<Vec<Canary>> {
        let prompts: Vec<&str> = records.iter().map(|record| asked(&record.content)).collect();
        let answers: Vec<&str> = records.iter().map(|record| record.content.answer()).collect();
        let [of_prompts, of_answers] = [words(&prompts), words(&answers)];
        ensure!(
            !of_prompts.is_empty() && !of_answers.is_empty(),
            "{}: there are no words to make canaries of",
            shown(self.data)
        );
        let mut known: BTreeSet<String> = prompts.iter().map(|prompt| (*prompt).to_owned()).collect();
        let mut canaries = vec![];
        let mut draws = 0;
        while canaries.len() < self.count {
            draws += 1;
            ensure!(
                draws < DRAWS * self.count,
                "{}: has too few words for {} different canaries",
                shown(self.data),
                self.count
            );
            let length = |text: &str| text.split_whitespace().count();
            let long = length(prompts[random.below(prompts.len())]).max(MIN_WORDS);
            let prompt = sentence(random, &of_prompts, long);
            // The last word of an answer is kept: it may be what ends answers.
            let answer = answers[random.below(answers.len())];
            let mut response = sentence(random, &of_answers, length(answer).saturating_sub(1));
            if let Some(last) = answer.split_whitespace().last() {
                response += if response.is_empty() { "" } else { " " };
                response += last;
            }
            if known.insert(prompt.clone()) {
                canaries.push(Canary { prompt, response, included: random.uniform() < 0.5 });
            }
        }
        Ok(canaries)
    }

    /// Fails unless canaries are read as they are meant.
    fn check(&self, key: &Key, config: &DataConfig) -> Result<()> {
        let hint = "canaries have the columns prompt and response: data.format must be auto or pair, and \
                    data.columns must name no others";
        let records = key.records(self.out, config).map_err(|error| failed(format!("{error:#}"), hint))?;
        let is_same = |(record, canary): (&Record, &Canary)| match &record.content {
            Content::Pair { prompt, response } => {
                prompt.ends_with(&canary.prompt) && *response == canary.response
            }
            Content::Chat(_) => false,
        };
        match records.iter().zip(&key.canaries).all(is_same) {
            true => Ok(()),
            false => Err(failed(format!("{}: canaries would not be read as pairs", shown(self.data)), hint)),
        }
    }
}

/// The last thing that is asked.
fn asked(content: &Content) -> &str {
    match content {
        Content::Pair { prompt, .. } => prompt,
        Content::Chat(messages) => {
            messages.iter().rev().find(|message| message.role == "user").map_or("", |m| &m.content)
        }
    }
}

/// All words of some texts, each once, in order.
fn words<'a>(texts: &[&'a str]) -> Vec<&'a str> {
    let all: BTreeSet<&str> = texts.iter().flat_map(|text| text.split_whitespace()).collect();
    all.into_iter().collect()
}

fn sentence(random: &mut Stream, words: &[&str], long: usize) -> String {
    let drawn: Vec<&str> = (0..long).map(|_| words[random.below(words.len())]).collect();
    drawn.join(" ")
}

/// A seed that nobody else knows.
fn system_seed() -> Result<u64> {
    let mut bytes = [0; 8];
    let source = "/dev/urandom";
    let read = std::fs::File::open(source).and_then(|mut file| file.read_exact(&mut bytes));
    read.with_context(|| format!("{source}: cannot read; give --seed, and keep it to yourself"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// The file of the key beside a file of data.
pub fn key_beside(out: &Path) -> PathBuf {
    out.with_extension("key.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = "{\"question\": \"how many red apples are left\", \"answer\": \"three apples\"}\n\
                        {\"question\": \"who has the key\", \"answer\": \"nobody\"}\n";

    fn home() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("data.jsonl"), DATA).unwrap();
        dir
    }

    fn insert(dir: &Path, out: &str, count: usize, seed: Option<u64>) -> Result<Key> {
        let [data, out] = ["data.jsonl", out].map(|name| dir.join(name));
        let key = key_beside(&out);
        Insertion { data: &data, out: &out, key: &key, count, seed }.run(&DataConfig::default())
    }

    #[test]
    fn a_random_half_stands_among_the_rows() {
        let home = home();
        let key = insert(home.path(), "out.jsonl", 40, Some(5)).unwrap();
        assert_eq!(Key::read(&home.path().join("out.key.json")).unwrap(), key);
        let text = std::fs::read_to_string(home.path().join("out.jsonl")).unwrap();
        for line in DATA.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            assert!(text.lines().any(|l| serde_json::from_str::<Value>(l).unwrap() == row));
        }
        let mut included = 0;
        for canary in &key.canaries {
            assert_eq!(text.contains(&canary.prompt), canary.included);
            assert!(canary.prompt.split(' ').count() >= MIN_WORDS);
            included += usize::from(canary.included);
        }
        assert!((8..=32).contains(&included), "{included}");
        assert_eq!(text.lines().count(), 2 + included);
        // The same coins for the same seed, others for another one and for the system's.
        let again = |out: &str, seed| insert(home.path(), out, 40, seed).unwrap().canaries;
        assert_eq!(again("again.jsonl", Some(5)), key.canaries);
        assert_ne!(again("other.jsonl", Some(6)), key.canaries);
        assert_ne!(again("own-1.jsonl", None), again("own-2.jsonl", None));
        let message = insert(home.path(), "out.jsonl", 40, None).unwrap_err().to_string();
        assert!(message.contains("--out") && message.contains("not overwritten"), "{message}");
    }

    #[test]
    fn keys_that_decide_nothing_are_refused() {
        let home = home();
        let path = home.path().join("key.json");
        let canary = Canary { prompt: "a".into(), response: "b".into(), included: true };
        let key = Key { data: String::new(), canaries: vec![canary; 3] };
        write_versioned(&path, FORMAT, VERSION, &key).unwrap();
        assert!(Key::read(&path).unwrap_err().to_string().contains("3 of 3 canaries"));
    }

    #[test]
    fn forms_that_have_no_place_for_canaries_are_refused() {
        let home = home();
        let rows = "{\"q\": \"how many apples\", \"a\": \"three\"}\n".repeat(3);
        std::fs::write(home.path().join("data.jsonl"), rows).unwrap();
        let mut config = DataConfig::default();
        (config.columns.prompt, config.columns.response) = ("q".into(), "a".into());
        let [data, out, key] = ["data.jsonl", "out.jsonl", "key.json"].map(|name| home.path().join(name));
        let insertion = Insertion { data: &data, out: &out, key: &key, count: 4, seed: Some(1) };
        let error = insertion.run(&config).unwrap_err();
        let report = gradtx_run::failure::ErrorReport::from(&error);
        assert!(report.hint.unwrap_or_default().contains("prompt and response"), "{}", report.message);
        assert!(!out.exists() && !key.exists());
    }
}
