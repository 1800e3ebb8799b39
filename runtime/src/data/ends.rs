//! [`PromptCheck`]: does generation stop where answers end?
//!
//! Training teaches a model to write an answer and what the prompt form puts after it.
//! Generation stops at the model's end-of-text tokens. Where these are not the same, a
//! model that has learned everything never ends an answer. So before anything is trained
//! the two are compared: an end that is one token becomes a token that generation stops at;
//! one that the tokenizer cuts into ordinary tokens is refused.

use super::example::Dataset;
use super::prompt::{CHATML_START, CHATML_SYSTEM, PromptForm, Renderer};
use super::schema::{Content, Message, Record, Schema};
use super::tokenize::{TextTokenizer, Tokens};
use super::{Origin, Unit};
use crate::{Error, Result};
use std::path::PathBuf;
use std::sync::Arc;

/// An answer that occurs in no template.
const PROBE: &str = "The answer is 42.";

/// How the answers of a prompt form end with a model's tokenizer.
#[derive(Clone, Debug)]
pub struct PromptCheck {
    form: PromptForm,
    /// The token that the form puts after an answer, and its text.
    end: Option<(u32, String)>,
    /// Ids at which generation stops: the model's, and the form's end.
    stops: Vec<u32>,
    /// The form's end is none of the model's own.
    is_added: bool,
    /// What the form writes between the prompt and an answer.
    prefix: String,
    notes: Vec<String>,
}

impl PromptCheck {
    /// Renders and tokenizes an answer of its own, in the place of `record`'s where there is
    /// one. `model_type` is the model's, as in its config.json.
    pub fn new(
        renderer: &Renderer,
        tokenizer: &TextTokenizer,
        model_type: &str,
        record: Option<&Record>,
    ) -> Result<Self> {
        let form = renderer.form();
        let rendered = renderer.render(&probe(record))?;
        let answer = &rendered.text[rendered.answer..];
        let (prefix, tail) = answer.split_once(PROBE).unwrap_or((answer, ""));
        let mut check = Self {
            form,
            end: None,
            stops: tokenizer.eos().to_vec(),
            is_added: false,
            prefix: prefix.to_owned(),
            notes: vec![],
        };
        // Plain data may end its answers itself, and some tokenizers know that end only there.
        let own_end = match record {
            Some(record) if form == PromptForm::Plain => {
                let last = tokenizer.encode(&renderer.render(record)?.text)?.ids.last().copied();
                last.filter(|id| check.stops.contains(id))
            }
            _ => None,
        };
        match own_end {
            Some(id) => check.end = Some((id, tokenizer.token(id).unwrap_or_default())),
            None => {
                let tokens = tokenizer.encode(&rendered.text)?;
                check.find_end(tokenizer, &rendered.text, &tokens, rendered.text.len() - tail.len())?;
            }
        }
        check.note_markers(tokenizer)?;
        check.note_system(rendered.prompt(), model_type);
        Ok(check)
    }

    /// The token of what stands in `text` from `begin` on, where an answer has ended.
    fn find_end(
        &mut self,
        tokenizer: &TextTokenizer,
        text: &str,
        tokens: &Tokens,
        begin: usize,
    ) -> Result<()> {
        let after = tokens.ids.iter().zip(&tokens.spans).filter(|(_, (_, end))| *end > begin);
        let after: Vec<(u32, (usize, usize))> = after.map(|(&id, &span)| (id, span)).collect();
        let text_of = |(from, to): (usize, usize)| text.get(from..to).unwrap_or_default().to_owned();
        if let Some(&(id, span)) = after.iter().find(|(id, _)| self.stops.contains(id)) {
            self.end = Some((id, text_of(span)));
            return Ok(());
        }
        let tail = &text[begin..];
        if tail.trim().is_empty() {
            // Then the answers themselves have to end with a token that generation stops at.
            return Ok(());
        }
        let is_whole = |(from, _): (usize, usize)| from >= begin;
        let usable = |&&(id, span): &&(u32, (usize, usize))| {
            is_whole(span) && Some(id) != tokenizer.unknown() && is_end(tokenizer, id, tail)
        };
        let Some(&(id, span)) = after.iter().find(usable) else {
            return Err(self.no_end(tokenizer, tail, &after));
        };
        self.end = Some((id, text_of(span)));
        self.stops.push(id);
        self.is_added = true;
        Ok(())
    }

