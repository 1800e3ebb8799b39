//! The tuples of a step: which ones, read from the store, and mixed where that is asked for.
//!
//! In: the tuple store and the settings. Out: [`Split`], the tuples for training and those
//! for validation, and [`TupleSampler`], which prepares the student and teacher updates of a step.
//! A step's tuples depend on the seed and the step alone, and what becomes of each of them on its
//! place among them: ranks that share a step read their own, and together have all.

use super::prepare::{Making, Noise, PIECE, Recipe, Threads};
use super::source::TupleSource;
use crate::products::Groups;
use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{AsyncCopy, Real};
use gradtx_models::grad_transformer::{
    Normalization, NormalizationFit, NormalizationMode, StagedMut, StagedTuples,
};
use gradtx_run::config::{TrainConfig, ValidationSplit};
use gradtx_run::failure::unusable;
use gradtx_runtime::artifact::{Role, TupleStore};
use gradtx_runtime::data::Order;
use serde_json::{Value, json};
use std::ops::Range;

/// A tuple: a pair of the store, and a snapshot of it.
pub type Tuple = (usize, usize);

/// Tuples for training and for validation.
pub struct Split {
    /// For training.
    pub training: Vec<Tuple>,
    /// Held out.
    pub validation: Vec<Tuple>,
}

impl Split {
    /// Holds out a part of the shadow subsets, of their groups, or of the tuples. `groups` has the group of every
    /// pair, from 0; it is asked for where it is needed.
    pub fn of(
        store: &TupleStore,
        groups: impl FnOnce() -> Result<Groups>,
        train: &TrainConfig,
        key: u64,
    ) -> Result<Self> {
        let tuples = |pairs: &[usize]| -> Vec<Tuple> {
            pairs.iter().flat_map(|&pair| (0..store.steps()).map(move |step| (pair, step))).collect()
        };
        let groups = match train.val_split_by {
            ValidationSplit::Group => Some(groups()?),
            ValidationSplit::Subset | ValidationSplit::Tuple => None,
        };
        let part = |count: usize| (count as f64 * train.val_set_size).ceil() as usize;
        let (what, all, held) = match train.val_split_by {
            ValidationSplit::Subset => ("shadow subset", store.pairs(), part(store.pairs())),
            ValidationSplit::Tuple => {
                let count = store.pairs() * store.steps();
                ("tuple", count, part(count))
            }
            ValidationSplit::Group => {
                let count = groups.as_ref().map_or(0, Groups::count);
                ("group of shadow subsets", count, part(count))
            }
        };
        if held == 0 || held >= all {
            return Err(unusable(format!(
                "train.val_set_size: at least one {what} must be held out, and one left; {held} of {all} are \
                 asked for"
            )));
        }
        let mut training = Stream::new(key).permutation(all);
        let mut validation = training.split_off(all - held);
        training.sort_unstable();
        validation.sort_unstable();
        Ok(match train.val_split_by {
            ValidationSplit::Group => {
                let of = |chosen: &[usize]| {
                    let pairs =
                        chosen.iter().flat_map(|&group| groups.iter().flat_map(move |g| g.pairs(group)));
                    let mut pairs: Vec<usize> = pairs.collect();
                    pairs.sort_unstable();
                    tuples(&pairs)
                };
                Self { training: of(&training), validation: of(&validation) }
            }
            ValidationSplit::Subset => Self { training: tuples(&training), validation: tuples(&validation) },
            ValidationSplit::Tuple => {
                let tuple = |i: usize| (i / store.steps(), i % store.steps());
                Self {
                    training: training.into_iter().map(tuple).collect(),
                    validation: validation.into_iter().map(tuple).collect(),
                }
            }
        })
    }

    /// What was held out, for anyone to see: (shadow subset, snapshot).
    pub fn describe(&self, store: &TupleStore) -> Value {
        let name = |&(pair, step): &Tuple| json!([store.shadow(pair), step]);
        json!(self.validation.iter().map(name).collect::<Vec<_>>())
    }
}

/// Tuples that all threads go through together, so that each is read from the disk at about one time.
const TOGETHER: usize = 16;

