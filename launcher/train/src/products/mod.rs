//! Translation in the space of products: the LLM's change is a weighted sum of the shadow
//! teachers' products, `W = Σ v_k B_k A_k` for every adapted matrix.
//!
//! In: the last snapshots of shadow pairs, which of them are of one group, and clients'
//! student updates. Out: the weights v `[K]`, for [`gradtx_models::lora::Products`].
//!
//! With X_t the mean student of group t, μ the mean of these, and s the mean of
//! `‖X_t − μ‖²` over groups: K_tu = ⟨X_t−μ, X_u−μ⟩ / s, k_t = ⟨X_t−μ, x−μ⟩ / s for a
//! client's x; `a = (K + λI)⁻¹ k`, `w_t = a_t + (1 − Σa) / T`. So w sums to 1, and what all teachers
//! have in common (their start, too) stays whole. Each of the n_t shadows of a group has
//! `v_k = w_t / n_t`. It is ridge regression of group means; only what is added up differs.

pub mod coordinates;
pub mod penalty;

use crate::linalg::cholesky::Cholesky;
use crate::linalg::gram::{COLUMNS, Gram};
use anyhow::{Result, ensure};
use gradtx_models::lora::BlockLayout;
use gradtx_runtime::artifact::{Role, TupleStore};
use std::collections::BTreeMap;
use std::ops::Range;

/// Which shadows are of one group: of the same task, or whatever `curate.group_by` names.
#[derive(Clone, Debug, PartialEq)]
pub struct Groups {
    /// Group of every pair of the store, from 0 in the order of their first pairs.
    of: Vec<usize>,
    /// Pairs of every group.
    sizes: Vec<usize>,
}

impl Groups {
    /// From a label for every pair.
    pub fn new(labels: &[usize]) -> Self {
        let mut known = BTreeMap::new();
        let mut sizes = vec![];
        let group = |label| {
            let group = *known.entry(label).or_insert_with(|| {
                sizes.push(0);
                sizes.len() - 1
            });
            sizes[group] += 1;
            group
        };
        let of = labels.iter().map(group).collect();
        Self { of, sizes }
    }

    /// Number of groups, T.
    pub fn count(&self) -> usize {
        self.sizes.len()
    }

    /// The pairs of a group.
    pub fn pairs(&self, group: usize) -> impl Iterator<Item = usize> {
        (0..self.of.len()).filter(move |&pair| self.of[pair] == group)
    }

    /// Weights of the pairs `[K]`, from weights of these groups; other groups have none.
    pub fn spread(&self, groups: &[usize], weights: &[f64]) -> Vec<f64> {
        let mut of_group = vec![0.0; self.count()];
        groups.iter().zip(weights).for_each(|(&t, w)| of_group[t] = w / self.sizes[t] as f64);
        self.of.iter().map(|&t| of_group[t]).collect()
    }

    /// A matrix of inner products of pairs `[K, K]` as that of the groups' means `[T, T]`.
    pub fn means<R: AsRef<[f64]>>(&self, products: &[R]) -> Vec<Vec<f64>> {
        let mut out = vec![vec![0.0; self.count()]; self.count()];
        for (row, &t) in products.iter().zip(&self.of) {
            for (x, &u) in row.as_ref().iter().zip(&self.of) {
                out[t][u] += x / (self.sizes[t] * self.sizes[u]) as f64;
            }
        }
        out
    }
}

/// Fills in a range of the adapter of the LLM that a tuple (pair, snapshot) has: its update and `init`, the initial
/// adapter, in the order of the layout.
pub fn read_adapter(
    store: &TupleStore,
    layout: &BlockLayout,
    init: &[f32],
    (pair, step): (usize, usize),
    range: Range<usize>,
    out: &mut [f32],
) -> gradtx_runtime::Result<()> {
    match range.start.checked_sub(layout.trained().start) {
        Some(at) => store.read_part(Role::Teacher, pair, step, at, out)?,
        // A frozen A has no update.
        None => out.fill(0.0),
    }
    out.iter_mut().zip(&init[range]).for_each(|(value, start)| *value += start);
    Ok(())
}

/// Inner products of students, not centred.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Of group means with each other, `[T, T]`.
    pub groups: Vec<Vec<f64>>,
    /// Of clients with group means, `[clients][T]`.
    pub clients: Vec<Vec<f64>>,
    /// Of clients with themselves, `[clients]`.
    pub squares: Vec<f64>,
}

impl Kernel {
    /// Reads the last snapshot of every student once, some columns at a time.
    pub fn read(store: &TupleStore, groups: &Groups, clients: &[&[f32]]) -> Result<Self> {
        Self::read_role(store, Role::Student, groups, clients)
    }