    fn no_end(&self, tokenizer: &TextTokenizer, tail: &str, after: &[(u32, (usize, usize))]) -> Error {
        let shown: Vec<String> = after
            .iter()
            .take(8)
            .map(|&(id, _)| match tokenizer.token(id) {
                Some(token) if Some(id) == tokenizer.unknown() => format!("{token:?} (unknown)"),
                Some(token) => format!("{token:?}"),
                None => id.to_string(),
            })
            .collect();
        let why = format!(
            "the form ends an answer with {:?}, which is no token of this model: its tokenizer makes {} of it \
             ({}{}), and generation would never stop; set data.prompt to {}",
            tail.trim(),
            if after.len() == 1 { "another one".into() } else { format!("{} ordinary tokens", after.len()) },
            shown.join(", "),
            if after.len() > shown.len() { ", …" } else { "" },
            match (self.form, tokenizer.chat_template().is_some()) {
                (PromptForm::ChatMl, true) => "auto or template (the model's own chat template), or plain",
                (PromptForm::Template, _) => "chatml or plain",
                (PromptForm::Plain, true) => "auto or template (the model's own chat template)",
                (PromptForm::Plain, false) =>
                    "chatml, or end the answers in the data with a token of the model",
                _ => "auto or plain",
            }
        );
        Error::invalid(format!("data.prompt = \"{}\"", self.form.name()), why)
    }

    /// ChatML's begin of a message should be a token as well.
    fn note_markers(&mut self, tokenizer: &TextTokenizer) -> Result<()> {
        if self.form != PromptForm::ChatMl || tokenizer.is_one_token(CHATML_START) {
            return Ok(());
        }
        let ids = tokenizer.encode(CHATML_START)?.ids;
        if ids.iter().any(|&id| Some(id) == tokenizer.unknown()) {
            let why = format!(
                "{CHATML_START} is unknown to this model's tokenizer; set data.prompt to auto or plain"
            );
            return Err(Error::invalid("data.prompt = \"chatml\"", why));
        }
        self.notes.push(format!(
            "{CHATML_START} is no token of this model but {} ordinary ones; data.prompt = \"auto\" takes a form \
             that the model knows",
            ids.len()
        ));
        Ok(())
    }

    fn note_system(&mut self, prompt: &str, model_type: &str) {
        if prompt.contains(CHATML_SYSTEM) && !model_type.starts_with("qwen") {
            self.notes.push(format!(
                "the prompt begins with \"{CHATML_SYSTEM}\", and this model is of the type {model_type}; \
                 data.system_prompt sets another system message, or \"none\""
            ));
        }
    }

    /// Ids at which generation stops.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// Whether generation stops at a token that the model's own files do not name.
    pub fn adds_stop(&self) -> bool {
        self.is_added
    }

    /// What the form writes between prompt and answer; empty for most.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// What deserves the user's attention, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The form and its end in one line.
    pub fn line(&self) -> String {
        let form = match self.form {
            PromptForm::Plain => "plain text",
            PromptForm::ChatMl => "ChatML",
            PromptForm::Auto | PromptForm::Template => "the model's own chat template",
        };
        let end = match &self.end {
            Some((id, text)) if self.is_added => {
                format!("an answer ends with {text} (id {id}), at which generation stops as well")
            }
            Some((id, text)) => format!("an answer ends with {text} (id {id})"),
            None => "nothing is put after an answer".into(),
        };
        format!("{form}; {end}")
    }

