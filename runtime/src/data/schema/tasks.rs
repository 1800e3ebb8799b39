//! The data sets that the method is measured on: which columns they have, what is asked,
//! and what is answered.
//!
//! For each, the columns of the Hugging Face hub and those of the original release. The
//! instructions are those of the method's authors, byte for byte.

use super::super::rows::kind;
use super::forms::Schema;
use super::record::{Part, as_text, text};
use serde_json::{Map, Value};

const STEP_BY_STEP: &str =
    "Let's think step by step and write your answer at the end in the format '#### {answer}'\n";
const STEP_BY_STEP_LETTER: &str =
    "Let's think step by step and write only the choice letter in the format '#### {answer}'\n";
const STEP_BY_STEP_SPAN: &str =
    "Let's think step by step and write the answer in the format '#### {answer}'\n";
const LETTER_ONLY: &str = "Answer only the choice letter in capital letter in the format: '#### {answer}'.\n";
const SUMMARIZE: &str = "Summarize the following dialogue.\n";

/// What the method's authors put before a question of a data set that has an instruction.
pub(super) fn instruction(task: Schema) -> &'static str {
    match task {
        _ if !task.has_instruction() => "",
        Schema::AquaRat => STEP_BY_STEP_LETTER,
        Schema::CommonsenseQa => LETTER_ONLY,
        Schema::Drop => STEP_BY_STEP_SPAN,
        Schema::Dialogsum | Schema::Samsum => SUMMARIZE,
        _ => STEP_BY_STEP,
    }
}

/// Takes a task's columns out of a row: its question, without the instruction, and the
/// answer to learn. Only for data sets that have an instruction.
pub(super) fn take(task: Schema, row: &mut Map<String, Value>) -> Part<(String, String)> {
    match task {
        Schema::AquaRat => aqua_rat(row),
        Schema::CommonsenseQa => commonsense_qa(row),
        Schema::Drop => drop_reading(row),
        Schema::Dialogsum if !row.contains_key("summary") => {
            Ok((text(row, "dialogue")?, label(row, "summary1")?))
        }
        Schema::Dialogsum | Schema::Samsum => Ok((text(row, "dialogue")?, label(row, "summary")?)),
        _ => Ok((text(row, "question")?, label(row, "answer")?)),
    }
}

/// Takes out a column that is the answer, or a part of it. Test sets are also published
/// without: a row that cannot be learned from is an error.
pub(super) fn label(row: &mut Map<String, Value>, name: &str) -> Part<String> {
    match row.get(name) {
        Some(Value::Null) => Err(no_label(name)),
        Some(Value::String(text)) if text.trim().is_empty() => Err(no_label(name)),
        _ => text(row, name),
    }
}

fn no_label(name: &str) -> String {
    format!("`{name}` is empty: rows without an answer, as in unlabelled test sets, cannot be used")
}

/// `question`, `options` (a list such as `A)21`), `rationale`, `correct` (a letter).
fn aqua_rat(row: &mut Map<String, Value>) -> Part<(String, String)> {
    let question = text(row, "question")?;
    let options = texts(row.shift_remove("options"), "options")?.join("\n");
    let rationale = text(row, "rationale")?;
    let letter = label(row, "correct")?;
    Ok((
        format!("{question}\nWhich of the following options is correct?\n{options}"),
        format!("{rationale}\n#### {letter}"),
    ))
}

/// `question`, `choices`, `answerKey`.
fn commonsense_qa(row: &mut Map<String, Value>) -> Part<(String, String)> {
    let (question, choices) = labelled_choices(row, "question")?;
    let key = label(row, "answerKey")?;
    let labels: Vec<&str> = choices.iter().map(|(label, _)| label.as_str()).collect();
    if !labels.contains(&key.as_str()) {
        return Err(format!("`answerKey` is `{key}`, the choices are {}", labels.join(", ")));
    }
    let lines = choices.iter().map(|(label, option)| format!("\n{label}. {option}"));
    Ok((question + &lines.collect::<String>(), format!("#### {key}")))
}

