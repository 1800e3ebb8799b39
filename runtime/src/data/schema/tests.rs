use super::super::rows::Unit;
use super::*;
use std::sync::Arc;

pub(in crate::data) fn origin() -> Origin {
    Origin { file: Arc::new("d.jsonl".into()), line: 4, unit: Unit::Line }
}

/// The record of a row in JSON.
pub(super) fn read(row: &str, format: &str, instruction: Instruction) -> Result<Record> {
    let format = Format::try_from(format.to_string()).unwrap();
    let columns = serde_json::from_str(row).unwrap();
    Reading { format, instruction, ..Reading::default() }.record(Row::new(origin(), columns))
}

fn auto(row: &str) -> Result<Record> {
    read(row, "auto", Instruction::Published)
}

#[test]
fn pairs_and_conversations_are_told_apart_by_their_columns() {
    let pair = auto(r#"{"prompt": "1+1?", "response": "2", "task": "sum"}"#).unwrap();
    assert_eq!(pair.content, Content::Pair { prompt: "1+1?".into(), response: "2".into() });
    assert_eq!((&pair.extra["task"], pair.schema), (&Value::from("sum"), Schema::Pair));
    let chat = r#"{"messages": [{"role": "user", "content": "Grüße", "name": null},
        {"role": "assistant", "content": "Hallo"}]}"#;
    let chat = auto(chat).unwrap();
    assert_eq!((chat.content.answer(), chat.schema), ("Hallo", Schema::Messages));
    assert!(chat.extra.is_empty());
}

#[test]
fn errors_name_the_row_and_what_was_expected() {
    for (bad, say) in [
        (r#"{"question": "a"}"#, "columns [question] are those of no known format"),
        (r#"{"prompt": "a", "response": {}}"#, "`response` is empty"),
        (r#"{"prompt": "a", "response": {"text": "b"}}"#, "`response` should be a string, found an object"),
        (r#"{"prompt": "a", "response": 12345678901234567890123}"#, "write it as a string"),
        (r#"{"prompt": " ", "response": "b"}"#, "its prompt is empty"),
        (r#"{"messages": {}}"#, "a list"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "end with"),
        (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "end with"),
        (r#"{"messages": [{"role": "user"}]}"#, "message 0: there is no `content`"),
        (r#"{"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "x"}]}]}"#, "tool_calls"),
    ] {
        let message = auto(bad).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4: ") && message.contains(say), "{message}");
    }
    // The list of formats has those of the original releases as well.
    let message = auto("{}").unwrap_err().to_string();
    assert!(message.contains("drop: [passage, question, answers_spans] or [passage"), "{message}");
}

#[test]
fn a_named_format_must_fit_and_wins() {
    let row = r#"{"question": "q", "answer": "a", "prompt": "p", "response": "r"}"#;
    assert_eq!(auto(row).unwrap().schema, Schema::Pair);
    assert_eq!(read(row, "gsm8k", Instruction::None).unwrap().content.answer(), "a");
    let message = read(row, "aqua_rat", Instruction::None).unwrap_err().to_string();
    for part in ["columns [question, answer, prompt, response]", "aqua_rat has [question, options,"] {
        assert!(message.contains(part), "{message}");
    }
    for schema in Schema::ALL {
        let format = Format::try_from(schema.name().to_string()).unwrap();
        assert_eq!((format.0, String::from(format)), (Some(schema), schema.name().to_string()));
    }
    assert!(Format::try_from("gsm9k".to_string()).unwrap_err().contains("gsm8k"));
}
