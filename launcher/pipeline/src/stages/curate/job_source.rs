//! [`JobSource`]: where a process gets groups of jobs from, and whom it says how far it is.
//!
//! | source | processes |
//! |---|---|
//! | [`super::coordinator::Coordinator`] | rank 0: hands out the work, and does some itself; also a single process |
//! | [`super::worker::Worker`] | any other rank: asks rank 0 |
//! | [`super::file_locks::FileLocks`] | one of several without MPI: takes what nobody else has taken |

use super::collection::Finished;
use anyhow::Result;
use gradtx_run::role::Role;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::schedule::JobGroup;
use std::fs::File;
use std::time::Duration;

/// A group that is to be trained.
pub struct Task {
    /// Which.
    pub work: JobGroup,
    /// What keeps other processes from doing the same.
    pub claim: Option<File>,
}

/// How far the group is that a process works at.
#[derive(Clone, Copy, Debug)]
pub struct JobProgress {
    /// The group.
    pub work: JobGroup,
    /// Its jobs.
    pub jobs: usize,
    /// Steps that are done,
    pub done: u32,
    /// of so many.
    pub steps: u32,
    /// Tokens, and their time.
    pub rate: Rate,
    /// Mean of the jobs' losses in the last step; none before the first.
    pub loss: Option<f64>,
}

/// What a process times its time with.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeBreakdown {
    /// Groups that it finished.
    pub groups: usize,
    /// Training.
    pub training: Duration,
    /// Loading models.
    pub loading: Duration,
    /// Handing over what is finished: waiting for the thread that writes, when the disk is slow.
    pub delivering: Duration,
    /// Waiting for work.
    pub waiting: Duration,
}

/// A place to get work from.
pub trait JobSource {
    /// The next group for a process that holds this base model; none when there is nothing
    /// left for it, or when it should stop.
    fn next(&mut self, resident: Option<Role>) -> Result<Option<Task>>;

    /// Looks after other processes for a moment.
    fn between(&mut self) -> Result<()>;

    /// A step is done. Whether to continue.
    fn step(&mut self, now: &JobProgress) -> Result<bool>;

    /// A group is trained, and should be written.
    fn deliver(&mut self, finished: Finished, now: &JobProgress) -> Result<()>;

    /// This process has nothing left to do. Returns when all have come here (where they wait
    /// for each other): the exit code, if they were asked to stop before everything was done.
    fn end(self: Box<Self>, unfinished: bool, times: TimeBreakdown) -> Result<Option<u8>>;
}
