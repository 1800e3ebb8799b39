//! What it costs to leave out a component of an attention matrix, or a channel of an MLP.

use crate::decoder::ProductSums;
use crate::linalg::{Svd, dot};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How candidates are ordered; the first to go has the lowest score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Gradient-preserving compression score.
    #[default]
    Gcs,
    /// Singular values; of channels the norm of their column of `down_proj`.
    Magnitude,
    /// Size of what they add to the output on public data.
    Activation,
    /// Drawn from the seed.
    Random,
}

/// The two terms of the score of one candidate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Term {
    /// h: the bound on the shift of the edge's gradient.
    pub second: f64,
    /// f̃: the first-order change of the loss, with its sign turned.
    pub first: f64,
}

/// The candidates of one attention matrix or one MLP.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidates {
    /// Of the gradient-preserving score.
    pub terms: Vec<Term>,
    /// Singular values, or norms of columns.
    pub magnitude: Vec<f64>,
    /// Root of the mean square that they add to the output.
    pub activation: Vec<f64>,
}

impl Candidates {
    /// The score of each candidate; `lambda` is that of its kind, `key` names the matrix for [`Score::Random`].
    pub fn scores(&self, score: Score, lambda: f64, key: u64) -> Vec<f64> {
        match score {
            Score::Gcs => self.terms.iter().map(|term| term.second + lambda * term.first).collect(),
            Score::Magnitude => self.magnitude.clone(),
            Score::Activation => self.activation.clone(),
            Score::Random => {
                let mut stream = Stream::new(derive(derive_named(key, "random scores"), 0));
                self.terms.iter().map(|_| stream.uniform()).collect()
            }
        }
    }
}

/// λ of a kind of matrices: `relative` times the ratio of the mean sizes of the two terms.
pub fn lambda<'a>(relative: f64, all: impl IntoIterator<Item = &'a Candidates>) -> f64 {
    let (mut second, mut first) = (0.0, 0.0);
    for term in all.into_iter().flat_map(|candidates| &candidates.terms) {
        second += term.second;
        first += term.first.abs();
    }
    if first > 0.0 { relative * second / first } else { 0.0 }
}

/// `‖x‖₁`
fn l1(x: impl Iterator<Item = f64>) -> f64 {
    x.map(f64::abs).sum()
}

/// Vectors that a matrix is multiplied by at once: they stay in the cache while its rows go by.
const AT_ONCE: usize = 16;

/// `‖M x‖₁` of each of these vectors, M by rows.
fn products_l1(matrix: &[f64], vectors: &[&[f64]]) -> Vec<f64> {
    let of = |vectors: &[&[f64]]| {
        let mut sums = vec![0.0; vectors.len()];
        let len = vectors.first().map_or(1, |x| x.len().max(1));
        for row in matrix.chunks_exact(len) {
            sums.iter_mut().zip(vectors).for_each(|(sum, x)| *sum += dot(row, x).abs());
        }
        sums
    };
    vectors.par_chunks(AT_ONCE).flat_map_iter(of).collect()
}

/// Vectors as slices.
fn slices(vectors: &[Vec<f64>]) -> Vec<&[f64]> {
    vectors.iter().map(Vec::as_slice).collect()
}

/// `xᵀ M y` of a matrix by rows.
pub(super) fn bilinear(x: &[f64], matrix: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(matrix.chunks_exact(y.len())).map(|(x, row)| x * dot(row, y)).sum()
}

/// The components of a matrix with these singular vectors. `sums` are those of its product, scaled: A, G and D.
/// `outputs` are the matrix's rows of a fused product.
pub fn components(svd: &Svd, sums: &ProductSums, outputs: std::ops::Range<usize>) -> Candidates {
    let own = Own::new(sums, outputs);
    let of_left = products_l1(&own.outputs, &slices(&svd.left));
    let of_right = products_l1(&sums.inputs, &slices(&svd.right));
    let of = |k: usize| {
        let (value, u, v) = (svd.values[k], &svd.left[k], &svd.right[k]);
        let second = value * of_left[k] * of_right[k];
        let term = Term { second, first: value * bilinear(u, own.gradient, v) };
        (term, value, value * bilinear(v, &sums.inputs, v).max(0.0).sqrt())
    };
    let all: Vec<(Term, f64, f64)> = (0..svd.values.len()).into_par_iter().map(of).collect();
    Candidates {
        terms: all.iter().map(|(term, _, _)| *term).collect(),
        magnitude: all.iter().map(|(_, value, _)| *value).collect(),
        activation: all.iter().map(|(_, _, activation)| *activation).collect(),
    }
}

/// The parts of a fused product's sums that are one matrix's.
struct Own<'a> {
    /// Its block of G.
    outputs: Vec<f64>,
    /// Its rows of D.
    gradient: &'a [f64],
}