    /// [`Self::read`] for either side of the tuples, and clients' updates of that side.
    pub fn read_role(store: &TupleStore, role: Role, groups: &Groups, clients: &[&[f32]]) -> Result<Self> {
        let width = store.space(role).values();
        ensure!(
            clients.iter().all(|client| client.len() == width),
            "the shadow updates have {width} values, a client's has another number"
        );
        let (count, rows) = (groups.count(), groups.count() + clients.len());
        let mut gram = Gram::new(rows);
        let mut part = vec![0.0f32; COLUMNS.min(width)];
        for first in (0..width).step_by(COLUMNS) {
            let range = first..width.min(first + COLUMNS);
            let len = range.len();
            let mut columns = vec![0.0f64; rows * len];
            for (pair, &group) in groups.of.iter().enumerate() {
                store.read_part(role, pair, store.steps() - 1, range.start, &mut part[..len])?;
                let mean = &mut columns[group * len..(group + 1) * len];
                let share = 1.0 / groups.sizes[group] as f64;
                mean.iter_mut().zip(&part).for_each(|(m, &x)| *m += share * f64::from(x));
            }
            for (client, row) in clients.iter().zip(columns[count * len..].chunks_mut(len)) {
                row.iter_mut().zip(&client[range.clone()]).for_each(|(r, &x)| *r = f64::from(x));
            }
            gram.add(&columns, len);
        }
        let mut all = gram.finish();
        let clients = all.split_off(count);
        let squares = clients.iter().enumerate().map(|(i, row)| row[count + i]).collect();
        all.iter_mut().for_each(|row| row.truncate(count));
        let first = |row: Vec<f64>| row[..count].to_vec();
        Ok(Self { groups: all, clients: clients.into_iter().map(first).collect(), squares })
    }

    /// How far a client's update is from the weighted sum of group means that stands for it, as a part of
    /// its distance from their mean: near 0 within the span of the shadows, near 1 for noise or for
    /// what no shadow has. `weights` are of all groups.
    pub fn distance(&self, client: usize, weights: &[f64]) -> f64 {
        let (own, count) = (&self.clients[client], self.groups.len() as f64);
        let square = |weights: &[f64]| -> f64 {
            let dot = |row: &[f64]| row.iter().zip(weights).map(|(x, w)| x * w).sum::<f64>();
            let fitted: f64 = self.groups.iter().zip(weights).map(|(row, w)| w * dot(row)).sum();
            (self.squares[client] - 2.0 * dot(own) + fitted).max(0.0)
        };
        let from_mean = square(&vec![1.0 / count; self.groups.len()]);
        if from_mean > 0.0 { (square(weights) / from_mean).sqrt() } else { 0.0 }
    }

    /// Weights of these groups for a client with these inner products with all groups: they sum to 1.
    pub fn weights(&self, groups: &[usize], client: &[f64], penalty: f64) -> Result<Vec<f64>> {
        Centred::new(&self.groups, groups)?.weights(client, penalty)
    }
}

/// The products of some groups less their mean, in units of their mean square.
pub(crate) struct Centred<'a> {
    groups: &'a [usize],
    /// Mean product of each group with the others.
    means: Vec<f64>,
    mean: f64,
    scale: f64,
    kernel: Vec<Vec<f64>>,
}

impl<'a> Centred<'a> {
    pub(crate) fn new(products: &[Vec<f64>], groups: &'a [usize]) -> Result<Self> {
        ensure!(!groups.is_empty(), "there is no shadow pair");
        let n = groups.len() as f64;
        let means: Vec<f64> =
            groups.iter().map(|&t| groups.iter().map(|&u| products[t][u]).sum::<f64>() / n).collect();
        let mean = means.iter().sum::<f64>() / n;
        let mut kernel: Vec<Vec<f64>> = vec![];
        for (&t, of_t) in groups.iter().zip(&means) {
            let row = groups.iter().zip(&means).map(|(&u, of_u)| products[t][u] - of_t - of_u + mean);
            kernel.push(row.collect());
        }
        let scale = (0..groups.len()).map(|i| kernel[i][i]).sum::<f64>() / n;
        ensure!(
            groups.len() == 1 || scale > 1e-12 * means.iter().fold(0.0f64, |most, m| most.max(m.abs())),
            "all shadow updates of the TinyLM are the same: there is nothing to regress on"
        );
        if groups.len() > 1 {
            kernel.iter_mut().flatten().for_each(|x| *x /= scale);
        }
        Ok(Self { groups, means, mean, scale, kernel })
    }

