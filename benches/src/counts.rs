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

/// Bytes of an accumulator.
const ACC: f64 = 4.0;

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

    /// LM head, loss and gradient of the input, of `labels` labels.
    pub fn head(&self, labels: usize, vocab: usize) -> Count {
        Count::flops(4.0 * (labels * vocab * self.hidden) as f64)
    }
}

/// `[m, k] · [k, n]`.
pub fn product(m: usize, n: usize, k: usize) -> Count {
    Count::flops(2.0 * (m * n * k) as f64)
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