impl<'a> Own<'a> {
    fn new(sums: &'a ProductSums, rows: std::ops::Range<usize>) -> Self {
        let inputs = sums.inputs.len().isqrt();
        let all = sums.outputs.len().isqrt();
        let outputs = rows.clone().flat_map(|i| &sums.outputs[i * all..][rows.clone()]).copied().collect();
        let gradient = sums.gradient.get(rows.start * inputs..rows.end * inputs).unwrap_or_default();
        Self { outputs, gradient }
    }
}

/// The exact `‖G Δ A‖₁` of a change of a matrix, `[outputs, in]`.
pub fn gradient_shift(sums: &ProductSums, outputs: std::ops::Range<usize>, change: &[f64]) -> f64 {
    let own = Own::new(sums, outputs.clone());
    let (rows, cols) = (outputs.len(), sums.inputs.len().isqrt());
    // A is symmetric: row i of Δ A has the products of row i of Δ with the rows of A.
    let times_a: Vec<Vec<f64>> = change
        .par_chunks(cols)
        .map(|row| sums.inputs.chunks_exact(cols).map(|a| dot(a, row)).collect())
        .collect();
    let row = |i: usize| {
        let mut sum = vec![0.0; cols];
        for (g, row) in own.outputs[i * rows..][..rows].iter().zip(&times_a) {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += g * x);
        }
        l1(sum.into_iter())
    };
    (0..rows).into_par_iter().map(row).collect::<Vec<f64>>().iter().sum()
}

