//! Coordinates of what the LLM's adapters do, for a Grad-Transformer to predict.
//!
//! In: the tuple store, and which shadows are of one group. Out: [`Components`], for every block of the
//! LLM the principal components of the mean products of groups, and every tuple's [`Coordinates`] in them,
//! `[L_T, C]` in the place of `[L_T, d_T]`, C = min(T − 1, `train.max_components`) for T groups.
//!
//! With M_t the mean of the products P = B A of group t's last snapshots (all adapted matrices of the block
//! side by side), M their mean, and e_j, λ_j the eigenvectors and eigenvalues of the centred inner
//! products `⟨M_t − M, M_u − M⟩` `[T, T]`, component j is `U_j = Σ_t e_jt (M_t − M) / √λ_j`, and a tuple's
//! coordinate `c_j = ⟨U_j, P − M⟩`. No product is ever made: U_j is a weighted sum of shadows' products with
//! weights that sum to 0, and all that is needed are inner products of factors. Coordinates are affine in
//! P: an affine combination of tuples has the same combination of coordinates. Translation goes back:
//! `M + Σ_j c_j U_j` gives every shadow pair a weight in every block ([`Components::weights`]).
//!
//! [`Residuals`] subtracts what the regression of [`super`] gives. Each tuple is translated by the other
//! groups alone: those of its own would explain it better than they will a client's.

use super::{Centred, Groups, Kernel, read_adapter};
use crate::linalg::gram::COLUMNS;
use anyhow::{Result, ensure};
use gradtx_models::grad_transformer::Components;
use gradtx_models::linalg::SymmetricEigen;
use gradtx_models::lora::{BlockLayout, BlockProducts};
use gradtx_runtime::artifact::{Role, TupleStore};
use rayon::prelude::*;
use std::ops::Range;

/// Eigenvalues below this part of the largest are rounding.
const NEGLIGIBLE: f64 = 1e-10;

/// Components of a block for so many groups, `limit` at most.
pub fn width(groups: usize, limit: usize) -> usize {
    groups.saturating_sub(1).min(limit)
}

/// Coordinates of tuples.
#[derive(Clone, Debug, PartialEq)]
pub struct Coordinates {
    /// Blocks of the LLM, and components of each: `[L_T, C]`.
    shape: [usize; 2],
    /// Snapshots of a pair.
    steps: usize,
    /// `[pairs, steps, L_T, C]`
    values: Vec<f32>,
}

impl Coordinates {
    /// From their values `[pairs, steps, L_T, C]`.
    pub fn new(values: Vec<f32>, steps: usize, shape: [usize; 2]) -> Self {
        Self { shape, steps, values }
    }

    /// `[L_T, C]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// All of them, `[pairs, steps, L_T, C]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The same, taken out.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// Those of a tuple, `[L_T · C]`.
    pub fn of(&self, pair: usize, step: usize) -> &[f32] {
        let each = self.shape[0] * self.shape[1];
        &self.values[(pair * self.steps + step) * each..][..each]
    }
}

