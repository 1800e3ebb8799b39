//! From rows to [`Record`]s: what the columns of a row mean.
//!
//! A [`Schema`] is recognised by its columns and, where other data has the same columns, by
//! what stands in them; or it is named ([`Format`]), or its columns are ([`Columns`]). Columns
//! that do not belong to it are kept (`Record::extra`), for grouping by task.
//!
//! * mod: the steps from a row to a record.
//! * record: records, and texts in columns.
//! * forms: the schemas, their columns and names.
//! * reading: the settings that say how rows are read.
//! * pairs: prompts and responses, instructions, own columns.
//! * chat: conversations.
//! * preference: liked and disliked answers.
//! * tasks: the published data sets that have a form of their own.
//! * choices: multiple-choice data sets.

mod chat;
mod choices;
mod forms;
mod pairs;
mod preference;
mod reading;
mod record;
mod tasks;

pub use choices::Choices;
pub use forms::{Metric, Schema};
pub use preference::Labels;
pub use reading::{Columns, Format, Instruction, OnError, Reading, TrainOn};
pub use record::{Content, Message, Record};

use super::rows::Row;
use crate::Result;
use forms::Candidate;
use record::Part;
use serde_json::{Map, Value};

/// What was made of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Taken {
    /// An example.
    Record(Box<Record>, &'static [&'static str]),
    /// A row whose answer somebody disliked, which is not to be learned.
    Disliked,
}

/// What the rows of one file have in common, which decides what each of them is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileFacts {
    /// Rows with the columns of GSM8K whose answer ends like a solution of it.
    solutions: usize,
    /// Rows with these columns.
    questions: usize,
    /// Values of the column that says which answers are liked.
    labels: Labels,
}

impl FileFacts {
    /// Notes a row.
    pub fn add(&mut self, row: &Map<String, Value>, reading: &Reading) {
        if forms::could_be_gsm8k(row) {
            self.questions += 1;
            self.solutions += usize::from(forms::ends_like_gsm8k(row));
        }
        let label = reading.columns.label_column();
        if reading.columns.are_named() || !forms::names_a_choice(row, label) {
            self.labels.add(row.get(label));
        }
    }

    /// Whether rows with the columns of GSM8K are GSM8K; an error where some are and some
    /// are not.
    fn is_gsm8k(&self) -> std::result::Result<bool, String> {
        match (10 * self.solutions).cmp(&(9 * self.questions)) {
            std::cmp::Ordering::Less if 10 * self.solutions <= self.questions => Ok(false),
            std::cmp::Ordering::Less => Err(format!(
                "`question` and `answer` may be those of GSM8K or not: {} of {} answers in this file end in \
                 `#### number`; set data.format to \"gsm8k\" or \"pair\"",
                self.solutions, self.questions
            )),
            _ => Ok(true),
        }
    }
}

impl Reading {
    /// The record of a row that is all of a file.
    pub fn record(&self, row: Row) -> Result<Record> {
        let mut facts = FileFacts::default();
        facts.add(&row.columns, self);
        let origin = row.origin.clone();
        match self.take(row, &facts)? {
            Taken::Record(record, _) => Ok(*record),
            Taken::Disliked => Err(origin.error("its answer is one that was disliked")),
        }
    }

    /// Fails when a row is of no form, whatever the rest of its file is like.
    pub(crate) fn check_form(&self, row: &Row) -> Result<()> {
        let form = self.form(&row.columns, &FileFacts::default());
        form.map(|_| ()).map_err(|why| row.origin.error(why))
    }