/// Statistics of the training tuples in the units that the settings ask for. Threads share the
/// coordinates: the numbers do not depend on how many there are.
pub fn fit<'a>(
    source: impl Into<TupleSource<'a>>,
    tuples: &[Tuple],
    mode: NormalizationMode,
    threads: &Threads,
) -> Result<Normalization> {
    let source = source.into();
    let mut fit = NormalizationFit::new(mode, source.shape(Role::Student), source.shape(Role::Teacher));
    for tuples in tuples.chunks(TOGETHER) {
        threads.each(fit.add_in_parts(tuples.len(), PIECE), |mut part| {
            let mut room = [0.0; PIECE];
            let values = &mut room[..part.len()];
            for &tuple in tuples {
                source.read_part(part.role(), tuple, part.from(), values)?;
                part.add(values);
            }
            Ok(())
        })?;
    }
    Ok(fit.finish()?)
}

/// The mean teacher update `[L_T · d_T]` of these tuples.
pub(crate) fn mean_teacher<'a>(
    source: impl Into<TupleSource<'a>>,
    tuples: &[Tuple],
    threads: &Threads,
) -> Result<Vec<f32>> {
    let source = source.into();
    let mut sum = vec![0.0f64; source.values(Role::Teacher)];
    for tuples in tuples.chunks(TOGETHER) {
        threads.each(sum.chunks_mut(PIECE).enumerate().collect(), |(i, sum): (usize, &mut [f64])| {
            let mut room = [0.0; PIECE];
            let values = &mut room[..sum.len()];
            for &tuple in tuples {
                source.read_part(Role::Teacher, tuple, i * PIECE, values)?;
                sum.iter_mut().zip(&*values).for_each(|(s, &x)| *s += x as f64);
            }
            Ok(())
        })?;
    }
    Ok(sum.into_iter().map(|s| (s / tuples.len().max(1) as f64) as f32).collect())
}

/// Student and teacher updates, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TupleBatch {
    /// `[n, L_S, d_S]`
    pub students: Vec<f32>,
    /// `[n, L_T, d_T]`
    pub teachers: Vec<f32>,
}

impl TupleBatch {
    /// Reads tuples as they are in their source.
    pub fn read(source: TupleSource<'_>, tuples: &[Tuple]) -> Result<Self> {
        let (s, t) = (source.values(Role::Student), source.values(Role::Teacher));
        let mut students = vec![0.0; tuples.len() * s];
        let mut teachers = vec![0.0; tuples.len() * t];
        for ((&tuple, student), teacher) in
            tuples.iter().zip(students.chunks_mut(s)).zip(teachers.chunks_mut(t))
        {
            source.read(Role::Student, tuple, student)?;
            source.read(Role::Teacher, tuple, teacher)?;
        }
        Ok(Self { students, teachers })
    }
}

/// Pairs that are combined into one.
pub(super) const COMBINED: usize = 3;

/// Gives the tuples of every step.
pub struct TupleSampler<'a> {
    source: TupleSource<'a>,
    train: &'a TrainConfig,
    tuples: &'a [Tuple],
    order: Order,
    key: u64,
}

impl<'a> TupleSampler<'a> {
    /// Of these tuples, in an order of the key.
    pub fn new(
        source: impl Into<TupleSource<'a>>,
        train: &'a TrainConfig,
        tuples: &'a [Tuple],
        key: u64,
    ) -> Result<Self> {
        let order = Order::new(tuples.len(), train.global_batch_size, derive_named(key, "order"))?;
        Ok(Self { source: source.into(), train, tuples, order, key })
    }

    /// The tuples of a step (from 0), before anything is mixed.
    pub fn tuples(&mut self, step: u32) -> Vec<Tuple> {
        self.order.step(step as usize).into_iter().map(|i| self.tuples[i]).collect()
    }

    /// Makes the updates of tuples `own` of a step, in these units, and the keys of their dropout
    /// masks; `to` has room for as many.
    ///
    /// With `train.mixup_prob`, so large a share of them is replaced by affine combinations
    /// of three: with normal weights `w` of spread `train.mixup_std`, the first
    /// raised by `1 − Σw`, so that the weights sum to one. If the relation between student
    /// and teacher updates is affine, combinations obey it too, and teach it where no
    /// shadow subset is. `train.input_noise_std` adds normal noise to the students.
    pub fn prepare<D: AsyncCopy, X: Real>(
        &mut self,
        step: u32,
        own: Range<usize>,
        units: &Normalization,
        threads: &Threads,
        to: &mut StagedTuples<D, X>,
    ) -> Result<()> {
        self.prepare_values(step, own, units, threads, to.values_mut()?)
    }

