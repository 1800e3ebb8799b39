//! From records to the text that a model sees, and which part of it is the answer.
//!
//! Three forms ([`PromptForm`]): the text as it is, a fixed ChatML prompt, and the
//! model's own chat template. In each the text splits into a prompt, which is what
//! generation starts from, and an answer, which is what is trained on.

use super::schema::{Content, Message, Record};
use super::tokenize::TextTokenizer;
use crate::{Error, Result};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The system message of the fixed ChatML prompt.
pub const CHATML_SYSTEM: &str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
const TEMPLATE: &str = "chat_template";

/// How records become text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptForm {
    /// Prompt and response, one after the other, nothing added.
    Plain,
    /// `<|im_start|>role\n…<|im_end|>` around every message, with [`CHATML_SYSTEM`]
    /// before a conversation that has no system message of its own. The prompt of a
    /// pair is trimmed and stands on lines of its own.
    #[default]
    ChatMl,
    /// The Jinja template in the model's directory.
    Template,
}

/// A text and where its answer begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// Prompt and answer.
    pub text: String,
    /// The answer's first byte.
    pub answer: usize,
}

impl Rendered {
    /// What generation starts from.
    pub fn prompt(&self) -> &str {
        &self.text[..self.answer]
    }
}

/// Turns records into text.
pub struct Renderer {
    form: PromptForm,
    jinja: Option<Environment<'static>>,
    special: BTreeMap<String, String>,
}

impl Renderer {
    /// For a form; [`PromptForm::Template`] takes the tokenizer's template.
    pub fn new(form: PromptForm, tokenizer: &TextTokenizer) -> Result<Self> {
        let jinja = match form {
            PromptForm::Plain | PromptForm::ChatMl => None,
            PromptForm::Template => {
                let template = tokenizer.chat_template();
                let template = template.ok_or_else(|| {
                    Error::invalid(
                        "chat template",
                        "the model's directory has none; choose another prompt form",
                    )
                })?;
                Some(environment(template)?)
            }
        };
        Ok(Self { form, jinja, special: tokenizer.special().iter().cloned().collect() })
    }

    /// The text of a record.
    pub fn render(&self, record: &Record) -> Result<Rendered> {
        let content = &record.content;
        match (self.form, content) {
            (PromptForm::Plain, Content::Pair { prompt, response }) => {
                Ok(Rendered { text: format!("{prompt}{response}"), answer: prompt.len() })
            }
            (PromptForm::Plain, Content::Chat(_)) => {
                Err(record.origin.error("the plain prompt form has no place for the roles of `messages`"))
            }
            (PromptForm::ChatMl, Content::Pair { prompt, response }) => {
                let prompt = format!("\n{}\n", prompt.trim());
                Ok(chatml([("user", prompt.as_str())], response))
            }
            (PromptForm::ChatMl, Content::Chat(messages)) => {
                let before = messages[..messages.len() - 1].iter().map(|m| (&*m.role, &*m.content));
                Ok(chatml(before, content.answer()))
            }
            (PromptForm::Template, Content::Pair { prompt, response }) => {
                let message =
                    |role: &str, content: &str| Message { role: role.into(), content: content.into() };
                self.template(record, &[message("user", prompt), message("assistant", response)])
            }
            (PromptForm::Template, Content::Chat(messages)) => self.template(record, messages),
        }
    }

    fn template(&self, record: &Record, messages: &[Message]) -> Result<Rendered> {
        let jinja = self.jinja.as_ref().and_then(|jinja| jinja.get_template(TEMPLATE).ok());
        let template = jinja.expect("`new` has put the template into the environment");
        let render = |messages: &[Message], add_generation_prompt: bool| {
            let unset = Value::from(());
            let context = context! {
                messages, add_generation_prompt, tools => unset, documents => unset,
                ..Value::from_serialize(&self.special)
            };
            template.render(context).map_err(|e| record.origin.error(format!("chat template: {e}")))
        };
        let prompt = render(&messages[..messages.len() - 1], true)?;
        let mut text = render(messages, false)?;
        if !text.starts_with(&prompt) {
            let why = "the chat template writes the conversation differently once the answer is there, \
                so no part of the text is the answer alone; choose another prompt form";
            return Err(record.origin.error(why));
        }
        // A newline after the end-of-turn token is never generated, so it is not trained on.
        if text.ends_with('\n') && text.len() > prompt.len() {
            text.pop();
        }
        Ok(Rendered { text, answer: prompt.len() })
    }
}

