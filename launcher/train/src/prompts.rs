//! [`Prompts`]: how one model is asked, and what it can read.
//!
//! In: the settings, a model directory, and records. Out: the tokens of examples and of
//! prompts, checked against the model's limits: where its answers end, how many positions it
//! has, and which token ids its embedding has rows for. Everything is checked before
//! anything is computed.

use anyhow::{Result, ensure};
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::config::DataConfig;
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_runtime::data::{
    Content, DataSummary, Dataset, Example, PromptCheck, PromptForm, Record, Renderer, TextTokenizer, Tokens,
    build_examples, expect_vocabulary, prompt_tokens,
};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A model's tokenizer and prompt form, with the model's limits.
pub struct Prompts {
    /// The tokenizer.
    pub tokenizer: TextTokenizer,
    /// How answers end.
    pub check: PromptCheck,
    renderer: Renderer,
    /// The date, where the texts depend on it.
    date: Option<String>,
    max_length: usize,
    /// Share of the labels that may be cut off.
    max_lost_labels: f64,
    /// Tokens that a text may have at most.
    context: usize,
    /// Rows of the embedding.
    vocabulary: usize,
}

impl Prompts {
    /// Loads and checks; `record` is one of those that will be rendered, where there are any.
    pub fn new(
        config: &DataConfig,
        dir: &Path,
        model: &DecoderConfig,
        record: Option<&Record>,
    ) -> Result<Self> {
        let tokenizer = TextTokenizer::load(dir)?;
        let in_dir = |e: gradtx_runtime::Error| unusable(format!("{}: {e}", dir.display()));
        let prompting = config.prompting();
        let renderer = Renderer::new(prompting.clone(), &tokenizer).map_err(in_dir)?;
        let model_type = model.family.model_type();
        let check = PromptCheck::new(&renderer, &tokenizer, model_type, record).map_err(in_dir)?;
        Ok(Self {
            tokenizer,
            check,
            date: renderer.uses_date().then_some(prompting.date),
            renderer,
            max_length: config.max_length,
            max_lost_labels: config.max_lost_labels,
            context: model.longest_context(),
            vocabulary: model.vocab,
        })
    }