    /// The same in any memory.
    pub fn prepare_values<X: Real>(
        &mut self,
        step: u32,
        own: Range<usize>,
        units: &Normalization,
        threads: &Threads,
        to: StagedMut<'_, X>,
    ) -> Result<()> {
        let chosen = self.tuples(step);
        let recipes: Vec<Recipe> = own
            .clone()
            .map(|i| match self.combination(step, i, chosen[i]) {
                Some((parts, weights)) => Recipe::Combined(parts, weights),
                None => Recipe::Plain(chosen[i]),
            })
            .collect();
        let dropout = derive(derive_named(self.key, "dropout"), step as u64);
        to.keys.iter_mut().zip(own.clone()).for_each(|(key, i)| *key = derive(dropout, i as u64));
        let noise = (self.train.input_noise_std > 0.0).then(|| Noise {
            key: derive(derive_named(self.key, "student noise"), step as u64),
            first: (own.start * self.source.values(Role::Student)) as u64,
            spread: self.train.input_noise_std,
        });
        Making { source: self.source, units, recipes: &recipes, noise }.fill(to, threads)
    }

    /// The tuples that tuple i of a step is made of: itself, and others where it is combined.
    pub fn parts(&mut self, step: u32, i: usize) -> Vec<Tuple> {
        let first = self.tuples(step)[i];
        self.combination(step, i, first).map_or(vec![first], |(parts, _)| parts.to_vec())
    }

    /// What tuple i of a step, which is `first`, is perhaps replaced by: a combination of itself
    /// and two others, with these weights.
    fn combination(&self, step: u32, i: usize, first: Tuple) -> Option<([Tuple; COMBINED], [f64; COMBINED])> {
        if self.train.mixup_prob == 0.0 {
            return None;
        }
        let key = derive(derive(derive_named(self.key, "augment"), step as u64), i as u64);
        let mut random = Stream::new(key);
        if random.uniform() >= self.train.mixup_prob {
            return None;
        }
        let mut parts = [first; COMBINED];
        for part in &mut parts[1..] {
            *part = self.tuples[random.below(self.tuples.len())];
        }
        let mut weights = [0.0f64; COMBINED];
        weights.iter_mut().for_each(|w| *w = random.normal() * self.train.mixup_std);
        weights[0] += 1.0 - weights.iter().sum::<f64>();
        Some((parts, weights))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::bf16;
    use gradtx_runtime::artifact::{
        StoreType, TuplePlan, UpdateSpace, assemble, checksum, little_endian, write_init, write_shard,
    };

    /// Blocks and width: more than a thread takes at a time, and of no round size.
    const SHAPES: [[usize; 2]; 2] = [[3, 23_001], [2, 7001]];
    const SHADOWS: usize = 3;
    const STEPS: usize = 2;
    const BATCH: usize = 4;

    /// A store of normal numbers, of which each coordinate has a mean of its own.
    fn store(dir: &std::path::Path) -> TupleStore {
        let side = |[blocks, width]: [usize; 2]| UpdateSpace {
            blocks,
            width,
            layout: "aa".into(),
            base_model: "bb".into(),
            targets: vec!["q_proj".into()],
            rank: 2,
            alpha: 4.0,
            freeze_a: false,
            init: checksum(&little_endian(&vec![0.0f32; blocks * width])),
        };
        let [student, teacher] = SHAPES.map(side);
        let plan = TuplePlan { shadows: SHADOWS, steps: STEPS, dtype: StoreType::F32, student, teacher };
        for role in Role::BOTH {
            let len = plan.space(role).values();
            write_init(dir, role, plan.space(role), &vec![0.0; len]).unwrap();
            for shadow in 0..SHADOWS {
                let mut random = Stream::new(17 * shadow as u64 + role as u64);
                let value = |i: usize| ((i % len % 7) as f64 + random.normal()) as f32 * 1e-3;
                let updates: Vec<f32> = (0..STEPS * len).map(value).collect();
                write_shard(dir, &plan, role, shadow, &updates).unwrap();
            }
        }
        assemble(dir, &plan, Value::Null).unwrap();
        TupleStore::open(dir).unwrap()
    }

    #[test]
    fn validation_holds_out_whole_groups() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let train =
            TrainConfig { val_split_by: ValidationSplit::Group, val_set_size: 0.4, ..TrainConfig::default() };
        for key in 0..6 {
            let split = Split::of(&store, || Ok(Groups::new(&[4, 9, 4])), &train, key).unwrap();
            let tuples =
                |pairs: &[usize]| -> Vec<Tuple> { pairs.iter().flat_map(|&p| [(p, 0), (p, 1)]).collect() };
            let held = split.validation.clone();
            assert!(held == tuples(&[0, 2]) || held == tuples(&[1]), "{held:?}");
            assert_eq!(split.training.len() + held.len(), SHADOWS * STEPS);
            assert!(split.training.iter().all(|tuple| !held.contains(tuple)));
        }
        let one = Split::of(&store, || Ok(Groups::new(&[1, 1, 1])), &train, 1).err().unwrap().to_string();
        assert!(one.contains("one group of shadow subsets must be held out"), "{one}");
    }

