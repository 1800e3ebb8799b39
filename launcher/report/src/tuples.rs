//! Statistics of the tuples: how large the updates are, and how they resemble each other.
//!
//! In: the tuple store, memory-mapped, and the task of each shadow subset where there are
//! tasks. Out: [`Tuples`]. Large stores are sampled, evenly and always the same way, so
//! that this takes seconds.
//!
//! A translator can exist only if subsets with similar student updates have similar
//! teacher updates: [`Tuples::agreement`] measures that before anything is trained.

use super::source::Source;
use crate::spread::Spread;
use anyhow::Result;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::TupleStore;
use rayon::prelude::*;
use serde::Serialize;

/// Values of one side that are held or read at most.
const MAX_VALUES: usize = 1 << 28;
/// Multiplications of one side's products at most.
const MAX_PRODUCTS: usize = 1 << 32;
/// Rows and columns of the map of cosines at most.
pub const MAP: usize = 64;

/// Statistics of a tuple store.
#[derive(Debug, Serialize)]
pub struct Tuples {
    /// Shadow subsets with both updates.
    pub subsets: usize,
    /// Shadow subsets that there should be.
    pub planned: usize,
    /// Updates of each.
    pub snapshots: usize,
    /// Tuples: subsets times snapshots.
    pub tuples: usize,
    /// Tasks that the subsets are of, where they are grouped by task.
    pub tasks: Option<usize>,
    /// The TinyLM's updates.
    pub student: Side,
    /// The LLM's updates.
    pub teacher: Side,
    /// Correlation, over pairs of subsets, between the cosine of their students and that
    /// of their teachers.
    pub agreement: Option<f64>,
}

/// One side of the tuples.
#[derive(Debug, Serialize)]
pub struct Side {
    /// L, blocks.
    pub blocks: usize,
    /// d, values of a block.
    pub width: usize,
    /// L · d.
    pub values: usize,
    /// Bytes of all updates.
    pub bytes: u64,
    /// Optimizer step of each snapshot, where the settings report.
    pub steps: Vec<u64>,
    /// Subsets that norms were taken of.
    pub norm_subsets: usize,
    /// At each snapshot, the spread over subsets of the update's Euclidean norm.
    pub norms: Vec<Option<Spread>>,
    /// Norms of the last snapshot, in increasing order.
    pub last_norms: Vec<f64>,
    /// Squared norm of the mean update over the mean squared norm, at the last snapshot.
    pub mean_share: Option<f64>,
    /// How the subsets' last updates resemble each other.
    pub cosines: Option<Cosines>,
}

/// Cosines between the last updates of different subsets.
#[derive(Debug, Serialize)]
pub struct Cosines {
    /// Subsets compared.
    pub subsets: usize,
    /// Between subsets of the same task, as the updates are.
    pub within: Option<Spread>,
    /// Between subsets of different tasks (of any, where there are no tasks).
    pub between: Option<Spread>,
    /// The same as `within`, after the mean over subsets is subtracted.
    pub within_centred: Option<Spread>,
    /// The same as `between`, after the mean over subsets is subtracted.
    pub between_centred: Option<Spread>,
    /// Centred cosines, tasks side by side; at most 64 rows, each the mean of neighbours.
    pub map: Vec<Vec<f64>>,
    /// Rows of the map at which another task begins.
    pub map_tasks: Vec<usize>,
    /// Tasks that begin at the first row and at those of `map_tasks`, in the public data's
    /// words; empty where there are no tasks.
    pub map_names: Vec<String>,
}

