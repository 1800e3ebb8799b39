//! A whole data set: the examples of its files, and what there is to say about them.

use super::rows::{Budget, Row, each_row};
use super::schema::{FileFacts, OnError, Reading, Record, Schema, Taken};
use crate::{Error, Result};
use std::path::PathBuf;

/// Unusable rows that are named; further ones are counted.
const NAMED: usize = 5;
/// With so many of them, and none to be skipped, reading ends.
const GIVE_UP: usize = 1000;

/// Examples that were read as one form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormCount {
    /// The form.
    pub schema: Schema,
    /// The columns that it was recognised by; empty where the settings name them.
    pub columns: &'static [&'static str],
    /// How many.
    pub examples: usize,
}

/// The examples of a data set.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The examples, in order.
    pub records: Vec<Record>,
    /// The row of each, counted from 0 over all files, with those that gave no example.
    pub numbers: Vec<usize>,
    /// Their rows as they were read, where these were asked for.
    pub rows: Vec<Row>,
    /// Rows of all files.
    pub total: usize,
    /// What they were read as.
    pub forms: Vec<FormCount>,
    /// Rows that could not be used and were left out.
    pub skipped: usize,
    /// Why, of the first ones.
    pub skipped_because: Vec<String>,
    /// Rows with an answer that was disliked, which were left out.
    pub disliked: usize,
}

/// Reads files. `keep_rows` also keeps the rows that the examples were made of.
///
/// # Errors
/// When a file cannot be read; when rows cannot be used, unless these are to be skipped and
/// are at most half of all; when no example is left.
pub fn load(files: &[PathBuf], reading: &Reading, keep_rows: bool) -> Result<Loaded> {
    let mut budget = Budget::of(files, reading.limit_mib);
    let mut loaded = Loaded::default();
    let mut problems = Problems::default();
    for file in files {
        let mut facts = FileFacts::default();
        let mut rows = vec![];
        each_row(file, &mut budget, &mut |row| {
            let number = loaded.total;
            loaded.total += 1;
            match row.and_then(|row| reading.check_form(&row).map(|()| row)) {
                Ok(row) => {
                    facts.add(&row.columns, reading);
                    rows.push((number, row));
                    Ok(())
                }
                // Where the first row is none, the others are hardly better.
                Err(error) if number == 0 && reading.on_error == OnError::Fail => Err(error),
                Err(error) => problems.add(error, reading),
            }
        })?;
        for (number, row) in rows {
            let kept = keep_rows.then(|| row.clone());
            match reading.take(row, &facts) {
                Ok(Taken::Record(record, columns)) => loaded.push(*record, columns, number, kept),
                Ok(Taken::Disliked) => loaded.disliked += 1,
                Err(error) => problems.add(error, reading)?,
            }
        }
    }
    problems.judge(reading, loaded.total)?;
    if loaded.records.is_empty() {
        let what = files.first().map_or(String::new(), |file| file.display().to_string());
        return Err(Error::invalid(what, "all of its answers were disliked: there is nothing to learn"));
    }
    (loaded.skipped, loaded.skipped_because) = (problems.count, problems.named);
    Ok(loaded)
}

impl Loaded {
    fn push(&mut self, record: Record, columns: &'static [&'static str], number: usize, row: Option<Row>) {
        let form = FormCount { schema: record.schema, columns, examples: 0 };
        let at = self.forms.iter().position(|f| (f.schema, f.columns) == (form.schema, form.columns));
        let at = at.unwrap_or_else(|| {
            self.forms.push(form);
            self.forms.len() - 1
        });
        self.forms[at].examples += 1;
        self.records.push(record);
        self.numbers.push(number);
        self.rows.extend(row);
    }
}

/// Rows that cannot be used.
#[derive(Default)]
struct Problems {
    count: usize,
    /// The first error in full.
    first: Option<Error>,
    /// What is wrong with the first rows, a line each.
    named: Vec<String>,
}

