//! Multiple-choice data sets: a context and its possible continuations, of which one is right.
//!
//! Contexts and continuations are worded as lm-evaluation-harness words them, so that likelihoods
//! can be compared with the numbers that this field reports.

use super::super::rows::kind;
use super::forms::Schema;
use super::record::{Part, as_text, text};
use super::tasks::{label, labelled_choices, texts};
use serde_json::{Map, Value};

/// The continuations of a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// At least two.
    pub texts: Vec<String>,
    /// Which of them is right.
    pub right: usize,
}

impl Choices {
    fn new(texts: Vec<String>, right: usize) -> Part<Self> {
        match texts.len() {
            0 | 1 => Err(format!("expected at least two choices, found {}", texts.len())),
            count if right >= count => Err(format!("choice {right} is the right one, of {count} from 0")),
            _ => match texts.iter().position(|text| text.trim().is_empty()) {
                Some(empty) => Err(format!("choice {empty} is empty")),
                None => Ok(Self { texts, right }),
            },
        }
    }

    /// The right one.
    pub fn answer(&self) -> &str {
        &self.texts[self.right]
    }
}

/// Takes a task's columns out of a row: its context and its choices. Only for data sets that
/// [`Schema::is_multiple_choice`] has.
pub(super) fn take(task: Schema, row: &mut Map<String, Value>) -> Part<(String, Choices)> {
    match task {
        Schema::OpenBookQa => {
            let stem = match row.get("question") {
                Some(Value::Object(_)) => "stem",
                _ => "question_stem",
            };
            by_letter(row, stem)
        }
        Schema::Arc => {
            let (question, choices) = by_letter(row, "question")?;
            Ok((format!("Question: {question}\nAnswer:"), choices))
        }
        Schema::Piqa => {
            let goal = text(row, "goal")?;
            let solutions = ["sol1", "sol2"].map(|name| text(row, name));
            let solutions = solutions.into_iter().collect::<Part<Vec<_>>>()?;
            let right = number(row, "label")?;
            Ok((format!("Question: {goal}\nAnswer:"), Choices::new(solutions, right)?))
        }
        Schema::HellaSwag => hella_swag(row),
        Schema::SciQ => {
            let support = row.shift_remove("support").map_or(Ok(String::new()), |v| as_text(v, "support"))?;
            let question = text(row, "question")?;
            let names = ["distractor1", "distractor2", "distractor3", "correct_answer"];
            let choices = names.map(|name| text(row, name)).into_iter().collect::<Part<Vec<_>>>()?;
            let context = format!("{}\nQuestion: {question}\nAnswer:", support.trim_start());
            Ok((context, Choices::new(choices, names.len() - 1)?))
        }
        _ => {
            let (article, question) = (text(row, "article")?, text(row, "question")?);
            let options = texts(row.shift_remove("options"), "options")?;
            let letter = label(row, "answer")?;
            let right = match letter.trim().as_bytes() {
                [letter @ b'A'..=b'Z'] => usize::from(letter - b'A'),
                _ => return Err(format!("`answer` should be a letter, found `{letter}`")),
            };
            Ok((
                format!("Article: {article}\n\nQuestion: {question}\nAnswer:"),
                Choices::new(options, right)?,
            ))
        }
    }
}

/// A question, `choices` (lists of `label` and of `text`, or a list of both) and `answerKey`.
fn by_letter(row: &mut Map<String, Value>, question: &str) -> Part<(String, Choices)> {
    let (question, choices) = labelled_choices(row, question)?;
    let key = label(row, "answerKey")?;
    let labels: Vec<&str> = choices.iter().map(|(label, _)| label.as_str()).collect();
    let right = labels.iter().position(|label| *label == key).or_else(|| same_place(&labels, &key));
    let right =
        right.ok_or_else(|| format!("`answerKey` is `{key}`, the choices are {}", labels.join(", ")))?;
    let texts = choices.into_iter().map(|(_, text)| text).collect();
    Ok((question, Choices::new(texts, right)?))
}

/// Some rows of ARC have letters as labels and a number as key, or the other way round.
fn same_place(labels: &[&str], key: &str) -> Option<usize> {
    let place = match key.as_bytes() {
        [letter @ b'A'..=b'Z'] => usize::from(letter - b'A'),
        [digit @ b'1'..=b'9'] => usize::from(digit - b'1'),
        _ => return None,
    };
    (place < labels.len()).then_some(place)
}

/// A column that is the number of the right choice, from 0.
fn number(row: &mut Map<String, Value>, name: &str) -> Part<usize> {
    let value = label(row, name)?;
    match value.parse() {
        Ok(number) => Ok(number),
        // Test sets are published with -1.
        Err(_) if value == "-1" => Err(format!("`{name}` is -1: this row has no answer")),
        Err(_) => Err(format!("`{name}` should be the number of a choice, found `{value}`")),
    }
}

/// `ctx_a`, `ctx_b`, `activity_label`, `endings`, `label`.
fn hella_swag(row: &mut Map<String, Value>) -> Part<(String, Choices)> {
    let [label, first, second] = ["activity_label", "ctx_a", "ctx_b"].map(|name| text(row, name));
    row.shift_remove("ctx");
    let endings = match row.shift_remove("endings") {
        Some(Value::Array(items)) => texts(Some(Value::Array(items)), "endings")?,
        Some(other) => return Err(format!("`endings` should be a list, found {}", kind(&other))),
        None => return Err("there are no `endings`".into()),
    };
    let context = clean(&format!("{}: {} {}", label?, first?, capitalised(&second?)));
    let endings = endings.iter().map(|ending| clean(ending)).collect();
    let right = number(row, "label")?;
    Ok((context, Choices::new(endings, right)?))
}

