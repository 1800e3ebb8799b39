//! What ranks say to each other while rank 0 ([`super::coordinator`]) hands out work to the others
//! ([`super::worker`]): messages, each with a tag of its own.
//!
//! | tag | from, to | content |
//! |---|---|---|
//! | `REQUEST` | worker, coordinator | the model that it holds, as JSON |
//! | `ASSIGN` | coordinator, worker | a group, or nothing any more, as JSON |
//! | `REPORT` | worker, coordinator | `WorkerMessage` as JSON: how far it is, about once a second; that a group is trained |
//! | `STOP` | both ways | the exit code of the end that somebody asked for |
//! | `END` | worker, coordinator | everything of it is written; what its time was times with |
//!
//! Point-to-point messages, not one-sided ones: a window's owner has to look after it just as
//! often, and a message says more.

use super::job_source::{JobProgress, TimeBreakdown};
use anyhow::{Context as _, Result};
use gradtx_run::progress::{self, RankProgress};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::schedule::JobGroup;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;

pub(super) const REQUEST: u8 = 1;
pub(super) const ASSIGN: u8 = 2;
pub(super) const REPORT: u8 = 3;
pub(super) const STOP: u8 = 4;
pub(super) const END: u8 = 5;

/// A pause between looks while there is nothing to do.
pub(super) const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// What a worker gives, in the order in which it happens.
#[derive(Serialize, Deserialize)]
pub(super) enum WorkerMessage {
    /// How far it is.
    StageProgress(RankProgress),
    /// A group is trained.
    Done(Done),
}

/// What is said of a finished group.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct Done {
    pub(super) work: JobGroup,
    pub(super) jobs: usize,
    tokens: u64,
    seconds: f64,
}

impl Done {
    pub(super) fn of(now: &JobProgress) -> Self {
        let JobProgress { work, jobs, rate, .. } = *now;
        Self { work, jobs, tokens: rate.tokens, seconds: rate.time.as_secs_f64() }
    }

    pub(super) fn rate(&self) -> Rate {
        Rate { tokens: self.tokens, time: Duration::from_secs_f64(self.seconds) }
    }
}

/// What is said at the end.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct WorkerSummary {
    pub(super) unfinished: bool,
    pub(super) groups: usize,
    pub(super) training_s: f64,
    pub(super) delivering_s: f64,
    pub(super) loading_s: f64,
    pub(super) waiting_s: f64,
}

impl WorkerSummary {
    pub(super) fn new(unfinished: bool, times: TimeBreakdown) -> Self {
        Self {
            unfinished,
            groups: times.groups,
            training_s: times.training.as_secs_f64(),
            delivering_s: times.delivering.as_secs_f64(),
            loading_s: times.loading.as_secs_f64(),
            waiting_s: times.waiting.as_secs_f64(),
        }
    }
}

pub(super) fn send_json(comm: &dyn Comm, to: usize, tag: u8, what: &impl Serialize) -> Result<()> {
    Ok(comm.send(to, tag, &serde_json::to_vec(what)?)?)
}

pub(super) fn recv_json<T: DeserializeOwned>(from: usize, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).with_context(|| format!("rank {from} sent a malformed message"))
}

/// How far a rank is, as rank 0 shows it.
pub(super) fn state(comm: &dyn Comm, now: Option<&JobProgress>, before: &RankProgress) -> RankProgress {
    let mut told = RankProgress {
        rank: comm.rank(),
        node: comm.place().node.clone(),
        pid: std::process::id(),
        updated: progress::unix_now(),
        ..before.clone()
    };
    if let Some(now) = now {
        told.part = format!("{} group {}", now.work.side.name(), now.work.group);
        (told.done, told.total) = (now.done as u64, now.steps as u64);
        (told.rate, told.cost) = (now.rate.per_second(), now.work.cost);
        told.unit = "tokens".into();
        told.loss = now.loss;
    }
    told
}