/// A question with the labels and texts of its `choices` (lists of `label` and of `text`). Original
/// releases have both in an object `question`: its `stem`, and `choices` as a list of `label`, `text`.
pub(super) fn labelled_choices(
    row: &mut Map<String, Value>,
    name: &str,
) -> Part<(String, Vec<(String, String)>)> {
    let (question, choices) = match row.get_mut("question") {
        Some(Value::Object(inner)) => {
            let mut inner = std::mem::take(inner);
            row.shift_remove("question");
            (text(&mut inner, "stem")?, inner.shift_remove("choices"))
        }
        _ => (text(row, name)?, row.shift_remove("choices")),
    };
    let choices = match choices {
        Some(Value::Object(mut lists)) => {
            let labels = texts(lists.shift_remove("label"), "choices.label")?;
            let options = texts(lists.shift_remove("text"), "choices.text")?;
            if labels.len() != options.len() {
                return Err(format!("`choices` has {} labels and {} texts", labels.len(), options.len()));
            }
            labels.into_iter().zip(options).collect()
        }
        Some(Value::Array(items)) => {
            let choice = |item| match item {
                Value::Object(mut choice) => Ok((text(&mut choice, "label")?, text(&mut choice, "text")?)),
                other => Err(format!("`choices` should hold objects, found {}", kind(&other))),
            };
            items.into_iter().map(choice).collect::<Part<Vec<_>>>()?
        }
        Some(other) => return Err(format!("`choices` should be a list or two, found {}", kind(&other))),
        None => return Err("there are no `choices`".into()),
    };
    Ok((question, choices))
}

/// `passage`, `question`, `answers_spans` (lists of `spans` and `types`). The original
/// release has an `answer` of `number`, `spans` and `date`, of which one is not empty;
/// others have it as a text. The first span is the answer.
fn drop_reading(row: &mut Map<String, Value>) -> Part<(String, String)> {
    let question = format!("{}\n{}", text(row, "passage")?, text(row, "question")?);
    let (name, answer) = match row.shift_remove("answers_spans") {
        Some(Value::Object(mut lists)) => {
            ("answers_spans.spans", first(texts(lists.shift_remove("spans"), "answers_spans.spans")?))
        }
        Some(other) => return Err(format!("`answers_spans` should be an object, found {}", kind(&other))),
        None => match row.shift_remove("answer") {
            Some(Value::Object(answer)) => ("answer", original_answer(answer)?),
            Some(value) => ("answer", as_text(value, "answer")?),
            None => return Err("there is no `answers_spans`".into()),
        },
    };
    if answer.trim().is_empty() {
        return Err(no_label(name));
    }
    Ok((question, format!("#### {answer}")))
}

fn original_answer(mut answer: Map<String, Value>) -> Part<String> {
    let number = match answer.shift_remove("number") {
        Some(Value::Number(number)) => number.to_string(),
        Some(Value::String(number)) => number,
        _ => String::new(),
    };
    if !number.is_empty() {
        return Ok(number);
    }
    let spans = texts(Some(answer.shift_remove("spans").unwrap_or(Value::Array(vec![]))), "answer.spans")?;
    if !spans.is_empty() {
        return Ok(first(spans));
    }
    let date = answer.shift_remove("date").unwrap_or_default();
    let parts = ["day", "month", "year"].map(|part| date[part].as_str().unwrap_or_default());
    Ok(parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" "))
}

fn first(texts: Vec<String>) -> String {
    texts.into_iter().next().unwrap_or_default()
}