    /// What a row of a file is.
    pub fn take(&self, row: Row, facts: &FileFacts) -> Result<Taken> {
        let Row { origin, columns: mut extra, unusable } = row;
        let form = self.form(&extra, facts).map_err(|why| origin.error(why))?;
        let fail = |why: String| origin.error(format!("{} row: {why}", form.schema.name()));
        let before: Vec<String> = if unusable.is_empty() { vec![] } else { extra.keys().cloned().collect() };
        let label = self.columns.label_column();
        if !form.columns.contains(&label)
            && facts
                .labels
                .is_disliked(extra.get(label), &self.columns)
                .map_err(|why| fail(format!("`{label}`: {why}")))?
        {
            return Ok(Taken::Disliked);
        }
        let (content, choices, mut learned) = self.content(&form, &mut extra).map_err(fail)?;
        let used = |name: &&String| before.contains(name) && !extra.contains_key(*name);
        if let Some((name, what)) = unusable.keys().find(used).and_then(|n| unusable.get_key_value(n)) {
            return Err(fail(format!("`{name}` has {what}")));
        }
        if content.answer().trim().is_empty() {
            return Err(fail("its answer is empty: there is nothing to learn from it".into()));
        }
        if !content.asks() {
            return Err(fail("its prompt is empty: nothing is asked".into()));
        }
        if self.train_on == TrainOn::Last {
            learned.clear();
        }
        let record = Record { origin, schema: form.schema, content, choices, learned, extra };
        Ok(Taken::Record(Box::new(record), form.columns))
    }

    /// The form of a row: as it is set, or as its columns and the file say.
    fn form(&self, row: &Map<String, Value>, facts: &FileFacts) -> std::result::Result<Candidate, String> {
        let found = || row.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        if self.columns.are_named() {
            return self.columns.form(row);
        }
        if let Some(schema) = self.format.0 {
            return forms::named(schema, row).ok_or_else(|| {
                format!("columns [{}]; the format {} has {}", found(), schema.name(), schema.wanted())
            });
        }
        let gsm8k = if forms::could_be_gsm8k(row) { facts.is_gsm8k()? } else { false };
        forms::recognise(row, gsm8k).ok_or_else(|| {
            let advice = forms::advice(row).unwrap_or_default();
            let known = Schema::ALL.map(|s| format!("\n  {}: {}", s.name(), s.wanted())).concat();
            format!(
                "columns [{}] are those of no known format{advice}; name them in [data.columns], e.g. \
                 columns.prompt = \"question\", columns.response = \"reply\"; known formats:{known}",
                found()
            )
        })
    }

    /// Takes a form's columns out of a row: what they say, and which messages before the last
    /// can be learned as well.
    fn content(
        &self,
        form: &Candidate,
        row: &mut Map<String, Value>,
    ) -> Part<(Content, Option<Choices>, Vec<usize>)> {
        let chat = match form.schema {
            _ if self.columns.are_named() => pairs::own(&self.columns, row)?,
            Schema::Pair | Schema::Summary => pairs::pair(form.columns, row)?,
            Schema::Alpaca => pairs::alpaca(form.columns, row)?,
            Schema::Messages => chat::messages(form.columns[0], row)?,
            Schema::Preference => preference::chosen(row)?,
            task => {
                let (question, response, choices) = match task.is_multiple_choice() {
                    true => {
                        let (question, choices) = choices::take(task, row)?;
                        (question, choices.answer().to_owned(), Some(choices))
                    }
                    false => {
                        let (question, response) = tasks::take(task, row)?;
                        (question, response, None)
                    }
                };
                if question.trim().is_empty() {
                    return Err("its prompt is empty: nothing is asked".into());
                }
                let prompt = match &self.instruction {
                    Instruction::Published => [tasks::instruction(task), &question].concat(),
                    Instruction::None => question,
                    Instruction::Text(text) => pairs::instructed(text, &question),
                };
                return Ok((Content::Pair { prompt, response }, choices, vec![]));
            }
        };
        let chat = match &self.instruction {
            Instruction::Text(text) => chat.instructed(text),
            Instruction::Published | Instruction::None => chat,
        };
        let (content, learned) = chat.content();
        Ok((content, None, learned))
    }
}

#[cfg(test)]
pub(in crate::data) mod tests;
