//! Prompts that the LLM writes, for providers whose public prompts do not cover the client's.
//!
//! In: public records, the LLM as it is. Out: more prompts in their style. The LLM reads some public
//! examples, one after the other in its prompt form, and goes on with the prompt of another one, drawn
//! from its probabilities. No client has a part in it, so these prompts are the provider's and are kept.
//!
//! What is left out: texts that are empty, that do not end or are longer than every public prompt, that
//! hold tokens of the prompt form itself or of no text, and what was there before.

use super::shares::Shares;
use anyhow::{Result, ensure};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, Decoding, GenerateLimits, Generator, Prompt, Sampling};
use gradtx_run::config::Config;
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_run::failure::unusable_with;
use gradtx_runtime::data::{Content, Record};
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// Public examples that the LLM reads before it writes, where they fit.
const SHOTS: usize = 4;
/// Texts are written until enough are of use, at most so many times as many as are wanted.
const WAVES: usize = 4;
/// Only the likeliest tokens of this probability together are drawn.
const TOP_P: f64 = 0.95;
/// Where the text goes that is to be written; in no tokenizer's vocabulary as one token.
const PLACE: &str = "gradtx-writes-here";

/// How many prompts were written, and why others were left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Synthetic {
    /// Texts that the LLM wrote.
    pub written: usize,
    /// Those that are asked.
    pub kept: usize,
    /// Left out: nothing but white space.
    pub empty: usize,
    /// Left out: did not end, or longer than every public prompt.
    pub too_long: usize,
    /// Left out: with tokens of the prompt form, of no text, or that a model cannot read.
    pub malformed: usize,
    /// Left out: a public prompt, or one that was written before.
    pub duplicates: usize,
}

/// The prompts that were kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) counts: Synthetic,
    pub(super) prompts: Vec<String>,
}

/// The LLM's part.
pub(super) struct Writing<'a> {
    pub(super) context: &'a Context,
    pub(super) shares: Shares<'a>,
    pub(super) config: &'a Config,
    pub(super) side: &'a ModelSpec,
    /// Of both models.
    pub(super) prompts: &'a [Prompts; 2],
    /// The public records that are asked, which the LLM reads.
    pub(super) public: &'a [Record],
    /// All public records.
    pub(super) known: &'a [Record],
}

/// What is common to all texts: where they begin in the prompt form, and what ends them.
struct Frame {
    before: String,
    /// What the public prompts have in common at their beginning: an instruction.
    opening: String,
    /// What the form writes after a prompt, without white space around it.
    after: String,
    /// Tokens that end a text.
    ends: Vec<u32>,
    /// Tokens of the longest public prompt.
    longest: usize,
}

impl Work for Writing<'_> {
    type Output = Written;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Written> {
        let frame = self.frame()?;
        let wanted = self.config.refine.synthetic_prompts;
        let key = derive_named(self.config.seed, "synthetic prompts");
        let shots = derive_named(key, "public examples");
        let starts = (0..wanted * WAVES).map(|i| self.start(&frame, derive(shots, i as u64)));
        let starts: Vec<Vec<u32>> = starts.collect::<Result<_>>()?;
        let limits = self.limits(&frame, &starts);
        let mut plan = Decoder::<D, X>::plan(&self.side.model, false);
        plan.extend(Generator::<D, X>::plan(&self.side.model, limits, None));
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &self.side.dir)?;
        let mut generator = Generator::new(&decoder, limits, None)?.within(self.prompts[1].context());
        let mut filter = Filter::new(&self, &frame);
        let comm = self.shares.comm;
        for (wave, starts) in starts.chunks(wanted).enumerate() {
            let texts = self.shares.gather(starts.len(), |chunk| {
                // The number of a text in its chunk is a part of what its draws depend on.
                let seed = derive(key, (wave * wanted + chunk.start) as u64);
                let sampling = Some(Sampling { temperature: 1.0, top_p: TOP_P, seed });
                let asked: Vec<Prompt> =
                    starts[chunk].iter().map(|s| Prompt { tokens: s.clone(), adapter: None }).collect();
                let decoding = &mut Decoding { sampling, on_token: &mut |_, _| {} };
                let found = generator.generate_as(
                    &decoder,
                    None,
                    &asked,
                    frame.longest + 1,
                    &frame.ends,
                    decoding,
                )?;
                Ok(found.into_iter().map(|text| (text.tokens, text.ended)).collect())
            })?;
            for (tokens, ended) in texts.into_iter().flatten() {
                filter.take(&tokens, ended, wanted)?;
            }
            let mut enough = vec![u8::from(filter.written.prompts.len() == wanted)];
            comm.broadcast_bytes(0, &mut enough)?;
            if enough == [1] {
                break;
            }
        }
        let mut written = serde_json::to_vec(&filter.written)?;
        comm.broadcast_bytes(0, &mut written)?;
        Ok(serde_json::from_slice(&written)?)
    }
}

