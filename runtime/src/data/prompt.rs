//! From records to the text that a model sees, and which part of it is the answer.
//!
//! Three forms ([`PromptForm`]): prompt and response as they are, a fixed ChatML prompt, and
//! the model's own chat template. In each the text splits into a prompt, which is what
//! generation starts from, and an answer, which is what is trained on. Whether generation
//! stops where an answer of this form ends is the business of [`super::PromptCheck`].

use super::schema::{Content, Message, Record};
use super::template::ChatTemplate;
use super::tokenize::TextTokenizer;
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The system message of the fixed ChatML prompt.
pub(crate) const CHATML_SYSTEM: &str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
/// Begins a message of the ChatML prompt.
pub(super) const CHATML_START: &str = "<|im_start|>";
/// Ends a message of the ChatML prompt.
pub(super) const CHATML_END: &str = "<|im_end|>";
/// The value of [`PromptSettings::system`] that puts in no system message.
const NO_SYSTEM: &str = "none";

/// How records become text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PromptForm {
    /// The model's own template where it has one; else ChatML where its markers are tokens
    /// of the tokenizer; else plain.
    #[default]
    Auto,
    /// Prompt and response, one after the other, and the model's end-of-text token.
    Plain,
    /// `<|im_start|>role\n…<|im_end|>` around every message, with a system message before a
    /// conversation that has none of its own. The prompt of a pair is trimmed and stands on
    /// lines of its own.
    ChatMl,
    /// The Jinja template in the model's directory.
    Template,
}

impl PromptForm {
    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Plain => "plain",
            Self::ChatMl => "chatml",
            Self::Template => "template",
        }
    }

    /// The form that [`Self::Auto`] stands for with this tokenizer; any other is itself.
    pub fn resolve(self, tokenizer: &TextTokenizer) -> Self {
        match self {
            Self::Auto if tokenizer.chat_template().is_some() => Self::Template,
            Self::Auto if [CHATML_START, CHATML_END].iter().all(|m| tokenizer.is_one_token(m)) => {
                Self::ChatMl
            }
            Self::Auto => Self::Plain,
            chosen => chosen,
        }
    }
}

/// A prompt form and what goes into its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptSettings {
    /// The form.
    pub form: PromptForm,
    /// System message of conversations that have none. Empty: the form's own, which is
    /// `CHATML_SYSTEM` or what the template writes; `none`: no message.
    pub system: String,
    /// The date that templates take for today, `2026-11-27`; empty for none.
    pub date: String,
}

impl From<PromptForm> for PromptSettings {
    fn from(form: PromptForm) -> Self {
        Self { form, ..Self::default() }
    }
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
    form: Form,
    /// System message of conversations that have none.
    system: Option<String>,
}

/// A form that is resolved, with what it needs.
enum Form {
    /// The text of the token that ends an answer; empty where the model has none.
    Plain(String),
    ChatMl,
    Template(Box<ChatTemplate>),
}

impl Renderer {
    /// For a form and a model's tokenizer.
    pub fn new(settings: impl Into<PromptSettings>, tokenizer: &TextTokenizer) -> Result<Self> {
        let PromptSettings { form, system, date } = settings.into();
        let form = match form.resolve(tokenizer) {
            PromptForm::Auto | PromptForm::Plain => {
                Form::Plain(tokenizer.end_text().unwrap_or_default().to_owned())
            }
            PromptForm::ChatMl => Form::ChatMl,
            PromptForm::Template => {
                let template = tokenizer.chat_template().ok_or_else(|| {
                    Error::invalid(
                        "chat template",
                        "the model's directory has none; set data.prompt to auto, chatml or plain",
                    )
                })?;
                Form::Template(Box::new(ChatTemplate::new(template, tokenizer.special(), &date)?))
            }
        };
        let system = match (system.as_str(), &form) {
            ("", Form::ChatMl) => Some(CHATML_SYSTEM.to_owned()),
            ("" | NO_SYSTEM, _) => None,
            (_, Form::Plain(_)) => {
                let why = "the plain prompt form has no place for it; leave it empty, or set data.prompt";
                return Err(Error::invalid("data.system_prompt", why));
            }
            _ => Some(system),
        };
        Ok(Self { form, system })
    }