/// A list of strings.
pub(super) fn texts(value: Option<Value>, name: &str) -> Part<Vec<String>> {
    match value {
        Some(Value::Array(items)) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                other => Err(format!("`{name}` should hold strings, found {}", kind(&other))),
            })
            .collect(),
        Some(other) => Err(format!("`{name}` should be a list, found {}", kind(&other))),
        None => Err(format!("there is no `{name}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::read;
    use super::super::{Content, Instruction};
    use super::*;

    fn pair(row: &str) -> (Schema, String, String) {
        let record = read(row, "auto", Instruction::None).unwrap();
        match record.content {
            Content::Pair { prompt, response } => (record.schema, prompt, response),
            Content::Chat(_) => panic!("a task is a pair"),
        }
    }

    #[test]
    fn releases_of_their_own_read_like_those_of_the_hub() {
        let hub = pair(
            r#"{"id": "1", "question": "Where?", "question_concept": "x",
            "choices": {"label": ["A", "B"], "text": ["here", "there"]}, "answerKey": "B"}"#,
        );
        let own = pair(
            r#"{"answerKey": "B", "id": "1", "question": {"question_concept": "x", "stem": "Where?",
            "choices": [{"label": "A", "text": "here"}, {"label": "B", "text": "there"}]}}"#,
        );
        assert_eq!(hub, own);
        assert_eq!(hub, (Schema::CommonsenseQa, "Where?\nA. here\nB. there".into(), "#### B".into()));

        let drop = |answer: &str| {
            pair(&format!(r#"{{"query_id": "1", "passage": "P.", "question": "Q?", {answer}}}"#))
        };
        let hub = drop(r#""answers_spans": {"spans": ["3", "4"], "types": ["number", "number"]}"#);
        assert_eq!(hub, (Schema::Drop, "P.\nQ?".into(), "#### 3".into()));
        for same in [
            r#""answer": {"number": "3", "date": {"day": "", "month": "", "year": ""}, "spans": []}"#,
            r#""answer": {"number": 3, "date": {}, "spans": ["x"]}"#,
            r#""answer": {"number": "", "date": {"day": ""}, "spans": ["3", "4"]}"#,
            r#""answer": "3""#,
        ] {
            assert_eq!(drop(same), hub);
        }
        let date =
            r#""answer": {"number": "", "date": {"day": "", "month": "May", "year": "1916"}, "spans": []}"#;
        assert_eq!(drop(date).2, "#### May 1916");

        let samsum = r#"{"id": "1", "summary": "S.", "dialogue": "A: hi\r\nB: ho"}"#;
        assert_eq!(pair(samsum), (Schema::Samsum, "A: hi\r\nB: ho".into(), "S.".into()));
        for (row, answer) in [
            (r#"{"fname": "t_0", "dialogue": "D", "summary": "S", "topic": "t"}"#, "S"),
            (r#"{"id": "t_0", "dialogue": "D", "summary": "S", "topic": "t"}"#, "S"),
            (r#"{"fname": "t_0", "dialogue": "D", "summary1": "1", "summary2": "2", "topic1": "t"}"#, "1"),
        ] {
            assert_eq!(pair(row), (Schema::Dialogsum, "D".into(), answer.into()));
        }
    }

    #[test]
    fn rows_without_an_answer_are_named() {
        for (row, say) in [
            (
                r#"{"question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": ""}"#,
                "`answerKey` is empty",
            ),
            (
                r#"{"question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "E"}"#,
                "the choices are A",
            ),
            (
                r#"{"question": "q", "choices": {"label": ["A"], "text": []}, "answerKey": "A"}"#,
                "1 labels and 0",
            ),
            (r#"{"question": "q", "answerKey": "A"}"#, "no `choices`"),
            (
                r#"{"passage": "p", "question": "q", "answers_spans": {"spans": [], "types": []}}"#,
                "`answers_spans.spans` is empty",
            ),
            (
                r#"{"passage": "p", "question": "q", "answer": {"number": "", "spans": []}}"#,
                "`answer` is empty",
            ),
            (r#"{"question": "q", "answer": null}"#, "`answer` is null"),
            (r#"{"question": ["q"], "answer": "x\n#### 3"}"#, "`question` should be a string, found a list"),
            (
                r#"{"question": "q", "options": "A", "rationale": "r", "correct": "A"}"#,
                "`options` should be a list",
            ),
            (
                r#"{"question": "q", "options": [1], "rationale": "r", "correct": "A"}"#,
                "should hold strings, found a number",
            ),
        ] {
            let message = read(row, "auto", Instruction::Published).unwrap_err().to_string();
            assert!(message.contains("d.jsonl:4: ") && message.contains(say), "{message}");
        }
    }
}
