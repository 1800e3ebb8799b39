//! [`BlockProducts`]: inner products of what adapters do in one block, without making the products.
//!
//! `⟨B_i A_i, B_j A_j⟩ = Σ_pq (B_iᵀ B_j)_pq (A_i A_jᵀ)_pq`, summed over the block's adapted matrices: r² · (in
//! + out) multiplications for each pair of adapters in the place of in · out.

use super::BlockLayout;
use crate::linalg::dot;
use gradtx_runtime::Result;
use std::ops::Range;

/// What some adapters do in one block, ready for inner products with what others do there.
#[derive(Debug)]
pub struct BlockProducts {
    adapters: usize,
    matrices: Vec<Matrix>,
}

/// The factors of all adapters of one matrix.
#[derive(Debug)]
struct Matrix {
    place: Place,
    /// Of every adapter A `[K, r, in]`, then Bᵀ `[K, r, out]`.
    factors: [Vec<f64>; 2],
}

/// Where the factors of a matrix lie among an adapter's values.
#[derive(Debug)]
struct Place {
    a: Range<usize>,
    b: Range<usize>,
    rank: usize,
}

impl Place {
    /// A `[r, in]` and Bᵀ `[r, out]` of an adapter; `read` fills in a range of its values.
    fn factors(&self, read: &dyn Fn(Range<usize>, &mut [f32]) -> Result<()>) -> Result<[Vec<f64>; 2]> {
        let values = |range: &Range<usize>| {
            let mut values = vec![0.0f32; range.len()];
            read(range.clone(), &mut values).map(|()| values)
        };
        let (a, b) = (values(&self.a)?, values(&self.b)?);
        let column = |i: usize| b.iter().skip(i).step_by(self.rank).map(|&x| f64::from(x));
        Ok([a.iter().map(|&x| f64::from(x)).collect(), (0..self.rank).flat_map(column).collect()])
    }
}

impl BlockProducts {
    /// Of `adapters` adapters; `read` fills in a range of one adapter's values: its factors, not their
    /// change since the start.
    pub fn new(
        layout: &BlockLayout,
        block: usize,
        adapters: usize,
        read: impl Fn(usize, Range<usize>, &mut [f32]) -> Result<()>,
    ) -> Result<Self> {
        let mut matrices = vec![];
        for pair in layout.slices().chunks_exact(2) {
            let [a, b] = [0, 1].map(|i| layout.range(block, &pair[i]));
            let place = Place { a, b, rank: pair[0].shape[0] };
            let mut factors = [vec![], vec![]];
            for adapter in 0..adapters {
                let own = place.factors(&|range, out| read(adapter, range, out))?;
                factors.iter_mut().zip(own).for_each(|(all, own)| all.extend(own));
            }
            matrices.push(Matrix { place, factors });
        }
        Ok(Self { adapters, matrices })
    }

    /// Inner products of what another adapter does in the block with what each of these does: `[K]`.
    pub fn with(&self, read: impl Fn(Range<usize>, &mut [f32]) -> Result<()>) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; self.adapters];
        for Matrix { place, factors } in &self.matrices {
            let rank = place.rank;
            let own = place.factors(&read)?;
            // Row p of its own factor with row q of theirs.
            let inner = |side: usize, p: usize, q: usize| {
                let width = own[side].len() / rank;
                dot(&own[side][p * width..][..width], &factors[side][q * width..][..width])
            };
            for (k, sum) in sums.iter_mut().enumerate() {
                for p in 0..rank {
                    for q in k * rank..(k + 1) * rank {
                        *sum += inner(0, p, q) * inner(1, p, q);
                    }
                }
            }
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::DecoderConfig;
    use crate::lora::{LoraConfig, Module, Products};
    use gradtx_kernels::rng::Stream;
    use std::path::Path;

    #[test]
    fn blocks_add_up_to_inner_products_of_adapters() {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let lora = LoraConfig {
            rank: 3,
            targets: vec![Module::Q, Module::V, Module::Down],
            ..LoraConfig::default()
        };
        let layout = BlockLayout::new(&model, &lora).unwrap();
        let mut random = Stream::new(8);
        let adapters: Vec<Vec<f32>> =
            (0..5).map(|_| (0..layout.total()).map(|_| random.normal() as f32).collect()).collect();
        let all = Products::new(&layout, 5, |i, range, out| {
            out.copy_from_slice(&adapters[i][range]);
            Ok(())
        });
        let want = all.unwrap().inner_products();
        let mut found = vec![vec![0.0; 5]; 5];
        for block in 0..layout.blocks() {
            let copy = |i: usize, range: Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&adapters[i][range]);
                Ok(())
            };
            let products = BlockProducts::new(&layout, block, 5, copy).unwrap();
            for (i, row) in found.iter_mut().enumerate() {
                let inner = products.with(|range, out| copy(i, range, out)).unwrap();
                row.iter_mut().zip(inner).for_each(|(sum, x)| *sum += x);
            }
        }
        for (found, want) in found.iter().flatten().zip(want.iter().flatten()) {
            assert!((found - want).abs() < 1e-9 * want.abs().max(1.0), "{found} {want}");
        }
    }
}