/// Statistics of the run's tuples; `tasks` has the task of every shadow subset, `names` those of
/// the tasks.
pub fn of(source: &mut Source, tasks: Option<&[usize]>, names: &[String]) -> Option<Tuples> {
    let store = source.store.as_ref()?;
    let plan = &store.manifest().plan;
    let (subsets, planned) = (store.pairs(), plan.shadows);
    let steps = [Role::Tiny, Role::Llm].map(|role| snapshot_steps(source, store, role));
    let [student_steps, teacher_steps] = steps;
    let task_of = |pair: usize| tasks.and_then(|tasks| tasks.get(store.shadow(pair)).copied());
    let compared = compared(store, &task_of);
    let compared_tasks: Vec<Option<usize>> = compared.iter().map(|&pair| task_of(pair)).collect();
    let compared = Compared { pairs: compared, tasks: compared_tasks, names };
    let student = measure(store, Role::Tiny, &compared, student_steps);
    let teacher = measure(store, Role::Llm, &compared, teacher_steps);
    let snapshots = store.steps();
    let tasks = tasks.map(|tasks| tasks.iter().copied().max().map_or(0, |max| max + 1));
    if subsets < planned {
        source.missing(format!("Tuples of {subsets} of {planned} shadow subsets."));
    }
    match (student, teacher) {
        (Ok((student, products)), Ok((teacher, teachers))) => Some(Tuples {
            subsets,
            planned,
            snapshots,
            tuples: subsets * snapshots,
            tasks,
            student,
            teacher,
            agreement: products.agreement(&teachers),
        }),
        (student, teacher) => {
            for error in [student.err(), teacher.err()].into_iter().flatten() {
                let at = source.run.clone();
                source.note(&at, format!("tuples: {error:#}"));
            }
            None
        }
    }
}

/// Optimizer steps of the snapshots, as the settings say.
fn snapshot_steps(source: &Source, store: &TupleStore, role: Role) -> Vec<u64> {
    let Some(config) = &source.config else { return vec![] };
    let curate = config.curate.resolved();
    let recipe = match role {
        Role::Tiny => &curate.tiny,
        Role::Llm => &curate.llm,
    };
    let back = |snapshot: usize| (store.steps() - 1 - snapshot) as u64 * curate.snapshot_steps as u64;
    (0..store.steps()).filter_map(|s| (recipe.max_steps as u64).checked_sub(back(s))).collect()
}

/// `count` of `all`, evenly spaced, the first among them.
fn evenly(all: usize, count: usize) -> Vec<usize> {
    let count = count.clamp(1, all.max(1)).min(all);
    (0..count).map(|i| i * all / count).collect()
}

/// Pairs whose updates are compared with each other, those of one task side by side.
fn compared(store: &TupleStore, task_of: &dyn Fn(usize) -> Option<usize>) -> Vec<usize> {
    let most = [Role::Tiny, Role::Llm].map(|role| {
        let values = store.space(role.side()).values().max(1);
        (MAX_VALUES / values).min((2 * MAX_PRODUCTS / values).isqrt())
    });
    let mut pairs = evenly(store.pairs(), most[0].min(most[1]));
    pairs.sort_by_key(|&pair| (task_of(pair), pair));
    pairs
}

/// Pairs that are compared with each other, and their tasks.
struct Compared<'a> {
    pairs: Vec<usize>,
    tasks: Vec<Option<usize>>,
    names: &'a [String],
}

fn measure(store: &TupleStore, role: Role, compared: &Compared, steps: Vec<u64>) -> Result<(Side, Products)> {
    let space = store.space(role.side());
    let (values, snapshots) = (space.values(), store.steps());
    let read = |pair: usize, snapshot: usize| -> Result<Vec<f32>> {
        let mut out = vec![0.0; values];
        store.read(role.side(), pair, snapshot, &mut out)?;
        Ok(out)
    };
    let pairs = evenly(store.pairs(), MAX_VALUES / (values * snapshots).max(1));
    let norms = pairs
        .par_iter()
        .map(|&pair| (0..snapshots).map(|s| Ok(norm(&read(pair, s)?))).collect::<Result<Vec<f64>>>())
        .collect::<Result<Vec<_>>>()?;
    let mut last_norms: Vec<f64> = norms.iter().filter_map(|n| n.last().copied()).collect();
    last_norms.sort_by(f64::total_cmp);

    let last = compared.pairs.iter().map(|&pair| read(pair, snapshots - 1));
    let updates = last.collect::<Result<Vec<_>>>()?;
    let products = Products { raw: gram(&updates), tasks: compared.tasks.clone() };
    let of_snapshot = |s: usize| Spread::of(norms.iter().map(|n| n[s]));
    let side = Side {
        blocks: space.blocks,
        width: space.width,
        values,
        bytes: store
            .manifest()
            .shards
            .iter()
            .map(|s| match role {
                Role::Tiny => s.student.bytes,
                Role::Llm => s.teacher.bytes,
            })
            .sum(),
        steps,
        norm_subsets: pairs.len(),
        norms: (0..snapshots).map(of_snapshot).collect(),
        last_norms,
        mean_share: products.mean_share(),
        cosines: products.cosines(compared.names),
    };
    Ok((side, products))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| x as f64 * y as f64).sum()
}

