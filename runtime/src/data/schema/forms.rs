//! The schemas: their names, and the columns that they are recognised by.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The forms of rows, distinguished by their columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Schema {
    /// A prompt and a response.
    Pair,
    /// A conversation: a list of `role`, `content`, or of `from`, `value`.
    Messages,
    /// An instruction, perhaps an input to it, and an output.
    Alpaca,
    /// An answer that was chosen and one that was rejected, of which the first is learned.
    Preference,
    /// A text and its summary.
    Summary,
    /// AQuA-RAT: algebra with five options, a rationale and a letter.
    AquaRat,
    /// CommonsenseQA: a question with five choices and a letter.
    CommonsenseQa,
    /// DROP: a passage, a question and spans of text, numbers or dates.
    Drop,
    /// DialogSum: a spoken dialogue and its summary.
    Dialogsum,
    /// SAMSum: a chat and its summary.
    Samsum,
    /// GSM8K: a word problem and its solution, which ends in `#### number`.
    Gsm8k,
    /// OpenBookQA: the stem of a sentence and four ends of it.
    OpenBookQa,
    /// ARC, easy and challenge: a question of science and its choices.
    Arc,
    /// PIQA: a goal and two ways to it.
    Piqa,
    /// HellaSwag: the begin of a story and four ends.
    HellaSwag,
    /// SciQ: a question, perhaps a text that answers it, three wrong answers and the right one.
    SciQ,
    /// RACE: an article, a question and its options.
    Race,
}

/// How answers to a schema's questions are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Right or wrong.
    ExactMatch,
    /// F1 of the words that a text and its reference share (ROUGE-1, stemmed).
    Rouge1,
    /// Whether the right one of several choices is the likeliest.
    MultipleChoice,
    /// The same by likelihood per character of the choice.
    MultipleChoiceNorm,
}

impl Metric {
    /// What a reader calls it.
    pub fn label(self) -> &'static str {
        match self {
            Self::ExactMatch => "exact match",
            Self::Rouge1 => "ROUGE-1",
            Self::MultipleChoice => "accuracy by likelihood (acc)",
            Self::MultipleChoiceNorm => "accuracy by likelihood per character (acc_norm)",
        }
    }
}

/// A schema and the columns of a row that make it one of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub schema: Schema,
    pub columns: &'static [&'static str],
}

/// Sets of columns in the order in which they are tried. Of a published data set, those of
/// the Hugging Face hub and those of the original release.
const FORMS: [(Schema, &[&str]); 38] = [
    (Schema::Preference, &["chosen", "rejected"]),
    (Schema::Pair, &["prompt", "response"]),
    (Schema::Pair, &["prompt", "completion"]),
    (Schema::Messages, &["messages"]),
    (Schema::Messages, &["conversations"]),
    (Schema::Messages, &["conversation"]),
    (Schema::AquaRat, &["question", "options", "rationale", "correct"]),
    (Schema::OpenBookQa, &["question_stem", "choices", "answerKey"]),
    (Schema::Arc, &["question", "choices", "answerKey"]),
    (Schema::CommonsenseQa, &["question", "choices", "answerKey"]),
    (Schema::CommonsenseQa, &["question", "answerKey"]),
    (Schema::OpenBookQa, &["question", "answerKey"]),
    (Schema::Piqa, &["goal", "sol1", "sol2", "label"]),
    (Schema::HellaSwag, &["activity_label", "ctx_a", "ctx_b", "endings", "label"]),
    (Schema::SciQ, &["question", "distractor1", "distractor2", "distractor3", "correct_answer"]),
    (Schema::Race, &["article", "question", "options", "answer"]),
    (Schema::Drop, &["passage", "question", "answers_spans"]),
    (Schema::Drop, &["passage", "question", "answer"]),
    (Schema::Dialogsum, &["dialogue", "summary", "topic"]),
    (Schema::Dialogsum, &["fname", "dialogue", "summary"]),
    (Schema::Dialogsum, &["fname", "dialogue", "summary1"]),
    (Schema::Samsum, &["dialogue", "summary"]),
    (Schema::Gsm8k, &["question", "answer"]),
    (Schema::Alpaca, &["instruction", "output"]),
    (Schema::Alpaca, &["instruction", "response"]),
    (Schema::Pair, &["input", "output"]),
    (Schema::Pair, &["query", "response"]),
    (Schema::Pair, &["question", "response"]),
    (Schema::Pair, &["question", "answer"]),
    (Schema::Pair, &["query", "answer"]),
    (Schema::Pair, &["prompt", "output"]),
    (Schema::Pair, &["prompt", "answer"]),
    (Schema::Pair, &["problem", "solution"]),
    (Schema::Summary, &["dialogue", "summary"]),
    (Schema::Summary, &["document", "summary"]),
    (Schema::Summary, &["article", "summary"]),
    (Schema::Summary, &["article", "highlights"]),
    (Schema::Summary, &["text", "summary"]),
];

impl Schema {
    /// All schemas.
    pub const ALL: [Self; 17] = [
        Self::Pair,
        Self::Messages,
        Self::Alpaca,
        Self::Preference,
        Self::Summary,
        Self::AquaRat,
        Self::CommonsenseQa,
        Self::Drop,
        Self::Dialogsum,
        Self::Samsum,
        Self::Gsm8k,
        Self::OpenBookQa,
        Self::Arc,
        Self::Piqa,
        Self::HellaSwag,
        Self::SciQ,
        Self::Race,
    ];

