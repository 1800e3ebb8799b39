//! The matrices of an emulator, from those of its LLM and what of them stays.

use super::Matrix;
use crate::linalg::Svd;
use crate::lora::Module;
use rayon::prelude::*;

/// What stays of a middle layer; in ascending order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Components of q, k, v and o.
    pub components: [Vec<usize>; 4],
    /// Channels of the MLP.
    pub channels: Vec<usize>,
}

/// A matrix of an emulator.
#[derive(Clone, Debug, PartialEq)]
pub struct Compressed {
    /// What follows the module's path in its name: `weight`, or that of a factor.
    pub suffix: &'static str,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// By rows.
    pub values: Vec<f32>,
}

impl Compressed {
    /// A matrix `[rows, cols]` of which these components stay: in factors, or multiplied out where that takes less or
    /// `is_dense`. One that stays whole is returned as it is.
    pub fn attention(whole: &[f32], matrix: &Matrix, svd: &Svd, kept: &[usize], is_dense: bool) -> Vec<Self> {
        let &Matrix { rows, cols, .. } = matrix;
        if kept.len() == svd.values.len() {
            return vec![Self { suffix: "weight", shape: [rows, cols], values: whole.to_vec() }];
        }
        let rank = matrix.stored_rank(kept.len());
        if rank == 0 || is_dense {
            let values = product(svd, kept, rows, cols).into_iter().map(|x| x as f32).collect();
            return vec![Self { suffix: "weight", shape: [rows, cols], values }];
        }
        let root = |k: usize| svd.values[k].sqrt();
        let down = kept.iter().flat_map(|&k| svd.right[k].iter().map(move |v| (root(k) * v) as f32));
        let up = (0..rows).flat_map(|i| kept.iter().map(move |&k| (root(k) * svd.left[k][i]) as f32));
        vec![
            Self { suffix: "down.weight", shape: [rank, cols], values: down.collect() },
            Self { suffix: "up.weight", shape: [rows, rank], values: up.collect() },
        ]
    }

    /// A matrix of a gated MLP of which these channels stay: rows of gate and up, columns of down; zeros in the place
    /// of the others if `is_dense`.
    pub fn mlp(whole: &[f32], module: Module, shape: [usize; 2], kept: &[usize], is_dense: bool) -> Self {
        let [rows, cols] = shape;
        let by_columns = module == Module::Down;
        let width = if by_columns { cols } else { rows };
        let mut stays = vec![false; width];
        kept.iter().for_each(|&j| stays[j] = true);
        let mut values = Vec::with_capacity(whole.len());
        for (i, row) in whole.chunks_exact(cols).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                match stays[if by_columns { j } else { i }] {
                    true => values.push(value),
                    false if is_dense => values.push(0.0),
                    false => {}
                }
            }
        }
        let own = if is_dense { width } else { kept.len() };
        let shape = if by_columns { [rows, own] } else { [own, cols] };
        Self { suffix: "weight", shape, values }
    }

    /// The change of a matrix that leaving out all but these components makes, `[rows, cols]`.
    pub fn change(svd: &Svd, kept: &[usize], rows: usize, cols: usize) -> Vec<f64> {
        let gone: Vec<usize> = (0..svd.values.len()).filter(|k| kept.binary_search(k).is_err()).collect();
        product(svd, &gone, rows, cols).into_iter().map(|x| -x).collect()
    }
}

/// `Σ_k σ_k u_k v_kᵀ` over these components.
fn product(svd: &Svd, components: &[usize], rows: usize, cols: usize) -> Vec<f64> {
    let mut sum = vec![0.0; rows * cols];
    sum.par_chunks_exact_mut(cols).enumerate().for_each(|(i, row)| {
        for &k in components {
            let factor = svd.values[k] * svd.left[k][i];
            row.iter_mut().zip(&svd.right[k]).for_each(|(s, v)| *s += factor * v);
        }
    });
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn random(len: usize) -> Vec<f32> {
        let mut stream = Stream::new(2);
        (0..len).map(|_| stream.normal() as f32).collect()
    }

    fn far(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
    }

    #[test]
    fn factors_are_the_truncated_product() {
        let (rows, cols) = (12, 20);
        let whole = random(rows * cols);
        let wide: Vec<f64> = whole.iter().map(|&x| f64::from(x)).collect();
        let svd = Svd::new(rows, cols, &wide).unwrap();
        let matrix = Matrix { layer: 0, rows, cols, scores: svd.values.clone() };
        let of = |kept: &[usize], dense| Compressed::attention(&whole, &matrix, &svd, kept, dense);
        let kept = [0, 2, 3, 7];
        let [down, up] = of(&kept, false).try_into().unwrap();
        assert_eq!((down.shape, up.shape), ([4, cols], [rows, 4]));
        let product: Vec<f64> = (0..rows * cols)
            .map(|i| {
                (0..4)
                    .map(|k| f64::from(up.values[i / cols * 4 + k] * down.values[k * cols + i % cols]))
                    .sum()
            })
            .collect();
        let [dense] = of(&kept, true).try_into().unwrap();
        let dense: Vec<f64> = dense.values.iter().map(|&x| f64::from(x)).collect();
        assert!(far(&product, &dense) < 1e-5);
        // With what is gone it is the matrix again.
        let change = Compressed::change(&svd, &kept, rows, cols);
        let rest: Vec<f64> = wide.iter().zip(&change).map(|(w, c)| w + c).collect();
        assert!(far(&rest, &dense) < 1e-5 && far(&wide, &dense) > 1.0);
        // Ten of twelve components take more in factors; all are the matrix itself.
        assert_eq!(of(&(0..10).collect::<Vec<_>>(), false).len(), 1);
        assert_eq!(of(&(0..12).collect::<Vec<_>>(), false)[0].values, whole);
    }

    #[test]
    fn channels_that_go_are_left_out_or_zero() {
        let whole: Vec<f32> = (0..12).map(|i| i as f32 + 1.0).collect();
        let rows = Compressed::mlp(&whole, Module::Up, [4, 3], &[1, 3], false);
        assert_eq!((rows.shape, rows.values), ([2, 3], vec![4.0, 5.0, 6.0, 10.0, 11.0, 12.0]));
        let columns = Compressed::mlp(&whole, Module::Down, [3, 4], &[1, 3], false);
        assert_eq!((columns.shape, columns.values), ([3, 2], vec![2.0, 4.0, 6.0, 8.0, 10.0, 12.0]));
        let zeros = Compressed::mlp(&whole, Module::Down, [3, 4], &[0], true);
        assert_eq!(zeros.shape, [3, 4]);
        assert_eq!(zeros.values, [1.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0]);
    }
}
