//! Tuples on the disk for benchmarks, and what it takes to prepare those of a step.
//!
//! The lines `prepare tuples` report how long the threads of the host need to read a batch of tuples
//! from a store, take it into the model's units and round it to a type, as `gradtx train` does while
//! a step runs; `ns_per_value` is one thread's time for a value.
//!
//! **Bytes** are those that are read from the store and those that are written.

use super::counts::Count;
use super::results::{Entry, Results, rounded};
use super::train::updates;
use super::{On, measure};
use anyhow::{Context as _, Result};
use gradtx_kernels::{Device, Real};
use gradtx_models::grad_transformer::{GradTransformerConfig, Normalization, NormalizationMode, StagedMut};
use gradtx_run::config::TrainConfig;
use gradtx_runtime::artifact::{
    Role, TuplePlan, TupleStore, UpdateSpace, assemble, checksum, little_endian, write_init, write_shard,
};
use gradtx_train::translator::prepare::Threads;
use gradtx_train::translator::tuples::{Tuple, TupleSampler, fit};
use serde_json::{Value, json};

/// Shadow pairs of the store.
const SHADOWS: usize = 2;

/// A store of random tuples in a directory of its own, which goes with it.
pub(super) struct Store {
    store: TupleStore,
    tuples: Vec<Tuple>,
    train: TrainConfig,
    units: Normalization,
    threads: usize,
    _dir: tempfile::TempDir,
}

impl Store {
    /// As many tuples as a step has, or one more, in the units that training takes by default.
    pub fn make(config: &GradTransformerConfig, batch: usize, threads: usize) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory for tuples")?;
        let side = |blocks: usize, width: usize| UpdateSpace {
            blocks,
            width,
            layout: "random".into(),
            base_model: "random".into(),
            targets: vec![],
            rank: 1,
            alpha: 1.0,
            freeze_a: false,
            init: checksum(&little_endian(&vec![0.0f32; blocks * width])),
        };
        let student = side(config.student_blocks, config.student_width);
        let teacher = side(config.teacher_blocks, config.teacher_width);
        let steps = batch.div_ceil(SHADOWS);
        let plan = TuplePlan { shadows: SHADOWS, steps, dtype: Default::default(), student, teacher };
        for role in Role::BOTH {
            let space = plan.space(role);
            write_init(dir.path(), role, space, &vec![0.0; space.values()])?;
            for shadow in 0..SHADOWS {
                let values = updates(steps * space.values(), (2 * shadow + role as usize) as u64);
                write_shard(dir.path(), &plan, role, shadow, &values)?;
            }
        }
        assemble(dir.path(), &plan, Value::Null)?;
        let store = TupleStore::open(dir.path())?;
        let tuples: Vec<Tuple> =
            (0..SHADOWS).flat_map(|pair| (0..steps).map(move |step| (pair, step))).collect();
        let units = fit(&store, &tuples, NormalizationMode::ScalarCentred, &Threads::new(threads)?)?;
        let train = TrainConfig { global_batch_size: batch, ..TrainConfig::default() };
        Ok(Self { store, tuples, train, units, threads, _dir: dir })
    }

    /// Tuples of a step.
    pub fn batch(&self) -> usize {
        self.train.global_batch_size
    }

    /// The units that they are prepared in.
    pub fn units(&self) -> &Normalization {
        &self.units
    }

    /// Gives the tuples of every step.
    pub fn source(&self) -> Result<TupleSampler<'_>> {
        TupleSampler::new(&self.store, &self.train, &self.tuples, 1)
    }

    /// Adds lines about preparing the tuples of a step as values of type `T`: on one thread, and on
    /// all.
    pub fn measure<T: Real, D: Device>(&self, on: &On<'_, D>, results: &mut Results) -> Result<()> {
        let batch = self.batch();
        let [student, teacher] = Role::BOTH.map(|role| batch * self.store.space(role).values());
        let mut room = (vec![T::zero(); student], vec![T::zero(); teacher], vec![0; batch]);
        let (values, mut source, mut step) = ((student + teacher) as f64, self.source()?, 0);
        let bytes = values * (size_of::<f32>() + size_of::<T>()) as f64;
        let mut counts = vec![1, self.threads];
        counts.dedup();
        for count in counts {
            let threads = Threads::new(count)?;
            let times = measure::step(on.device, results.repeats(), || {
                step += 1;
                let (student, teacher, keys) = (&mut room.0[..], &mut room.1[..], &mut room.2[..]);
                let to = StagedMut { student, teacher, keys };
                source.prepare_values(step, 0..batch, &self.units, &threads, to)
            })?;
            let dtype = format!("{:?}", T::DTYPE).to_lowercase();
            let shape = format!("{values:.0} values to {dtype}, threads: {count}");
            let each = times.median() * count as f64 / values;
            let more = json!({ "prepare_threads": count, "ns_per_value": rounded(1e9 * each) });
            let entry = Entry::new("prepare tuples", shape, Count { flops: 0.0, bytes }, times);
            results.add(on.device, entry.with(more))?;
        }
        Ok(())
    }
}
