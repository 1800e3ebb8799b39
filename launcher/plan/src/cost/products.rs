//! What translation by products and refinement take.
//!
//! Linear algebra of translation runs in f64 on the host's threads, side by side for all adapted matrices; the loss by
//! which the penalty is chosen, and a refinement, run on the LLM's device.

use super::predict::Planner;
use super::rates::Kind;
use super::work::Cost;
use gradtx_models::lora::BlockLayout;
use gradtx_run::config::{PenaltyChoice, PenaltyRule};
use gradtx_run::role::Role;
use gradtx_train::products::penalty::{CANDIDATES, MAX_LEFT_OUT};
use serde::Serialize;

/// f64 operations per second of one thread: inner products of long rows, decompositions, and read-outs. The measured ones
/// of one machine, rounded down (docs/cost-model.md); `gradtx bench products` measures all three.
const GRAM_THREAD: f64 = 30e9;
const DECOMPOSITION_THREAD: f64 = 3e9;
const READ_OUT_THREAD: f64 = 6e9;

/// What translation by products takes.
#[derive(Clone, Debug, Serialize)]
pub struct ByProducts {
    /// Shadow pairs, one snapshot each.
    pub shadows: usize,
    /// Columns of a stack of factors: shadows times their rank; none where A is frozen.
    pub columns: usize,
    /// Seconds of one translation without the choice of the penalty, by part.
    pub seconds: Parts,
    /// Seconds of the choice of the penalty, once per run.
    pub penalty_seconds: f64,
    /// Bytes of host memory.
    pub host_memory: u64,
    /// Seconds of a refinement of one translation.
    pub refine_seconds: f64,
}

/// The parts of a translation, in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Parts {
    /// Inner products of the TinyLM's updates.
    pub inner_products: f64,
    /// Decomposition of the stacks of the LLM's factors.
    pub decomposition: f64,
    /// The adapter of one weighted sum.
    pub read_out: f64,
}

/// Operations and values of the LLM's side.
struct Algebra {
    decomposition: f64,
    read_out: f64,
    /// f64 values that are held.
    values: f64,
}

impl Algebra {
    /// For `columns` columns of every stack.
    fn of_stacks(layout: &BlockLayout, columns: f64) -> Self {
        let mut sum = Self { decomposition: 0.0, read_out: 0.0, values: 0.0 };
        for pair in layout.slices().chunks_exact(2) {
            let (inputs, outputs) = (pair[0].shape[1] as f64, pair[1].shape[0] as f64);
            let ranks = [inputs, outputs].map(|rows| columns.min(rows));
            for (rows, rank) in [inputs, outputs].into_iter().zip(ranks) {
                sum.decomposition += 2.0 * rank * rank * (rows.max(columns) - rank / 3.0);
                // Reflections, and R twice: by rows and by columns.
                sum.values += rank * (rows - rank / 2.0) + 2.0 * rank * columns;
            }
            let (small, large) = (ranks[0].min(ranks[1]), ranks[0].max(ranks[1]));
            sum.read_out += 2.0 * columns * small * large + small * small * large + 6.0 * small.powi(3);
        }
        let blocks = layout.blocks() as f64;
        Self {
            decomposition: blocks * sum.decomposition,
            read_out: blocks * sum.read_out,
            values: blocks * sum.values,
        }
    }

    /// Where A is frozen a translation is a weighted sum of B, which is held in f32.
    fn of_b(layout: &BlockLayout, shadows: f64) -> Self {
        let values = layout.trained().len() as f64;
        Self { decomposition: 0.0, read_out: 2.0 * shadows * values, values: shadows * values / 2.0 }
    }
}

