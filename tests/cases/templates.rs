//! Chat templates and tokenizers: what transformers gives to templates works, and whatever they
//! are, reading them ends.

use crate::common::Case;
use crate::hostile::rendered;
use serde_json::{Value, json};
use std::time::Duration;

const SET: [&str; 2] = ["--set", "data.prompt=template"];

/// A template that writes this for every message, in ChatML's frame.
fn framed(message: &str) -> String {
    format!(
        "{{%- for m in messages %}}{{{{- '<|im_start|>' + m.role + '\n' + ({message}) + '<|im_end|>\n' }}}}{{%- endfor %}}{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\n' }}}}{{%- endif %}}"
    )
}

/// What the model says with a template.
fn said(template: &str) -> Vec<String> {
    let case = Case::new();
    case.write("base/chat_template.jinja", template);
    case.evaluate("o", &SET).well();
    case.predictions("o")
}

#[test]
fn what_transformers_gives_to_templates() {
    let plain = said(&framed("m.content"));
    let same = [
        "m['content']",
        "m.content.strip()",
        "m.content[:99]",
        "m.content if m.content is string else ''",
        "(m.content | trim)",
        "(m.content.split('@')[0])",
        "([m.content] | join(''))",
        "((m.content ~ '') if not tools is defined or not tools else '')",
        "m.content + (raise_exception('no') if m.role == 'nobody' else '')",
        "m.get('content', '')",
        "(namespace(x=m.content).x)",
    ];
    for message in same {
        assert_eq!(said(&framed(message)), plain, "{message}");
    }
    assert_ne!(said(&framed("m.content | upper")), plain, "the control");
}

#[test]
fn a_template_s_own_error_is_said() {
    let case = Case::new();
    case.write("base/chat_template.jinja", "{{ raise_exception('Roles must alternate!') }}");
    case.evaluate("o", &SET).refused().says(&["Roles must alternate!"]);
}

#[test]
fn several_templates_have_a_default() {
    let case = Case::new();
    let template = case.read("base/chat_template.jinja");
    case.evaluate("o", &SET).well();
    case.remove("base/chat_template.jinja");
    case.edit("base/tokenizer_config.json", |c| {
        c["chat_template"] = json!([{ "name": "tool_use", "template": "{{ raise_exception('no') }}" }, { "name": "default", "template": template }]);
    });
    case.evaluate("p", &SET).well();
    assert_eq!(case.predictions("o"), case.predictions("p"));
}

/// A date in the prompt is the run's, and the same again on another day.
#[test]
fn dates_are_settings() {
    let case = Case::new();
    case.write("base/chat_template.jinja", framed("strftime_now('%d %B %Y') + m.content"));
    case.evaluate("o", &SET).well();
    let text = case.read("r-o/run.toml");
    assert!(text.lines().any(|line| line.trim_start().starts_with("date")), "{text}");
    case.write("fixed/chat_template.jinja", "");
    case.write("base/chat_template.jinja", framed("'03 February 2001' + m.content"));
    case.evaluate("fixed-date", &SET).well();
    case.write("base/chat_template.jinja", framed("strftime_now('%d %B %Y') + m.content"));
    case.evaluate("set-date", &[&SET[..], &["--set", "data.date=2001-02-03"]].concat()).well();
    assert_eq!(case.predictions("fixed-date"), case.predictions("set-date"));
}

// Templates end.

#[test]
fn templates_that_grow() {
    rendered("{{ 'x' * 1000000000000 }}");
    rendered("{{ ('x' * 100000)|replace('x', 'y' * 100000) }}");
    rendered("{{ 'x'|indent(1000000000, true) }}");
    rendered("{{ '%1000000000d'|format(1) }}");
    rendered("{{ messages|tojson(indent=1000000000) }}");
    rendered(
        "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
    );
    rendered("{{ range(99999)|map('string')|map('center', 99999)|list }}");
}

#[test]
fn templates_that_never_end() {
    rendered("{% for a in range(10000000000) %}{% endfor %}");
    rendered("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}");
    rendered("{% for a in range(3) recursive %}{{ loop(range(3)) }}{% endfor %}");
    rendered("{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}");
    rendered("{% include 'chat_template.jinja' %}");
    rendered("{% extends 'chat_template.jinja' %}");
}