    /// What was chosen, and what deserves attention, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("prompt: {}", self.check.line())];
        if let Some(date) = &self.date {
            lines.push(format!("prompt: it contains the date, {date} (data.date)"));
        }
        lines.extend(self.check.notes().iter().map(|note| format!("prompt: note: {note}")));
        lines
    }

    /// What is assumed of a model that is trained: [`Self::lines`], and where examples are cut.
    pub fn assumed(&self) -> Vec<String> {
        let (limit, set_by) = self.limit();
        let mut lines = self.lines();
        lines.push(format!("limit: examples are cut at {limit} tokens ({set_by})"));
        lines
    }

    /// The form, resolved.
    pub fn form(&self) -> PromptForm {
        self.renderer.form()
    }

    /// Tokens that training keeps of an example at most, and what sets that.
    pub fn limit(&self) -> (usize, &'static str) {
        match self.context < self.max_length {
            true => (self.context, "the model's positions"),
            false => (self.max_length, "data.max_length"),
        }
    }

    /// Records as examples, as long as they are, whatever is wrong with them.
    pub fn uncut(&self, records: &[Record], threads: usize) -> Result<Dataset> {
        Ok(build_examples(records, &self.renderer, &self.tokenizer, None, threads)?)
    }

    /// One record as text and tokens.
    pub fn trace(&self, record: &Record) -> Result<Trace> {
        let rendered = self.renderer.render(record)?;
        let tokens = self.tokenizer.encode(&rendered.text)?;
        let example = self.uncut(std::slice::from_ref(record), 1)?.examples.remove(0);
        ensure!(
            example.tokens == tokens.ids,
            "{}: its text has other tokens than its example",
            record.origin
        );
        Ok(Trace { text: rendered.text, answer: rendered.answer, spans: tokens.spans, example })
    }

    /// Rows of the model's embedding: token ids must be below.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Records as examples, and warnings about them. An error where training on them would
    /// teach nothing that generation can use.
    pub fn examples(&self, records: &[Record], threads: usize) -> Result<(Dataset, Vec<String>)> {
        let longest = self.limit().0;
        let data = build_examples(records, &self.renderer, &self.tokenizer, Some(longest), threads)?;
        for (record, example) in records.iter().zip(&data.examples) {
            expect_vocabulary(record, &example.tokens, &self.tokenizer, self.vocabulary)?;
        }
        let mut warnings = self.check.check(&data)?;
        warnings.extend(self.cut(&data.summary));
        Ok((data, warnings))
    }

    /// What cutting takes away, if anything.
    fn cut(&self, summary: &DataSummary) -> Option<String> {
        let (longest, set_by) = self.limit();
        (summary.truncated > 0).then(|| {
            format!(
                "{} of {} examples are longer than {longest} tokens ({set_by}) and are cut there (first: {}): {} of {} \
                 labels are lost, {:.1} %",
                summary.truncated,
                summary.examples,
                summary.first_cut.as_deref().unwrap_or_default(),
                summary.lost_labels,
                summary.trained + summary.lost_labels,
                100.0 * summary.lost_share()
            )
        })
    }

    /// Fails when cutting takes away more of a data set's labels than `data.max_lost_labels` allows.
    pub(crate) fn expect_labels(&self, summary: &DataSummary) -> Result<()> {
        match self.cut(summary).filter(|_| summary.lost_share() > self.max_lost_labels) {
            None => Ok(()),
            Some(cut) => {
                let most = 100.0 * self.max_lost_labels;
                let hint = "shorten these examples or leave them out; raise data.max_length if the model has more \
                            positions; or accept the loss with a larger data.max_lost_labels";
                let what = format!("{cut}, and at most {most:.1} % may be (data.max_lost_labels)");
                Err(unusable_with(what, Some(hint.into())))
            }
        }
    }

    /// The tokens that generation starts from, with room for at least one more.
    pub fn prompt(&self, record: &Record) -> Result<Vec<u32>> {
        let tokens = prompt_tokens(record, &self.renderer, &self.tokenizer)?;
        expect_vocabulary(record, &tokens, &self.tokenizer, self.vocabulary)?;
        if tokens.len() >= self.context {
            let why = format!(
                "its prompt has {} tokens, and the model has {} positions for prompt and answer; shorten the \
                 example, or evaluate without it",
                tokens.len(),
                self.context
            );
            return Err(record.origin.error(why).into());
        }
        Ok(tokens)
    }

    /// The choices of a record, each after its context as an example in which the choice's tokens alone
    /// count; none if it has no choices.
    ///
    /// # Errors
    /// If one is longer than the model's positions, or the prompt form changes its text.
    pub fn choices(&self, record: &Record) -> Result<Vec<Example>> {
        let texts = record.choices.iter().flat_map(|choices| &choices.texts);
        texts.map(|text| self.choice(record, text)).collect()
    }

    fn choice(&self, record: &Record, text: &str) -> Result<Example> {
        let Content::Pair { prompt, .. } = &record.content else {
            return Err(record.origin.error("expected a context with choices, found a conversation").into());
        };
        let content = Content::Pair { prompt: prompt.clone(), response: text.into() };
        let rendered = self.renderer.render(&Record { content, ..record.clone() })?;
        let Some(place) = rendered.text[rendered.answer..].find(text.trim()) else {
            let why = format!(
                "the chat template writes the choice `{text}` differently; choose another prompt form"
            );
            return Err(record.origin.error(why).into());
        };
        let end = rendered.answer + place + text.trim().len();
        let Tokens { ids, spans, .. } = self.tokenizer.encode(&rendered.text[..end])?;
        expect_vocabulary(record, &ids, &self.tokenizer, self.vocabulary)?;
        if ids.len() > self.context {
            let why = format!(
                "a choice has {} tokens with its context, the model {} positions",
                ids.len(),
                self.context
            );
            return Err(record.origin.error(why).into());
        }
        // The first token has nothing before it that predicts it.
        let trained = spans.iter().enumerate().map(|(i, span)| i > 0 && span.1 > rendered.answer).collect();
        Ok(Example { tokens: ids, trained })
    }

    /// Tokens that a text may have at most.
    pub fn context(&self) -> usize {
        self.context
    }

    /// What a stage's results depend on: the form, and of the rest what is in the texts.
    pub fn inputs(config: &DataConfig, prompts: &[&Self]) -> PromptInputs {
        PromptInputs::of(config, prompts.iter().find_map(|p| p.date.clone()))
    }
}

/// An example as text and as tokens, not cut.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Prompt and answer.
    pub text: String,
    /// The answer's first byte.
    pub answer: usize,
    /// `[n]` first and one past the last byte of each token in the text.
    pub spans: Vec<(usize, usize)>,
    /// `[n]` ids, and which of them are trained on.
    pub example: Example,
}

/// How prompts are rendered, as the records of stages have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PromptInputs {
    /// The form says it all.
    Form(PromptForm),
    /// The texts have more in them.
    Texts {
        /// The form.
        form: PromptForm,
        /// The system message of conversations that have none.
        system: String,
        /// The date, where the texts depend on it.
        date: Option<String>,
        /// How answers end, where the form does that.
        ends: Option<String>,
    },
}

impl PromptInputs {
    /// With these settings, and the date where the texts depend on it.
    fn of(config: &DataConfig, date: Option<String>) -> Self {
        // Since this form ends answers itself, its examples are others than before.
        let ends = (config.prompt == PromptForm::Plain).then(|| "end of text".to_string());
        if config.system_prompt.is_empty() && date.is_none() && ends.is_none() {
            return Self::Form(config.prompt);
        }
        Self::Texts { form: config.prompt, system: config.system_prompt.clone(), date, ends }
    }

    /// The same texts with these settings.
    pub fn with(&self, config: &DataConfig) -> Self {
        let has_date = matches!(self, Self::Texts { date: Some(_), .. });
        Self::of(config, has_date.then(|| config.date.clone()))
    }
}

impl Default for PromptInputs {
    fn default() -> Self {
        Self::Form(PromptForm::default())
    }
}
