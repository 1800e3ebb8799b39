//! Chat templates in the manner of published models render as Jinja2 renders them.

use gradtx_runtime::data::{
    Content, Message, Origin, PromptForm, PromptSettings, Reading, Record, Renderer, Row, TextTokenizer, Unit,
};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// A model directory with this template.
fn model(dir: &Path, template: &str, special: &Value) -> TextTokenizer {
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), special.to_string()).unwrap();
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
    TextTokenizer::load(dir).unwrap()
}

fn conversation(messages: &Value) -> Record {
    let columns = json!({"messages": messages}).as_object().unwrap().clone();
    let origin = Origin { file: Arc::new("d.jsonl".into()), line: 7, unit: Unit::Line };
    Reading::default().record(Row::new(origin, columns)).unwrap()
}

#[test]
fn templates_of_known_models_render_as_in_python() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/fixtures/templates/cases.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() >= 12);
    let mut refused = 0;
    for case in cases {
        let (name, dir) = (case["name"].as_str().unwrap(), tempfile::tempdir().unwrap());
        let tokenizer = model(dir.path(), case["template"].as_str().unwrap(), &file["special"]);
        let date = file["date"].as_str().unwrap().to_string();
        let settings = PromptSettings { form: PromptForm::Auto, system: String::new(), date };
        let renderer = Renderer::new(settings, &tokenizer).unwrap();
        let found = renderer.render(&conversation(&case["messages"]));
        if let Some(error) = case["error"].as_str() {
            let message = found.unwrap_err().to_string();
            assert!(message.contains("d.jsonl:7") && message.contains(error), "{name}: {message}");
            refused += 1;
            continue;
        }
        let (prompt, text) = (case["prompt"].as_str().unwrap(), case["text"].as_str().unwrap());
        match text.starts_with(prompt) {
            true => {
                let found = found.unwrap();
                assert_eq!(found.prompt(), prompt, "{name}");
                assert_eq!(found.text, text.strip_suffix('\n').unwrap_or(text), "{name}");
            }
            false => assert!(found.unwrap_err().to_string().contains("differently"), "{name}"),
        }
    }
    assert_eq!(refused, 2, "a system message and two questions in a row");
}

#[test]
fn system_messages_of_settings_fill_their_absence() {
    let dir = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    let tokenizer = model(dir.path(), template, &json!({}));
    let text = |system: &str, messages: Value| {
        let settings =
            PromptSettings { form: PromptForm::Template, system: system.into(), date: String::new() };
        let record = conversation(&messages);
        assert!(
            matches!(&record.content, Content::Chat(list) if list.iter().all(|m: &Message| !m.role.is_empty()))
        );
        Renderer::new(settings, &tokenizer).unwrap().render(&record).unwrap().text
    };
    let pair = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    assert_eq!(text("Be kind.", pair.clone()), "<system>Be kind.</><user>a</><assistant>b</>");
    assert_eq!(text("", pair.clone()), "<user>a</><assistant>b</>");
    assert_eq!(text("none", pair), "<user>a</><assistant>b</>");
    let own = json!([{"role": "system", "content": "x"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}]);
    assert_eq!(text("Be kind.", own), "<system>x</><user>a</><assistant>b</>");
}