fn norm(update: &[f32]) -> f64 {
    dot(update, update).sqrt()
}

fn gram(rows: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let lower: Vec<Vec<f64>> =
        rows.par_iter().enumerate().map(|(i, a)| rows[..=i].iter().map(|b| dot(a, b)).collect()).collect();
    let entry = |i: usize, j: usize| if j <= i { lower[i][j] } else { lower[j][i] };
    (0..rows.len()).map(|i| (0..rows.len()).map(|j| entry(i, j)).collect()).collect()
}

/// Products of all pairs of updates, and the task of each.
struct Products {
    raw: Vec<Vec<f64>>,
    tasks: Vec<Option<usize>>,
}

impl Products {
    fn mean_share(&self) -> Option<f64> {
        let n = self.raw.len() as f64;
        let all: f64 = self.raw.iter().flatten().sum();
        let own: f64 = (0..self.raw.len()).map(|i| self.raw[i][i]).sum();
        Some(all / (n * own)).filter(|x| x.is_finite())
    }

    /// Products after the mean over subsets is subtracted.
    fn centred(&self) -> Vec<Vec<f64>> {
        let n = self.raw.len() as f64;
        let means: Vec<f64> = self.raw.iter().map(|row| row.iter().sum::<f64>() / n).collect();
        let mean = means.iter().sum::<f64>() / n;
        let row = |(row, mine): (&Vec<f64>, &f64)| {
            row.iter().zip(&means).map(|(x, theirs)| x - mine - theirs + mean).collect()
        };
        self.raw.iter().zip(&means).map(row).collect()
    }

    fn cosines(&self, names: &[String]) -> Option<Cosines> {
        if self.raw.len() < 2 {
            return None;
        }
        let (plain, centred) = (cosines(&self.raw), cosines(&self.centred()));
        let same = |i: usize, j: usize| self.tasks[i].is_some() && self.tasks[i] == self.tasks[j];
        let spread = |of: &[Vec<f64>], within: bool| {
            let pairs = (0..of.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
            Spread::of(pairs.filter(|&(i, j)| same(i, j) == within).map(|(i, j)| of[i][j]))
        };
        let (map, map_tasks) = self.map(&centred);
        Some(Cosines {
            subsets: self.raw.len(),
            within: spread(&plain, true),
            between: spread(&plain, false),
            within_centred: spread(&centred, true),
            between_centred: spread(&centred, false),
            map,
            map_names: self.map_names(&map_tasks, names),
            map_tasks,
        })
    }

    /// At most [`MAP`] rows and columns: means of neighbours, to four digits.
    fn map(&self, cosines: &[Vec<f64>]) -> (Vec<Vec<f64>>, Vec<usize>) {
        let n = cosines.len();
        let size = n.min(MAP);
        let part = |i: usize| i * n / size..(i + 1) * n / size;
        let cell = |i: usize, j: usize| {
            let values: Vec<f64> = part(i).flat_map(|a| part(j).map(move |b| cosines[a][b])).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean * 1e4).round() / 1e4
        };
        let map = (0..size).map(|i| (0..size).map(|j| cell(i, j)).collect()).collect();
        let task = |i: usize| self.tasks[part(i).start];
        let begins = (1..size).filter(|&i| task(i).is_some() && task(i) != task(i - 1));
        (map, begins.collect())
    }

    /// Names of the tasks that begin at the map's first row and at these.
    fn map_names(&self, begins: &[usize], names: &[String]) -> Vec<String> {
        let n = self.raw.len();
        let size = n.min(MAP);
        let name = |row: usize| names.get(self.tasks[row * n / size]?).cloned();
        std::iter::once(0).chain(begins.iter().copied()).map(name).collect::<Option<_>>().unwrap_or_default()
    }

