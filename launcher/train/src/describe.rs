//! What files of data were taken for, in one line, and what `inspect` says about one of them.
//!
//! Names of files and columns, and counts; no text of an example.

use gradtx_run::config::DataConfig;
use gradtx_runtime::data::{Budget, Chosen, DataSplit, Instruction, Loaded, Record, Schema, each_row, load};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// What files of data were taken for.
#[derive(Clone, Debug)]
pub struct Facts {
    examples: usize,
    files: Vec<PathBuf>,
    left_out: Vec<PathBuf>,
    split: Option<DataSplit>,
    forms: String,
    instruction: Option<String>,
    skipped: (usize, Vec<String>),
    disliked: usize,
    duplicates: usize,
}

/// Characters of an instruction that are shown.
const SHOWN: usize = 48;

impl Facts {
    /// Facts about files and what came of them.
    pub fn of(chosen: &Chosen, loaded: &Loaded, config: &DataConfig) -> Self {
        Self {
            examples: loaded.records.len(),
            files: chosen.files.clone(),
            left_out: chosen.left_out.clone(),
            split: chosen.split,
            forms: forms(loaded),
            instruction: instruction(loaded, &config.instruction),
            skipped: (loaded.skipped, loaded.skipped_because.clone()),
            disliked: loaded.disliked,
            duplicates: duplicates(&loaded.records),
        }
    }

    /// One line about all, and one for each of the first rows that were left out.
    pub fn lines(&self) -> Vec<String> {
        std::iter::once(self.line()).chain(self.left_out()).collect()
    }

    /// The first rows that were left out, a line each.
    pub fn left_out(&self) -> impl Iterator<Item = String> {
        self.skipped.1.iter().map(|why| format!("data: left out: {why}"))
    }

    /// What the files were taken for, in one line.
    pub fn line(&self) -> String {
        let mut line = format!("data: {} examples from {}", grouped(self.examples), named(&self.files));
        if let Some(split) = self.split {
            line += &format!(" (the {} split", split.name());
            line += &match self.left_out.as_slice() {
                [] => ")".to_string(),
                files => format!("; not {})", named(files)),
            };
        }
        line += &format!(", read as {}", self.forms);
        line += self.instruction.as_deref().unwrap_or_default();
        for (count, what) in [
            (self.skipped.0, "rows that cannot be used are left out"),
            (self.disliked, "rows with disliked answers are left out"),
            (self.duplicates, "are exact duplicates"),
        ] {
            if count > 0 {
                line += &format!("; {} {what}", grouped(count));
            }
        }
        line
    }
}

/// What rows were read as, and by which columns.
fn forms(loaded: &Loaded) -> String {
    let one = |form: &gradtx_runtime::data::FormCount| {
        let columns = match form.columns {
            [] => "data.columns".into(),
            columns => columns.join(", "),
        };
        let part = match form.schema {
            Schema::Preference => "; only chosen answers",
            _ => "",
        };
        let count =
            if loaded.forms.len() > 1 { format!("{} ", grouped(form.examples)) } else { String::new() };
        format!("{count}{} ({columns}{part})", form.schema.name())
    };
    loaded.forms.iter().map(one).collect::<Vec<_>>().join(" and ")
}

/// What was put before prompts, where there is something to say about it.
fn instruction(loaded: &Loaded, instruction: &Instruction) -> Option<String> {
    let published = loaded.forms.iter().any(|form| form.schema.has_instruction());
    match instruction {
        Instruction::Text(text) => {
            let short: String = text.chars().take(SHOWN).collect();
            let dots = if short.len() < text.len() { "..." } else { "" };
            Some(format!(", with the instruction {:?}", short + dots))
        }
        Instruction::Published => published.then(|| ", with the published instruction".into()),
        Instruction::None => published.then(|| ", without an instruction".into()),
    }
}

/// Examples that are the same as one before them.
fn duplicates(records: &[Record]) -> usize {
    let different: HashSet<u128> = records.iter().map(|record| record.content.digest()).collect();
    records.len() - different.len()
}

fn named(files: &[PathBuf]) -> String {
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match files {
        [] => "no file".into(),
        [one] => name(one),
        [one, two] => format!("{} and {}", name(one), name(two)),
        [first, others @ ..] => format!("{} and {} more files", name(first), others.len()),
    }
}

