//! Labels stand on the answer, wherever else its text and the template's words occur.

use crate::fixture;
use gradtx_runtime::data::{PromptForm, Reading, Renderer, TextTokenizer, build_examples, read_rows};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const END: &str = "</s>";

/// Begins the assistant's turn with `#### `, which the questions and answers are full of.
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'assistant' %}#### {{ m.content }}</s>\n\
    {% else %}<user>{{ m.content }}</user>\n{% endif %}{% endfor %}\
    {% if add_generation_prompt %}#### {% endif %}";

/// A token per character, and one that ends a text.
fn characters(dir: &Path, texts: &[String]) -> TextTokenizer {
    let mut vocab: BTreeMap<String, usize> = BTreeMap::from([(END.to_string(), 0)]);
    for c in texts.iter().flat_map(|t| t.chars()).chain(TEMPLATE.chars()) {
        let next = vocab.len();
        vocab.entry(c.to_string()).or_insert(next);
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": {"type": "Fuse"},
        "added_tokens": [{"id": 0, "content": END, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("chat_template.jinja"), TEMPLATE).unwrap();
    TextTokenizer::load(dir).unwrap()
}

#[test]
fn labels_are_the_answer_and_its_end_alone() {
    for name in ["aqua_rat", "gsm8k", "commonsense_qa", "drop", "samsum", "dialogsum"] {
        let rows = read_rows(&fixture(&format!("tasks/{name}.parquet"))).unwrap();
        let texts: Vec<String> = rows.iter().map(|r| all_text(&Value::Object(r.columns.clone()))).collect();
        let records: Vec<_> = rows.into_iter().map(|row| Reading::default().record(row).unwrap()).collect();
        let dir = tempfile::tempdir().unwrap();
        let instruction = format!("Let's think step by step{{}}AnswerSummarizeformat:'.\n{}", texts.concat());
        let letters: String = ('a'..='z').chain('A'..='Z').collect();
        let tokenizer = characters(dir.path(), &[instruction, letters]);
        let renderer = Renderer::new(PromptForm::Template, &tokenizer).unwrap();
        let data = build_examples(&records, &renderer, &tokenizer, None, 2).unwrap();
        for (record, example) in records.iter().zip(&data.examples) {
            let split = example.trained.iter().position(|&t| t).unwrap();
            assert!(example.trained[split..].iter().all(|&t| t), "the answer is the end");
            let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
            assert_eq!(text(&example.tokens[split..]), format!("{}{END}", record.content.answer()));
            assert!(text(&example.tokens[..split]).ends_with("</user>\n#### "), "{name}");
        }
        assert_eq!(data.summary.straddling, 0);
    }
}

/// All strings in a value.
fn all_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(all_text).collect(),
        Value::Object(entries) => entries.values().map(all_text).collect(),
        _ => String::new(),
    }
}