impl Problems {
    /// Notes one; an error when reading on would only add to the list.
    fn add(&mut self, error: Error, reading: &Reading) -> Result<()> {
        self.count += 1;
        if self.named.len() < NAMED {
            let text = error.to_string();
            self.named.push(text.lines().next().unwrap_or_default().to_string());
        }
        self.first.get_or_insert(error);
        if reading.on_error == OnError::Fail && self.count >= GIVE_UP {
            self.judge(reading, 0)
        } else {
            Ok(())
        }
    }

    /// The error that they are; none if they may be left out of `total` rows.
    fn judge(&mut self, reading: &Reading, total: usize) -> Result<()> {
        let Some(first) = self.first.take() else { return Ok(()) };
        let what = match &first {
            Error::Invalid { what, .. } => what.clone(),
            other => return Err(Error::invalid("data", other.to_string())),
        };
        let why = first.to_string().trim_start_matches(&format!("{what}: ")).to_string();
        let many = if self.count == 1 { String::new() } else { self.others() };
        match reading.on_error {
            OnError::Fail => {
                let way_out = "\n  data.on_error = \"skip\" leaves out rows that cannot be used";
                Err(Error::invalid(what, format!("{why}{many}{way_out}")))
            }
            OnError::Skip if 2 * self.count > total => {
                let count = self.count;
                let why = format!(
                    "{why}{many}\n  {count} of {total} rows cannot be used; at most half are skipped"
                );
                Err(Error::invalid(what, why))
            }
            OnError::Skip => Ok(()),
        }
    }