impl Planner<'_> {
    /// Translation by products, and refinement.
    pub(super) fn by_products(&self) -> ByProducts {
        let question = self.question;
        let (config, threads) = (question.config, question.cluster.threads.max(1) as f64);
        let (tiny, llm) = (&self.model(Role::Tiny).layout, &self.model(Role::Llm).layout);
        let shadows = config.curate.num_subsets;
        let groups = if question.groups.is_empty() { shadows } else { question.groups.len().min(shadows) };
        let rows = groups as f64 + 1.0;
        let (columns, algebra) = match llm.freezes_a() {
            true => (0, Algebra::of_b(llm, shadows as f64)),
            false => {
                let columns = shadows.saturating_mul(llm.lora().rank);
                (columns, Algebra::of_stacks(llm, columns as f64))
            }
        };
        let seconds = Parts {
            inner_products: rows * rows * tiny.trained().len() as f64 / (GRAM_THREAD * threads),
            decomposition: algebra.decomposition / (DECOMPOSITION_THREAD * threads),
            read_out: algebra.read_out / (READ_OUT_THREAD * threads),
        };
        let trials = CANDIDATES.len() as f64 * groups.min(MAX_LEFT_OUT) as f64;
        let penalty_seconds = match config.translate.penalty {
            PenaltyChoice::Fixed(_) => 0.0,
            // Inner products of the products.
            PenaltyChoice::By(PenaltyRule::Mse) => {
                (shadows as f64).powi(2) * algebra.values / shadows as f64 / (DECOMPOSITION_THREAD * threads)
            }
            PenaltyChoice::By(PenaltyRule::Loss) => {
                let read = self.decoder(Role::Llm).reading(&self.lengths(Role::Llm).mean(None), 1.0);
                let examples = trials * config.translate.penalty_examples as f64;
                trials * seconds.read_out + self.rates.seconds(Kind::Lora, read * examples)
            }
        };
        let host = 8.0 * (algebra.values + rows * rows);
        ByProducts {
            shadows,
            columns,
            seconds,
            penalty_seconds,
            host_memory: host as u64,
            refine_seconds: self.refinement(),
        }
    }

    /// Answers of both models and training of a fresh adapter, in rounds.
    fn refinement(&self) -> f64 {
        let config = self.question.config;
        let refine = &config.refine;
        let answering = |side: Role| {
            let (lengths, decoder) = (self.lengths(side), self.decoder(side));
            let (prompt, asked) = (lengths.prompt(), refine.num_prompts as f64);
            let new = lengths.mean(None).labels.clamp(1.0, config.evaluate.max_new_tokens as f64);
            let rows = (config.evaluate.per_device_eval_batch_size as f64).min(asked);
            let decode = decoder.decoding(rows, prompt.tokens + new / 2.0) * (asked * new / rows);
            self.rates.seconds(Kind::Lora, decoder.reading(&prompt, asked))
                + self.rates.seconds(Kind::Generate, decode)
        };
        let mean = self.lengths(Role::Llm).mean(None);
        let stream_tokens = config.device.max_tokens_per_microbatch;
        let step: Cost =
            self.decoder(Role::Llm).finetuning(&mean, refine.global_batch_size as f64, stream_tokens);
        let training = self.rates.seconds(Kind::Lora, step * f64::from(refine.steps_per_round));
        let loading: f64 =
            [Role::Tiny, Role::Llm].map(|side| self.rates.load(self.decoder(side).bytes())).iter().sum();
        loading + answering(Role::Tiny) + refine.num_rounds as f64 * (answering(Role::Llm) + training)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::calibrate::published;
    use crate::cost::memory::Model;
    use gradtx_run::config::AdapterConfig;

    fn layout(adapter: &AdapterConfig) -> BlockLayout {
        Model::new(published("qwen2.5-7b").unwrap(), Role::Llm, adapter).unwrap().layout
    }

    #[test]
    fn stacks_cost_what_their_shapes_say() {
        // q is [3584, 3584], v [512, 3584]: three sides of rank 600, one of 512.
        let found = Algebra::of_stacks(&layout(&AdapterConfig::default()), 600.0);
        let side = 2.0 * 600f64.powi(2) * (3584.0 - 200.0);
        let narrow = 2.0 * 512f64.powi(2) * (600.0 - 512.0 / 3.0);
        assert!((found.decomposition / (28.0 * (3.0 * side + narrow)) - 1.0).abs() < 1e-12);
        let core =
            |small: f64, large: f64| 1200.0 * small * large + small * small * large + 6.0 * small.powi(3);
        assert!((found.read_out / (28.0 * (core(600.0, 600.0) + core(512.0, 600.0))) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_frozen_a_is_not_decomposed() {
        let adapter = AdapterConfig { freeze_a: true, r: 8, ..AdapterConfig::default() };
        let found = Algebra::of_b(&layout(&adapter), 300.0);
        assert_eq!((found.decomposition, found.read_out), (0.0, 600.0 * 28.0 * 32_768.0));
    }
}