/// Components of the groups' mean products, and the coordinates of all tuples in them. `layout` is that of the
/// LLM's adapters; a block has [`width`] components.
pub fn measure(
    store: &TupleStore,
    layout: &BlockLayout,
    groups: &Groups,
    limit: usize,
) -> Result<(Components, Coordinates)> {
    let (pairs, steps, blocks) = (store.pairs(), store.steps(), layout.blocks());
    let count = width(groups.count(), limit);
    ensure!(count > 0, "there is one group of shadows only: products of one group have no components");
    let init = store.init(Role::Teacher)?;
    let read =
        |tuple, range: Range<usize>, out: &mut [f32]| read_adapter(store, layout, &init, tuple, range, out);
    let center = mean_weights(groups);
    let mut components = vec![];
    let mut values = vec![0.0f32; pairs * steps * blocks * count];
    for block in 0..blocks {
        let last = |pair, range: Range<usize>, out: &mut [f32]| read((pair, steps - 1), range, out);
        let products = BlockProducts::new(layout, block, pairs, last)?;
        let with_all = |i: usize| products.with(|range, out| read((i / steps, i % steps), range, out));
        let rows = (0..pairs * steps).into_par_iter().map(with_all).collect::<Result<Vec<_>, _>>()?;
        let own: Vec<&[f64]> = (0..pairs).map(|pair| &rows[pair * steps + steps - 1][..]).collect();
        let weights = principal(&own, groups, count)?;
        let of_mean: Vec<f64> = own.iter().map(|row| dot(row, &center)).collect();
        for (i, row) in rows.iter().enumerate() {
            let centred: Vec<f64> = row.iter().zip(&of_mean).map(|(x, mean)| x - mean).collect();
            let place = &mut values[(i * blocks + block) * count..][..count];
            for (value, weights) in place.iter_mut().zip(&weights) {
                let terms = weights.iter().zip(&centred).map(|(&w, x)| f64::from(w) * x);
                *value = terms.sum::<f64>() as f32;
            }
        }
        components.extend(weights.concat());
    }
    let shape = [blocks, count];
    Ok((Components::new(shape, pairs, components), Coordinates::new(values, steps, shape)))
}

/// Weight of every shadow pair in the mean of the groups' mean products: `[K]`.
pub fn mean_weights(groups: &Groups) -> Vec<f64> {
    let all: Vec<usize> = (0..groups.count()).collect();
    groups.spread(&all, &vec![1.0 / groups.count() as f64; groups.count()])
}

/// Weights of pairs in each of the `count` first components, `[C][K]`, from inner products of the
/// pairs' products `[K, K]`. Those of components that the groups do not have are 0.
fn principal(products: &[&[f64]], groups: &Groups, count: usize) -> Result<Vec<Vec<f32>>> {
    let mut means = groups.means(products);
    let n = groups.count();
    let rows: Vec<f64> = means.iter().map(|row| row.iter().sum::<f64>() / n as f64).collect();
    let all = rows.iter().sum::<f64>() / n as f64;
    for (t, row) in means.iter_mut().enumerate() {
        row.iter_mut().enumerate().for_each(|(u, x)| *x += all - rows[t] - rows[u]);
    }
    let eigen = SymmetricEigen::largest(n, means.concat(), count)?;
    let largest = eigen.values.first().copied().unwrap_or(0.0);
    let every: Vec<usize> = (0..n).collect();
    let component = |(&value, vector): (&f64, &Vec<f64>)| {
        if value <= NEGLIGIBLE * largest {
            return vec![0.0; groups.of.len()];
        }
        let mean = vector.iter().sum::<f64>() / n as f64;
        let weights: Vec<f64> = vector.iter().map(|x| (x - mean) / value.sqrt()).collect();
        groups.spread(&every, &weights).into_iter().map(|w| w as f32).collect()
    };
    Ok(eigen.values.iter().zip(&eigen.vectors).map(component).collect())
}

/// What the regression of [`super`] leaves over.
pub struct Residuals<'a> {
    /// The tuples.
    pub store: &'a TupleStore,
    /// Which shadow is of which group.
    pub groups: &'a Groups,
    /// Inner products of students' group means.
    pub kernel: &'a Kernel,
    /// The regression's penalty.
    pub penalty: f64,
}

impl Residuals<'_> {
    /// Coordinates less those of the weighted sum of the other groups' mean products.
    pub fn of(&self, coordinates: &Coordinates) -> Result<Coordinates> {
        let Self { store, groups, kernel, penalty } = *self;
        let (steps, each) = (coordinates.steps, coordinates.shape[0] * coordinates.shape[1]);
        let means = group_means(coordinates, groups);
        let rows = students_with_means(store, groups)?;
        let residual = |i: usize| -> Result<Vec<f32>> {
            let (pair, step) = (i / steps, i % steps);
            let others: Vec<usize> = (0..groups.count()).filter(|&t| t != groups.of[pair]).collect();
            let weights = Centred::new(&kernel.groups, &others)?.weights(&rows[i], penalty)?;
            let mut left: Vec<f64> = coordinates.of(pair, step).iter().map(|&c| f64::from(c)).collect();
            for (&t, w) in others.iter().zip(&weights) {
                left.iter_mut().zip(&means[t * each..]).for_each(|(left, c)| *left -= w * c);
            }
            Ok(left.into_iter().map(|x| x as f32).collect())
        };
        let all = (0..rows.len()).into_par_iter().map(residual).collect::<Result<Vec<_>>>()?;
        Ok(Coordinates::new(all.concat(), steps, coordinates.shape))
    }
}

