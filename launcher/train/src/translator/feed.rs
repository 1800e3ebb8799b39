//! [`Feed`]: the tuples of the next step are read, and mixed, while a step runs.
//!
//! In: a [`Source`] and the part of every step's tuples that is this rank's. Out: the steps'
//! updates in their order, and how long was waited for them.

use super::tuples::{Source, Updates};
use anyhow::{Context as _, Result};
use gradtx_models::grad_transformer::Normalization;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// Gives the updates of one step after the other.
pub struct Feed {
    updates: Receiver<Result<Updates>>,
    waited: Duration,
}

impl Feed {
    /// A thread reads tuples `own` of each of these steps, one step ahead. It ends when the feed
    /// is dropped, at the latest after it has read one step more.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        mut source: Source<'scope>,
        steps: Range<u32>,
        own: Range<usize>,
        units: Normalization,
    ) -> Result<Self> {
        let (sender, updates) = sync_channel(1);
        let read = move || {
            for step in steps {
                let read = source.step(step, own.clone(), &units);
                let failed = read.is_err();
                // Nobody is there any more when training stopped early.
                if sender.send(read).is_err() || failed {
                    break;
                }
            }
        };
        let builder = std::thread::Builder::new().name("tuples".into());
        builder.spawn_scoped(scope, read).context("cannot start a thread that reads tuples")?;
        Ok(Self { updates, waited: Duration::ZERO })
    }

    /// The updates of the next step.
    pub fn next_step(&mut self) -> Result<Updates> {
        let begin = Instant::now();
        let updates = self.updates.recv().context("the thread that reads tuples has ended")?;
        self.waited += begin.elapsed();
        updates
    }

    /// The updates of the next step if they are there already.
    pub fn next_if_ready(&mut self) -> Option<Result<Updates>> {
        self.updates.try_recv().ok()
    }

    /// Seconds that were waited since this was last asked.
    pub fn take_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.waited).as_secs_f64()
    }
}