    fn settings(augment: f64, student_noise: f64) -> TrainConfig {
        TrainConfig {
            global_batch_size: BATCH,
            mixup_prob: augment,
            input_noise_std: student_noise,
            ..TrainConfig::default()
        }
    }

    fn prepared<X: Real>(
        source: &mut TupleSampler<'_>,
        own: Range<usize>,
        units: &Normalization,
        threads: usize,
    ) -> [Vec<X>; 2] {
        let [s, t] = SHAPES.map(|[blocks, width]| own.len() * blocks * width);
        let (mut student, mut teacher) = (vec![X::zero(); s], vec![X::one(); t]);
        let mut keys = vec![0; own.len()];
        let to = StagedMut { student: &mut student, teacher: &mut teacher, keys: &mut keys };
        source.prepare_values(5, own, units, &Threads::new(threads).unwrap(), to).unwrap();
        keys.windows(2).for_each(|pair| assert_ne!(pair[0], pair[1]));
        [student, teacher]
    }

    /// What a step's tuples are by their definition, one value after the other.
    fn by_definition(source: &mut TupleSampler<'_>, units: &Normalization) -> [Vec<f32>; 2] {
        let (store, train) = (source.source, source.train);
        let mut sides = [vec![], vec![]];
        for i in 0..BATCH {
            let first = source.tuples(5)[i];
            let made = source.combination(5, i, first);
            for (role, side) in Role::BOTH.into_iter().zip(&mut sides) {
                let read = |tuple: Tuple| {
                    let mut update = vec![0.0; store.values(role)];
                    store.read(role, tuple, &mut update).unwrap();
                    update
                };
                let mut update = read(first);
                if let Some((parts, weights)) = made {
                    let parts = parts.map(read);
                    for (at, x) in update.iter_mut().enumerate() {
                        let sum: f64 = (0..COMBINED).map(|k| weights[k] * parts[k][at] as f64).sum();
                        *x = sum as f32;
                    }
                }
                match role {
                    Role::Student => units.apply_student(&mut update).unwrap(),
                    Role::Teacher => units.apply_teacher(&mut update).unwrap(),
                }
                side.extend(update);
            }
        }
        let key = derive(derive_named(source.key, "student noise"), 5);
        let mut noise = Stream::new(key);
        if train.input_noise_std > 0.0 {
            sides[0].iter_mut().for_each(|x| *x += (noise.normal() * train.input_noise_std) as f32);
        }
        sides
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn a_step_is_the_same_to_the_bit_however_it_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let tuples: Vec<Tuple> = (0..SHADOWS).flat_map(|pair| (0..STEPS).map(move |s| (pair, s))).collect();
        for (mode, augment, noise) in [
            (NormalizationMode::ScalarCentred, 0.0, 0.0),
            (NormalizationMode::Block, 0.6, 0.0),
            (NormalizationMode::Coordinate, 0.5, 0.1),
        ] {
            let units = fit(&store, &tuples, mode, &Threads::new(3).unwrap()).unwrap();
            let train = settings(augment, noise);
            let mut source = TupleSampler::new(&store, &train, &tuples, 3).unwrap();
            let combined = (0..BATCH).filter(|&i| source.parts(5, i).len() > 1).count();
            assert!(
                (1..BATCH).contains(&combined) || augment == 0.0,
                "{combined} combinations of both kinds"
            );
            let wanted = by_definition(&mut source, &units);
            for threads in [1, 3] {
                let found = prepared::<f32>(&mut source, 0..BATCH, &units, threads);
                for (found, wanted) in found.iter().zip(&wanted) {
                    assert_eq!(bits(found), bits(wanted), "{mode:?}, {threads} threads");
                }
            }
            let [first, second] = [0..1, 1..BATCH].map(|own| prepared::<f32>(&mut source, own, &units, 2));
            for side in 0..2 {
                let all = [&first[side][..], &second[side][..]].concat();
                assert_eq!(bits(&all), bits(&wanted[side]), "{mode:?}, on two ranks");
            }
            for (found, wanted) in prepared::<bf16>(&mut source, 0..BATCH, &units, 2).iter().zip(&wanted) {
                assert!(found.iter().zip(wanted).all(|(f, &w)| *f == bf16::from_f32(w)), "{mode:?} in bf16");
            }
            // Another step is another batch.
            let mut other = vec![0.0f32; wanted[0].len()];
            let (mut teacher, mut keys) = (vec![0.0f32; wanted[1].len()], vec![0; BATCH]);
            let to = StagedMut { student: &mut other, teacher: &mut teacher, keys: &mut keys };
            source.prepare_values(6, 0..BATCH, &units, &Threads::new(2).unwrap(), to).unwrap();
            assert_ne!(bits(&other), bits(&wanted[0]), "{mode:?}");
        }
    }

