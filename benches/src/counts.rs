//! Operations and bytes of single operations, by formula.
//!
//! A multiplication and an addition are two operations. Bytes are those that must move at
//! least: every input read once, every output written once (and read, where it is added to),
//! of values that are not a handful. `X` is the type of activations, of [`Sizes::x`] bytes;
//! accumulators have four. What a kernel reads twice lowers the rate that it is said to reach.
//!
//! | operation | operations | bytes |
//! |---|---|---|
//! | product `[m, k] · [k, n]` | 2mnk | |
//! | RMS norm | | forward 2TH·x; backward 4TH·x: dy and x read, dx added to |
//! | the same with adapters | 2TH per column of s, twice that in backward | the same |
//! | rotation of q, k, v | | forward with bias 2TR·x; backward, where v stays, 2T(R − kv)·x |
//! | gated activation | | forward 3TF·x, backward 5TF·x |
//! | embedding | | 2TH·x |
//! | dropout, in place | | 2n·x |
//! | squared error with its gradient | | 3n·x |
//! | difference of update vectors | | 12n |
//! | conversion | | n(4 + x) |
//! | AdamW | | 28n: gradient read; value and two moments read and written |
//! | AdamW that writes a copy | | n(28 + x) |
//! | sum of squares | | 4n |
//! | LM head with its gradient | 4VH per label | |
//! | attention | 4 · heads · D per pair; backward 10: five products, one of them the scores again | |
//! | attention of T5 | 4 · heads · D per pair; backward 8: probabilities are kept | |
//! | a token's attention to a cache | 4 · heads · D per pair | 2 · kv heads · D · x per pair |
//!
//! Those that a step is made of, beside these ([`super::step_counts`]):
//!
//! | operation | bytes |
//! |---|---|
//! | product, all of it | (mk + kn)·x + mn·c, of outputs of c bytes |
//! | attention, what it moves | forward T(R + Q)·x; backward T(2R + Q)·x; the sums that backward begins with 2TQ·x |
//! | cross-entropy with its gradient | 2·labels·V·x |
//! | gradients of B | T(sum of the targets' outputs + tail)·x |
//! | sums of the adapters' gradients over tiles | 4 per tile and value |
//! | residual, dropout and norm | forward 4TH·x; backward 5TH·x |
//! | gradient of a norm's weight | 2TH·x |
//! | gradient of a bias | TH·x |
//! | attention of T5, what it moves | forward (2QI + 2KI + P)·x; backward (3QI + 4KI + P)·x, of Q queries, K keys, I values of all heads, P probabilities |
//! | norms of query and key heads | forward 2TR·x; backward 3TR·x |

use std::ops::Add;

/// What a piece of work takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    /// Operations; 0 where their rate means nothing.
    pub flops: f64,
    /// Bytes; 0 where their rate means nothing.
    pub bytes: f64,
}

impl Count {
    /// Operations only.
    pub fn flops(flops: f64) -> Self {
        Self { flops, bytes: 0.0 }
    }

    /// Bytes only.
    pub fn bytes(bytes: f64) -> Self {
        Self { flops: 0.0, bytes }
    }
}

impl Add for Count {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

/// Bytes of an accumulator.
pub(crate) const ACC: f64 = 4.0;

/// Sizes that the formulas are about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// T: rows of a stream.
    pub tokens: usize,
    /// H: width of the residual stream.
    pub hidden: usize,
    /// Bytes of a value.
    pub x: usize,
}

impl Sizes {
    /// T rows of so many values, moved so many times.
    fn rows(&self, width: usize, times: f64) -> Count {
        Count::bytes(times * (self.tokens * width * self.x) as f64)
    }

    /// RMS norm, forward.
    pub fn norm(&self) -> Count {
        self.rows(self.hidden, 2.0)
    }

    /// RMS norm, backward, onto the residual stream's gradient.
    pub(crate) fn norm_backward(&self) -> Count {
        self.rows(self.hidden, 4.0)
    }

    /// RMS norm and the down-projection to `tail` columns.
    pub(crate) fn norm_with_adapters(&self, tail: usize) -> Count {
        Count { flops: 2.0 * (self.tokens * self.hidden * tail) as f64, ..self.norm() }
    }

    /// Its backward: the adapters' gradients, and the input's.
    pub(crate) fn norm_with_adapters_backward(&self, tail: usize) -> Count {
        Count { flops: 4.0 * (self.tokens * self.hidden * tail) as f64, ..self.norm_backward() }
    }

    /// Bias and rotation of rows of `row` values, in place.
    pub fn rotation(&self, row: usize) -> Count {
        self.rows(row, 2.0)
    }

