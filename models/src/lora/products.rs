//! [`Products`]: weighted sums of what adapters do, `W = Σ v_k B_k A_k` for every adapted matrix, and
//! the adapter of a chosen rank that is nearest to such a sum.
//!
//! A sum of the factors themselves would be another thing: the product of `Σ v_k B_k` and `Σ v_k A_k`
//! also has the terms `B_i A_j`, which pair one adapter's B with another's A.
//!
//! With the stacks `[B_1 … B_K] = Q_B R_B` and `[A_1; …; A_K]ᵀ = Q_A R_A`, found once, every sum is
//! `W = Q_B C Q_Aᵀ` with the core `C = R_B diag(v) R_Aᵀ`, at most K·r on a side. The nearest
//! matrix of rank ρ (in the Frobenius norm) keeps the ρ largest singular values of the core.
//! All of it is f64 and runs on the host, adapted matrices side by side.
//!
//! Where A is frozen all adapters have the same, and the sum is the one adapter `(Σ v_k B_k) A`: nothing is decomposed.

use super::BlockLayout;
use crate::linalg::{Qr, SymmetricEigen};
use gradtx_runtime::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// Singular values below this part of the largest are rounding: squares of them are computed.
const NEGLIGIBLE: f64 = 1e-7;

/// Adapters of one layout, ready for sums of their products.
#[derive(Debug)]
pub struct Products {
    layout: BlockLayout,
    adapters: usize,
    held: Held,
}

/// What sums are made of.
#[derive(Debug)]
enum Held {
    /// Stacks, by block, then by module.
    Stacks(Vec<Factors>),
    /// The A that all have, and the B of each, `[K][L·d]`.
    FrozenA { a: Vec<f32>, b: Vec<Vec<f32>> },
}

/// The stacks of one adapted matrix.
#[derive(Debug)]
struct Factors {
    /// Of `[B_1 … B_K]`, `[out, K·r]`.
    b: Side,
    /// Of `[A_1; …; A_K]ᵀ`, `[in, K·r]`.
    a: Side,
}

/// A stack, decomposed.
#[derive(Debug)]
struct Side {
    qr: Qr,
    /// Rᵀ, `[K·r, ρ]`.
    r: Vec<f64>,
}

impl Side {
    fn new(rows: usize, columns: Vec<Vec<f64>>) -> Self {
        let qr = Qr::new(rows, columns);
        let (rank, cols) = (qr.rank(), qr.cols());
        let r = (0..cols).flat_map(|j| (0..rank).map(move |i| (i, j)));
        Self { r: r.map(|(i, j)| qr.r()[i * cols + j]).collect(), qr }
    }

    fn rank(&self) -> usize {
        self.qr.rank()
    }

    /// Column j of R, as far as it is not 0.
    fn column(&self, j: usize) -> &[f64] {
        &self.r[j * self.rank()..][..self.rank().min(j + 1)]
    }
}