    #[test]
    fn statistics_are_the_same_on_any_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let one_by_one: Vec<Tuple> =
            (0..SHADOWS).flat_map(|pair| (0..STEPS).map(move |s| (pair, s))).collect();
        // More than are read together.
        let tuples = one_by_one.repeat(4);
        let [s, t] = SHAPES;
        let mut wanted = NormalizationFit::new(NormalizationMode::Coordinate, s, t);
        let mut sum = vec![0.0; t[0] * t[1]];
        let (mut student, mut teacher) = (vec![0.0; s[0] * s[1]], vec![0.0; t[0] * t[1]]);
        for &(pair, step) in &tuples {
            store.read(Role::Student, pair, step, &mut student).unwrap();
            store.read(Role::Teacher, pair, step, &mut teacher).unwrap();
            wanted.add(&student, &teacher).unwrap();
            sum.iter_mut().zip(&teacher).for_each(|(s, &x): (&mut f64, _)| *s += x as f64);
        }
        let wanted = wanted.finish().unwrap();
        let mean: Vec<f32> = sum.iter().map(|s| (s / tuples.len() as f64) as f32).collect();
        for threads in [1, 3].map(|count| Threads::new(count).unwrap()) {
            let found = fit(&store, &tuples, NormalizationMode::Coordinate, &threads).unwrap();
            assert!(found == wanted);
            assert!(mean_teacher(&store, &tuples, &threads).unwrap() == mean);
        }
    }

    #[test]
    fn a_value_that_is_no_number_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let tuples = [(1, 1)];
        let train = TrainConfig { global_batch_size: 1, ..settings(0.0, 0.0) };
        let units = Normalization::none(SHAPES[0], SHAPES[1]);
        let path = gradtx_runtime::artifact::shard_path(dir.path(), Role::Student, 1);
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let mut source = TupleSampler::new(&store, &train, &tuples, 3).unwrap();
        let [s, t] = SHAPES.map(|[blocks, width]| blocks * width);
        let (mut student, mut teacher, mut keys) = (vec![0.0f32; s], vec![0.0f32; t], vec![0]);
        let to = StagedMut { student: &mut student, teacher: &mut teacher, keys: &mut keys };
        let threads = Threads::new(3).unwrap();
        let error = source.prepare_values(0, 0..1, &units, &threads, to).unwrap_err().to_string();
        assert!(error.contains("00001.student") && error.contains(&format!("element {}", s - 1)), "{error}");
    }
}
