//! `bench generate`: greedy decoding of many sequences at once, by the generator that `evaluate`
//! uses, to the last token.
//!
//! Two lines. `generate prompts`: all prompts read, and a first token for each. `generate`: one
//! more token for every sequence, as the time of everything beyond that of the first line, by the
//! number of tokens.
//!
//! **Bytes** of a token, by [`DecoderWork::decoding`]: all values of blocks and head once, and
//! every sequence's keys and values, of the mean length while it grows. At the rate of the large
//! copy these would be the shortest time a token can take: `share_of_copy` is the part of that
//! floor that is reached.

use super::counts::Count;
use super::models::{NamedDecoder, check_memory};
use super::options::{Common, at_least_one};
use super::results::{Entry, Results, rounded};
use super::values::tokens;
use super::{Measured, On, measure, profile};
use anyhow::{Result, ensure};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, GenerateLimits, Generator, Prompt};
use gradtx_models::lora::{BlockLayout, LoraConfig};
use gradtx_plan::cost::rates::Kind;
use gradtx_plan::cost::tokens::Lengths;
use gradtx_plan::cost::work::DecoderWork;
use gradtx_run::failure::unusable;
use serde_json::json;

/// What to generate.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    /// The model: qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b, or the path of a config.json
    /// (default: 0.5b on a CPU, 7b on a GPU).
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    /// Sequences at once (default: 4 on a CPU, 64 on a GPU).
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Tokens of a prompt (default: 32 on a CPU, 256 on a GPU).
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// New tokens of a sequence, at least 2 (default: 8 on a CPU, 128 on a GPU).
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
}

/// Sizes, as asked for or by the device.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    prompt: usize,
    new: usize,
}

impl Sizes {
    /// All prompts are read in one pass, so that all sequences are equally far.
    fn limits(self) -> GenerateLimits {
        let Self { batch, prompt, new } = self;
        GenerateLimits { rows: batch, prompt_tokens: batch * prompt, context: prompt + new }
    }
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
    ) -> Result<()> {
        let is_cpu = on.machine.is_cpu();
        let by_default = |cpu: usize, gpu: usize| if is_cpu { cpu } else { gpu };
        let name = if is_cpu { "qwen2.5-0.5b" } else { "qwen2.5-7b" };
        let model = NamedDecoder::find(self.model.as_deref().unwrap_or(name))?;
        let sizes = Sizes {
            batch: self.batch.unwrap_or(by_default(4, 64)),
            prompt: self.context.unwrap_or(by_default(32, 256)),
            new: self.tokens.unwrap_or(by_default(8, 128)),
        };
        at_least_one("--batch", sizes.batch)?;
        at_least_one("--context", sizes.prompt)?;
        if sizes.new < 2 {
            return Err(unusable("--tokens: expected at least 2, since the first one is the prompts'"));
        }
        check_memory(on.device, &model.name, "--batch", sizes.batch, |batch| {
            let mut plan = Decoder::<D, X>::plan(&model.config, false);
            plan.extend(Generator::<D, X>::plan(&model.config, Sizes { batch, ..sizes }.limits(), None));
            Ok(plan)
        })?;
        if self.model.is_none() && is_cpu {
            results.say("a small model, since this is a CPU: --model qwen2.5-7b --batch 64 is the real one");
        }
        generate::<X, D>(on, results, &model, sizes)
    }
}

fn generate<X: Real<Acc = f32>, D: Backend<X>>(
    on: &On<'_, D>,
    results: &mut Results,
    model: &NamedDecoder,
    sizes: Sizes,
) -> Result<()> {
    let Sizes { batch, prompt, new } = sizes;
    let decoder = model.make::<X, D>(on.device)?;
    let mut generator = Generator::new(&decoder, sizes.limits(), None)?;
    let one = |i: usize| Prompt { tokens: tokens(prompt, model.config.vocab, i as u64), adapter: None };
    let prompts: Vec<Prompt> = (0..batch).map(one).collect();
    let mut times = |max_new: usize| {
        measure::step(on.device, results.repeats(), || {
            generator.generate(&decoder, None, &prompts, max_new, &[])?;
            Ok(())
        })
    };
    let (first, all) = (times(1)?, times(new)?);
    let operations = profile::of_step(on, || {
        generator.generate(&decoder, None, &prompts, new, &[])?;
        Ok(())
    })?;
    let each = all.beyond(&first).by(new - 1);
    ensure!(
        each.median() > 0.0,
        "--tokens {new}: too few for their time to be told from that of the prompts"
    );

    let layout = BlockLayout::new(&model.config, &LoraConfig::default())?;
    let work = DecoderWork { model: &model.config, layout: &layout, element: size_of::<X>() as f64 };
    let read = work.reading(&Lengths::uniform(prompt, 0).mean(None), batch as f64);
    // The first decoded token sees the prompt and the token before it, the last all but itself.
    let context = prompt as f64 + new as f64 / 2.0;
    let cost = work.decoding(batch as f64, context);
    let shape = format!("{}, batch {batch}, prompt {prompt}, {new} new", model.name);
    let fields = json!({"model": model.name, "batch": batch, "prompt": prompt, "new": new});
    let mut more = fields.clone();
    more["tokens_per_s"] = rounded((batch * prompt) as f64 / first.median());
    let entry = Entry::new("generate prompts", shape.as_str(), Count::flops(read.flops), first);
    results.add(on.device, entry.with(more))?;
    let mut more = fields;
    more["tokens_per_s"] = rounded(batch as f64 / each.median());
    more["operations"] = operations;
    more["generation_s"] = rounded(all.median());
    more["floor_s"] = rounded(cost.bytes / on.ceilings.copy);
    let entry = Entry::new("generate", shape, Count::bytes(cost.bytes), each);
    results.add(on.device, entry.of(Kind::Generate).with(more))
}