    /// The rows after the first.
    fn others(&self) -> String {
        let more = if self.count >= GIVE_UP { format!("{GIVE_UP} or more") } else { self.count.to_string() };
        let lines: String = self.named.iter().skip(1).map(|line| format!("\n  {line}")).collect();
        let dots = if self.count > NAMED { "\n  ..." } else { "" };
        format!("\n  {more} rows cannot be used; after this one:{lines}{dots}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn written(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn loaded(text: &str, on_error: OnError) -> Result<Loaded> {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), "d.jsonl", text);
        load(&[path], &Reading { on_error, ..Reading::default() }, true)
    }

    const GOOD: &str = "{\"prompt\": \"a\", \"response\": \"b\"}\n";

    #[test]
    fn unusable_rows_are_named_and_skipped_only_on_demand() {
        for bad in [
            "{\"prompt\": \"a\", \"response\": \" \"}\n",
            "{\"prompt\": \"a\", \"response\": null}\n",
            "{\"prompt\": \"\", \"response\": \"b\"}\n",
            "{\"prompt\": \"a\", \"response\": NaN}\n",
            "{\"prompt\": \"a\", \"response\": \"b\\ud83d\"}\n",
            "{\"prompt\": \"a\", \"resp\n",
            "{\"other\": 1}\n",
            "[1]\n",
        ] {
            let text = format!("{GOOD}{bad}{GOOD}{GOOD}{bad}");
            let message = loaded(&text, OnError::Fail).unwrap_err().to_string();
            for word in ["d.jsonl:2: ", "d.jsonl:5: ", "2 rows cannot be used", "data.on_error"] {
                assert!(message.contains(word), "no `{word}` in {message}");
            }
            let found = loaded(&text, OnError::Skip).unwrap();
            assert_eq!((found.records.len(), found.skipped, found.total), (3, 2, 5), "{bad}");
            assert_eq!(found.numbers, [0, 2, 3]);
            assert!(found.skipped_because[1].contains("d.jsonl:5: "), "{:?}", found.skipped_because);
            let message = loaded(&format!("{GOOD}{bad}{bad}"), OnError::Skip).unwrap_err().to_string();
            assert!(message.contains("2 of 3 rows") && message.contains("d.jsonl:2: "), "{message}");
        }
        assert_eq!(loaded(&GOOD.repeat(4), OnError::Fail).unwrap().skipped, 0);
        let one = loaded(&format!("{GOOD}{{\"prompt\": \"a\", \"response\": \"\"}}\n"), OnError::Fail);
        assert!(!one.unwrap_err().to_string().contains("rows cannot be used; after"));
    }

    #[test]
    fn values_that_nobody_uses_may_be_anything() {
        let text = "{\"prompt\": \"a\", \"response\": \"b\", \"score\": NaN, \"note\": \"\\ud83d\", \"x\": [Infinity]}\n";
        let found = loaded(text, OnError::Fail).unwrap();
        assert_eq!(found.records[0].content.answer(), "b");
        assert!(found.rows[0].columns["score"].is_null());
    }

    #[test]
    fn a_file_is_gsm8k_by_its_answers() {
        let row = |answer: &str| format!("{{\"question\": \"q\", \"answer\": \"{answer}\"}}\n");
        let schemas = |text: &str| {
            let found = loaded(text, OnError::Fail)?;
            Ok::<_, Error>(found.forms.iter().map(|f| (f.schema, f.examples)).collect::<Vec<_>>())
        };
        let (solution, plain) = (row("2+2=4\\n#### 4"), row("Paris"));
        assert_eq!(schemas(&solution.repeat(3)).unwrap(), [(Schema::Gsm8k, 3)]);
        assert_eq!(schemas(&plain.repeat(3)).unwrap(), [(Schema::Pair, 3)]);
        assert_eq!(schemas(&(solution.repeat(19) + &plain)).unwrap(), [(Schema::Gsm8k, 20)]);
        assert_eq!(schemas(&(plain.repeat(19) + &solution)).unwrap(), [(Schema::Pair, 20)]);
        let message = schemas(&(plain.repeat(2) + &solution.repeat(2))).unwrap_err().to_string();
        assert!(message.contains("2 of 4 answers") && message.contains("data.format"), "{message}");
        for number in ["#### 1,234", "#### -3.5", "#### $5", "#### 3/4", "#### 50%"] {
            assert_eq!(schemas(&row(number)).unwrap(), [(Schema::Gsm8k, 1)], "{number}");
        }
        for other in ["#### blue", "4", "#### ", "#### 4 apples", "# 4"] {
            assert_eq!(schemas(&row(other)).unwrap(), [(Schema::Pair, 1)], "{other}");
        }
    }

    #[test]
    fn disliked_answers_are_left_out() {
        let row = |label: &str| {
            format!("{{\"prompt\": \"p\", \"completion\": \"c {label}\", \"label\": {label}}}\n")
        };
        let rows = |labels: &[&str]| labels.iter().map(|label| row(label)).collect::<String>();
        for (labels, kept, disliked) in [
            (&["true", "false", "true"][..], 2, 1),
            (&["1", "1"], 2, 0),
            (&["0", "1", "2"], 3, 0),
            (&["0.5", "0"], 2, 0),
            (&["true", "false", "null"], 2, 1),
        ] {
            let found = loaded(&rows(labels), OnError::Fail).unwrap();
            assert_eq!((found.records.len(), found.disliked), (kept, disliked), "{labels:?}");
        }
        let message = loaded(&rows(&["0", "1"]), OnError::Fail).unwrap_err().to_string();
        assert!(message.contains("`label`") && message.contains("data.columns.label"), "{message}");
        let message = loaded(&rows(&["false", "false"]), OnError::Fail).unwrap_err().to_string();
        assert!(message.contains("disliked"), "{message}");
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), "d.jsonl", &rows(&["0", "1", "1"]));
        let with = |label: &str| {
            let mut reading = Reading::default();
            reading.columns.label = label.into();
            load(std::slice::from_ref(&path), &reading, false)
                .map(|found| (found.records.len(), found.disliked))
        };
        assert_eq!((with("label").unwrap(), with("none").unwrap()), ((2, 1), (3, 0)));
        assert!(with("liked").unwrap_err().to_string().contains("no such column"));
    }

    #[test]
    fn memory_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), "d.jsonl", &GOOD.repeat(5000));
        let with = |mebibytes| {
            let reading = Reading { limit_mib: Some(mebibytes), ..Reading::default() };
            load(std::slice::from_ref(&path), &reading, false)
        };
        assert!(with(1).unwrap_err().to_string().contains("data.read_limit_mib"));
        assert_eq!(with(8).unwrap().records.len(), 5000);
    }
}
