//! What share of its floor each kind of work reaches.
//!
//! One constant per kind, from the fourth run on an H100 (`benches/results/gpu-check_h100_2026-11-27_fourth`, and `…_third`): of the
//! large product's rate where operations bind, of the large copy's where bytes do. "Profile" are the operations of a step there,
//! "kernels" the lines of `bench kernels`. A step that is compared with that run is so compared with where its constants are from.

use crate::counts::Count;
use crate::measured::Ceilings;

/// Kinds of work with a constant of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A product of at least [`LARGE`] operations.
    LargeProduct,
    /// A smaller one: too few tiles for all multiprocessors.
    SmallProduct,
    /// Attention by tensor cores, forward and backward: bound by what stands between its products.
    AttentionForward,
    AttentionBackward,
    /// The same by Hopper's own instructions.
    HopperAttentionForward,
    HopperAttentionBackward,
    /// Attention of T5's short sequences.
    T5Attention,
    /// Attention of one token to a cache.
    DecodeAttention,
    /// A pass over memory that does nothing but move it.
    Pass,
    /// A pass over memory by rows.
    Rows,
    /// The norm with the adapters' down-projections, which draws dropout masks.
    AdapterNormForward,
    AdapterNormBackward,
    /// Gradients of adapters.
    AdapterGradient,
}

/// Operations from which on a product is large.
pub(super) const LARGE: f64 = 1e11;

/// Seconds between two launches of one queue: what is left of a generated token (6.63 ms) beyond its products and
/// attention at the shares below, by its 257 launches.
pub(super) const LAUNCH: f64 = 2.5e-6;

/// Rates of the large product and the large copy, as shares of an H100's data sheet: 717 to 796 of 989 TFLOP/s before the steps
/// (lines `large gemm`: with the card's power), and 3.01 of 3.35 TB/s (`large copy`). Other devices are taken to reach the same
/// shares; none was measured.
pub(super) const GEMM_SHARE: f64 = 0.74;
pub(super) const COPY_SHARE: f64 = 0.898;

impl Work {
    /// Of a product.
    pub fn of_product(count: Count) -> Self {
        if count.flops < LARGE { Self::SmallProduct } else { Self::LargeProduct }
    }

    /// The share of the product's rate that its operations reach, and that of the copy's rate that its bytes do.
    fn shares(self) -> (f64, f64) {
        match self {
            // Profiles: 92 to 102 % of 7B's products, 89 to 98 % of the large ones of 3B.
            Self::LargeProduct => (0.955, 0.955),
            // Kernels, `gemm t5 …`: 51 to 67 % with the time between launches, 69 % without. Bytes bind products of a
            // few rows: profile of generation, 78 to 86 % of the two that are most of a token.
            Self::SmallProduct => (0.69, 0.87),
            // Profiles of the third run, of segments of 512 tokens: 23.2 and 22.1 %, 21.3 and 20.1 %.
            Self::AttentionForward => (0.226, 0.226),
            Self::AttentionBackward => (0.207, 0.207),
            // Profiles of the fourth: 30 and 28 %, 31 and 30 %.
            Self::HopperAttentionForward => (0.29, 0.29),
            Self::HopperAttentionBackward => (0.31, 0.31),
            // Kernels, `t5 attention …`: 38 to 42 % of the encoder's and the decoder's own with the time between launches.
            Self::T5Attention => (0.50, 0.50),
            // Kernels, `attention decode`.
            Self::DecodeAttention => (0.87, 0.87),
            // Profiles: 97 % of the gated activation, 93 % of AdamW with a copy; kernels: 92 to 96 %.
            Self::Pass => (0.95, 0.95),
            // Profiles: 77 to 98 % of norms, rotation, cross-entropy.
            Self::Rows => (0.85, 0.85),
            // Profiles: 30 and 33 %, 46 and 54 %.
            Self::AdapterNormForward => (0.31, 0.31),
            Self::AdapterNormBackward => (0.50, 0.50),
            // Profiles: about half.
            Self::AdapterGradient => (0.50, 0.50),
        }
    }

    /// Seconds of this much of it.
    pub fn seconds(self, count: Count, ceilings: &Ceilings) -> f64 {
        let (of_gemm, of_copy) = self.shares();
        (count.flops / (of_gemm * ceilings.gemm)).max(count.bytes / (of_copy * ceilings.copy))
    }
}