    /// Compares the ends of examples with the tokens at which generation stops. An error where
    /// training on them would not teach the model to stop; else what there is to say.
    pub fn check(&self, data: &Dataset) -> Result<Vec<String>> {
        let ends = |e: &super::Example| {
            let trained = e.tokens.iter().zip(&e.trained).filter(|(_, trained)| **trained);
            trained.into_iter().any(|(id, _)| self.stops.contains(id))
        };
        let count = data.examples.len();
        let without = data.examples.iter().filter(|e| !ends(e)).count();
        if without == 0 {
            return Ok(vec![]);
        }
        if self.stops.is_empty() {
            let note = "the model has no end-of-text token: every generated text will have \
                evaluate.max_new_tokens tokens; name `eos_token_id` in its generation_config.json";
            return Ok(vec![note.into()]);
        }
        let cut = data.summary.truncated.min(without);
        let wrong = |why: String| Error::invalid(format!("data.prompt = \"{}\"", self.form.name()), why);
        if without * 2 > count && cut * 2 > count {
            let first = data.summary.first_cut.as_deref().unwrap_or_default();
            return Err(wrong(format!(
                "{cut} of {count} answers are cut at the maximum length and have no end ({first}): a model \
                 trained on them would not stop; raise data.max_length, or shorten the examples"
            )));
        }
        if without == count {
            return Err(wrong(format!(
                "none of {count} answers ends with a token at which generation stops (ids {:?}): a model trained \
                 on them would not stop; set data.prompt to another form, or name the token that ends answers \
                 as `eos_token_id` in generation_config.json",
                self.stops
            )));
        }
        let why =
            if cut == without { "are cut at the maximum length and have no end" } else { "have no end" };
        Ok(vec![format!("{without} of {count} answers {why}: they do not teach the model to stop")])
    }
}

/// Whether a token may end answers: one that was added as a whole, or one that is all of what
/// follows an answer and written like a marker.
fn is_end(tokenizer: &TextTokenizer, id: u32, tail: &str) -> bool {
    let marker = |text: &str| {
        (text.starts_with('<') && text.ends_with('>')) || (text.starts_with('[') && text.ends_with(']'))
    };
    tokenizer.is_added(id) || (marker(tail.trim()) && tokenizer.is_one_token(tail.trim()))
}

/// A record with an answer of ours.
fn probe(record: Option<&Record>) -> Record {
    let Some(record) = record else {
        let content = Content::Pair { prompt: "What is 6 times 7?".into(), response: PROBE.into() };
        let origin =
            Origin { file: Arc::new(PathBuf::from("a conversation for trial")), line: 1, unit: Unit::Line };
        return Record {
            origin,
            schema: Schema::Pair,
            content,
            choices: None,
            learned: vec![],
            extra: Default::default(),
        };
    };
    let mut record = record.clone();
    match &mut record.content {
        Content::Pair { response, .. } => *response = PROBE.into(),
        Content::Chat(messages) => {
            if let Some(Message { content, .. }) = messages.last_mut() {
                *content = PROBE.into();
            }
        }
    }
    record
}

#[cfg(test)]
mod tests {
    use super::super::example::build_examples;
    use super::super::prompt::PromptSettings;
    use super::super::prompt::tests::pair;
    use super::*;
    use serde_json::{Value, json};

    /// Every character that occurs, and some markers as whole tokens.
    struct Model {
        dir: tempfile::TempDir,
    }

    impl Model {
        fn new(added: &[&str], eos: Value) -> Self {
            let model = Self { dir: tempfile::tempdir().unwrap() };
            let mut vocab = serde_json::Map::new();
            for token in
                added.iter().map(|t| t.to_string()).chain((10u8..127).map(|c| (c as char).to_string()))
            {
                let id = vocab.len();
                vocab.entry(token).or_insert(json!(id));
            }
            let special = |(id, content): (usize, &&str)| {
                json!({"id": id, "content": content, "special": true, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false})
            };
            model.write(
                "tokenizer.json",
                &json!({
                    "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
                    "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
                    "added_tokens": added.iter().enumerate().map(special).collect::<Vec<_>>(),
                    "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": null, "unk_token": null,
                        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                        "byte_fallback": false},
                }),
            );
            model.write("generation_config.json", &json!({ "eos_token_id": eos }));
            model
        }

        fn write(&self, name: &str, value: &Value) {
            std::fs::write(self.dir.path().join(name), value.to_string()).unwrap();
        }

        fn template(self, template: &str) -> Self {
            std::fs::write(self.dir.path().join("chat_template.jinja"), template).unwrap();
            self
        }

        fn check(&self, settings: impl Into<PromptSettings>) -> Result<PromptCheck> {
            let tokenizer = TextTokenizer::load(self.dir.path())?;
            let renderer = Renderer::new(settings, &tokenizer)?;
            PromptCheck::new(&renderer, &tokenizer, "llama", None)
        }

