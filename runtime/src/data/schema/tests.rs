use super::super::rows::{Origin, Unit};
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
fn pairs_and_conversations_differ_by_columns() {
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

/// What a row is read as: schema, roles and texts (a pair has none but `user` and `assistant`).
fn said(row: &str) -> (Schema, Vec<(String, String)>) {
    let record = auto(row).unwrap();
    let turns = match record.content {
        Content::Pair { prompt, response } => vec![("user".into(), prompt), ("assistant".into(), response)],
        Content::Chat(messages) => messages.into_iter().map(|m| (m.role, m.content)).collect(),
    };
    (record.schema, turns)
}

fn pair_of(prompt: &str, response: &str) -> Vec<(String, String)> {
    vec![("user".into(), prompt.into()), ("assistant".into(), response.into())]
}

fn with_system(system: &str, prompt: &str, response: &str) -> Vec<(String, String)> {
    [vec![("system".into(), system.into())], pair_of(prompt, response)].concat()
}

#[test]
fn pairs_under_their_common_names() {
    for (row, schema, wanted) in [
        (r#"{"prompt": "p", "completion": "c"}"#, Schema::Pair, pair_of("p", "c")),
        (
            r#"{"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]}"#,
            Schema::Pair,
            pair_of("p", "c"),
        ),
        (
            r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], "completion": "c"}"#,
            Schema::Pair,
            with_system("s", "p", "c"),
        ),
        (r#"{"input": "p", "output": "c"}"#, Schema::Pair, pair_of("p", "c")),
        (r#"{"query": "p", "response": "c"}"#, Schema::Pair, pair_of("p", "c")),
        (
            r#"{"question": "p", "response": "c", "system_prompt": "s"}"#,
            Schema::Pair,
            with_system("s", "p", "c"),
        ),
        (r#"{"question": "p", "response": "c", "system_prompt": ""}"#, Schema::Pair, pair_of("p", "c")),
        (r#"{"question": "p", "answer": 7}"#, Schema::Pair, pair_of("p", "7")),
        (r#"{"question": "p", "answer": 0.5}"#, Schema::Pair, pair_of("p", "0.5")),
        (r#"{"question": "p", "passage": "P.", "answer": true}"#, Schema::Pair, pair_of("P.\np", "true")),
        (r#"{"question": "p", "passage": "P.", "answer": "x"}"#, Schema::Pair, pair_of("P.\np", "x")),
        (r#"{"question": "p", "context": "P.", "answer": "x"}"#, Schema::Pair, pair_of("P.\np", "x")),
        (r#"{"problem": "p", "solution": "x"}"#, Schema::Pair, pair_of("p", "x")),
        (r#"{"instruction": "i", "input": "", "output": "o"}"#, Schema::Alpaca, pair_of("i", "o")),
        (r#"{"instruction": "i", "input": "x", "output": "o"}"#, Schema::Alpaca, pair_of("i\nx", "o")),
        (
            r#"{"instruction": "i", "input": null, "output": "o", "text": "t"}"#,
            Schema::Alpaca,
            pair_of("i", "o"),
        ),
        (
            r#"{"instruction": "i", "context": "x", "response": "o", "category": "c"}"#,
            Schema::Alpaca,
            pair_of("i\nx", "o"),
        ),
        (
            r#"{"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]}"#,
            Schema::Alpaca,
            [vec![("system".into(), "s".into())], pair_of("q", "a"), pair_of("i", "o")].concat(),
        ),
        (r#"{"dialogue": "D: x", "summary": "s"}"#, Schema::Summary, pair_of("D: x", "s")),
        (r#"{"article": "a", "highlights": "h", "id": "1"}"#, Schema::Summary, pair_of("a", "h")),
    ] {
        assert_eq!(said(row), (schema, wanted), "{row}");
    }
    assert_eq!(Schema::Summary.metric(), Metric::Rouge1);
}

#[test]
fn conversations_in_their_common_forms() {
    let turns = pair_of("p", "a");
    for row in [
        r#"{"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]}"#,
        r#"{"conversations": [{"from": "user", "value": "p"}, {"from": "chatgpt", "value": "a"}], "id": "7"}"#,
        r#"{"conversations": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"conversation": [{"from": "human", "value": "p"}, {"from": "bard", "value": "a"}]}"#,
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}]}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"messages": [{"role": "user", "content": [{"type": "input_text", "text": "p", "image_url": null}]},
            {"role": "assistant", "content": ["a"], "tool_calls": [], "function_call": null}], "tools": []}"#,
        r#"{"messages": [{"role": "user", "content": "p", "name": "Ann", "id": 4}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "weight": 0}]}"#,
    ] {
        assert_eq!(said(row), (Schema::Messages, turns.clone()), "{row}");
    }
    let row = r#"{"system": "s", "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]}"#;
    assert_eq!(said(row).1, with_system("s", "p", "a"));
    for (row, say) in [
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}"#,
            "message 0, part 0 is of the type `image_url`",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]}"#,
            "part 1 is of the type `input_audio`",
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "p"}, {"from": "function_call", "value": "{}"}]}"#,
            "message 1 is of the role `function_call`",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": null, "tool_calls": [{}]}]}"#,
            "tool_calls",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]}"#,
            "reasoning_content",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": null}]}"#,
            "message 1: `content` is null",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": " "}]}"#,
            "its answer is empty",
        ),
        (
            r#"{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}"#,
            "its prompt is empty",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a", "weight": 0}]}"#,
            "weight 0",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], "tools": [{"type": "function"}]}"#,
            "`tools` is not supported",
        ),
        (r#"{"text": "all in one"}"#, "does not say where the prompt ends"),
        (r#"{"prompt": "p", "rejected": "r"}"#, "no `chosen` beside them"),
    ] {
        let message = auto(row).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4: ") && message.contains(say), "{row}: {message}");
    }
}

