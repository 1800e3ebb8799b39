//! Launches of adapters of q, k and v beside the frozen base.

use super::decoder::{Model, X};
use super::operations::Operations;
use super::work::Work;
use crate::counts::{self, Count};
use anyhow::Result;
use gradtx_kernels::ops::LoraTarget;
use gradtx_models::lora::{BlockLayout, Projection};
use gradtx_run::failure::unusable;

/// Columns that inputs and weights have for all adapters together.
const ROOM: usize = 64;
/// Tokens of a tile of the gradients of A, and of B.
const A_TILE: usize = 32;
const B_TILE: usize = 64;
/// The kernel of two targets of rank 1 or 2: rows of at most so many values.
const PAIR: usize = 2;
const PAIR_WIDTH: usize = 4096;
/// Bytes of shared memory of a block: what devices have, less what kernels declare.
const SHARED_HOPPER: usize = (227 << 10) - 512;
const SHARED: usize = (163 << 10) - 512;

/// Adapters of so many jobs.
pub(super) struct Adapters<'a> {
    layout: &'a BlockLayout,
    targets: &'a [LoraTarget],
    jobs: usize,
}

impl<'a> Adapters<'a> {
    /// # Errors
    /// If other projections than q, k and v have adapters.
    pub fn new(layout: &'a BlockLayout, jobs: usize) -> Result<Self> {
        let others = [Projection::O, Projection::GateUp, Projection::Down];
        if others.into_iter().any(|projection| !layout.targets(0, projection).is_empty()) {
            let why = "--targets: launches are counted for adapters of q_proj, k_proj and v_proj; `gradtx bench finetune --profile` \
                       on a GPU counts those of others";
            return Err(unusable(why));
        }
        Ok(Self { layout, targets: layout.targets(0, Projection::Qkv), jobs })
    }

    /// Columns of s.
    fn tail(&self) -> usize {
        self.layout.lora().rank * self.targets.len()
    }

    /// Columns of the products that are the adapters'; 0 where they have launches of their own.
    fn columns(&self) -> usize {
        if self.jobs * self.tail() <= ROOM { ROOM } else { 0 }
    }

    /// Columns of y that have adapters.
    fn outputs(&self) -> usize {
        self.targets.iter().map(|target| target.out_len).sum()
    }

    /// B in the rows of the weights; or products with B by themselves.
    fn products_with_b(&self, all: &mut Operations, model: &Model<'_>, name: &'static str, tokens: usize) {
        let layers = model.config.layers;
        if self.columns() > 0 {
            let tail = counts::set(model.config.qkv_dim() * self.columns(), X as f64);
            return all.add(layers, "lora_weight_tail", tail, Work::AdapterGradient);
        }
        for target in self.targets {
            let count = model.sizes(tokens).gradient_of_b(target.out_len, self.layout.lora().rank);
            all.add(layers, name, count, Work::AdapterGradient);
        }
    }

    /// Norm and q, k, v.
    pub fn forward(&self, all: &mut Operations, model: &Model<'_>, tokens: usize) {
        let (config, sizes) = (model.config, model.sizes(tokens));
        let norm = sizes.norm_with_adapters(self.tail());
        all.add(config.layers, "rmsnorm_lora_forward", norm, Work::AdapterNormForward);
        self.products_with_b(all, model, "lora_up_forward", tokens);
        all.product(config.layers, (tokens, config.qkv_dim(), config.hidden + self.columns()), X);
    }

    /// Gradients of q, k, v's input, of the adapters and of the norm's input.
    pub fn backward(&self, all: &mut Operations, model: &Model<'_>, tokens: usize, segments: usize) {
        let (config, sizes) = (model.config, model.sizes(tokens));
        let (layers, h, rank) = (config.layers, config.hidden, self.layout.lora().rank);
        self.products_with_b(all, model, "lora_up_backward", tokens);
        all.product(layers, (tokens, h + self.columns(), config.qkv_dim()), X);
        let of_b = sizes.gradient_of_b(self.outputs(), self.tail());
        all.add(layers, "lora_gradient_b", of_b, Work::AdapterGradient);
        let tiles = |tile: usize| tokens.div_ceil(tile) + segments;
        let sums = counts::sums_over_tiles(tiles(B_TILE), rank * self.outputs());
        all.add(layers, "lora_gradient_rows", sums, Work::AdapterGradient);

        let (name, at_a_time) = self.norm_backward(model);
        let norm = sizes.norm_with_adapters_backward(self.tail());
        for first in (0..self.tail()).step_by(at_a_time) {
            let units = at_a_time.min(self.tail() - first);
            all.add(layers, name, norm, Work::AdapterNormBackward);
            let sums = counts::sums_over_tiles(tiles(A_TILE), units * h);
            all.add(layers, "lora_gradient_rows", sums, Work::AdapterGradient);
        }
    }

    /// The kernel of the norm's backward, and how many columns of s a launch takes.
    fn norm_backward(&self, model: &Model<'_>) -> (&'static str, usize) {
        let (h, rank, float) = (model.config.hidden, self.layout.lora().rank, size_of::<f32>());
        let is_pair = rank <= PAIR && self.targets.len() <= PAIR && h <= PAIR_WIDTH && h.is_multiple_of(8);
        if is_pair {
            return ("rmsnorm_lora_backward_pair", self.tail());
        }
        let shared = if model.hopper { SHARED_HOPPER } else { SHARED };
        match shared.saturating_sub(A_TILE * self.tail() * float) / (h * float) {
            0 => ("rmsnorm_lora_backward_scratch", self.tail()),
            n => ("rmsnorm_lora_backward", n),
        }
    }

    /// Clipping of every job, AdamW, and gradients of zero.
    pub fn optimizer(&self, all: &mut Operations) {
        let n = self.jobs * self.layout.total();
        all.add(1, "sum_squares_partial", counts::sum_squares(n), Work::Pass);
        all.add(1, "sum_squares_final", Count::default(), Work::Pass);
        all.add(1, "clip_scale", Count::default(), Work::Pass);
        all.add(1, "adamw", counts::adamw(n), Work::Pass);
        all.add(1, "set memory", counts::set(n, counts::ACC), Work::Pass);
    }
}