    /// The rotation's backward; the `v` values of a row are not rotated.
    pub(crate) fn rotation_backward(&self, row: usize, v: usize) -> Count {
        self.rows(row - v, 2.0)
    }

    /// Gated activation of `width` columns.
    pub fn gated(&self, width: usize) -> Count {
        self.rows(width, 3.0)
    }

    /// Its backward.
    pub fn gated_backward(&self, width: usize) -> Count {
        self.rows(width, 5.0)
    }

    /// Rows of a table.
    pub fn embedding(&self) -> Count {
        self.rows(self.hidden, 2.0)
    }

    /// Dropout of `width` columns, in place.
    pub fn dropout(&self, width: usize) -> Count {
        self.rows(width, 2.0)
    }

    /// Attention's rows of `row` values of q, k and v, and of `q_dim` of its output.
    pub(crate) fn attention_moves(&self, row: usize, q_dim: usize) -> Count {
        self.rows(row + q_dim, 1.0)
    }

    /// The same backwards: q, k, v and their gradients, and the output's.
    pub(crate) fn attention_backward_moves(&self, row: usize, q_dim: usize) -> Count {
        self.rows(2 * row + q_dim, 1.0)
    }

    /// Sums over heads of `q_dim` values in all, of the output by its gradient.
    pub(crate) fn attention_delta(&self, q_dim: usize) -> Count {
        self.rows(q_dim, 2.0)
    }

    /// Gradients of B: the gradients of `outputs` columns, and `tail` columns of s.
    pub(crate) fn gradient_of_b(&self, outputs: usize, tail: usize) -> Count {
        Count { flops: 2.0 * (self.tokens * outputs * tail) as f64, ..self.rows(outputs + tail, 1.0) }
    }

    /// Dropout of a branch, the residual, and the norm of their sum.
    pub(crate) fn residual_norm(&self) -> Count {
        self.rows(self.hidden, 4.0)
    }

    /// Its backward.
    pub(crate) fn residual_norm_backward(&self) -> Count {
        self.rows(self.hidden, 5.0)
    }

    /// Norms of query and key heads, of rows of `row` values.
    pub(crate) fn head_norm(&self, row: usize) -> Count {
        self.rows(row, 2.0)
    }

    /// Its backward.
    pub(crate) fn head_norm_backward(&self, row: usize) -> Count {
        self.rows(row, 3.0)
    }

    /// Gradient of a norm's weight.
    pub(crate) fn norm_backward_weight(&self) -> Count {
        self.rows(self.hidden, 2.0)
    }

    /// Gradient of a bias of `width` columns.
    pub(crate) fn bias_backward(&self, width: usize) -> Count {
        self.rows(width, 1.0)
    }

    /// LM head, loss and gradient of the input, of `labels` labels.
    pub fn head(&self, labels: usize, vocab: usize) -> Count {
        Count::flops(4.0 * (labels * vocab * self.hidden) as f64)
    }
}

/// `[m, k] · [k, n]`.
pub fn product(m: usize, n: usize, k: usize) -> Count {
    Count::flops(2.0 * (m * n * k) as f64)
}

/// The same with all that it reads and writes: inputs of `x` bytes, outputs of `c`.
pub(crate) fn whole_product(m: usize, n: usize, k: usize, (x, c): (usize, f64)) -> Count {
    Count { bytes: ((m * k + k * n) * x) as f64 + (m * n) as f64 * c, ..product(m, n, k) }
}

/// Cross-entropy of `labels` rows of logits, which become their gradient.
pub(crate) fn cross_entropy(labels: usize, vocab: usize, x: usize) -> Count {
    Count::bytes((2 * labels * vocab * x) as f64)
}

/// Sums of `values` accumulators over `tiles` parts.
pub(crate) fn sums_over_tiles(tiles: usize, values: usize) -> Count {
    Count::bytes(ACC * (tiles * values) as f64)
}

/// Writing of `n` values of `x` bytes.
pub(crate) fn set(n: usize, x: f64) -> Count {
    Count::bytes(n as f64 * x)
}

/// Squared error over `n` values of `x` bytes, and its gradient.
pub fn squared_error(n: usize, x: usize) -> Count {
    Count::bytes((3 * n * x) as f64)
}

/// Difference of `n` accumulators.
pub fn difference(n: usize) -> Count {
    Count::bytes(3.0 * ACC * n as f64)
}

/// Conversion of `n` values between accumulators and values of `x` bytes.
pub fn conversion(n: usize, x: usize) -> Count {
    Count::bytes(n as f64 * (ACC + x as f64))
}