        /// What there is to say about these answers to `q`.
        fn answers(&self, form: PromptForm, answers: &[&str], max_length: usize) -> Result<Vec<String>> {
            let tokenizer = TextTokenizer::load(self.dir.path())?;
            let renderer = Renderer::new(form, &tokenizer)?;
            let records: Vec<Record> = answers.iter().map(|answer| pair("q", answer)).collect();
            let data = build_examples(&records, &renderer, &tokenizer, Some(max_length), 1)?;
            PromptCheck::new(&renderer, &tokenizer, "llama", records.first())?.check(&data)
        }
    }

    const CHATML: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

    #[test]
    fn an_end_that_generation_stops_at_needs_nothing() {
        let check = Model::new(&CHATML, json!(2)).check(PromptForm::ChatMl).unwrap();
        assert_eq!((check.stops(), check.adds_stop(), check.prefix()), (&[2][..], false, ""));
        assert!(check.line().contains("<|im_end|> (id 2)"), "{}", check.line());
        let check = Model::new(&CHATML, json!([0, 2])).check(PromptForm::ChatMl).unwrap();
        assert!(!check.adds_stop());
    }

    #[test]
    fn an_end_that_is_one_token_is_added_to_the_stops() {
        // A base model: its text ends with another token than a chat's message.
        let check = Model::new(&CHATML, json!(0)).check(PromptForm::ChatMl).unwrap();
        assert_eq!((check.stops(), check.adds_stop()), (&[0, 2][..], true));
        // A model without any end.
        let check = Model::new(&CHATML, json!(null)).check(PromptForm::ChatMl).unwrap();
        assert_eq!(check.stops(), [2]);
        // A template whose end is followed by white space, and one that ends with another marker.
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eot|>\n\n{% endfor %}\
            {% if add_generation_prompt %}<assistant>{% endif %}";
        let model = Model::new(&["<s>", "<|eot|>"], json!(0)).template(template);
        assert_eq!(model.check(PromptForm::Auto).unwrap().stops(), [0, 1]);
        assert_eq!(model.answers(PromptForm::Auto, &["a", "b"], 99).unwrap(), [""; 0]);
    }

    #[test]
    fn ends_of_ordinary_text_are_refused_before_training() {
        let model = Model::new(&["<s>", "</s>"], json!(1));
        let message = model.check(PromptForm::ChatMl).unwrap_err().to_string();
        for word in ["chatml", "<|im_end|>", "10 ordinary tokens", "\"<\"", "auto or plain"] {
            assert!(message.contains(word), "{word}: {message}");
        }
        let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }} END{% endfor %}\
            {% if add_generation_prompt %}[assistant]{% endif %}";
        let model = Model::new(&["<s>", "</s>"], json!(1)).template(template);
        let message = model.check(PromptForm::Auto).unwrap_err().to_string();
        assert!(message.contains("\"END\"") && message.contains("chatml or plain"), "{message}");
    }

    #[test]
    fn markers_that_are_unknown_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        super::super::tokenize::tests::words(dir.path(), &["?", "a"]);
        let path = dir.path().join("tokenizer.json");
        let mut file = crate::artifact::read_json(&path).unwrap();
        file["added_tokens"] = json!([]);
        for marker in ["<|im_start|>", "<|im_end|>"] {
            file["model"]["vocab"].as_object_mut().unwrap().remove(marker);
        }
        std::fs::write(&path, file.to_string()).unwrap();
        let tokenizer = TextTokenizer::load(dir.path()).unwrap();
        let renderer = Renderer::new(PromptForm::ChatMl, &tokenizer).unwrap();
        let message = PromptCheck::new(&renderer, &tokenizer, "llama", None).unwrap_err().to_string();
        assert!(message.contains("(unknown)") && message.contains("data.prompt"), "{message}");
    }

    #[test]
    fn auto_takes_what_the_model_knows() {
        let form = |model: &Model| {
            let tokenizer = TextTokenizer::load(model.dir.path()).unwrap();
            PromptForm::Auto.resolve(&tokenizer)
        };
        assert_eq!(form(&Model::new(&CHATML, json!(0))), PromptForm::ChatMl);
        assert_eq!(form(&Model::new(&["</s>"], json!(0))), PromptForm::Plain);
        assert_eq!(
            form(&Model::new(&CHATML, json!(0)).template("{{ messages[0].content }}")),
            PromptForm::Template
        );
    }

    #[test]
    fn plain_text_ends_with_the_model_s_end() {
        let model = Model::new(&["<s>", "</s>"], json!([0, 1]));
        model.write("tokenizer_config.json", &json!({"eos_token": "</s>"}));
        let check = model.check(PromptForm::Plain).unwrap();
        assert!(check.line().contains("</s> (id 1)") && !check.adds_stop(), "{}", check.line());
        let tokenizer = TextTokenizer::load(model.dir.path()).unwrap();
        let renderer = Renderer::new(PromptForm::Plain, &tokenizer).unwrap();
        assert_eq!(renderer.render(&pair("a", "b")).unwrap().text, "ab</s>");
        assert_eq!(renderer.render(&pair("a", "b</s>\n")).unwrap().text, "ab</s>\n");
        // No end at all: said, since every text will be as long as it may be.
        let model = Model::new(&["<s>"], json!(null));
        let notes = model.answers(PromptForm::Plain, &["a"], 99).unwrap();
        assert!(notes[0].contains("no end-of-text token"), "{notes:?}");
    }

    #[test]
    fn answers_that_must_end_themselves_do_or_are_refused() {
        let template =
            "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}>{% endif %}{% endfor %}";
        let model = Model::new(&["<s>"], json!(1 + 49)).template(template);
        let stop = TextTokenizer::load(model.dir.path()).unwrap().token(50).unwrap();
        let good = format!("ab{stop}");
        let answers = |list: &[&str]| model.answers(PromptForm::Template, list, 99);
        assert_eq!(answers(&[&good, &good]).unwrap(), [""; 0]);
        assert!(answers(&[&good, &good, "ab"]).unwrap()[0].contains("1 of 3 answers have no end"));
        let message = answers(&["ab", "b"]).unwrap_err().to_string();
        assert!(message.contains("none of 2 answers") && message.contains("[50]"), "{message}");
    }

    #[test]
    fn answers_that_are_cut_have_no_end() {
        let model = Model::new(&["</s>"], json!(0));
        let notes = model.answers(PromptForm::Plain, &["a", "b", "long answer"], 6).unwrap();
        assert!(notes[0].contains("1 of 3 answers are cut"), "{notes:?}");
        let message =
            model.answers(PromptForm::Plain, &["a", "long one", "long two"], 6).unwrap_err().to_string();
        for word in ["2 of 3", "d.jsonl:4", "data.max_length"] {
            assert!(message.contains(word), "{word}: {message}");
        }
        assert_eq!(model.answers(PromptForm::Plain, &["a", "b"], 6).unwrap(), [""; 0]);
    }

    #[test]
    fn what_the_form_writes_before_an_answer_is_known() {
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
            {% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}\
            {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let check = Model::new(&CHATML, json!(2)).template(template).check(PromptForm::Template).unwrap();
        assert_eq!(check.prefix(), "<think>\n\n</think>\n\n");
    }

    #[test]
    fn a_system_message_that_names_another_model_is_said() {
        let model = Model::new(&CHATML, json!(2));
        assert!(model.check(PromptForm::ChatMl).unwrap().notes()[0].contains("type llama"));
        for system in ["none", "Be brief."] {
            let settings =
                PromptSettings { form: PromptForm::ChatMl, system: system.into(), date: String::new() };
            assert!(model.check(settings).unwrap().notes().is_empty());
        }
        let tokenizer = TextTokenizer::load(model.dir.path()).unwrap();
        let renderer = Renderer::new(PromptForm::ChatMl, &tokenizer).unwrap();
        assert!(PromptCheck::new(&renderer, &tokenizer, "qwen2", None).unwrap().notes().is_empty());
        let plain = PromptSettings { form: PromptForm::Plain, system: "x".into(), date: String::new() };
        assert!(model.check(plain).unwrap_err().to_string().contains("data.system_prompt"));
    }
}