/// A number with commas: 7,473.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Facts about a file of data for `inspect`, and what is wrong with it.
pub fn file(path: &Path) -> (Vec<(String, String)>, Vec<String>) {
    let (mut facts, mut problems) = (vec![], vec![]);
    let mut columns: Vec<String> = vec![];
    let files = [path.to_owned()];
    let mut rows = 0usize;
    let read = each_row(path, &mut Budget::of(&files, None), &mut |row| {
        rows += 1;
        if let Ok(row) = row {
            let new = row.columns.into_iter().map(|(name, _)| name).filter(|name| !columns.contains(name));
            let new: Vec<String> = new.collect();
            columns.extend(new);
        }
        Ok(())
    });
    if let Err(error) = read {
        return (facts, vec![error.to_string()]);
    }
    facts.push(("rows".into(), grouped(rows)));
    facts.push(("columns".into(), columns.join(", ")));
    let config = DataConfig::default();
    match load(&files, &config.reading(), false) {
        Ok(loaded) => {
            facts.push(("form".into(), forms(&loaded)));
            let put_in = instruction(&loaded, &config.instruction);
            let put_in =
                put_in.map_or("none".into(), |text| text.trim_start_matches(", with the ").to_string());
            facts.push(("instruction".into(), put_in));
            facts.push(("examples".into(), grouped(loaded.records.len())));
            for (name, count) in
                [("disliked answers", loaded.disliked), ("duplicates", duplicates(&loaded.records))]
            {
                if count > 0 {
                    facts.push((name.into(), grouped(count)));
                }
            }
        }
        Err(error) => problems.push(error.to_string()),
    }
    (facts, problems)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_runtime::data::{OnError, Purpose, choose};

    fn written(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn lines(paths: &[PathBuf], config: &DataConfig) -> Vec<String> {
        let chosen = choose(paths, config.split, Purpose::Training).unwrap();
        let loaded = load(&chosen.files, &config.reading(), false).unwrap();
        Facts::of(&chosen, &loaded, config).lines()
    }

    #[test]
    fn one_line_says_what_data_was_taken_for() {
        let dir = tempfile::tempdir().unwrap();
        let solved = "{\"question\": \"q\", \"answer\": \"#### 1\"}\n";
        let plain = "{\"question\": \"q\", \"answer\": \"Paris\"}\n";
        let gsm8k = written(dir.path(), "train.jsonl", &solved.repeat(2));
        let mut config = DataConfig::default();
        assert_eq!(
            lines(std::slice::from_ref(&gsm8k), &config),
            [
                "data: 2 examples from train.jsonl, read as gsm8k (question, answer), with the published instruction; \
              1 are exact duplicates"
            ]
        );
        let qa = written(dir.path(), "test.jsonl", plain);
        assert_eq!(
            lines(&[qa], &config),
            ["data: 1 examples from test.jsonl, read as pair (question, answer)"]
        );
        let found = lines(&[dir.path().to_owned()], &config).remove(0);
        assert!(found.contains("train.jsonl (the train split; not test.jsonl), read as gsm8k"), "{found}");
        config.instruction = Instruction::None;
        assert!(lines(std::slice::from_ref(&gsm8k), &config)[0].contains(", without an instruction"));
        config.instruction = Instruction::Text("Answer briefly.".into());
        assert!(lines(&[gsm8k], &config)[0].contains(", with the instruction \"Answer briefly.\""));
        config.on_error = OnError::Skip;
        let some = written(
            dir.path(),
            "some.jsonl",
            &format!("{plain}{plain}{{\"question\": \"q\", \"answer\": \"\"}}"),
        );
        let found = lines(&[some], &config);
        assert!(found[0].contains("; 1 rows that cannot be used are left out"), "{}", found[0]);
        assert!(
            found[1].starts_with("data: left out: ") && found[1].contains("some.jsonl:3: "),
            "{}",
            found[1]
        );
        assert_eq!(grouped(1_234_567), "1,234,567");
    }

    #[test]
    fn inspect_shows_columns_and_counts_and_no_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), "d.csv", "prompt,response\nsecret words,b\n");
        let (facts, problems) = file(&path);
        assert!(problems.is_empty(), "{problems:?}");
        let all = format!("{facts:?}");
        for word in ["(\"rows\", \"1\")", "prompt, response", "pair (prompt, response)"] {
            assert!(all.contains(word), "no {word} in {all}");
        }
        assert!(!all.contains("secret"));
        let bad = written(dir.path(), "e.csv", "prompt,response\nsecret words,\n");
        let (_, problems) = file(&bad);
        assert!(problems[0].contains("e.csv:2") && !problems[0].contains("secret"), "{problems:?}");
    }
}