#[test]
fn templates_that_are_deep() {
    for n in [1000, 100_000] {
        rendered(&format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n)));
        rendered(&format!("{{{{ {}1{} }}}}", "[".repeat(n), "]".repeat(n)));
        rendered(&format!("{{{{ {}1 }}}}", "-".repeat(n)));
        rendered(&format!("{{{{ {}true }}}}", "not ".repeat(n)));
        rendered(&format!("{{{{ m{} }}}}", ".a".repeat(n)));
        rendered(&format!("{{{{ m{} }}}}", "|upper".repeat(n)));
        rendered(&format!("{{{{ {}x }}}}", "x if x else ".repeat(n)));
        rendered(&format!("{}{}", "{% if true %}".repeat(n), "{% endif %}".repeat(n)));
        rendered(&format!("{}{}", "{% for a in [1] %}".repeat(n), "{% endfor %}".repeat(n)));
    }
}

#[test]
fn values_that_contain_themselves() {
    rendered("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a }}");
    rendered("{% set ns = namespace() %}{% set ns.a = {'x': ns} %}{{ ns|tojson }}");
    rendered(
        "{% set a = namespace() %}{% set b = namespace() %}{% set a.b = b %}{% set b.a = a %}{{ a == b }}{{ a|string }}",
    );
    rendered(
        "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
    );
}

#[test]
fn templates_that_are_long() {
    rendered(&"x".repeat(64 << 20));
    rendered(&"{{ 1 }}".repeat(2_000_000));
}

// Tokenizers end.

fn tokenizer(change: impl FnOnce(&mut Value)) {
    let case = Case::new();
    case.rows("one.jsonl", &[json!({ "prompt": "a".repeat(3000), "response": "7" })]);
    case.edit("base/tokenizer.json", change);
    let more = ["--set", "evaluate.max_new_tokens=2", "--set", "data.max_length=100000"];
    let end = case.evaluate("o", &more).ended();
    assert!(end.took < Duration::from_secs(30), "{end:#?}");
}

#[test]
fn tokenizers_of_odd_tokens() {
    let token = |id: u64, content: &str| json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    tokenizer(|t| t["added_tokens"].as_array_mut().unwrap().push(token(4_294_967_295, "<|x|>")));
    tokenizer(|t| t["added_tokens"].as_array_mut().unwrap().push(token(18_446_744_073_709_551_615, "<|x|>")));
    tokenizer(|t| t["added_tokens"].as_array_mut().unwrap().push(token(459, "")));
    tokenizer(|t| t["model"]["vocab"]["<far>"] = json!(4_294_967_295u64));
    tokenizer(|t| t["model"]["vocab"]["<twice>"] = json!(1));
    tokenizer(|t| t["model"]["vocab"] = json!({}));
    tokenizer(|t| t["model"]["merges"].as_array_mut().unwrap().push(json!("no such")));
    tokenizer(|t| t["model"]["merges"] = json!(["", " ", "a"]));
}

#[test]
fn tokenizers_of_costly_rules() {
    let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    tokenizer(|t| t["pre_tokenizer"] = split("(a+)+$b"));
    tokenizer(|t| t["pre_tokenizer"] = split("(?=(a*)*b)(a|aa)+\\1"));
    tokenizer(|t| t["pre_tokenizer"] = split("a{1000}{1000}{1000}"));
    tokenizer(|t| t["pre_tokenizer"] = split("("));
    tokenizer(|t| {
        t["normalizer"] =
            json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "a".repeat(1000) })
    });
    let many: Vec<Value> = (0..12)
        .map(|_| json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaa" }))
        .collect();
    tokenizer(|t| t["normalizer"] = json!({ "type": "Sequence", "normalizers": many }));
    tokenizer(|t| {
        t["decoder"] =
            json!({ "type": "Strip", "content": "a", "start": 1_000_000_000, "stop": 1_000_000_000 })
    });
}

/// Limits of another program's batches: they would cut or fill up what is trained.
#[test]
fn truncation_and_padding_of_a_tokenizer_file_are_off() {
    let case = Case::new();
    case.copy("base", "cut");
    case.edit("cut/tokenizer.json", |t| {
        t["truncation"] = json!({ "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0 });
        t["padding"] = json!({ "strategy": { "Fixed": 200 }, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 456, "pad_type_id": 0, "pad_token": "<|endoftext|>" });
    });
    assert_eq!(case.said_by("cut"), case.said_by("base"));
}