    /// Its name in the configuration, and the task of rows that have no column for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Messages => "messages",
            Self::Alpaca => "alpaca",
            Self::Preference => "preference",
            Self::Summary => "summary",
            Self::AquaRat => "aqua_rat",
            Self::CommonsenseQa => "commonsense_qa",
            Self::Drop => "drop",
            Self::Dialogsum => "dialogsum",
            Self::Samsum => "samsum",
            Self::Gsm8k => "gsm8k",
            Self::OpenBookQa => "open_book_qa",
            Self::Arc => "arc",
            Self::Piqa => "piqa",
            Self::HellaSwag => "hellaswag",
            Self::SciQ => "sciq",
            Self::Race => "race",
        }
    }

    /// How its answers are scored.
    pub fn metric(self) -> Metric {
        match self {
            Self::Summary | Self::Dialogsum | Self::Samsum => Metric::Rouge1,
            _ if self.is_multiple_choice() => Metric::MultipleChoice,
            _ => Metric::ExactMatch,
        }
    }

    /// Whether the method's authors put an instruction before its questions.
    pub fn has_instruction(self) -> bool {
        !matches!(self, Self::Pair | Self::Messages | Self::Alpaca | Self::Preference | Self::Summary)
            && !self.is_multiple_choice()
    }

    /// Whether its rows have several continuations, of which one is right.
    pub(crate) fn is_multiple_choice(self) -> bool {
        matches!(self, Self::OpenBookQa | Self::Arc | Self::Piqa | Self::HellaSwag | Self::SciQ | Self::Race)
    }

    /// Its sets of columns as text.
    pub(super) fn wanted(self) -> String {
        let sets = FORMS.iter().filter(|(schema, _)| *schema == self);
        let sets: Vec<String> = sets.map(|(_, set)| format!("[{}]", set.join(", "))).collect();
        sets.join(" or ")
    }
}

/// The first set of columns of a schema that a row has, whatever stands in them.
pub(super) fn named(schema: Schema, row: &Map<String, Value>) -> Option<Candidate> {
    first(row, |of, _| of == schema)
}

/// The first form that fits a row by its columns and by what stands in them. `gsm8k` says
/// whether questions and answers of its file are those of GSM8K.
pub(super) fn recognise(row: &Map<String, Value>, gsm8k: bool) -> Option<Candidate> {
    let has_number = |name: &str| row.get(name).is_some_and(|v| !v.is_null());
    first(row, |schema, columns| match (schema, columns) {
        (Schema::Gsm8k, _) => gsm8k,
        // Data sets of people have these columns too; the published ones number their rows.
        (Schema::Samsum, _) => has_number("id"),
        // The same columns, but for the names of rows: those of ARC begin with their source.
        (Schema::Arc, _) => {
            let is_named = |id: &Value| id.as_str().is_some_and(|id| id.contains('_'));
            !row.contains_key("question_concept") && row.get("id").is_some_and(is_named)
        }
        (Schema::Drop, [.., "answer"]) => {
            row["answer"].is_object()
                || (row["answer"].is_string() && (has_number("query_id") || has_number("section_id")))
        }
        _ => true,
    })
}

fn first(row: &Map<String, Value>, fits: impl Fn(Schema, &[&str]) -> bool) -> Option<Candidate> {
    let has_all = |columns: &[&str]| columns.iter().all(|column| row.contains_key(*column));
    let (schema, columns) =
        FORMS.into_iter().find(|(schema, columns)| has_all(columns) && fits(*schema, columns))?;
    Some(Candidate { schema, columns })
}

/// Columns with a text that a question is about.
pub(super) const CONTEXT: [&str; 2] = ["context", "passage"];

/// Whether a row has the columns of GSM8K, and nothing that its questions do not have.
pub(super) fn could_be_gsm8k(row: &Map<String, Value>) -> bool {
    row.contains_key("question")
        && row.contains_key("answer")
        && !CONTEXT.iter().any(|name| row.contains_key(*name))
        && recognise(row, true).is_some_and(|form| form.schema == Schema::Gsm8k)
}

/// Whether a row's answer ends in `#### number`.
pub(super) fn ends_like_gsm8k(row: &Map<String, Value>) -> bool {
    let Some((_, last)) = row.get("answer").and_then(Value::as_str).and_then(|text| text.rsplit_once("####"))
    else {
        return false;
    };
    let number = last.trim().trim_start_matches(['-', '$']).trim_end_matches(['%', '.']);
    !number.is_empty() && number.chars().all(|c| c.is_ascii_digit() || matches!(c, ',' | '.' | '/'))
}

/// Whether this column of a row is the number of the right choice.
pub(super) fn names_a_choice(row: &Map<String, Value>, column: &str) -> bool {
    first(row, |schema, columns| schema.is_multiple_choice() && columns.contains(&column)).is_some()
}

/// What to do with columns that are nearly those of a form.
pub(super) fn advice(row: &Map<String, Value>) -> Option<&'static str> {
    let has = |name: &str| row.contains_key(name);
    if has("text") {
        Some(
            ": `text` alone does not say where the prompt ends and the answer begins, and only answers are learned; \
             write them to two columns",
        )
    } else if has("rejected") {
        Some(": `rejected` answers are not learned, and there is no `chosen` beside them")
    } else if has("response_a") || has("response_0") || has("response_j") || has("answer_a") {
        Some(": of several responses, the one to learn must stand in a column of its own")
    } else {
        None
    }
}