fn chatml<'a>(messages: impl IntoIterator<Item = (&'a str, &'a str)>, answer: &str) -> Rendered {
    let mut messages = messages.into_iter().peekable();
    let mut text = String::new();
    let mut turn = |role: &str, content: &str| {
        text.extend(["<|im_start|>", role, "\n", content, "<|im_end|>\n"]);
    };
    if messages.peek().is_none_or(|(role, _)| *role != "system") {
        turn("system", CHATML_SYSTEM);
    }
    messages.for_each(|(role, content)| turn(role, content));
    text.push_str("<|im_start|>assistant\n");
    let start = text.len();
    text.extend([answer, "<|im_end|>"]);
    Rendered { text, answer: start }
}

/// Jinja with the settings and additions that chat templates are written for.
fn environment(template: &str) -> Result<Environment<'static>> {
    let mut jinja = Environment::new();
    jinja.set_trim_blocks(true);
    jinja.set_lstrip_blocks(true);
    jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    jinja.add_function("raise_exception", |why: String| -> std::result::Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, why))
    });
    jinja.add_filter("tojson", to_json);
    jinja
        .add_template_owned(TEMPLATE, without_generation_tags(template))
        .map_err(|e| Error::invalid("chat template", e.to_string()))?;
    Ok(jinja)
}