    pub(crate) fn weights(&self, client: &[f64], penalty: f64) -> Result<Vec<f64>> {
        let n = self.groups.len();
        if n == 1 {
            return Ok(vec![1.0]);
        }
        let own: Vec<f64> = self.groups.iter().map(|&t| client[t]).collect();
        let mean = own.iter().sum::<f64>() / n as f64;
        let against: Vec<f64> =
            own.iter().zip(&self.means).map(|(x, m)| (x - mean - m + self.mean) / self.scale).collect();
        let all: Vec<usize> = (0..n).collect();
        let weights = Cholesky::of(&self.kernel, &all, penalty)?.solve(&against);
        let rest = (1.0 - weights.iter().sum::<f64>()) / n as f64;
        Ok(weights.into_iter().map(|w| w + rest).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn dot(x: &[f64], y: &[f64]) -> f64 {
        x.iter().zip(y).map(|(x, y)| x * y).sum()
    }

    fn kernel(students: &[Vec<f64>], client: &[f64]) -> Kernel {
        let against = students.iter().map(|s| dot(s, client)).collect();
        let groups = students.iter().map(|a| students.iter().map(|b| dot(a, b)).collect()).collect();
        Kernel { groups, clients: vec![against], squares: vec![dot(client, client)] }
    }

    #[test]
    fn groups_are_numbered_and_spread_their_weight() {
        let groups = Groups::new(&[7, 3, 7, 7, 0]);
        assert_eq!((groups.count(), groups.of.clone()), (3, vec![0, 1, 0, 0, 2]));
        assert_eq!(groups.pairs(0).collect::<Vec<_>>(), [0, 2, 3]);
        assert_eq!(groups.spread(&[0, 2], &[0.6, 0.4]), [0.6 / 3.0, 0.0, 0.6 / 3.0, 0.6 / 3.0, 0.4]);
        let rows: Vec<f64> = vec![1.0, 2.0, 3.0, 5.0, 8.0];
        let products: Vec<Vec<f64>> = rows.iter().map(|x| rows.iter().map(|y| x * y).collect()).collect();
        let means = groups.means(&products);
        assert!((means[0][1] - 3.0 * 2.0).abs() < 1e-12 && (means[2][2] - 64.0).abs() < 1e-12);
    }

    #[test]
    fn weights_sum_to_one_and_find_an_affine_combination() {
        let mut random = Stream::new(3);
        let students: Vec<Vec<f64>> =
            (0..6).map(|_| (0..40).map(|_| 3.0 + random.normal()).collect()).collect();
        let wanted = [0.5, 0.7, -0.4, 0.1, 0.1, 0.0];
        let client: Vec<f64> =
            (0..40).map(|i| students.iter().zip(wanted).map(|(s, w)| w * s[i]).sum()).collect();
        let kernel = kernel(&students, &client);
        let all: Vec<usize> = (0..6).collect();
        let found = kernel.weights(&all, &kernel.clients[0], 1e-9).unwrap();
        assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
        assert!(kernel.distance(0, &found) < 1e-4, "within the span");
        assert!((kernel.distance(0, &[1.0 / 6.0; 6]) - 1.0).abs() < 1e-12, "the mean alone");
        let shrunk = kernel.weights(&all, &kernel.clients[0], 1e9).unwrap();
        assert!(shrunk.iter().all(|w| (w - 1.0 / 6.0).abs() < 1e-6), "{shrunk:?}");
        for penalty in [1e-3, 0.3] {
            let found = kernel.weights(&[5, 1, 2], &kernel.clients[0], penalty).unwrap();
            assert!((found.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        assert_eq!(kernel.weights(&[4], &kernel.clients[0], 0.1).unwrap(), [1.0]);
    }

    #[test]
    fn the_mean_of_clients_has_the_mean_of_their_weights() {
        let mut random = Stream::new(4);
        let mut vector = || -> Vec<f64> { (0..30).map(|_| random.normal()).collect() };
        let students: Vec<Vec<f64>> = (0..5).map(|_| vector()).collect();
        let (a, b) = (vector(), vector());
        let middle: Vec<f64> = a.iter().zip(&b).map(|(x, y)| 0.5 * (x + y)).collect();
        let all: Vec<usize> = (0..5).collect();
        let of = |client: &[f64]| {
            let kernel = kernel(&students, client);
            kernel.weights(&all, &kernel.clients[0], 0.03).unwrap()
        };
        let (a, b, middle) = (of(&a), of(&b), of(&middle));
        assert!((0..5).all(|i| (0.5 * (a[i] + b[i]) - middle[i]).abs() < 1e-12));
    }

    #[test]
    fn students_that_are_all_alike_are_refused() {
        let students = vec![vec![1.0, 2.0, 3.0]; 4];
        let kernel = kernel(&students, &[1.0, 0.0, 0.0]);
        let message = kernel.weights(&[0, 1, 2, 3], &kernel.clients[0], 0.1).unwrap_err().to_string();
        assert!(message.contains("nothing to regress on"), "{message}");
    }
}