#[test]
fn all_answers_are_learned_on_demand() {
    let row = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0}, {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f", "weight": 1}]}"#;
    let learned = |train_on| {
        let reading = Reading { train_on, ..Reading::default() };
        reading.record(Row::new(origin(), serde_json::from_str(row).unwrap())).unwrap().learned
    };
    assert_eq!((learned(TrainOn::Last), learned(TrainOn::All)), (vec![], vec![2]));
}

#[test]
fn of_preferences_the_chosen_answer_is_learned() {
    let conversation = [pair_of("p", "a"), pair_of("q", "good")].concat();
    for (row, wanted) in [
        (r#"{"prompt": "p", "chosen": "good", "rejected": "bad"}"#, pair_of("p", "good")),
        (
            r#"{"question": "p", "chosen": "good", "rejected": "bad", "system": "s"}"#,
            with_system("s", "p", "good"),
        ),
        (r#"{"prompt": "p", "chosen": "p good", "rejected": "p bad"}"#, pair_of("p", " good")),
        (r#"{"prompt": "p", "response": "good", "chosen": "good", "rejected": "bad"}"#, pair_of("p", "good")),
        (
            r#"{"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}], "rejected": []}"#,
            pair_of("p", "good"),
        ),
        (
            r#"{"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": []}"#,
            pair_of("p", "good"),
        ),
        (
            r#"{"chosen": "\n\nHuman: p\n\nAssistant: a\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: p\n\nAssistant: bad"}"#,
            conversation,
        ),
        (
            r#"{"prompt": "\n\nHuman: p\n\nAssistant:", "chosen": " good\n\nof two parts", "rejected": "bad"}"#,
            pair_of("p", "good\n\nof two parts"),
        ),
    ] {
        assert_eq!(said(row), (Schema::Preference, wanted), "{row}");
    }
    for (row, say) in [
        (
            r#"{"prompt": "p", "response": "x", "chosen": "good", "rejected": "bad"}"#,
            "`chosen` and `response`",
        ),
        (r#"{"chosen": "good", "rejected": "bad"}"#, "no prompt beside `chosen`"),
        (r#"{"prompt": "p", "chosen": null, "rejected": "bad"}"#, "`chosen` is null"),
        (r#"{"prompt": "p", "completion": "c", "label": false}"#, "disliked"),
        (r#"{"prompt": "p", "completion": "c", "label": "rejected"}"#, "disliked"),
        (r#"{"prompt": "p", "completion": "c", "label": 0}"#, "data.columns.label"),
        (r#"{"prompt": "p", "completion": "c", "label": "0"}"#, "data.columns.label"),
    ] {
        let message = auto(row).unwrap_err().to_string();
        assert!(message.contains(say), "{row}: {message}");
    }
    for row in [
        r#"{"prompt": "p", "completion": "c", "label": true}"#,
        r#"{"prompt": "p", "completion": "c", "label": "spam"}"#,
    ] {
        assert_eq!(said(row).1, pair_of("p", "c"));
    }
}

#[test]
fn columns_can_be_named() {
    let read = |columns: Columns, row: &str| {
        columns.check().unwrap();
        let reading = Reading { columns, ..Reading::default() };
        reading.record(Row::new(origin(), serde_json::from_str(row).unwrap()))
    };
    let row = r#"{"ask": "p", "reply": "a", "about": "x", "rule": "s", "talk": [{"from": "human", "value": "p"},
        {"from": "gpt", "value": "a"}], "question": "other", "answer": "other"}"#;
    let columns = |prompt: &str, response: &str| Columns {
        prompt: prompt.into(),
        response: response.into(),
        ..Columns::default()
    };
    let content = read(columns("ask", "reply"), row).unwrap().content;
    assert_eq!(content, Content::Pair { prompt: "p".into(), response: "a".into() });
    let all = Columns { input: "about".into(), system: "rule".into(), ..columns("ask", "reply") };
    let Content::Chat(messages) = read(all, row).unwrap().content else { panic!("it has a system message") };
    assert_eq!(messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>(), ["s", "p\nx", "a"]);
    let talk = Columns { messages: "talk".into(), ..Columns::default() };
    assert_eq!(read(talk, row).unwrap().schema, Schema::Messages);
    let message = read(columns("ask", "repyl"), row).unwrap_err().to_string();
    for part in ["data.columns.response", "`repyl`", "[ask, reply,", "did you mean `reply`?"] {
        assert!(message.contains(part), "no `{part}` in {message}");
    }
    assert!(!read(columns("ask", "zzz"), row).unwrap_err().to_string().contains("did you mean"));
    for wrong in [
        columns("ask", ""),
        Columns { messages: "talk".into(), ..columns("ask", "reply") },
        Columns { system: "rule".into(), ..Columns::default() },
    ] {
        assert!(wrong.check().is_err(), "{wrong:?}");
    }
}

#[test]
fn own_instructions_stand_before_every_prompt() {
    let own = |row: &str| {
        read(row, "auto", Instruction::try_from("Answer briefly.".to_string()).unwrap()).unwrap().content
    };
    let pair =
        |prompt: &str, response: &str| Content::Pair { prompt: prompt.into(), response: response.into() };
    assert_eq!(own(r#"{"prompt": "p", "response": "r"}"#), pair("Answer briefly.\np", "r"));
    let solution = r#"{"question": "q", "answer": "1\n#### 1"}"#;
    assert_eq!(own(solution), pair("Answer briefly.\nq", "1\n#### 1"));
    let chat = own(
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}"#,
    );
    assert!(matches!(chat, Content::Chat(m) if m[1].content == "Answer briefly.\np" && m[0].content == "s"));
    for name in ["published", "none"] {
        assert_eq!(String::from(Instruction::try_from(name.to_string()).unwrap()), name);
    }
    for typo in ["publised", "None", "nome"] {
        assert!(Instruction::try_from(typo.to_string()).unwrap_err().contains("did you mean"), "{typo}");
    }
}

#[test]
fn published_sets_are_known_by_more_than_two_columns() {
    let drop = r#"{"passage": "P.", "question": "Q?", "answer": "3", "query_id": "a"}"#;
    assert_eq!(
        said(drop),
        (Schema::Drop, pair_of(&format!("{}P.\nQ?", super::tasks::instruction(Schema::Drop)), "#### 3"))
    );
    assert_eq!(said(r#"{"id": "1", "dialogue": "A: hi", "summary": "s"}"#).0, Schema::Samsum);
    assert_eq!(said(r#"{"dialogue": "A: hi", "summary": "s"}"#).0, Schema::Summary);
    assert_eq!(said(r#"{"question": "q", "answer": "1+1\n#### 2", "context": "c"}"#).0, Schema::Pair);
}