    /// The form, resolved.
    pub fn form(&self) -> PromptForm {
        match &self.form {
            Form::Plain(_) => PromptForm::Plain,
            Form::ChatMl => PromptForm::ChatMl,
            Form::Template(_) => PromptForm::Template,
        }
    }

    /// Whether its texts depend on the date.
    pub fn uses_date(&self) -> bool {
        matches!(&self.form, Form::Template(template) if template.uses_date())
    }

    /// The text of a record.
    pub fn render(&self, record: &Record) -> Result<Rendered> {
        let content = &record.content;
        match (&self.form, content) {
            (Form::Plain(end), Content::Pair { prompt, response }) => {
                // Data that was made for this form may end its answers itself.
                let end = if response.trim_end().ends_with(end.as_str()) { "" } else { end.as_str() };
                // Contexts of choices end in no space, as lm-evaluation-harness has them.
                let space = if record.choices.is_some() { " " } else { "" };
                Ok(Rendered { text: [prompt, space, response, end].concat(), answer: prompt.len() })
            }
            (Form::Plain(_), Content::Chat(_)) => Err(record.origin.error(
                "the plain prompt form has no place for the roles of `messages`: take a model with a chat \
                 template, or set data.prompt to chatml where its markers are tokens of the model",
            )),
            (Form::ChatMl, Content::Pair { prompt, response }) => {
                let prompt = format!("\n{}\n", prompt.trim());
                Ok(chatml(self.system.as_deref(), [("user", prompt.as_str())], response))
            }
            (Form::ChatMl, Content::Chat(messages)) => {
                let before = messages[..messages.len() - 1].iter().map(|m| (&*m.role, &*m.content));
                Ok(chatml(self.system.as_deref(), before, content.answer()))
            }
            (Form::Template(template), Content::Pair { prompt, response }) => {
                let messages = [message("user", prompt), message("assistant", response)];
                self.template(template, record, &messages)
            }
            (Form::Template(template), Content::Chat(messages)) => self.template(template, record, messages),
        }
    }

    fn template(&self, template: &ChatTemplate, record: &Record, messages: &[Message]) -> Result<Rendered> {
        let with_system: Vec<Message>;
        let messages = match &self.system {
            Some(system) if messages[0].role != "system" => {
                let begin = [message("system", system)];
                with_system = begin.into_iter().chain(messages.iter().cloned()).collect();
                &with_system
            }
            _ => messages,
        };
        let render = |messages: &[Message], add_generation_prompt: bool| {
            let text = template.render(messages, add_generation_prompt);
            text.map_err(|why| record.origin.error(format!("chat template: {why}")))
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

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

fn chatml<'a>(
    system: Option<&str>,
    messages: impl IntoIterator<Item = (&'a str, &'a str)>,
    answer: &str,
) -> Rendered {
    let mut messages = messages.into_iter().peekable();
    let mut text = String::new();
    let mut turn = |role: &str, content: &str| {
        text.extend([CHATML_START, role, "\n", content, CHATML_END, "\n"]);
    };
    if let Some(system) = system.filter(|_| messages.peek().is_none_or(|(role, _)| *role != "system")) {
        turn("system", system);
    }
    messages.for_each(|(role, content)| turn(role, content));
    text.extend([CHATML_START, "assistant\n"]);
    let start = text.len();
    text.extend([answer, CHATML_END]);
    Rendered { text, answer: start }
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
        Record {
            origin: origin(),
            schema,
            content,
            choices: None,
            learned: vec![],
            extra: Default::default(),
        }
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
