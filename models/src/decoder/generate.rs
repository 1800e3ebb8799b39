//! [`Generator`]: decoding of many prompts at once, with a key/value cache.
//!
//! In: prompts, each with an adapter of its own or none. Out: their continuations.
//! Prompts are read as packed streams; then every unfinished sequence gets one token
//! per pass. A sequence that ends leaves its slot of the cache to the next prompt.
//!
//! The next token is the likeliest one, or it is drawn ([`Sampling`]). Who wants to follow the text
//! while it grows gives [`Decoding`] a function.
//!
//! What a sequence becomes does not depend on its companions, as far as the device
//! keeps the rows of a product independent of each other (the CPU does, to the bit).

use super::pass::{Cache, CacheAction, Pass};
use super::sampling::Sampling;
use super::{Activations, AdapterView, Decoder, DecoderConfig, Mode};
use crate::lora::BlockLayout;
use gradtx_kernels::ops::LmHead;
use gradtx_kernels::{Backend, Buffer, GraphCapture, Real, View};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};
use std::collections::HashMap;

/// What a generator has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateLimits {
    /// Sequences at a time.
    pub rows: usize,
    /// Tokens of prompts that are read in one pass; at least the longest prompt.
    pub prompt_tokens: usize,
    /// Tokens of one sequence, prompt and continuation.
    pub context: usize,
}

impl GenerateLimits {
    /// The largest stream of a pass: prompts, or one token of every row.
    fn streams(self) -> BatchCapacity {
        let rows = self.rows.max(1);
        BatchCapacity { tokens: self.prompt_tokens.max(rows), segments: rows, labels: rows }
    }
}

/// What is to be continued.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids; at least one.
    pub tokens: Vec<u32>,
    /// Row of the adapters, or the base model alone.
    pub adapter: Option<u32>,
}

/// A continuation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Continuation {
    /// Token ids, without the one that ended it.
    pub tokens: Vec<u32>,
    /// It ended by itself; otherwise it reached the limit.
    pub ended: bool,
}

/// How new tokens are chosen, and who sees each of them.
pub struct Decoding<'a> {
    /// Draws tokens; none for the likeliest one.
    pub sampling: Option<Sampling>,
    /// Called with the number of the prompt and every new token but the one that ends a text.
    pub on_token: &'a mut dyn FnMut(usize, u32),
}

/// Buffers for generation, allocated once.
pub struct Generator<D: GraphCapture, X: Real> {
    limits: GenerateLimits,
    /// Tokens of a text at most, as the model can read them.
    positions: usize,
    acts: Activations<D, X>,
    batch: DeviceBatch<D, X::Acc>,
    /// `[L, rows, context, kv_heads · D]`
    k: D::Buf<X>,
    /// As `k`.
    v: D::Buf<X>,
    /// `[rows]`
    next: D::Buf<u32>,
    /// The adapters of a call and one more, all zero, where a call needs it.
    padded: Option<D::Buf<X::Acc>>,
    /// By number of rows: the operations of one more token for each, within one call.
    steps: HashMap<usize, D::Graph>,
}

/// A sequence in the batch.
struct Row {
    prompt: usize,
    slot: u32,
    /// Position of `last`, which the cache does not hold yet.
    position: u32,
    last: u32,
    adapter: u32,
}

impl<D: Backend<X>, X: Real> Generator<D, X> {
    /// Buffers for this decoder, with adapters of this layout or without.
    pub fn new(
        decoder: &Decoder<D, X>,
        limits: GenerateLimits,
        layout: Option<&BlockLayout>,
    ) -> Result<Self> {
        let mut alloc = Allocator::new(&decoder.device, Purpose::Activations);
        Self::allocate(&mut alloc, &decoder.config, limits, layout)
    }

    fn allocate(
        alloc: &mut Allocator<'_, D>,
        config: &DecoderConfig,
        limits: GenerateLimits,
        layout: Option<&BlockLayout>,
    ) -> Result<Self> {
        let capacity = limits.streams();
        let rows = capacity.segments;
        let positions = limits.context.max(capacity.tokens);
        let acts = Activations::allocate(alloc, config, capacity, Mode::Inference(layout), positions)?;
        let batch = DeviceBatch::allocate(alloc, capacity)?;
        alloc.set_purpose(Purpose::Cache);
        let cache = [config.layers, rows, limits.context, config.kv_dim()];
        let (k, v) = (alloc.buffer("keys and values", &cache)?, alloc.buffer("keys and values", &cache)?);
        Ok(Self {
            limits: GenerateLimits { rows, ..limits },
            positions: usize::MAX,
            acts,
            batch,
            k,
            v,
            next: alloc.buffer("next tokens", &[rows])?,
            padded: None,
            steps: HashMap::new(),
        })
    }

    /// With texts that end, though not by themselves, where they have this many tokens.
    pub fn within(self, positions: usize) -> Self {
        Self { positions, ..self }
    }

