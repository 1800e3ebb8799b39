//! What ranks say to each other while rank 0 ([`super::coordinator`]) hands out work to the others
//! ([`super::worker`]): messages, each with a tag of its own.
//!
//! | tag | from, to | content |
//! |---|---|---|
//! | `REQUEST` | worker, coordinator | the model that it holds, as JSON |
//! | `ASSIGN` | coordinator, worker | a group, or nothing any more, as JSON |
//! | `REPORT` | worker, coordinator | `WorkerMessage` as JSON: how far it is, about once a second; that a group is trained |
//! | `SHARD` | worker, coordinator | what came of a group, where the coordinator writes for all |
//! | `STOP` | both ways | the exit code of the end that somebody asked for |
//! | `END` | worker, coordinator | everything of it is written; what its time was times with |
//!
//! Point-to-point messages, not one-sided ones: a window's owner has to look after it just as
//! often, and a message says more.

use super::collection::Finished;
use super::job_source::{JobProgress, TimeBreakdown};
use anyhow::{Context as _, Result};
use gradtx_run::progress::{self, RankProgress};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::schedule::JobGroup;
use gradtx_train::lora::trainer::JobResult;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;

pub(super) const REQUEST: u8 = 1;
pub(super) const ASSIGN: u8 = 2;
pub(super) const REPORT: u8 = 3;
pub(super) const SHARD: u8 = 4;
pub(super) const STOP: u8 = 5;
pub(super) const END: u8 = 6;

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
    /// Groups whose results rank 0 has to write.
    pub(super) sent: usize,
    pub(super) training_s: f64,
    pub(super) delivering_s: f64,
    pub(super) loading_s: f64,
    pub(super) waiting_s: f64,
}

impl WorkerSummary {
    pub(super) fn new(unfinished: bool, times: TimeBreakdown, sent: usize) -> Self {
        Self {
            unfinished,
            groups: times.groups,
            sent,
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

/// What came of a group, as bytes: a line of JSON, and the updates of every job.
pub(super) fn pack(finished: &Finished) -> Result<Vec<u8>> {
    // Numbers as bits, since decimal ones may lose their last digit.
    let bits = |numbers: &[f64]| -> Vec<u64> { numbers.iter().map(|number| number.to_bits()).collect() };
    let metrics = |t: &JobResult| [bits(&t.losses), bits(&t.grad_norms), t.tokens.clone()];
    let metrics: Vec<[Vec<u64>; 3]> = finished.jobs.iter().map(metrics).collect();
    let mut bytes = serde_json::to_vec(&(finished.work, metrics))?;
    bytes.push(b'\n');
    for job in &finished.jobs {
        bytes.extend(gradtx_runtime::artifact::little_endian(&job.updates).iter());
    }
    Ok(bytes)
}

pub(super) fn unpack(from: usize, bytes: &[u8]) -> Result<Finished> {
    let end = bytes.iter().position(|&b| b == b'\n').unwrap_or(bytes.len());
    let (work, metrics): (JobGroup, Vec<[Vec<u64>; 3]>) = recv_json(from, &bytes[..end])?;
    let values: Vec<f32> = bytes[(end + 1).min(bytes.len())..]
        .chunks_exact(size_of::<f32>())
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let each = values.len() / metrics.len().max(1);
    let numbers = |bits: Vec<u64>| bits.into_iter().map(f64::from_bits).collect();
    let job = |([losses, norms, tokens], updates): ([Vec<u64>; 3], &[f32])| JobResult {
        losses: numbers(losses),
        grad_norms: numbers(norms),
        tokens,
        updates: updates.to_vec(),
    };
    // The shards say how many values they need, and refuse any other number.
    let jobs = metrics.into_iter().zip(values.chunks(each.max(1))).map(job).collect();
    Ok(Finished { work, jobs, claim: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_run::role::Role;

    #[test]
    fn what_came_of_a_group_can_be_sent() {
        let work = JobGroup { side: Role::Llm, group: 3, cost: 0.25 };
        let job = |x: f64| JobResult {
            losses: vec![x, 0.1 + x],
            grad_norms: vec![1.0 / x, x / 7.0],
            tokens: vec![3, 5],
            updates: vec![x as f32, -1.5, f32::MIN_POSITIVE],
        };
        let sent = Finished { work, jobs: vec![job(0.3), job(1.0 / 3.0)], claim: None };
        let got = unpack(1, &pack(&sent).unwrap()).unwrap();
        assert_eq!(got.work, work);
        for (a, b) in sent.jobs.iter().zip(&got.jobs) {
            assert_eq!((&a.losses, &a.updates), (&b.losses, &b.updates));
            assert_eq!((&a.grad_norms, &a.tokens), (&b.grad_norms, &b.tokens));
        }
        assert_eq!(got.jobs.len(), 2);
        assert!(unpack(1, b"nonsense\n").is_err());
    }
}
