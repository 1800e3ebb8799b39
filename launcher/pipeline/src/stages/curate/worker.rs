//! [`Worker`]: a rank that asks rank 0 for work. It asks a little before it needs the answer, so
//! that it rarely waits for rank 0 to come to the end of its stream. What is said is in
//! [`super::messages`].

use super::collection::Finished;
use super::job_source::{JobProgress, JobSource, Task, TimeBreakdown};
use super::messages::{
    ASSIGN, Done, END, POLL_INTERVAL, REPORT, REQUEST, STOP, WorkerMessage, WorkerSummary, recv_json,
    send_json, state,
};
use super::shard_writer::ShardWriter;
use anyhow::Result;
use gradtx_run::interrupt;
use gradtx_run::progress::RankProgress;
use gradtx_run::role::Role;
use gradtx_runtime::comm::Comm;
use gradtx_train::lora::schedule::JobGroup;
use std::time::{Duration, Instant};

/// It asks for its next group when so many steps of this one are left.
const AHEAD: u32 = 2;
/// How often it says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Any rank but the first.
pub struct Worker<'a> {
    comm: &'a dyn Comm,
    shard_writer: ShardWriter,
    /// Whether an answer is under way.
    asked: bool,
    stop: Option<u8>,
    state: RankProgress,
    told: Instant,
}

impl<'a> Worker<'a> {
    /// With what writes its shards.
    pub fn new(comm: &'a dyn Comm, shard_writer: ShardWriter) -> Result<Self> {
        let mut worker = Self {
            comm,
            shard_writer,
            asked: false,
            stop: None,
            state: state(comm, None, &RankProgress::default()),
            told: Instant::now(),
        };
        send_json(comm, 0, REPORT, &WorkerMessage::StageProgress(worker.state.clone()))?;
        worker.ask(None)?;
        comm.barrier()?;
        Ok(worker)
    }

    fn ask(&mut self, resident: Option<Role>) -> Result<()> {
        if !self.asked {
            send_json(self.comm, 0, REQUEST, &resident)?;
            self.asked = true;
        }
        Ok(())
    }

    /// Whether somebody wants the end.
    fn should_stop(&mut self) -> Result<bool> {
        if self.stop.is_none()
            && let Some(code) = interrupt::stop_requested()
        {
            self.stop = Some(code);
            self.comm.send(0, STOP, &[code])?;
        }
        if let Some(message) = self.comm.try_receive(Some(0), STOP)? {
            self.stop = message.bytes.first().copied();
        }
        Ok(self.stop.is_some())
    }
}

impl JobSource for Worker<'_> {
    fn next(&mut self, resident: Option<Role>) -> Result<Option<Task>> {
        self.ask(resident)?;
        loop {
            if let Some(message) = self.comm.try_receive(Some(0), ASSIGN)? {
                self.asked = false;
                let work: Option<JobGroup> = recv_json(0, &message.bytes)?;
                return Ok(work.map(|work| Task { work, claim: None }));
            }
            if self.should_stop()? {
                return Ok(None);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn between(&mut self) -> Result<()> {
        Ok(self.comm.poll()?)
    }

    fn step(&mut self, now: &JobProgress) -> Result<bool> {
        if self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            self.state = state(self.comm, Some(now), &self.state);
            send_json(self.comm, 0, REPORT, &WorkerMessage::StageProgress(self.state.clone()))?;
        }
        let go_on = !self.should_stop()?;
        if go_on && now.done + AHEAD >= now.steps {
            self.ask(Some(now.work.side))?;
        }
        Ok(go_on)
    }

    fn deliver(&mut self, finished: Finished, now: &JobProgress) -> Result<()> {
        send_json(self.comm, 0, REPORT, &WorkerMessage::Done(Done::of(now)))?;
        self.shard_writer.give(finished)
    }

    fn end(self: Box<Self>, unfinished: bool, times: TimeBreakdown) -> Result<Option<u8>> {
        let Self { comm, shard_writer, asked, .. } = *self;
        shard_writer.end()?;
        // What it asked for and did not wait for may be a group that nobody does now.
        let unfinished = unfinished || asked;
        send_json(comm, 0, END, &WorkerSummary::new(unfinished, times))?;
        let mut code = vec![];
        comm.broadcast_bytes(0, &mut code)?;
        Ok(code.first().copied().filter(|&code| code != 0))
    }
}