    /// The cache and the buffers of the passes.
    pub fn plan(config: &DecoderConfig, limits: GenerateLimits, layout: Option<&BlockLayout>) -> MemoryPlan {
        Allocator::plan_sizes(Purpose::Activations, |alloc| Self::allocate(alloc, config, limits, layout))
    }

    /// Continues every prompt with the likeliest tokens, until one of `ends` or `max_new` tokens.
    pub fn generate(
        &mut self,
        decoder: &Decoder<D, X>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        prompts: &[Prompt],
        max_new: usize,
        ends: &[u32],
    ) -> Result<Vec<Continuation>> {
        let greedy = &mut Decoding { sampling: None, on_token: &mut |_, _| {} };
        self.generate_as(decoder, adapters, prompts, max_new, ends, greedy)
    }

    /// [`Self::generate`] with tokens chosen and shown as `decoding` says.
    pub fn generate_as(
        &mut self,
        decoder: &Decoder<D, X>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        prompts: &[Prompt],
        max_new: usize,
        ends: &[u32],
        decoding: &mut Decoding<'_>,
    ) -> Result<Vec<Continuation>> {
        let adapter_rows = adapters.map_or(0, |a| a.values.len() / a.layout.total());
        self.check(decoder, adapter_rows, prompts, max_new)?;
        // What the device remembers is about the buffers of another call.
        self.steps.clear();
        let padded = match adapters {
            Some(a) if prompts.iter().any(|p| p.adapter.is_none()) => Some(self.pad(&decoder.device, a)?),
            _ => None,
        };
        let adapters = adapters.map(|a| AdapterView {
            values: padded.as_ref().unwrap_or(a.values),
            layout: a.layout,
            dropout: 0.0,
        });
        let results = self.generate_with(decoder, adapters, adapter_rows, prompts, max_new, ends, decoding);
        self.padded = padded;
        results
    }

    /// The adapters and one more, all zero, which rows of the base model use; in the buffer of the
    /// last call if it fits.
    fn pad(&mut self, device: &D, adapters: AdapterView<'_, D, X::Acc>) -> Result<D::Buf<X::Acc>> {
        let len = adapters.values.len();
        let all = len + adapters.layout.total();
        let mut rows = match self.padded.take().filter(|held| held.len() == all) {
            Some(held) => held,
            None => device.zeros(all)?,
        };
        device.copy(rows.view_mut(0..len), adapters.values.all())?;
        Ok(rows)
    }

    /// [`Self::generate`] with adapters that have a row for the base model where it is asked for.
    fn generate_with(
        &mut self,
        decoder: &Decoder<D, X>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        adapter_rows: usize,
        prompts: &[Prompt],
        max_new: usize,
        ends: &[u32],
        decoding: &mut Decoding<'_>,
    ) -> Result<Vec<Continuation>> {
        let sampling = decoding.sampling;
        let mut results = vec![Continuation::default(); prompts.len()];
        if max_new == 0 {
            return Ok(results);
        }
        let mut free: Vec<u32> = (0..self.limits.rows as u32).rev().collect();
        let mut waiting = 0;
        let mut active: Vec<Row> = Vec::new();
        while waiting < prompts.len() || !active.is_empty() {
            self.decode(decoder, adapters, &mut active, sampling)?;
            let new = self.admit(prompts, &mut waiting, &mut free, adapter_rows as u32);
            active.extend(self.read(decoder, adapters, prompts, new, sampling)?);
            active.retain(|row| {
                let result = &mut results[row.prompt];
                result.ended = ends.contains(&row.last);
                if !result.ended {
                    result.tokens.push(row.last);
                    (decoding.on_token)(row.prompt, row.last);
                }
                let text = prompts[row.prompt].tokens.len() + result.tokens.len();
                let done = result.ended || result.tokens.len() == max_new || text >= self.positions;
                if done {
                    free.push(row.slot);
                }
                !done
            });
        }
        Ok(results)
    }

    fn check(
        &self,
        decoder: &Decoder<D, X>,
        adapters: usize,
        prompts: &[Prompt],
        max_new: usize,
    ) -> Result<()> {
        let limits = &self.limits;
        for (i, prompt) in prompts.iter().enumerate() {
            let n = prompt.tokens.len();
            let wrong = |why: String| Err(Error::invalid(format!("prompt {i}"), why));
            if n == 0 {
                return wrong("it has no tokens".into());
            }
            if n >= self.positions {
                return wrong(format!("{n} tokens leave no room in a text of {}", self.positions));
            }
            let new = max_new.min(self.positions - n);
            if n > limits.prompt_tokens || n + new > limits.context {
                return wrong(format!("{n} tokens and {new} new ones do not fit {limits:?}"));
            }
            if let Some(id) = prompt.tokens.iter().find(|&&id| id as usize >= decoder.config.vocab) {
                return wrong(format!(
                    "token id {id} is not below the vocabulary's {}",
                    decoder.config.vocab
                ));
            }
            if let Some(a) = prompt.adapter.filter(|&a| a as usize >= adapters) {
                return wrong(format!("adapter {a} of {adapters}"));
            }
        }
        Ok(())
    }