/// AdamW on `n` values.
pub fn adamw(n: usize) -> Count {
    Count::bytes(7.0 * ACC * n as f64)
}

/// AdamW that also writes a copy of `x` bytes a value.
pub(crate) fn adamw_with_copy(n: usize, x: usize) -> Count {
    adamw(n) + set(n, x as f64)
}

/// Sum of squares of `n` accumulators.
pub fn sum_squares(n: usize) -> Count {
    Count::bytes(ACC * n as f64)
}

/// Pairs of a token and one that it sees, in causal segments of these lengths.
pub(crate) fn causal_pairs(segments: &[usize]) -> f64 {
    segments.iter().map(|&n| (n * (n + 1)) as f64 / 2.0).sum()
}

/// Attention, forward, of queries of `q_dim` values (all heads).
pub fn attention(pairs: f64, q_dim: usize) -> Count {
    Count::flops(4.0 * pairs * q_dim as f64)
}

/// Its backward where probabilities are computed again.
pub fn attention_backward(pairs: f64, q_dim: usize) -> Count {
    Count::flops(10.0 * pairs * q_dim as f64)
}

/// Its backward where probabilities are kept.
pub(crate) fn kept_attention_backward(pairs: f64, q_dim: usize) -> Count {
    Count::flops(8.0 * pairs * q_dim as f64)
}

/// What T5's attention moves: rows of queries and of keys, all heads of `inner` values, and probabilities.
pub(crate) fn t5_attention_moves(queries: usize, keys: usize, inner: usize, probs: usize, x: usize) -> Count {
    Count::bytes((x * (2 * queries * inner + 2 * keys * inner + probs)) as f64)
}

/// The same backwards: queries, keys and values with their gradients, the output's gradient, and probabilities.
pub(crate) fn t5_attention_backward_moves(
    queries: usize,
    keys: usize,
    inner: usize,
    probs: usize,
    x: usize,
) -> Count {
    Count::bytes((x * (3 * queries * inner + 4 * keys * inner + probs)) as f64)
}

/// One token's attention to a cache of keys and values of `kv_dim` values each.
pub(crate) fn decode_attention(pairs: f64, q_dim: usize, kv_dim: usize, x: usize) -> Count {
    Count { flops: 4.0 * pairs * q_dim as f64, bytes: 2.0 * pairs * (kv_dim * x) as f64 }
}

/// Lengths of segments that fill a stream: 256, 2048, 512, 1024 and again; the last is what is left.
pub(crate) fn mixed_segments(tokens: usize) -> Vec<usize> {
    let mut left = tokens;
    let mut lengths = vec![];
    for length in [256, 2048, 512, 1024].into_iter().cycle() {
        if left == 0 {
            break;
        }
        lengths.push(length.min(left));
        left -= length.min(left);
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fill_the_stream_and_pairs_are_counted() {
        assert_eq!(mixed_segments(8192), [256, 2048, 512, 1024, 256, 2048, 512, 1024, 256, 256]);
        assert_eq!(mixed_segments(300), [256, 44]);
        let lengths = [3, 1, 4];
        let mut pairs = 0;
        for n in lengths {
            for t in 0..n {
                pairs += (0..=t).count();
            }
        }
        assert_eq!(causal_pairs(&lengths), pairs as f64);
        // A mask that is off by one has n pairs fewer in every segment.
        let strict: usize = lengths.iter().map(|n| n * (n - 1) / 2).sum();
        assert_ne!(causal_pairs(&lengths), strict as f64);
    }

    #[test]
    fn a_block_of_7b_moves_what_its_buffers_hold() {
        // Qwen2.5-7B in bf16, 8,192 tokens: 58.7 MB of residual stream.
        let sizes = Sizes { tokens: 8192, hidden: 3584, x: 2 };
        let stream = 8192.0 * 3584.0 * 2.0;
        assert_eq!(sizes.norm(), Count::bytes(2.0 * stream));
        assert_eq!(sizes.norm_backward(), Count::bytes(4.0 * stream));
        assert_eq!(sizes.gated(18_944).bytes, 3.0 * 8192.0 * 18_944.0 * 2.0);
        assert_eq!(sizes.rotation_backward(4608, 512).bytes, 2.0 * 8192.0 * 4096.0 * 2.0);
        assert_eq!(product(3, 5, 7).flops, 210.0);
        assert_eq!(adamw(10).bytes, 280.0);
        assert_eq!(attention_backward(2.0, 8).flops / attention(2.0, 8).flops, 2.5);
    }
}
