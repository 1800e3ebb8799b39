//! `bench products`: what translation by products takes on the host, by its parts: inner products of the shadow
//! students, decomposition of the stacks of one block of the LLM, and the read-out of one client's adapter from it.
//!
//! **Operations.** Inner products of n rows of d values: n(n+1)d, for they are symmetric; in f64, while the large
//! product that they are held against is of the device's type. Decomposition, for a matrix [out, in] with stacks of
//! c = n·r columns: 2 ρ² (max(c, m) − ρ/3) of the side of m rows, ρ = min(c, m), on either side.

use super::counts::Count;
use super::models::NamedDecoder;
use super::options::{Common, at_least_one};
use super::results::{Entry, Results, rounded};
use super::train::updates;
use super::{Measured, On, measure};
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{BlockLayout, LoraConfig, Products};
use gradtx_train::linalg::gram::{COLUMNS, Gram};
use serde_json::json;

/// How many shadows, of which models.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    /// Shadow updates.
    #[arg(long, value_name = "N", default_value_t = 300)]
    shadows: usize,
    /// Values of an update of the TinyLM (36x12800 for Qwen2.5-3B and r = 2 on q and v); time grows with them.
    #[arg(long, value_name = "N", default_value_t = 46_080)]
    values: usize,
    /// The LLM: a published model or a config.json. Its adapters are of q and v.
    #[arg(long, value_name = "NAME|FILE", default_value = "qwen2.5-0.5b")]
    model: String,
    /// Rank of the shadows' adapters.
    #[arg(long, value_name = "R", default_value_t = 2)]
    rank: usize,
    /// Rank of the translation's adapter.
    #[arg(long, value_name = "R", default_value_t = 16)]
    lora_r: usize,
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
    ) -> Result<()> {
        let sizes = [("--shadows", self.shadows), ("--values", self.values), ("--lora-r", self.lora_r)];
        sizes.into_iter().try_for_each(|(option, value)| at_least_one(option, value))?;
        self.inner_products(on, results)?;
        let model = NamedDecoder::find(&self.model)?;
        // All blocks are alike.
        let blocks = model.config.layers;
        let one = DecoderConfig { layers: 1, ..model.config };
        self.read_out(on, results, &model.name, &one, blocks)
    }
}

impl Job {
    /// As `translate` finds them, but for reading the store.
    fn inner_products<D: gradtx_kernels::Device>(&self, on: &On<'_, D>, results: &mut Results) -> Result<()> {
        let (rows, width) = (self.shadows, COLUMNS.min(self.values));
        let columns: Vec<f64> = updates(rows * width, 1).into_iter().map(f64::from).collect();
        let times = measure::step(on.device, results.repeats(), || {
            let mut gram = Gram::new(rows);
            for first in (0..self.values).step_by(COLUMNS) {
                let width = width.min(self.values - first);
                gram.add(&columns[..rows * width], width);
            }
            anyhow::ensure!(gram.finish()[0][0] > 0.0, "a row has no length");
            Ok(())
        })?;
        let count = Count::flops((rows * (rows + 1)) as f64 * self.values as f64);
        let shape = format!("{rows} rows of {} values, f64", self.values);
        results.add(on.device, Entry::new("inner products of students", shape, count, times))
    }

    fn read_out<D: gradtx_kernels::Device>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
        name: &str,
        one: &DecoderConfig,
        blocks: usize,
    ) -> Result<()> {
        let lora = LoraConfig { rank: self.rank, ..LoraConfig::default() };
        let layout = BlockLayout::new(one, &lora)?;
        let alpha = lora.scale() * self.lora_r as f64;
        let to = BlockLayout::new(one, &LoraConfig { rank: self.lora_r, alpha, ..lora })?;
        let adapters = updates(self.shadows * layout.total(), 2);
        let decompose = || {
            Products::new(&layout, self.shadows, |adapter, range, out| {
                out.copy_from_slice(&adapters[adapter * layout.total()..][range]);
                Ok(())
            })
        };
        let times = measure::step(on.device, results.repeats(), || {
            decompose()?;
            Ok(())
        })?;
        let columns = (self.shadows * self.rank) as f64;
        let of_side = |rows: usize| {
            let rank = columns.min(rows as f64);
            2.0 * rank * rank * ((rows as f64).max(columns) - rank / 3.0)
        };
        let pairs = layout.slices().chunks_exact(2);
        let flops = pairs.map(|pair| of_side(pair[0].shape[1]) + of_side(pair[1].shape[0])).sum();
        let seconds = times.median() * blocks as f64;
        let more = json!({ "model": name, "blocks": blocks, "all_blocks_s": rounded(seconds) });
        let shape = format!("{name}, a block, {} columns", self.shadows * self.rank);
        let entry = Entry::new("decomposition of stacks", shape.as_str(), Count::flops(flops), times);
        results.add(on.device, entry.with(more))?;

        let products = decompose()?;
        let weights: Vec<f64> = updates(self.shadows, 3).into_iter().map(f64::from).collect();
        let times = measure::step(on.device, results.repeats(), || {
            products.read_out(&weights, &to)?;
            Ok(())
        })?;
        let seconds = times.median() * blocks as f64;
        let more =
            json!({ "model": name, "blocks": blocks, "rank": self.lora_r, "all_blocks_s": rounded(seconds) });
        let none = Count { flops: 0.0, bytes: 0.0 };
        results.add(on.device, Entry::new("read-out of a client", shape, none, times).with(more))
    }
}