    /// The prompts that are read next: as many as there are free slots and room in a stream.
    fn admit(&self, prompts: &[Prompt], waiting: &mut usize, free: &mut Vec<u32>, none: u32) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut tokens = 0;
        while let Some(prompt) = prompts.get(*waiting) {
            tokens += prompt.tokens.len();
            if tokens > self.limits.prompt_tokens {
                break;
            }
            let Some(slot) = free.pop() else { break };
            let adapter = prompt.adapter.unwrap_or(none);
            rows.push(Row { prompt: *waiting, slot, position: 0, last: 0, adapter });
            *waiting += 1;
        }
        rows
    }

    /// Reads prompts into the cache; their rows then have the first new token as `last`.
    fn read(
        &mut self,
        decoder: &Decoder<D, X>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        prompts: &[Prompt],
        mut rows: Vec<Row>,
        sampling: Option<Sampling>,
    ) -> Result<Vec<Row>> {
        let mut stream = PackedBatch::default();
        for row in &rows {
            let tokens = &prompts[row.prompt].tokens;
            push(&mut stream, tokens, 0, row.adapter);
        }
        let last: Vec<u32> = stream.offsets[1..].iter().map(|end| end - 1).collect();
        self.pass(decoder, adapters, &stream, &mut rows, &last, CacheAction::Fill, sampling)?;
        for row in &mut rows {
            row.position = prompts[row.prompt].tokens.len() as u32;
        }
        Ok(rows)
    }

    /// One more token for every row.
    fn decode(
        &mut self,
        decoder: &Decoder<D, X>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        rows: &mut [Row],
        sampling: Option<Sampling>,
    ) -> Result<()> {
        let mut stream = PackedBatch::default();
        for row in rows.iter() {
            push(&mut stream, &[row.last], row.position, row.adapter);
        }
        let all: Vec<u32> = (0..rows.len() as u32).collect();
        self.pass(decoder, adapters, &stream, rows, &all, CacheAction::Decode, sampling)?;
        rows.iter_mut().for_each(|row| row.position += 1);
        Ok(())
    }

    /// One pass over `stream`, segment i in the slot of row i; row i's next token is read
    /// at stream position `at[i]`.
    fn pass(
        &mut self,
        decoder: &Decoder<D, X>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        stream: &PackedBatch,
        rows: &mut [Row],
        at: &[u32],
        action: CacheAction,
        sampling: Option<Sampling>,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let (device, vocab) = (&decoder.device, decoder.config.vocab);
        let slots: Vec<u32> = rows.iter().map(|row| row.slot).collect();
        self.batch.load_for_cache(device, stream, &slots, at)?;
        self.acts.check(self.batch.used(), adapters.as_ref())?;
        let Self { limits, acts, batch, k, v, next, steps, .. } = self;
        let (pass, chunk) = (Pass::new(batch, adapters), acts.chunk);
        let mut blocks = |acts: &mut Activations<D, X>| {
            let (slot, capacity, slots) = (batch.slots(), limits.context, limits.rows);
            let cache = Cache { k: &mut *k, v: &mut *v, slot, capacity, slots, action };
            decoder.forward_blocks(acts, &pass, &mut Some(cache))
        };
        let head = |acts: &mut Activations<D, X>, next: &mut D::Buf<u32>, first: usize, n: usize| {
            let wanted = batch.last_rows().slice(first..first + n);
            decoder.row_logits(acts, stream.len(), wanted)?;
            let logits = acts.head_logits.view(0..n * vocab);
            Ok::<(), Error>(LmHead::<X>::argmax(device, next.view_mut(0..n), logits, n, vocab)?)
        };
        // One more token of so many rows is always the same work.
        let repeated = action == CacheAction::Decode && rows.len() <= chunk;
        if !repeated {
            blocks(acts)?;
        }
        for (i, rows) in rows.chunks_mut(chunk).enumerate() {
            let n = rows.len();
            if repeated {
                device.capture_or_launch(steps.entry(n).or_default(), &mut || {
                    blocks(acts)?;
                    head(acts, next, i * chunk, n)
                })?;
            } else {
                head(acts, next, i * chunk, n)?;
            }
            match sampling {
                None => {
                    let tokens = device.to_host(next.view(0..n))?;
                    rows.iter_mut().zip(tokens).for_each(|(row, token)| row.last = token);
                }
                Some(sampling) => {
                    let logits = device.to_host(acts.head_logits.view(0..n * vocab))?;
                    for (row, logits) in rows.iter_mut().zip(logits.chunks(vocab)) {
                        row.last = sampling.draw(logits, row.prompt, row.position);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Appends tokens of one sequence, from `position` on, as a segment.
fn push(stream: &mut PackedBatch, tokens: &[u32], position: u32, adapter: u32) {
    stream.tokens.extend_from_slice(tokens);
    stream.positions.extend((position..).take(tokens.len()));
    stream.offsets.push(stream.tokens.len() as u32);
    stream.adapter.push(adapter);
    stream.grad_row.push(0);
    stream.keys.push(0);
}
