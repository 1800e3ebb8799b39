//! `bench kernels`: every operation by itself, at the sizes of a model.
//!
//! Calls are queued back to back and waited for once per sample, so that launch latency counts
//! only where a call is shorter than its launch. Operations and bytes are those of
//! [`super::counts`]. The streams of packed attention have segments of 256 to 2048 tokens.
//!
//! Buffers that fit into the device's cache are read faster than memory gives: a `share_of_copy`
//! above 1 says so.

mod attention;
mod flat;
mod matrix;
mod rows;
mod shapes;

use super::models::{NamedDecoder, NamedTranslator, TranslatorArgs, check_memory};
use super::options::{Common, at_least_one};
use super::results::Results;
use super::{Measured, On};
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use shapes::{Bench, Shapes};

/// Which sizes.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    sizes: TranslatorArgs,
    /// The decoder whose sizes to take: qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b, or the path of a
    /// config.json (default: 0.5b on a CPU, 7b on a GPU).
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    /// Tokens of the stream (default: 1024 on a CPU, 8192 on a GPU).
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tuples of a translator's batch (default: 8 on a CPU, 32 on a GPU), and sequences that
    /// decode at once (twice as many).
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Tokens in the cache of a sequence that decodes.
    #[arg(long, value_name = "N", default_value_t = 320)]
    context: usize,
    /// Values of flat buffers, for AdamW and conversions (default: 16 million on a CPU, 256 million
    /// on a GPU).
    #[arg(long, value_name = "N")]
    values: Option<usize>,
    /// Rank of the adapters.
    #[arg(long, value_name = "R", default_value_t = 2)]
    rank: usize,
    /// What is adapted.
    #[arg(long, value_delimiter = ',', default_values_t = ["q_proj".to_string(), "v_proj".to_string()])]
    targets: Vec<String>,
    /// Only operations whose names contain this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
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
        let shapes = Shapes {
            layout: model.adapters(self.rank, &self.targets)?,
            model,
            translator: NamedTranslator::find(&self.sizes, is_cpu)?,
            tokens: self.tokens.unwrap_or(by_default(1024, 8192)),
            batch: self.batch.unwrap_or(by_default(8, 32)),
            context: self.context,
            values: self.values.unwrap_or(by_default(16_000_000, 256_000_000)),
            x: size_of::<X>(),
        };
        for (option, value) in
            [("--tokens", shapes.tokens), ("--batch", shapes.batch), ("--context", shapes.context)]
        {
            at_least_one(option, value)?;
        }
        at_least_one("--values", shapes.values)?;
        check_memory(on.device, "bench kernels", "--tokens", shapes.tokens, |n| Ok(shapes.plan::<X, D>(n)))?;
        if self.model.is_none() && is_cpu {
            results.say(
                "sizes of small models, since this is a CPU: --model, --translator, --tokens change them",
            );
        }
        let mut bench = Bench { device: on.device, results, only: self.only.as_deref() };
        rows::measure::<X, D>(&mut bench, &shapes)?;
        flat::measure::<X, D>(&mut bench, &shapes)?;
        attention::measure::<X, D>(&mut bench, &shapes)?;
        matrix::measure::<X, D>(&mut bench, &shapes)
    }
}