impl Products {
    /// Of `adapters` adapters; `read` fills in a range of one adapter's values `[L, d]`: its factors, not
    /// their change since the start.
    pub fn new(
        layout: &BlockLayout,
        adapters: usize,
        read: impl Fn(usize, Range<usize>, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<Self> {
        if adapters == 0 {
            return Err(Error::invalid("sum of adapters", "there are none"));
        }
        let held = match layout.freezes_a() {
            true => Held::frozen_a(layout, adapters, read)?,
            false => Held::Stacks(stacks(layout, adapters, read)?),
        };
        Ok(Self { layout: layout.clone(), adapters, held })
    }

    /// Number of adapters, K.
    pub fn adapters(&self) -> usize {
        self.adapters
    }

    /// The factors, in `layout`, of the adapter that is nearest to the sum with these weights
    /// `[K]`. Layouts differ in their rank; α/r must be the same. Where A is frozen, `layout` is the adapters' own,
    /// and the adapter is the sum.
    ///
    /// # Errors
    /// When there are not K weights, or the layout is of other matrices.
    pub fn read_out(&self, weights: &[f64], layout: &BlockLayout) -> Result<Vec<f32>> {
        self.read_out_blocks(&vec![weights; self.layout.blocks()], layout)
    }

    /// [`Self::read_out`] with weights of its own for every block, `[L][K]`.
    pub fn read_out_blocks<W: AsRef<[f64]>>(&self, weights: &[W], layout: &BlockLayout) -> Result<Vec<f32>> {
        let (own, other) = (self.layout.lora(), layout.lora());
        let blocks = self.layout.blocks();
        let freezing = [self.layout.freezes_a(), layout.freezes_a()];
        let same = freezing == [false; 2] || (freezing == [true; 2] && own.rank == other.rank);
        let same = same
            && own.targets == other.targets
            && self.layout.layers() == layout.layers()
            && blocks == weights.len();
        let same_scale = (own.scale() - other.scale()).abs() <= 1e-9 * own.scale();
        let wrong = weights.iter().map(|weights| weights.as_ref().len()).find(|&len| len != self.adapters);
        if !same || !same_scale || wrong.is_some() {
            let why = format!(
                "{} weights of {} adapters; α/r {} becomes {}; {blocks} blocks become {}",
                wrong.unwrap_or(self.adapters),
                self.adapters,
                own.scale(),
                other.scale(),
                layout.blocks()
            );
            return Err(Error::invalid("sum of adapters", why));
        }
        let matrices = match &self.held {
            Held::FrozenA { a, b } => {
                let mut sum = vec![0.0f64; blocks * layout.width()];
                for (block, (sum, weights)) in sum.chunks_mut(layout.width()).zip(weights).enumerate() {
                    for (b, &weight) in b.iter().zip(weights.as_ref()).filter(|(_, weight)| **weight != 0.0) {
                        let b = &b[block * layout.width()..][..layout.width()];
                        sum.iter_mut().zip(b).for_each(|(s, &x)| *s += weight * f64::from(x));
                    }
                }
                return Ok(a.iter().copied().chain(sum.into_iter().map(|x| x as f32)).collect());
            }
            Held::Stacks(matrices) => matrices,
        };
        // One weight for each column of the stacks.
        let by_column =
            |weights: &W| weights.as_ref().iter().flat_map(|&v| vec![v; own.rank]).collect::<Vec<f64>>();
        let weights: Vec<Vec<f64>> = weights.iter().map(by_column).collect();
        let pairs = self.layout.slices().len() / 2;
        let matrices = matrices.par_iter().enumerate();
        let read = |(i, factors): (usize, &Factors)| factors.read_out(&weights[i / pairs], other.rank);
        Ok(matrices.map(read).collect::<Result<Vec<_>>>()?.concat())
    }

    /// The inner products of what the adapters do, `Σ ⟨B_i A_i, B_j A_j⟩` over all matrices:
    /// `[K, K]`.
    pub fn inner_products(&self) -> Vec<Vec<f64>> {
        let (count, rank) = (self.adapters, self.layout.lora().rank);
        let matrices = match &self.held {
            Held::FrozenA { a, b } => return inner_products_of_b(&self.layout, a, b),
            Held::Stacks(matrices) => matrices,
        };
        let inner = |i: usize, j: usize| {
            let terms =
                (i * rank..(i + 1) * rank).flat_map(|p| (j * rank..(j + 1) * rank).map(move |q| (p, q)));
            let of = |side: &Side, p: usize, q: usize| overlap(side.column(p), side.column(q));
            let matrix =
                |m: &Factors| terms.clone().map(|(p, q)| of(&m.b, p, q) * of(&m.a, p, q)).sum::<f64>();
            matrices.iter().map(matrix).sum::<f64>()
        };
        let half: Vec<Vec<f64>> =
            (0..count).into_par_iter().map(|i| (0..=i).map(|j| inner(i, j)).collect()).collect();
        let at = |i: usize, j: usize| if j <= i { half[i][j] } else { half[j][i] };
        (0..count).map(|i| (0..count).map(|j| at(i, j)).collect()).collect()
    }
}

/// The stacks of all adapted matrices, decomposed.
fn stacks(
    layout: &BlockLayout,
    adapters: usize,
    read: impl Fn(usize, Range<usize>, &mut [f32]) -> Result<()> + Sync,
) -> Result<Vec<Factors>> {
    let pairs = layout.slices().len() / 2;
    let factors = |matrix: usize| {
        let (block, pair) = (matrix / pairs, &layout.slices()[matrix % pairs * 2..][..2]);
        let (a, b) = (&pair[0], &pair[1]);
        let range = layout.range(block, a).start..layout.range(block, b).end;
        let mut values = vec![0.0f32; range.len()];
        let ([rank, inputs], [outputs, _]) = (a.shape, b.shape);
        let (mut of_a, mut of_b) = (vec![], vec![]);
        for adapter in 0..adapters {
            read(adapter, range.clone(), &mut values)?;
            let (a, b) = values.split_at(rank * inputs);
            of_a.extend(a.chunks(inputs).map(|row| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()));
            let column = |i: usize| (0..outputs).map(|o| f64::from(b[o * rank + i])).collect::<Vec<_>>();
            of_b.extend((0..rank).map(column));
        }
        Ok(Factors { b: Side::new(outputs, of_b), a: Side::new(inputs, of_a) })
    };
    (0..layout.blocks() * pairs).into_par_iter().map(factors).collect()
}

impl Held {
    fn frozen_a(
        layout: &BlockLayout,
        adapters: usize,
        read: impl Fn(usize, Range<usize>, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<Self> {
        let part = |adapter: usize, range: Range<usize>| {
            let mut values = vec![0.0f32; range.len()];
            read(adapter, range, &mut values).map(|()| values)
        };
        let trained = layout.trained();
        let a = part(0, 0..trained.start)?;
        let b = (0..adapters).map(|adapter| part(adapter, trained.clone())).collect::<Result<_>>()?;
        Ok(Self::FrozenA { a, b })
    }
}

/// `Σ ⟨B_i A, B_j A⟩ = Σ ⟨B_i, B_j (A Aᵀ)⟩` over all matrices, `[K, K]`.
fn inner_products_of_b(layout: &BlockLayout, a: &[f32], b: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let (rank, first) = (layout.lora().rank, layout.trained().start);
    // A Aᵀ of every matrix, with where its B lies in an update.
    let mut squares: Vec<(Range<usize>, Vec<f64>)> = vec![];
    for block in 0..layout.blocks() {
        for pair in layout.slices().chunks_exact(2) {
            let (of_a, of_b) = (layout.range(block, &pair[0]), layout.range(block, &pair[1]));
            let row = |i: usize| a[of_a.clone()][i * pair[0].shape[1]..].iter().take(pair[0].shape[1]);
            let dot = |i, j| row(i).zip(row(j)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
            let square = (0..rank * rank).map(|k| dot(k / rank, k % rank)).collect();
            squares.push((of_b.start - first..of_b.end - first, square));
        }
    }
    let times_square = |b: &Vec<f32>| -> Vec<f64> {
        let mut out = Vec::with_capacity(b.len());
        for (range, square) in &squares {
            for row in b[range.clone()].chunks(rank) {
                let value =
                    |j: usize| (0..rank).map(|i| f64::from(row[i]) * square[i * rank + j]).sum::<f64>();
                out.extend((0..rank).map(value));
            }
        }
        out
    };
    let right: Vec<Vec<f64>> = b.par_iter().map(times_square).collect();
    let inner = |i: usize, j: usize| b[i].iter().zip(&right[j]).map(|(&x, y)| f64::from(x) * y).sum::<f64>();
    let half: Vec<Vec<f64>> =
        (0..b.len()).into_par_iter().map(|i| (0..=i).map(|j| inner(i, j)).collect()).collect();
    let at = |i: usize, j: usize| if j <= i { half[i][j] } else { half[j][i] };
    (0..b.len()).map(|i| (0..b.len()).map(|j| at(i, j)).collect()).collect()
}

/// The inner product of two vectors as far as both go.
fn overlap(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

impl Factors {
    /// A `[rank, in]`, then B `[out, rank]`, of the nearest product of this rank.
    fn read_out(&self, weights: &[f64], rank: usize) -> Result<Vec<f32>> {
        // W Wᵀ or Wᵀ W, whichever is smaller.
        let is_wide = self.b.rank() <= self.a.rank();
        let (left, right) = if is_wide { (&self.b, &self.a) } else { (&self.a, &self.b) };
        let core = core(left, right, weights);
        let (lefts, rights) = halves(left, right, &core, rank)?;
        let (of_b, of_a) = if is_wide { (lefts, rights) } else { (rights, lefts) };
        let mut out: Vec<f32> = of_a.iter().flatten().map(|&x| x as f32).collect();
        let rows = of_b.first().map_or(0, Vec::len);
        out.extend((0..rows).flat_map(|row| of_b.iter().map(move |column| column[row] as f32)));
        Ok(out)
    }
}

/// `R_left diag(weights) R_rightᵀ`: rows, each of the right side's rank.
fn core(left: &Side, right: &Side, weights: &[f64]) -> Vec<Vec<f64>> {
    let mut core = vec![vec![0.0; right.rank()]; left.rank()];
    for (j, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
        let right = right.column(j);
        for (row, &x) in core.iter_mut().zip(left.column(j)) {
            let x = weight * x;
            row.iter_mut().zip(right).for_each(|(c, y)| *c += x * y);
        }
    }
    core
}

/// The columns of the two factors, each with the square roots of the singular values.
fn halves(
    left: &Side,
    right: &Side,
    core: &[Vec<f64>],
    rank: usize,
) -> Result<(Vec<Vec<f64>>, Vec<Vec<f64>>)> {
    let n = core.len();
    let mut square = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let value = overlap(&core[i], &core[j]);
            (square[i * n + j], square[j * n + i]) = (value, value);
        }
    }
    let eigen = SymmetricEigen::largest(n, square, rank)?;
    let largest = eigen.values.first().copied().unwrap_or(0.0).max(0.0).sqrt();
    let (mut lefts, mut rights) = (vec![], vec![]);
    for i in 0..rank {
        let value = eigen.values.get(i).copied().unwrap_or(0.0).max(0.0).sqrt();
        // A rank that the sum does not have.
        let (mut u, mut t) = (vec![0.0; left.rank()], vec![0.0; right.rank()]);
        if value > NEGLIGIBLE * largest {
            let half = value.sqrt();
            u = eigen.vectors[i].iter().map(|x| x * half).collect();
            for (row, &x) in core.iter().zip(&eigen.vectors[i]) {
                t.iter_mut().zip(row).for_each(|(t, c)| *t += x / half * c);
            }
        }
        lefts.push(left.qr.apply(&u));
        rights.push(right.qr.apply(&t));
    }
    Ok((lefts, rights))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::DecoderConfig;
    use crate::lora::{LoraConfig, Module, Slice};
    use gradtx_kernels::rng::Stream;
    use std::path::Path;

    fn layout(rank: usize) -> BlockLayout {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let targets = vec![Module::Q, Module::V, Module::Up, Module::Down];
        BlockLayout::new(
            &model,
            &LoraConfig { rank, alpha: 4.0 * rank as f64, targets, ..Default::default() },
        )
        .unwrap()
    }

    fn random(layout: &BlockLayout, adapters: usize) -> Vec<Vec<f32>> {
        let mut random = Stream::new(5);
        let adapter = |_| (0..layout.total()).map(|_| random.normal() as f32).collect();
        (0..adapters).map(adapter).collect()
    }

    fn products(layout: &BlockLayout, adapters: &[Vec<f32>]) -> Products {
        Products::new(layout, adapters.len(), |i, range, out| {
            out.copy_from_slice(&adapters[i][range]);
            Ok(())
        })
        .unwrap()
    }

    /// All matrices B A of an adapter, one after the other.
    fn dense(layout: &BlockLayout, values: &[f32]) -> Vec<f64> {
        let mut out = vec![];
        for block in 0..layout.blocks() {
            for pair in layout.slices().chunks(2) {
                let of = |slice: &Slice| &values[layout.range(block, slice)];
                let (a, b, [rank, inputs]) = (of(&pair[0]), of(&pair[1]), pair[0].shape);
                for row in b.chunks(rank) {
                    for i in 0..inputs {
                        out.push((0..rank).map(|k| f64::from(row[k]) * f64::from(a[k * inputs + i])).sum());
                    }
                }
            }
        }
        out
    }

    fn distance(x: &[f64], y: &[f64]) -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn product_sums_are_exact_where_the_rank_allows() {
        let small = layout(2);
        let adapters = random(&small, 3);
        let weights = [0.7, -0.4, 0.7];
        let mut want = vec![0.0; dense(&small, &adapters[0]).len()];
        for (adapter, weight) in adapters.iter().zip(weights) {
            want.iter_mut().zip(dense(&small, adapter)).for_each(|(w, x)| *w += weight * x);
        }
        let all = products(&small, &adapters);
        let norm = distance(&want, &vec![0.0; want.len()]);
        for rank in [6, 9] {
            let found = all.read_out(&weights, &layout(rank)).unwrap();
            assert!(distance(&dense(&layout(rank), &found), &want) < 1e-6 * norm, "rank {rank}");
        }
        // The sums of the factors are something else.
        let sum: Vec<f32> = (0..small.total())
            .map(|i| adapters.iter().zip(weights).map(|(a, w)| w as f32 * a[i]).sum())
            .collect();
        assert!(distance(&dense(&small, &sum), &want) > 0.5 * norm);
    }

    #[test]
    fn what_is_read_out_is_the_nearest_of_its_rank() {
        let (small, cut) = (layout(2), layout(3));
        let adapters = random(&small, 12);
        let weights: Vec<f64> = (0..12).map(|i| 0.3 - 0.05 * i as f64).collect();
        let all = products(&small, &adapters);
        // More columns than the matrices have rows: the stacks are cut to those.
        let whole = dense(&layout(16), &all.read_out(&weights, &layout(16)).unwrap());
        let best = all.read_out(&weights, &cut).unwrap();
        let least = distance(&dense(&cut, &best), &whole);
        // The error is orthogonal to the result, and no small change makes it smaller.
        let (found, norm) = (dense(&cut, &best), distance(&whole, &vec![0.0; whole.len()]));
        let kept = distance(&found, &vec![0.0; found.len()]);
        assert!((kept.powi(2) + least.powi(2) - norm.powi(2)).abs() < 1e-5 * norm.powi(2));
        let mut random = Stream::new(9);
        for _ in 0..20 {
            let changed: Vec<f32> = best.iter().map(|x| x + 0.02 * random.normal() as f32).collect();
            assert!(distance(&dense(&cut, &changed), &whole) > least);
        }
        // The sum of squares of the factors is balanced between A and B.
        let [a, b] = [0, 1].map(|i| {
            let range = cut.range(1, &cut.slices()[i]);
            best[range].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()
        });
        assert!((a - b).abs() < 1e-5 * a);
    }

    /// Adapters that have one A, in a layout that freezes it.
    fn frozen(adapters: usize) -> (BlockLayout, Vec<Vec<f32>>) {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let layout = BlockLayout::with_frozen_a(&model, layout(2).lora()).unwrap();
        let mut values = random(&layout, adapters);
        let (first, rest) = values.split_first_mut().unwrap();
        let of_a = 0..layout.trained().start;
        rest.iter_mut().for_each(|values| values[of_a.clone()].copy_from_slice(&first[of_a.clone()]));
        (layout, values)
    }

    #[test]
    fn where_a_is_frozen_a_sum_is_one_adapter_of_the_same_rank() {
        let (layout, adapters) = frozen(4);
        let weights = [0.7, -0.4, 0.2, 0.5];
        let mut want = vec![0.0; dense(&layout, &adapters[0]).len()];
        for (adapter, weight) in adapters.iter().zip(weights) {
            want.iter_mut().zip(dense(&layout, adapter)).for_each(|(w, x)| *w += weight * x);
        }
        let all = products(&layout, &adapters);
        let found = all.read_out(&weights, &layout).unwrap();
        let norm = distance(&want, &vec![0.0; want.len()]);
        assert!(distance(&dense(&layout, &found), &want) < 1e-6 * norm);
        assert_eq!(found[..layout.trained().start], adapters[2][..layout.trained().start]);
        assert!(all.read_out(&weights, &self::layout(2)).is_err(), "A would have to move");
        let dense: Vec<Vec<f64>> = adapters.iter().map(|a| dense(&layout, a)).collect();
        let inner = all.inner_products();
        for i in 0..4 {
            for j in 0..4 {
                let want: f64 = dense[i].iter().zip(&dense[j]).map(|(x, y)| x * y).sum();
                assert!((inner[i][j] - want).abs() < 1e-9 * inner[i][i], "{i} {j}");
            }
        }
    }

    #[test]
    fn inner_products_are_those_of_the_dense_matrices() {
        let small = layout(2);
        let adapters = random(&small, 9);
        let found = products(&small, &adapters).inner_products();
        let dense: Vec<Vec<f64>> = adapters.iter().map(|a| dense(&small, a)).collect();
        for i in 0..9 {
            for j in 0..9 {
                let want: f64 = dense[i].iter().zip(&dense[j]).map(|(x, y)| x * y).sum();
                assert!((found[i][j] - want).abs() < 1e-9 * found[i][i], "{i} {j}");
            }
        }
    }

    #[test]
    fn weights_and_layouts_that_do_not_fit_are_errors() {
        let small = layout(2);
        let all = products(&small, &random(&small, 2));
        assert!(all.read_out(&[1.0], &layout(4)).is_err());
        let mut other = small.lora().clone();
        other.alpha = 9.0;
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        assert!(all.read_out(&[1.0, 0.0], &BlockLayout::new(&model, &other).unwrap()).is_err());
        assert!(Products::new(&small, 0, |_, _, _| Ok(())).is_err());
        let nothing = all.read_out(&[0.0, 0.0], &layout(4)).unwrap();
        assert!(nothing.iter().all(|&x| x == 0.0));
    }
}