/// The channels of a gated MLP: rows of `gate` and `up` `[F, H]`, columns of `down` `[H, F]`. `sums` are those of the
/// products of gate and up and of down, scaled.
pub fn channels(
    [gate, up, down]: [&[f64]; 3],
    hidden: usize,
    of_gate_up: &ProductSums,
    of_down: &ProductSums,
) -> Candidates {
    let width = gate.len() / hidden.max(1);
    // Symmetric: a row is a column.
    let outputs = |j: usize, start: usize| {
        l1(of_gate_up.outputs[(start + j) * 2 * width..][start..start + width].iter().copied())
    };
    let rows = |matrix| {
        let rows: Vec<&[f64]> = <[f64]>::chunks_exact(matrix, hidden).collect();
        products_l1(&of_gate_up.inputs, &rows)
    };
    let (of_gate, of_up) = (rows(gate), rows(up));
    let columns: Vec<Vec<f64>> =
        (0..width).map(|j| down.iter().skip(j).step_by(width).copied().collect()).collect();
    let of_columns = products_l1(&of_down.outputs, &slices(&columns));
    let of = |j: usize| {
        let column = &columns[j];
        let inputs = &of_down.inputs[j * width..][..width];
        let second = outputs(j, 0) * of_gate[j]
            + outputs(j, width) * of_up[j]
            + of_columns[j] * l1(inputs.iter().copied());
        // Gate, up and down together set z_j to zero once.
        let of_gradient = of_down.gradient.iter().skip(j).step_by(width);
        let first = column.iter().zip(of_gradient).map(|(w, d)| w * d).sum();
        let norm = dot(column, column).sqrt();
        (Term { second, first }, norm, norm * inputs[j].max(0.0).sqrt())
    };
    let all: Vec<(Term, f64, f64)> = (0..width).into_par_iter().map(of).collect();
    Candidates {
        terms: all.iter().map(|(term, _, _)| *term).collect(),
        magnitude: all.iter().map(|(_, norm, _)| *norm).collect(),
        activation: all.iter().map(|(_, _, activation)| *activation).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize, key: u64) -> Vec<f64> {
        let mut stream = Stream::new(key);
        (0..len).map(|_| stream.normal()).collect()
    }

    /// `X [m, k] Y [k, n]`
    fn times(x: &[f64], y: &[f64], k: usize) -> Vec<f64> {
        let n = y.len() / k;
        let at = |i: usize| (0..k).map(|l| x[i / n * k + l] * y[l * n + i % n]).sum();
        (0..x.len() / k * n).map(at).collect()
    }

    fn gram(rows: usize, cols: usize, key: u64) -> Vec<f64> {
        let x = random(rows * cols, key);
        let at = |i: usize| (0..rows).map(|t| x[t * cols + i / cols] * x[t * cols + i % cols]).sum();
        (0..cols * cols).map(at).collect()
    }

    fn norm1(x: &[f64]) -> f64 {
        x.iter().map(|x| x.abs()).sum()
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-11 * b.abs().max(1e-6)
    }

    /// The terms against `G Δ A` and `⟨D, Δ⟩` written out, for the second matrix of a fused product.
    #[test]
    fn terms_of_components_are_those_written_out() {
        let (rows, cols, all) = (5, 7, 9);
        let w = random(rows * cols, 1);
        let sums = ProductSums {
            inputs: gram(11, cols, 2),
            outputs: gram(11, all, 3),
            gradient: random(all * cols, 4),
        };
        let outputs = 3..8;
        let svd = Svd::new(rows, cols, &w).unwrap();
        let found = components(&svd, &sums, outputs.clone());
        let g: Vec<f64> =
            outputs.clone().flat_map(|i| sums.outputs[i * all..][outputs.clone()].to_vec()).collect();
        let d = &sums.gradient[3 * cols..8 * cols];
        let mut whole = vec![0.0; rows * cols];
        for k in 0..5 {
            let change: Vec<f64> = (0..rows * cols)
                .map(|i| -svd.values[k] * svd.left[k][i / cols] * svd.right[k][i % cols])
                .collect();
            whole.iter_mut().zip(&change).for_each(|(w, c)| *w += c);
            let shift = norm1(&times(&times(&g, &change, rows), &sums.inputs, cols));
            assert!(near(found.terms[k].second, shift), "{k}");
            assert!(near(gradient_shift(&sums, outputs.clone(), &change), shift), "{k}");
            let along: f64 = d.iter().zip(&change).map(|(d, c)| d * c).sum();
            assert!(near(found.terms[k].first, -along), "{k}");
            // Paired the wrong way, it is another number.
            let wrong = norm1(&times(&times(&gram(11, rows, 9), &change, rows), &sums.inputs, cols));
            assert!(!near(found.terms[k].second, wrong));
        }
        // Of all together it is not more than the sum: the triangle inequality.
        let shift = gradient_shift(&sums, outputs, &whole);
        assert!(shift <= found.terms.iter().map(|term| term.second).sum::<f64>() * (1.0 + 1e-12));
    }

    #[test]
    fn terms_of_channels_are_those_written_out() {
        let (hidden, width) = (4, 6);
        let [gate, up] = [1, 2].map(|key| random(width * hidden, key));
        let down = random(hidden * width, 3);
        let of_gate_up =
            ProductSums { inputs: gram(9, hidden, 4), outputs: gram(9, 2 * width, 5), gradient: vec![] };
        let of_down = ProductSums {
            inputs: gram(9, width, 6),
            outputs: gram(9, hidden, 7),
            gradient: random(hidden * width, 8),
        };
        let found = channels([&gate, &up, &down], hidden, &of_gate_up, &of_down);
        for j in 0..width {
            let mut want = 0.0;
            for (matrix, start) in [(&gate, 0), (&up, width)] {
                let mut change = vec![0.0; width * hidden];
                change[j * hidden..][..hidden].copy_from_slice(&matrix[j * hidden..][..hidden]);
                let g: Vec<f64> = (start..start + width)
                    .flat_map(|i| of_gate_up.outputs[i * 2 * width..][start..start + width].to_vec())
                    .collect();
                want += norm1(&times(&times(&g, &change, width), &of_gate_up.inputs, hidden));
            }
            let mut change = vec![0.0; hidden * width];
            (0..hidden).for_each(|i| change[i * width + j] = down[i * width + j]);
            want += norm1(&times(&times(&of_down.outputs, &change, hidden), &of_down.inputs, width));
            assert!(near(found.terms[j].second, want), "{j}: {} and {want}", found.terms[j].second);
            let first: f64 = (0..hidden).map(|i| down[i * width + j] * of_down.gradient[i * width + j]).sum();
            assert!(near(found.terms[j].first, first));
        }
    }

    #[test]
    fn scores_of_every_kind_order_candidates() {
        let term = |second, first| Term { second, first };
        let candidates = Candidates {
            terms: vec![term(3.0, -1.0), term(1.0, 0.5), term(2.0, 0.0)],
            magnitude: vec![1.0, 2.0, 3.0],
            activation: vec![3.0, 1.0, 2.0],
        };
        let lambda = lambda(0.5, [&candidates]);
        assert!(near(lambda, 0.5 * 6.0 / 1.5));
        // The one whose removal raises the loss has become cheaper.
        assert_eq!(candidates.scores(Score::Gcs, lambda, 1), [1.0, 2.0, 2.0]);
        assert_eq!(candidates.scores(Score::Gcs, 0.0, 1), [3.0, 1.0, 2.0]);
        assert_eq!(candidates.scores(Score::Magnitude, lambda, 1), [1.0, 2.0, 3.0]);
        assert_eq!(candidates.scores(Score::Activation, lambda, 1), [3.0, 1.0, 2.0]);
        let random = |key| candidates.scores(Score::Random, lambda, key);
        assert!(random(1) == random(1) && random(1) != random(2));
        assert_eq!(super::lambda(0.5, []), 0.0);
    }
}
