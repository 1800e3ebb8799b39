//! [`Prefetcher`]: the tuples of the next steps are prepared while a step runs.
//!
//! In: a [`TupleSampler`] and the part of every step's tuples that is this rank's. Out: the steps'
//! batches in their order, and how long was waited for them.
//!
//! There are `BATCHES` of them, in memory that is taken once and goes round: one is trained on, the
//! next is on its way to the device, and the others are prepared meanwhile, on several threads. The
//! thread that trains touches no value.

use super::prepare::Threads;
use super::tuples::TupleSampler;
use anyhow::{Context as _, Result};
use gradtx_kernels::{AsyncCopy, Real};
use gradtx_models::grad_transformer::{GradTransformerConfig, Normalization, StagedTuples};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// Batches that are kept. Two are with the device; two more let a slow read of the disk pass unseen.
pub(crate) const BATCHES: usize = 4;

/// Gives the batches of one step after the other.
pub struct Prefetcher<D: AsyncCopy, X: Real> {
    prepared: Receiver<Result<StagedTuples<D, X>>>,
    used: Sender<StagedTuples<D, X>>,
    /// What was prepared of the next step, if it was there early.
    next: Option<Result<StagedTuples<D, X>>>,
    waited: Duration,
}

/// What a prefetcher prepares.
pub struct Part {
    /// The steps, in order.
    pub steps: Range<u32>,
    /// This rank's part of every step's tuples.
    pub own: Range<usize>,
}

impl<D: AsyncCopy, X: Real> Prefetcher<D, X> {
    /// Prepares batches for a model of this shape and these units on `threads` threads, beside the
    /// caller. It ends when the prefetcher is dropped, at the latest after the batches that it holds.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        device: &D,
        config: &GradTransformerConfig,
        units: Normalization,
        mut source: TupleSampler<'scope>,
        part: Part,
        threads: usize,
    ) -> Result<Self> {
        let (used, free) = channel();
        let (sender, prepared) = channel();
        for _ in 0..BATCHES {
            let batch = StagedTuples::<D, X>::new(device, config, part.own.len())?;
            used.send(batch).expect("its receiver is here");
        }
        let threads = Threads::new(threads)?;
        let prepare = move || {
            for step in part.steps {
                // Nobody is there any more when training stopped early.
                let Ok(mut batch) = free.recv() else { break };
                let made = source.prepare(step, part.own.clone(), &units, &threads, &mut batch);
                let failed = made.is_err();
                if sender.send(made.map(|()| batch)).is_err() || failed {
                    break;
                }
            }
        };
        let builder = std::thread::Builder::new().name("tuples".into());
        builder.spawn_scoped(scope, prepare).context("cannot start a thread that reads tuples")?;
        Ok(Self { prepared, used, next: None, waited: Duration::ZERO })
    }

    /// The memory on the host for its batches, of so many tuples each.
    pub fn plan(config: &GradTransformerConfig, tuples: usize) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        let values = config.student_len() + config.teacher_len();
        plan.add(Purpose::Batch, "tuples being prepared", &[BATCHES, tuples, values], X::DTYPE.size());
        plan
    }

    /// The batch of the next step; [`Self::give_back`] it after the step.
    pub fn next_step(&mut self) -> Result<StagedTuples<D, X>> {
        if let Some(next) = self.next.take() {
            return next;
        }
        let begin = Instant::now();
        let next = self.prepared.recv().context("the thread that reads tuples has ended")?;
        self.waited += begin.elapsed();
        next
    }

    /// The batch after that, if it is ready.
    pub fn ahead(&mut self) -> Option<&StagedTuples<D, X>> {
        if self.next.is_none() {
            self.next = self.prepared.try_recv().ok();
        }
        self.next.as_ref()?.as_ref().ok()
    }

    /// Takes back the batch of a step that is done: its memory is used again.
    pub fn give_back(&mut self, batch: StagedTuples<D, X>) {
        // After the last steps nobody prepares any more.
        let _ = self.used.send(batch);
    }

    /// Seconds that were waited since this was last asked.
    pub fn take_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.waited).as_secs_f64()
    }
}