    /// Correlation between these centred cosines and those of the other side.
    fn agreement(&self, other: &Self) -> Option<f64> {
        let n = self.raw.len();
        if n < 3 {
            return None;
        }
        let (a, b) = (cosines(&self.centred()), cosines(&other.centred()));
        let pairs: Vec<(f64, f64)> =
            (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| (a[i][j], b[i][j])).collect();
        let count = pairs.len() as f64;
        let (x, y) =
            (pairs.iter().map(|p| p.0).sum::<f64>() / count, pairs.iter().map(|p| p.1).sum::<f64>() / count);
        let product = |of: fn(f64, f64) -> f64| pairs.iter().map(|p| of(p.0 - x, p.1 - y)).sum::<f64>();
        let correlation = product(|a, b| a * b) / (product(|a, _| a * a) * product(|_, b| b * b)).sqrt();
        Some(correlation).filter(|c| c.is_finite())
    }
}

fn cosines(products: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let norms: Vec<f64> = (0..products.len()).map(|i| products[i][i].max(0.0).sqrt()).collect();
    // An update of zeros resembles nothing.
    let cosine =
        |product: f64, a: f64, b: f64| if a * b > 0.0 { (product / (a * b)).clamp(-1.0, 1.0) } else { 0.0 };
    let row = |(row, &a): (&Vec<f64>, &f64)| {
        row.iter().zip(&norms).map(|(&product, &b)| cosine(product, a, b)).collect()
    };
    products.iter().zip(&norms).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        let updates = [vec![1.0f32, 2.0], vec![1.0, 4.0], vec![3.0, -1.0], vec![3.0, -2.0]];
        let products = Products { raw: gram(&updates), tasks: [0, 0, 1, 1].map(Some).into() };
        assert_eq!(products.raw[1][2], -1.0);
        // The mean is (2, 0.75); squared norms are 5, 17, 10, 13.
        assert!((products.mean_share().unwrap() - (4.0 + 0.5625) / 11.25).abs() < 1e-12);
        let centred = products.centred();
        // (−1, 1.25) · (1, −1.75)
        assert!((centred[0][2] + 1.0 + 1.25 * 1.75).abs() < 1e-12);
        let names = ["copy".to_string(), "sort".into()];
        let found = products.cosines(&names).unwrap();
        assert_eq!(found.map_names, names);
        assert!(found.within_centred.unwrap().median > 0.9 && found.between_centred.unwrap().median < -0.8);
        let within = (9.0 / 85f64.sqrt() + 11.0 / 130f64.sqrt()) / 2.0;
        assert!((found.within.unwrap().median - within).abs() < 1e-12);
        assert_eq!((found.map.len(), found.map_tasks.clone()), (4, vec![2]));
        assert_eq!(found.map[1][1], 1.0);
        assert!((products.agreement(&products).unwrap() - 1.0).abs() < 1e-12);
        let one = Products { raw: vec![vec![2.0]], tasks: vec![None] };
        assert!(one.cosines(&[]).is_none() && one.agreement(&one).is_none());
        let zeros = Products { raw: vec![vec![0.0; 2]; 2], tasks: vec![None; 2] };
        assert_eq!(zeros.mean_share(), None);
        assert_eq!(zeros.cosines(&[]).unwrap().between.unwrap().median, 0.0);
    }

    #[test]
    fn large_stores_are_sampled_and_large_maps_thinned() {
        assert_eq!(evenly(10, 3), [0, 3, 6]);
        assert_eq!(evenly(3, 100), [0, 1, 2]);
        assert_eq!(evenly(5, 0), [0]);
        let n = 2 * MAP + 1;
        let raw = (0..n).map(|i| (0..n).map(|j| if i == j { 1.0 } else { 0.25 }).collect()).collect();
        let products = Products { raw, tasks: vec![None; n] };
        let (map, tasks) = products.map(&cosines(&products.raw));
        assert_eq!((map.len(), map[0].len(), tasks.len()), (MAP, MAP, 0));
        assert_eq!((map[0][0], map[0][1]), (0.625, 0.25));
    }
}