impl Writing<'_> {
    fn frame(&self) -> Result<Frame> {
        let prompts = &self.prompts[1];
        let trace = prompts.trace(&with_prompt(&self.public[0], PLACE, "-"))?;
        let Some((before, after)) = trace.text[..trace.answer].split_once(PLACE) else {
            let what = "refine.synthetic_prompts: the prompt form does not write prompts as they are";
            return Err(unusable_with(what, Some("set it to 0, or choose another data.prompt".into())));
        };
        let after = after.trim().to_string();
        let mut ends = prompts.check.stops().to_vec();
        if let Some(&first) = prompts.tokenizer.encode(&after)?.ids.first() {
            let is_whole = prompts.tokenizer.is_one_token(&after) || prompts.tokenizer.is_added(first);
            ends.extend(is_whole.then_some(first));
        }
        let texts: Vec<&str> = self.public.iter().map(asked_text).collect();
        let opening = opening(&texts).to_string();
        let lengths = texts.iter().map(|text| Ok(prompts.tokenizer.encode(text)?.ids.len()));
        let longest = lengths.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(1);
        Ok(Frame { before: before.into(), opening, after, ends, longest })
    }

    /// What the LLM reads before it writes the text of this key.
    fn start(&self, frame: &Frame, key: u64) -> Result<Vec<u32>> {
        let prompts = &self.prompts[1];
        let room = prompts.context().saturating_sub(frame.longest + 1);
        let last = format!("{}{}", frame.before, frame.opening);
        let mut text = String::new();
        let mut tokens = prompts.tokenizer.encode(&last)?.ids;
        let order = Stream::new(key).permutation(self.public.len());
        for row in order.into_iter().take(SHOTS) {
            text += &prompts.trace(&self.public[row])?.text;
            let longer = prompts.tokenizer.encode(&format!("{text}{last}"))?.ids;
            if longer.len() > room {
                break;
            }
            tokens = longer;
        }
        ensure!(
            !tokens.is_empty() && tokens.len() <= room,
            "refine.synthetic_prompts: the LLM's {} positions have no room for a public example and another \
             prompt; set it to 0",
            prompts.context()
        );
        Ok(tokens)
    }

    fn limits(&self, frame: &Frame, starts: &[Vec<u32>]) -> GenerateLimits {
        let longest = starts.iter().map(Vec::len).max().unwrap_or(1);
        let rows = self.shares.batch.min(starts.len());
        let stream = self.config.device.max_tokens_per_microbatch;
        GenerateLimits {
            rows,
            prompt_tokens: longest.max(stream.min(longest * rows)),
            context: (longest + frame.longest + 1).min(self.prompts[1].context()),
        }
    }
}

/// What is kept of what was written.
struct Filter<'a> {
    prompts: &'a [Prompts; 2],
    /// A record whose form the new ones take.
    model: &'a Record,
    frame: &'a Frame,
    known: HashSet<String>,
    written: Written,
}

impl<'a> Filter<'a> {
    fn new(writing: &'a Writing<'_>, frame: &'a Frame) -> Self {
        let known = writing.known.iter().map(|record| asked_text(record).trim().to_string()).collect();
        let (prompts, model) = (writing.prompts, &writing.public[0]);
        Self { prompts, model, frame, known, written: Written::default() }
    }

    /// Counts a text, and keeps it if it is of use and wanted.
    fn take(&mut self, tokens: &[u32], ended: bool, wanted: usize) -> Result<()> {
        if self.written.prompts.len() == wanted {
            return Ok(());
        }
        let tokenizer = &self.prompts[1].tokenizer;
        let raw = tokenizer.decode(tokens, false)?;
        let (text, ended) = match raw.split_once(&self.frame.after).filter(|_| !self.frame.after.is_empty()) {
            Some((text, _)) => (text, true),
            None => (raw.as_str(), ended),
        };
        let text = format!("{}{}", self.frame.opening, text.trim());
        let counts = &mut self.written.counts;
        counts.written += 1;
        if text.trim().len() == self.frame.opening.trim().len() {
            counts.empty += 1;
        } else if !ended || tokenizer.encode(&text)?.ids.len() > self.frame.longest {
            counts.too_long += 1;
        } else if !is_well_formed(self.prompts, self.model, &text)? {
            counts.malformed += 1;
        } else if !self.known.insert(text.trim().to_string()) {
            counts.duplicates += 1;
        } else {
            counts.kept += 1;
            self.written.prompts.push(text);
        }
        Ok(())
    }
}

/// Whether both models read a prompt as nothing but text.
fn is_well_formed(prompts: &[Prompts; 2], model: &Record, text: &str) -> Result<bool> {
    let record = with_prompt(model, text, "");
    for side in prompts {
        let ids = side.tokenizer.encode(text)?.ids;
        let is_marker = |id: &u32| {
            side.tokenizer.is_added(*id)
                || side.check.stops().contains(id)
                || side.tokenizer.unknown() == Some(*id)
        };
        if ids.iter().any(is_marker)
            || text.contains(char::REPLACEMENT_CHARACTER)
            || side.prompt(&record).is_err()
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A record of the same form that asks something else.
pub(super) fn with_prompt(model: &Record, prompt: &str, response: &str) -> Record {
    let content = Content::Pair { prompt: prompt.into(), response: response.into() };
    Record { content, learned: vec![], extra: serde_json::Map::new(), ..model.clone() }
}

/// What a record asks: of a conversation the first message of its user.
fn asked_text(record: &Record) -> &str {
    match &record.content {
        Content::Pair { prompt, .. } => prompt,
        Content::Chat(messages) => {
            messages.iter().find(|message| message.role == "user").map_or("", |message| &message.content)
        }
    }
}

/// What all texts begin with, up to the end of a line.
fn opening<'a>(texts: &[&'a str]) -> &'a str {
    let Some((first, others)) = texts.split_first() else { return "" };
    let same = |other: &&str| first.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    let common = others.iter().map(same).min().unwrap_or(0);
    let end = first.as_bytes()[..common].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    &first[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_what_all_prompts_begin_with() {
        assert_eq!(opening(&["Think.\nHow many?", "Think.\nHow much?"]), "Think.\n");
        assert_eq!(opening(&["How many?", "How much?"]), "");
        assert_eq!(opening(&["a\nb\nä", "a\nb\nö", "a\nc"]), "a\n");
        assert_eq!((opening(&[]), opening(&["a\nb"])), ("", ""));
    }
}