/// Coordinates of the groups' mean products, `[T, L_T · C]`.
fn group_means(coordinates: &Coordinates, groups: &Groups) -> Vec<f64> {
    let each = coordinates.shape[0] * coordinates.shape[1];
    let mut means = vec![0.0; groups.count() * each];
    for (pair, &t) in groups.of.iter().enumerate() {
        let last = coordinates.of(pair, coordinates.steps - 1);
        let share = 1.0 / groups.sizes[t] as f64;
        means[t * each..].iter_mut().zip(last).for_each(|(mean, &c)| *mean += share * f64::from(c));
    }
    means
}

/// Inner products of every tuple's student with the groups' mean students, `[pairs · steps][T]`. The store is
/// read once, some columns at a time.
fn students_with_means(store: &TupleStore, groups: &Groups) -> Result<Vec<Vec<f64>>> {
    let width = store.space(Role::Student).values();
    let (count, steps) = (groups.count(), store.steps());
    let mut rows = vec![vec![0.0f64; count]; store.pairs() * steps];
    for first in (0..width).step_by(COLUMNS) {
        let len = COLUMNS.min(width - first);
        let mut means = vec![0.0f64; count * len];
        let mut part = vec![0.0f32; len];
        for (pair, &t) in groups.of.iter().enumerate() {
            store.read_part(Role::Student, pair, steps - 1, first, &mut part)?;
            let share = 1.0 / groups.sizes[t] as f64;
            means[t * len..].iter_mut().zip(&part).for_each(|(mean, &x)| *mean += share * f64::from(x));
        }
        rows.par_iter_mut().enumerate().try_for_each(|(i, row)| -> Result<()> {
            let mut part = vec![0.0f32; len];
            store.read_part(Role::Student, i / steps, i % steps, first, &mut part)?;
            let own: Vec<f64> = part.iter().map(|&x| f64::from(x)).collect();
            row.iter_mut().zip(means.chunks(len)).for_each(|(sum, mean)| *sum += dot(&own, mean));
            Ok(())
        })?;
    }
    Ok(rows)
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;
    use gradtx_models::decoder::DecoderConfig;
    use gradtx_models::lora::{LoraConfig, Products};
    use gradtx_runtime::artifact::{
        StoreType, TuplePlan, UpdateSpace, assemble, checksum, little_endian, write_init, write_shard,
    };
    use std::path::Path;

    const STEPS: usize = 2;
    /// Values of a student.
    const STUDENT: usize = 40;
    /// Groups of the pairs.
    const LABELS: [usize; 7] = [0, 1, 2, 3, 0, 1, 2];

    fn layout(rank: usize) -> BlockLayout {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let lora = LoraConfig { rank, alpha: 4.0 * rank as f64, ..LoraConfig::default() };
        BlockLayout::new(&model, &lora).unwrap()
    }

    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut random = Stream::new(seed);
        (0..count).map(|_| random.normal() as f32).collect()
    }

    /// Two snapshots of seven pairs. Teachers have one A for all, so that their products are linear in B; the
    /// last ones' B is a linear function of the first values of the student, or noise.
    fn store(dir: &Path, linear: bool) -> TupleStore {
        let layout = layout(2);
        let side = |blocks: usize, width: usize| UpdateSpace {
            blocks,
            width,
            layout: "aa".into(),
            base_model: "bb".into(),
            targets: vec!["q_proj".into()],
            rank: 2,
            alpha: 8.0,
            freeze_a: false,
            init: String::new(),
        };
        let mut plan = TuplePlan {
            shadows: LABELS.len(),
            steps: STEPS,
            dtype: StoreType::F32,
            student: side(1, STUDENT),
            teacher: side(layout.blocks(), layout.width()),
        };
        // A of the initial adapter is not 0, B is.
        let mut init = noise(99, layout.total());
        let is_b = |i: usize| {
            layout.slices()[1..].iter().step_by(2).any(|b| b.range.contains(&(i % layout.width())))
        };
        init.iter_mut().enumerate().filter(|(i, _)| is_b(*i)).for_each(|(_, x)| *x = 0.0);
        let inits = [vec![0.0; STUDENT], init];
        plan.student.init = checksum(&little_endian(&inits[0]));
        plan.teacher.init = checksum(&little_endian(&inits[1]));
        for (role, init) in Role::BOTH.into_iter().zip(&inits) {
            write_init(dir, role, plan.space(role), init).unwrap();
        }
        let maps: Vec<Vec<f32>> = (0..2).map(|i| noise(50 + i, layout.total())).collect();
        for (pair, label) in LABELS.iter().enumerate() {
            let mut updates = [vec![], vec![]];
            for step in 0..STEPS {
                let mut student = noise(1000 + pair as u64, STUDENT);
                student.iter_mut().for_each(|x| *x *= 1e-3);
                let of_group = noise(10 + *label as u64, 2);
                student[..2].iter_mut().zip(&of_group).for_each(|(s, g)| *s = (step + 1) as f32 * g);
                let own = noise(500 + (pair * STEPS + step) as u64, layout.total());
                let teacher = (0..layout.total()).map(|i| match (is_b(i), linear) {
                    (false, _) => 0.0,
                    (true, true) => student[0] * maps[0][i] + student[1] * maps[1][i],
                    (true, false) => own[i],
                });
                updates[1].extend(teacher);
                updates[0].extend(student);
            }
            for (role, updates) in Role::BOTH.into_iter().zip(&updates) {
                write_shard(dir, &plan, role, pair, updates).unwrap();
            }
        }
        assemble(dir, &plan, serde_json::Value::Null).unwrap();
        TupleStore::open(dir).unwrap()
    }

    /// All matrices B A of one block, one after the other.
    fn dense(layout: &BlockLayout, block: usize, values: &[f32]) -> Vec<f64> {
        let mut out = vec![];
        for pair in layout.slices().chunks(2) {
            let (a, b) = (&values[layout.range(block, &pair[0])], &values[layout.range(block, &pair[1])]);
            let [rank, inputs] = pair[0].shape;
            for row in b.chunks(rank) {
                for i in 0..inputs {
                    out.push((0..rank).map(|k| f64::from(row[k]) * f64::from(a[k * inputs + i])).sum());
                }
            }
        }
        out
    }

    fn adapter(store: &TupleStore, pair: usize, step: usize) -> Vec<f32> {
        let mut values = vec![0.0; store.space(Role::Teacher).values()];
        store.read(Role::Teacher, pair, step, &mut values).unwrap();
        let init = store.init(Role::Teacher).unwrap();
        values.iter_mut().zip(init).for_each(|(x, start)| *x += start);
        values
    }

    fn sum(weights: &[f64], rows: &[Vec<f64>]) -> Vec<f64> {
        let mut out = vec![0.0; rows[0].len()];
        for (w, row) in weights.iter().zip(rows) {
            out.iter_mut().zip(row).for_each(|(o, x)| *o += w * x);
        }
        out
    }

    #[test]
    fn coordinates_are_those_of_the_dense_products() {
        let dir = tempfile::tempdir().unwrap();
        let (store, layout, groups) = (store(dir.path(), false), layout(2), Groups::new(&LABELS));
        let (components, coordinates) = measure(&store, &layout, &groups, 64).unwrap();
        assert_eq!(components.shape(), [2, 3], "four groups");
        let mean = mean_weights(&groups);
        for block in 0..2 {
            let last: Vec<Vec<f64>> =
                (0..LABELS.len()).map(|pair| dense(&layout, block, &adapter(&store, pair, 1))).collect();
            let center = sum(&mean, &last);
            // The component of one unit coordinate, with nothing to count from.
            let unit = |j: usize| {
                let mut one = vec![0.0; 6];
                one[block * 3 + j] = 1.0;
                sum(&components.weights(&[0.0; LABELS.len()], &one).unwrap()[block], &last)
            };
            let units: Vec<Vec<f64>> = (0..3).map(unit).collect();
            for (i, x) in units.iter().enumerate() {
                for (j, y) in units.iter().enumerate() {
                    assert!((dot(x, y) - f64::from(u8::from(i == j))).abs() < 1e-5, "{block} {i} {j}");
                }
            }
            for (pair, step) in (0..LABELS.len()).flat_map(|pair| [(pair, 0), (pair, 1)]) {
                let product = dense(&layout, block, &adapter(&store, pair, step));
                let from_mean: Vec<f64> = product.iter().zip(&center).map(|(x, m)| x - m).collect();
                for (unit, &found) in units.iter().zip(&coordinates.of(pair, step)[block * 3..]) {
                    assert!((dot(unit, &from_mean) - f64::from(found)).abs() < 1e-4);
                }
            }
        }
        // Fewer components are the first ones.
        let (_, fewer) = measure(&store, &layout, &groups, 2).unwrap();
        assert_eq!(fewer.shape(), [2, 2]);
        for (few, all) in fewer.of(3, 1).chunks(2).zip(coordinates.of(3, 1).chunks(3)) {
            assert_eq!(few, &all[..2]);
        }
        let alone = Groups::new(&[0; LABELS.len()]);
        assert!(measure(&store, &layout, &alone, 64).unwrap_err().to_string().contains("one group"));
    }

    #[test]
    fn a_group_s_mean_is_read_out_from_its_coordinates() {
        let dir = tempfile::tempdir().unwrap();
        let (store, layout, groups) = (store(dir.path(), false), layout(2), Groups::new(&LABELS));
        let (components, coordinates) = measure(&store, &layout, &groups, 64).unwrap();
        let products = Products::new(&layout, LABELS.len(), |pair, range, out| {
            out.copy_from_slice(&adapter(&store, pair, 1)[range]);
            Ok(())
        })
        .unwrap();
        let wide = self::layout(14);
        // Group 0 has pairs 0 and 4.
        let mean: Vec<f32> =
            coordinates.of(0, 1).iter().zip(coordinates.of(4, 1)).map(|(x, y)| 0.5 * (x + y)).collect();
        let weights = components.weights(&mean_weights(&groups), &mean).unwrap();
        let found = products.read_out_blocks(&weights, &wide).unwrap();
        for block in 0..2 {
            let pair = [0, 4].map(|pair| dense(&layout, block, &adapter(&store, pair, 1)));
            let found = dense(&wide, block, &found);
            let (mut far, mut norm) = (0.0, 0.0);
            for (i, x) in found.iter().enumerate() {
                let want = 0.5 * (pair[0][i] + pair[1][i]);
                far += (x - want).powi(2);
                norm += want.powi(2);
            }
            assert!(far < 1e-8 * norm, "block {block}: {far} of {norm}");
        }
        assert!(products.read_out_blocks(&weights[..1], &wide).is_err());
    }

    #[test]
    fn nothing_is_left_over_of_what_other_groups_explain() {
        let part = |linear: bool| {
            let dir = tempfile::tempdir().unwrap();
            let (store, groups) = (store(dir.path(), linear), Groups::new(&LABELS));
            let (_, coordinates) = measure(&store, &layout(2), &groups, 64).unwrap();
            let kernel = Kernel::read(&store, &groups, &[]).unwrap();
            let residuals = Residuals { store: &store, groups: &groups, kernel: &kernel, penalty: 1e-5 };
            let left = residuals.of(&coordinates).unwrap();
            assert_eq!(left.shape(), coordinates.shape());
            let square = |c: &Coordinates| c.values().iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            square(&left) / square(&coordinates)
        };
        let linear = part(true);
        assert!(linear < 1e-3, "an affine function of two numbers, from three groups: {linear}");
        let unrelated = part(false);
        assert!(unrelated > 0.3, "a group's own teachers have no part in it: {unrelated}");
    }
}
