//! What an emulator takes (GradOT): passes over public data for the sums of its layers.

use super::memory::{self, Memory};
use super::predict::Planner;
use super::prediction::Emulating;
use super::rates::Kind;
use super::work::Cost;
use gradtx_run::role::Role;
use gradtx_runtime::data::BatchCapacity;
use gradtx_train::emulator::{Emulation, passes_that};

impl Planner<'_> {
    /// None where the edge is the whole model.
    pub(super) fn emulation(&self) -> Option<Emulating> {
        let config = self.question.config;
        let model = &self.model(Role::Llm).config;
        let emulation = Emulation { model, settings: &config.emulator };
        let layers: Vec<usize> = emulation.middle().collect();
        if layers.is_empty() {
            return None;
        }
        let longest = self.lengths(Role::Llm).longest().min(config.data.max_length);
        let tokens = config.emulator.num_tokens;
        let stream = config.device.max_tokens_per_microbatch.max(longest).min(tokens);
        let capacity = BatchCapacity { tokens: stream, segments: stream, labels: stream };
        // Ranks share the layers, and each goes through all of the data.
        let own = &layers[..layers.len().div_ceil(self.question.cluster.ranks())];
        let memory = |layers: &[usize]| {
            Memory::of(&memory::emulating(model, layers, capacity, self.gpu()), self.question.memory)
        };
        let passes = passes_that(own, |layers| memory(layers).fits());
        let most = passes.iter().max_by_key(|layers| layers.len()).map_or(own, Vec::as_slice);
        let [of_pass, of_layer] = emulation.operations_per_token();
        let flops = tokens as f64 * (passes.len() as f64 * of_pass + own.len() as f64 * of_layer);
        let load = self.rates.load(self.decoder(Role::Llm).bytes());
        Some(Emulating {
            layers: layers.len(),
            passes: passes.len(),
            tokens,
            flops,
            seconds: self.rates.seconds(Kind::Lora, Cost { flops, bytes: 0.0 }) + load,
            memory: memory(most),
            disk: emulation.statistics_bytes(),
            parameters: emulation.parameters(),
        })
    }
}