/// `{% generation %}` marks the assistant's text for other trainers and prints nothing.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length + 2;
        let inside = &rest[start + 2..end - 2];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        if matches!(word, "generation" | "endgeneration") {
            // A comment keeps the whitespace rules of the tag that it stands for.
            let mark = |present: bool| if present { "-" } else { "" };
            out.push_str(&rest[..start]);
            let (left, right) = (mark(inside.starts_with('-')), mark(inside.ends_with('-')));
            out.push_str(&format!("{{#{left} {right}#}}"));
        } else {
            out.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    out + rest
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it: spaces after `,` and
/// `:`, no escaping of HTML.
fn to_json(value: Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = vec![];
    if value.kind() == ValueKind::Undefined {
        return Err(minijinja::Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson)),
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    }
    .map_err(failed)?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::schema::Schema;
    use super::super::schema::tests::origin;
    use super::super::tokenize::tests::words;
    use super::*;

    pub(in crate::data) fn record(content: Content) -> Record {
        let schema = match content {
            Content::Pair { .. } => Schema::Pair,
            Content::Chat(_) => Schema::Messages,
        };
        Record { origin: origin(), schema, content, learned: vec![], extra: Default::default() }
    }

    pub(in crate::data) fn pair(prompt: &str, response: &str) -> Record {
        record(Content::Pair { prompt: prompt.into(), response: response.into() })
    }

    fn chat(turns: &[(&str, &str)]) -> Record {
        let message =
            |(role, content): &(&str, &str)| Message { role: (*role).into(), content: (*content).into() };
        record(Content::Chat(turns.iter().map(message).collect()))
    }

    fn with_template(template: &str) -> Result<Renderer> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
        Renderer::new(PromptForm::Template, &words(dir.path(), &["?"]))
    }

    fn with_form(form: PromptForm) -> Renderer {
        let dir = tempfile::tempdir().unwrap();
        Renderer::new(form, &words(dir.path(), &["?"])).unwrap()
    }

    #[test]
    fn chatml_is_byte_for_byte() {
        let renderer = with_form(PromptForm::ChatMl);
        let found = renderer.render(&pair("  What is 1+1?\n", " 2 ")).unwrap();
        let prompt = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\
            <|im_end|>\n<|im_start|>user\n\nWhat is 1+1?\n<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(found.prompt(), prompt);
        assert_eq!(&found.text[found.answer..], " 2 <|im_end|>");
        let turns =
            [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
        let found = renderer.render(&chat(&turns)).unwrap();
        let want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n\
            <|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>";
        assert_eq!(found.text, want);
        assert_eq!(&found.text[found.answer..], "d<|im_end|>");
    }

    #[test]
    fn plain_adds_nothing() {
        let renderer = with_form(PromptForm::Plain);
        let found = renderer.render(&pair("a > ", "b")).unwrap();
        assert_eq!((found.text.as_str(), found.prompt()), ("a > b", "a > "));
        let message = renderer.render(&chat(&[("user", "a"), ("assistant", "b")])).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4"), "{message}");
    }

    const SIMPLE: &str = "{{ bos_token }}{% for m in messages %}\n\
        {%- if m.role == 'assistant' %}\n[A] {% generation %}{{ m.content.strip() }}</s>{% endgeneration %}\n\n\
        {%- else %}\n[{{ m['role'].upper()[0] }}] {{ m.content | tojson }}{{ {'k': [1, 'é<']} | tojson }}\n\
        {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n[A] {% endif %}\n";

    #[test]
    fn a_template_renders_with_python_methods_and_json() {
        let renderer = with_template(SIMPLE).unwrap();
        let found = renderer.render(&pair("a<b & \"c\"", " yes ")).unwrap();
        let json = "{\"k\": [1, \"é<\"]}";
        assert!(found.text.starts_with("<s>"), "{}", found.text);
        assert!(found.text.contains(&format!("[U] \"a<b & \\\"c\\\"\"{json}")), "{}", found.text);
        assert_eq!(&found.text[found.answer..], "yes</s>");
        assert!(!found.text.contains("generation"));
    }

    /// Expected text from Jinja2 with the extensions that chat templates are written for.
    #[test]
    fn whitespace_json_and_generation_tags_are_as_in_python() {
        let template = r#"{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        [A]
        {% generation %}
        {{ m.content.strip() }}</s>
        {% endgeneration %}

        tail
    {%- generation -%}
        x
    {%- endgeneration -%}
        y
    {%- else %}
[{{ m['role'].upper()[0] }}] {{ m.content | tojson }}{{ {'k': [1, 'é<', none, true]} | tojson }}{{ [1,{'a':2}] | tojson(indent=2) }}
        {% if loop.index > 5 %}{% break %}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and tools is none %}
[G] {{ messages|length ~ '-' ~ messages[-1].content.split('<')[0] }}{% endif %}
"#;
        let message = |role, content| BTreeMap::from([("role", role), ("content", content)]);
        let messages =
            [message("user", "a<b & \"c\" 'd'"), message("assistant", " yes "), message("user", "ü")];
        let context = context! {
            messages, add_generation_prompt => true, tools => Value::from(()), bos_token => "<s>",
        };
        let found = environment(template).unwrap().get_template(TEMPLATE).unwrap().render(context).unwrap();
        let want = "<s>[U] \"a<b & \\\"c\\\" 'd'\"{\"k\": [1, \"é<\", null, true]}[\n  1,\n  {\n    \"a\": 2\n  }\n]\n        \
            [A]\n        yes</s>\n\n        tailxy\
            [U] \"ü\"{\"k\": [1, \"é<\", null, true]}[\n  1,\n  {\n    \"a\": 2\n  }\n]\n[G] 3-ü";
        assert_eq!(found, want);
    }

    #[test]
    fn templates_that_cannot_be_used_say_so() {
        assert!(with_template("{% for m in %}").is_err());
        let refuse = with_template("{{ raise_exception('only one turn') }}").unwrap();
        let message = refuse.render(&pair("a", "b")).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4") && message.contains("only one turn"), "{message}");
        let differs =
            with_template("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}");
        let message = differs.unwrap().render(&pair("a", "b")).unwrap_err().to_string();
        assert!(message.contains("differently"), "{message}");
        let dir = tempfile::tempdir().unwrap();
        assert!(Renderer::new(PromptForm::Template, &words(dir.path(), &["?"])).is_err());
    }
}
