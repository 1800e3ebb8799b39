//! Launches of a training step of the Grad-Transformer on a GPU in bf16, with the batch on the device.
//!
//! Follows `gradtx_models::{t5, grad_transformer}` and `kernels/src/cuda`; a test holds it against what they launch on the emulator.

use super::decoder::X;
use super::operations::Operations;
use super::work::Work;
use crate::counts::{self, Count, Sizes};
use gradtx_models::grad_transformer::GradTransformerConfig;

/// Width of a head, and keys of the smallest kernels that hold a whole head's attention in a block.
const TILE_DIM: usize = 64;
const TILE_KEYS: [usize; 4] = [32, 48, 64, 96];

/// A translator's step.
pub(super) struct Step<'a> {
    pub config: &'a GradTransformerConfig,
    /// Parameters.
    pub values: usize,
    /// Tuples.
    pub batch: usize,
}

/// Keys and queries of an attention.
#[derive(Clone, Copy)]
struct Shape {
    queries: usize,
    keys: usize,
    /// Pairs of a query and a key that it sees.
    pairs: usize,
    /// Has biases by relative position.
    biased: bool,
}

impl Step<'_> {
    fn sizes(&self, tokens: usize) -> Sizes {
        Sizes { tokens, hidden: self.config.t5.d_model, x: X }
    }

    fn drops(&self) -> bool {
        self.config.t5.dropout_rate > 0.0
    }

    /// All of it.
    pub fn training(&self) -> Operations {
        let (mut all, c) = (Operations::default(), self.config);
        let (student, teacher) = (self.batch * c.student_blocks, self.batch * c.teacher_blocks);
        let (d, encoder, decoder) = (c.t5.d_model, c.t5.num_layers, c.t5.num_decoder_layers);
        let own = |n: usize, pairs: usize| Shape { queries: n, keys: n, pairs, biased: true };
        let of_encoder = own(c.student_blocks, c.student_blocks * c.student_blocks);
        let of_decoder = own(c.teacher_blocks, c.teacher_blocks * (c.teacher_blocks + 1) / 2);
        let pairs = c.teacher_blocks * c.student_blocks;
        let cross = Shape { queries: c.teacher_blocks, keys: c.student_blocks, pairs, biased: false };

        all.product(1, (student, d, c.student_width), X);
        self.ends_of_stack(&mut all, student);
        self.attention(&mut all, encoder, of_encoder);
        self.feed_forward(&mut all, encoder, student);
        all.product(1, (teacher, d, c.teacher_width), X);
        self.ends_of_stack(&mut all, teacher);
        self.attention(&mut all, decoder, of_decoder);
        self.attention(&mut all, decoder, cross);
        self.feed_forward(&mut all, decoder, teacher);
        all.product(1, (teacher, c.teacher_width, d), X);
        all.add(1, "mse", counts::squared_error(teacher * c.teacher_width, X), Work::Pass);

        self.projection_backward(&mut all, teacher, (d, c.teacher_width));
        all.product(1, (teacher, d, c.teacher_width), X);
        self.stack_backward(&mut all, teacher, 3 * decoder);
        self.feed_forward_backward(&mut all, decoder, teacher);
        self.attention_backward(&mut all, decoder, cross);
        self.attention_backward(&mut all, decoder, of_decoder);
        self.projection_backward(&mut all, teacher, (c.teacher_width, d));
        all.add(1, "copy", counts::set(2 * student * d, X as f64), Work::Pass);
        self.stack_backward(&mut all, student, 2 * encoder);
        self.feed_forward_backward(&mut all, encoder, student);
        self.attention_backward(&mut all, encoder, of_encoder);
        self.projection_backward(&mut all, student, (c.student_width, d));
        self.update(&mut all);
        all
    }

    /// What stands before and behind the blocks, forwards.
    fn ends_of_stack(&self, all: &mut Operations, rows: usize) {
        let sizes = self.sizes(rows);
        if self.drops() {
            all.add(2, "dropout", sizes.dropout(sizes.hidden), Work::Rows);
        }
        all.add(1, "rmsnorm_forward", sizes.norm(), Work::Rows);
    }

    /// The end of a sublayer: dropout, the residual, and the next one's norm.
    fn residual(&self, all: &mut Operations, blocks: usize, rows: usize) {
        let sizes = self.sizes(rows);
        match self.drops() {
            true => all.add(blocks, "residual_norm_forward", sizes.residual_norm(), Work::Rows),
            false => all.add(blocks, "rmsnorm_forward", sizes.norm(), Work::Rows),
        }
    }

    fn attention(&self, all: &mut Operations, blocks: usize, shape: Shape) {
        let (d, inner) = (self.config.t5.d_model, self.config.t5.inner());
        let (rows, memory) = (self.batch * shape.queries, self.batch * shape.keys);
        let keys_values = |all: &mut Operations| all.product(blocks, (memory, 2 * inner, d), X);
        // The encoder's output is there before the decoder begins.
        if shape.biased {
            keys_values(all)
        } else {
            all.beside(keys_values)
        }
        all.product(blocks, (rows, inner, d), X);
        let names = self.kernels(shape);
        let count = counts::attention((self.batch * shape.pairs) as f64, inner)
            + counts::t5_attention_moves(rows, memory, inner, self.probabilities(shape), X);
        all.add(blocks, names.forward, count, Work::T5Attention);
        all.product(blocks, (rows, d, inner), X);
        self.residual(all, blocks, rows);
    }

    /// Of all heads and tuples, masked ones too.
    fn probabilities(&self, shape: Shape) -> usize {
        self.batch * self.config.t5.num_heads * shape.queries * shape.keys
    }

    fn kernels(&self, shape: Shape) -> Kernels {
        let tile = TILE_KEYS.iter().position(|&most| shape.keys <= most);
        match tile.filter(|_| self.config.t5.d_kv == TILE_DIM) {
            Some(n) => TILES[n],
            None => PLAIN,
        }
    }

    fn attention_backward(&self, all: &mut Operations, blocks: usize, shape: Shape) {
        let (d, inner) = (self.config.t5.d_model, self.config.t5.inner());
        let (rows, memory) = (self.batch * shape.queries, self.batch * shape.keys);
        all.beside(|all| {
            all.weight_gradient(blocks, (d, inner, rows), X);
            all.weight_gradient(blocks, (inner, d, rows), X);
            all.weight_gradient(blocks, (2 * inner, d, memory), X);
        });
        all.product(blocks, (rows, inner, d), X);
        let Kernels { backward, table, .. } = self.kernels(shape);
        let whole = counts::kept_attention_backward((self.batch * shape.pairs) as f64, inner)
            + counts::t5_attention_backward_moves(rows, memory, inner, self.probabilities(shape), X);
        let parts = backward.len() as f64;
        let each = Count { flops: whole.flops / parts, bytes: whole.bytes / parts };
        backward.iter().for_each(|name| all.add(blocks, *name, each, Work::T5Attention));
        if shape.biased {
            let values = self.config.t5.relative_attention_num_buckets * self.config.t5.num_heads;
            let sums = counts::sums_over_tiles(self.batch, values);
            all.add(blocks, table, sums, Work::Rows);
        }
        all.product(blocks, (rows, d, inner), X);
        let of_memory = |all: &mut Operations| all.product(blocks, (memory, d, 2 * inner), X);
        if shape.biased { of_memory(all) } else { all.beside(of_memory) }
    }

    fn feed_forward(&self, all: &mut Operations, blocks: usize, rows: usize) {
        let (d, f, sizes) = (self.config.t5.d_model, self.config.t5.d_ff, self.sizes(rows));
        all.product(blocks, (rows, 2 * f, d), X);
        let name = if self.drops() { "gelu_dropout_forward" } else { "gelu_forward" };
        all.add(blocks, name, sizes.gated(f), Work::Rows);
        all.product(blocks, (rows, d, f), X);
        self.residual(all, blocks, rows);
    }

    fn feed_forward_backward(&self, all: &mut Operations, blocks: usize, rows: usize) {
        let (d, f, sizes) = (self.config.t5.d_model, self.config.t5.d_ff, self.sizes(rows));
        all.beside(|all| {
            all.weight_gradient(blocks, (d, f, rows), X);
            all.weight_gradient(blocks, (2 * f, d, rows), X);
        });
        all.product(blocks, (rows, f, d), X);
        let name = if self.drops() { "gelu_dropout_backward" } else { "gelu_backward" };
        all.add(blocks, name, sizes.gated_backward(f), Work::Rows);
        all.product(blocks, (rows, d, 2 * f), X);
    }

    /// What a stack's backward pass has beside its sublayers' products.
    fn stack_backward(&self, all: &mut Operations, rows: usize, sublayers: usize) {
        let (sizes, t5) = (self.sizes(rows), &self.config.t5);
        let table = t5.relative_attention_num_buckets * t5.num_heads;
        all.add(1, "set memory", counts::set(table, counts::ACC), Work::Pass);
        if self.drops() {
            all.add(2, "dropout", sizes.dropout(sizes.hidden), Work::Rows);
        }
        let of_weight = sizes.norm_backward_weight();
        all.beside(|all| all.add(sublayers + 1, "rmsnorm_backward_weight", of_weight, Work::Rows));
        all.add(sublayers, "residual_norm_backward", sizes.residual_norm_backward(), Work::Rows);
        all.add(1, "rmsnorm_backward", sizes.norm_backward(), Work::Rows);
    }

    /// Gradients of a projection's weight and bias.
    fn projection_backward(&self, all: &mut Operations, rows: usize, (inputs, outputs): (usize, usize)) {
        let bias = self.sizes(rows).bias_backward(outputs);
        all.beside(|all| {
            all.add(1, "bias_backward", bias, Work::Rows);
            all.weight_gradient(1, (outputs, inputs, rows), X);
        });
    }

    /// Norm of the gradients, clipping, AdamW.
    fn update(&self, all: &mut Operations) {
        all.add(1, "sum_squares_partial", counts::sum_squares(self.values), Work::Pass);
        all.add(1, "sum_squares_final", Count::default(), Work::Pass);
        all.add(1, "clip_scale", Count::default(), Work::Pass);
        all.add(1, "adamw", counts::adamw_with_copy(self.values, X), Work::Pass);
    }
}

/// Names of the kernels of an attention.
#[derive(Clone, Copy)]
struct Kernels {
    forward: &'static str,
    backward: &'static [&'static str],
    /// Gradient of the table of biases.
    table: &'static str,
}

const PLAIN: Kernels = Kernels {
    forward: "t5_attention_forward",
    backward: &["t5_attention_backward_q", "t5_attention_backward_kv"],
    table: "t5_table_gradient",
};

const fn tiles(forward: &'static str, backward: &'static [&'static str]) -> Kernels {
    Kernels { forward, backward, table: "t5_table_sum" }
}

/// In the order of [`TILE_KEYS`].
const TILES: [Kernels; 4] = [
    tiles("t5_attention_forward_32", &["t5_attention_backward_32"]),
    tiles("t5_attention_forward_48", &["t5_attention_backward_48"]),
    tiles("t5_attention_forward_64", &["t5_attention_backward_64"]),
    tiles("t5_attention_forward_96", &["t5_attention_backward_96"]),
];