/// The first letter large, the others small.
fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| {
        first.to_uppercase().chain(letters.flat_map(char::to_lowercase)).collect()
    })
}

/// A text of WikiHow without its markers: `[title]` ends a sentence, what else is in brackets goes.
fn clean(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((start, end)) = rest.find('[').and_then(|s| Some((s, s + rest[s..].find(']')?))) {
        kept += &rest[..start];
        rest = &rest[end + 1..];
    }
    kept += rest;
    kept.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::super::tests::read;
    use super::super::{Content, Instruction};
    use super::*;

    fn taken(row: &str, format: &str) -> (Schema, String, Choices) {
        let record = read(row, format, Instruction::Published).unwrap();
        let Content::Pair { prompt, response } = record.content else { panic!("a task is a pair") };
        let choices = record.choices.unwrap();
        assert_eq!(response, choices.answer());
        (record.schema, prompt, choices)
    }

    fn refused(row: &str, format: &str, say: &str) {
        let message = read(row, format, Instruction::Published).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4: ") && message.contains(say), "{message}");
    }

    fn choices(texts: &[&str], right: usize) -> Choices {
        Choices { texts: texts.iter().map(ToString::to_string).collect(), right }
    }

    #[test]
    fn contexts_and_choices_are_the_harness_s() {
        let lists = r#""choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}"#;
        let open = taken(&format!(r#"{{"id": "7-9", "question_stem": "The sun", {lists}"#), "auto");
        assert_eq!(open, (Schema::OpenBookQa, "The sun".into(), choices(&["a", "b", "c"], 2)));
        let released = r#"{"id": "7", "question": {"stem": "The sun", "choices": [{"text": "a", "label": "A"},
            {"text": "b", "label": "B"}]}, "answerKey": "B"}"#;
        let released = taken(released, "open_book_qa");
        assert_eq!(released, (Schema::OpenBookQa, "The sun".into(), choices(&["a", "b"], 1)));

        let arc = format!(r#"{{"id": "Mercury_7175875", "question": "Which?", {lists}"#);
        let wanted = (Schema::Arc, "Question: Which?\nAnswer:".into(), choices(&["a", "b", "c"], 2));
        assert_eq!(taken(&arc, "auto"), wanted);
        assert_eq!(taken(&arc.replace("\"C\"}", "\"3\"}"), "auto"), wanted, "a number for a letter");

        let piqa = taken(r#"{"goal": "Open it.", "sol1": "pull", "sol2": "push", "label": 0}"#, "auto");
        assert_eq!(piqa, (Schema::Piqa, "Question: Open it.\nAnswer:".into(), choices(&["pull", "push"], 0)));

        let sciq = r#"{"question": "What?", "distractor3": "z", "distractor1": "x", "distractor2": "y",
            "correct_answer": "w", "support": " Because."}"#;
        let context = "Because.\nQuestion: What?\nAnswer:".into();
        assert_eq!(taken(sciq, "auto"), (Schema::SciQ, context, choices(&["x", "y", "z", "w"], 3)));

        let race = r#"{"example_id": "1", "article": "A.", "question": "Who _ ?", "options": ["x", "y"], "answer": "B"}"#;
        let context = "Article: A.\n\nQuestion: Who _ ?\nAnswer:".into();
        assert_eq!(taken(race, "auto"), (Schema::Race, context, choices(&["x", "y"], 1)));
    }

    #[test]
    fn hella_swag_loses_its_markers() {
        let row = r#"{"ind": 4, "activity_label": "Removing ice", "ctx_a": "A man sits [step] down.",
            "ctx_b": "then he", "ctx": "x", "endings": ["runs [title] Stops", "sits  [header] here", "is", "was"],
            "label": "3", "split": "val"}"#;
        let (schema, context, found) = taken(row, "auto");
        assert_eq!(schema, Schema::HellaSwag);
        assert_eq!(context, "Removing ice: A man sits down. Then he");
        // Of three spaces two stay, as with the harness.
        assert_eq!(found, choices(&["runs. Stops", "sits  here", "is", "was"], 3));
        refused(&row.replace("\"3\"", "\"\""), "auto", "`label` is empty");
        refused(&row.replace("\"3\"", "\"4\""), "auto", "choice 4 is the right one, of 4 from 0");
    }

    #[test]
    fn rows_without_a_right_choice_are_named() {
        refused(r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}"#, "auto", "has no answer");
        refused(r#"{"goal": "g", "sol1": "a", "sol2": " ", "label": 1}"#, "auto", "choice 1 is empty");
        refused(r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": "left"}"#, "auto", "number of a choice");
        let race = r#"{"article": "A.", "question": "Q", "options": ["x"], "answer": "A"}"#;
        refused(race, "auto", "at least two choices, found 1");
        refused(&race.replace("\"A\"}", "\"x\"}"), "auto", "should be a letter");
        let keyed =
            r#"{"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "E"}"#;
        refused(keyed, "arc", "`answerKey` is `E`, the choices are A, B");
    }
}
