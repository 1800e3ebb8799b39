//! [`Coordinator`]: rank 0, which hands out the work, on demand, while it works too; also a process
//! alone. What is said is in [`super::messages`].

use super::collection::{Collection, Finished, Throughput};
use super::job_source::{JobProgress, JobSource, Task, TimeBreakdown};
use super::messages::{
    ASSIGN, Done, END, POLL_INTERVAL, REPORT, REQUEST, STOP, WorkerMessage, WorkerSummary, recv_json,
    send_json, state,
};
use super::shard_writer::ShardWriter;
use anyhow::Result;
use gradtx_run::interrupt;
use gradtx_run::progress::{self, RankProgress};
use gradtx_run::role::Role;
use gradtx_run::ui::{Progress, Ui};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::metrics::JsonLines;
use gradtx_train::lora::schedule::{JobGroup, Scheduler};
use serde_json::json;
use std::time::{Duration, Instant};

/// How often rank 0 shows how far all are.
const SHOW_EVERY: Duration = Duration::from_millis(100);

/// Rank 0, or a process alone.
pub struct Coordinator<'a> {
    comm: &'a dyn Comm,
    collection: &'a Collection,
    shard_writer: ShardWriter,
    throughput: Throughput,
    scheduler: Scheduler,
    progress: Progress,
    /// Steps and cost of everything that is to be done.
    steps: u64,
    cost: f64,
    began: Instant,
    /// Of finished groups.
    done: (u64, f64),
    shown: Instant,
    /// Every rank's.
    rank_states: Vec<RankProgress>,
    ended: Vec<Option<(WorkerSummary, Instant)>>,
    stop: Option<u8>,
    ui: Ui,
}

impl<'a> Coordinator<'a> {
    /// With this work to hand out.
    pub fn new(
        comm: &'a dyn Comm,
        collection: &'a Collection,
        shard_writer: ShardWriter,
        work: &[JobGroup],
        ui: &Ui,
    ) -> Result<Self> {
        let size = comm.size();
        let steps = work.iter().map(|w| collection.recipe(w.side).max_steps as u64).sum();
        let mut coordinator = Self {
            comm,
            collection,
            shard_writer,
            throughput: Throughput::new(".jsonl"),
            scheduler: Scheduler::for_ranks(work.iter().copied(), comm.size()),
            progress: ui.progress("curate", steps),
            steps,
            cost: work.iter().map(|w| w.cost).sum(),
            began: Instant::now(),
            done: (0, 0.0),
            shown: Instant::now(),
            rank_states: (0..size).map(|rank| RankProgress { rank, ..RankProgress::default() }).collect(),
            ended: vec![None; size],
            stop: None,
            ui: ui.clone(),
        };
        // Everybody's first question has been sent by now, and is answered before rank 0 loads
        // a model, which takes a while.
        comm.barrier()?;
        coordinator.serve()?;
        Ok(coordinator)
    }

    /// Answers what has come.
    fn serve(&mut self) -> Result<()> {
        if let Some(code) = interrupt::stop_requested() {
            self.stop_all(code)?;
        }
        while let Some(message) = self.comm.try_receive(None, STOP)? {
            self.stop_all(message.bytes.first().copied().unwrap_or(gradtx_run::failure::STOPPED))?;
        }
        while let Some(message) = self.comm.try_receive(None, REPORT)? {
            match recv_json(message.from, &message.bytes)? {
                WorkerMessage::StageProgress(state) => {
                    let groups = self.rank_states[message.from].groups;
                    self.rank_states[message.from] = RankProgress { groups, ..state };
                }
                WorkerMessage::Done(done) => self.note(message.from, &done)?,
            }
        }
        while let Some(message) = self.comm.try_receive(None, REQUEST)? {
            let resident: Option<Role> = recv_json(message.from, &message.bytes)?;
            let work = self.hand_out(message.from, resident);
            send_json(self.comm, message.from, ASSIGN, &work)?;
        }
        while let Some(message) = self.comm.try_receive(None, END)? {
            self.ended[message.from] = Some((recv_json(message.from, &message.bytes)?, Instant::now()));
        }
        if self.shown.elapsed() >= SHOW_EVERY {
            self.show();
            self.shown = Instant::now();
        }
        Ok(())
    }

    fn hand_out(&mut self, to: usize, resident: Option<Role>) -> Option<JobGroup> {
        let work = if self.stop.is_none() { self.scheduler.next(resident) } else { None };
        if let Some(work) = work {
            tracing::info!("{} group {} goes to rank {to}", work.side.name(), work.group);
        }
        work
    }

    fn stop_all(&mut self, code: u8) -> Result<()> {
        if self.stop.is_none() {
            self.stop = Some(code);
            for rank in 1..self.comm.size() {
                self.comm.send(rank, STOP, &[code])?;
            }
        }
        Ok(())
    }

    /// A rank has trained a group.
    fn note(&mut self, rank: usize, done: &Done) -> Result<()> {
        let Done { work, jobs, .. } = *done;
        self.done.0 += self.collection.recipe(work.side).max_steps as u64;
        self.done.1 += work.cost;
        let state = &mut self.rank_states[rank];
        (state.done, state.total, state.cost) = (0, 0, 0.0);
        state.groups += 1;
        self.throughput.write(self.collection, &work, jobs, done.rate(), rank)
    }

    /// Shows how far all ranks are.
    fn show(&mut self) {
        let (mut steps, mut cost) = self.done;
        let mut rate = 0.0;
        for state in &self.rank_states {
            steps += state.done;
            rate += state.rate;
            cost += state.cost * state.done as f64 / state.total.max(1) as f64;
        }
        let seconds = self.began.elapsed().as_secs_f64();
        // By cost, not by steps: the two models' steps are not alike.
        let left = (cost > 0.0).then(|| (self.cost - cost).max(0.0) * seconds / cost);
        let losses: Vec<f64> =
            self.rank_states.iter().filter(|s| s.rate > 0.0).filter_map(|s| s.loss).collect();
        let loss = match losses.len() {
            0 => String::new(),
            n => format!("loss {:.4}, ", losses.iter().sum::<f64>() / n as f64),
        };
        let who = match self.comm.size() {
            1 => self.rank_states[0].part.clone(),
            size => format!("{size} ranks"),
        };
        // Rank 0 is here, and whoever has ended has nothing more to report.
        let now = progress::unix_now();
        self.rank_states[0].updated = now;
        for (state, ended) in self.rank_states.iter_mut().zip(&self.ended) {
            if ended.is_some() {
                (state.part, state.rate, state.updated) = (progress::NO_MORE.into(), 0.0, now);
            }
        }
        if let Some(output) = progress::current() {
            output.set_ranks(&self.rank_states);
        }
        self.progress.set_with(steps.min(self.steps), left, format!("{who}, {loss}{rate:.0} tokens/s"));
    }

    /// What every rank's time was times with, to a file and in a line. Rank 0's own work ended
    /// at `own_end`.
    fn account(&self, own: WorkerSummary, own_end: Instant) -> Result<()> {
        let end = Instant::now();
        let wall = (end - self.began).as_secs_f64().max(1e-9);
        let mut file = JsonLines::resume(&self.collection.dir.join("throughput-ranks.jsonl"), u64::MAX)?;
        let mut sums = WorkerSummary::default();
        for (rank, ended) in self.ended.iter().enumerate() {
            let (ended, at) = ended.unwrap_or((own, own_end));
            let tail = (end - at).as_secs_f64();
            file.write(&json!({
                "step": 0,
                "rank": rank,
                "node": if rank == 0 { &self.comm.place().node } else { &self.rank_states[rank].node },
                "groups": ended.groups,
                "wall_s": wall,
                "training_s": ended.training_s,
                "delivering_s": ended.delivering_s,
                "loading_s": ended.loading_s,
                "waiting_s": ended.waiting_s,
                "after_s": tail,
            }))?;
            sums.groups += ended.groups;
            sums.training_s += ended.training_s;
            sums.delivering_s += ended.delivering_s;
            sums.loading_s += ended.loading_s;
            sums.waiting_s += ended.waiting_s;
        }
        if self.comm.size() > 1 {
            let share = |seconds: f64| 100.0 * seconds / (wall * self.comm.size() as f64);
            self.ui.line(format!(
                "curate: {} groups on {} ranks; of their time {:.1} % training, {:.1} % loading models, \
                 {:.1} % waiting for shards to be written, {:.2} % waiting for work",
                sums.groups,
                self.comm.size(),
                share(sums.training_s),
                share(sums.loading_s),
                share(sums.delivering_s),
                share(sums.waiting_s),
            ));
        }
        Ok(())
    }
}

impl JobSource for Coordinator<'_> {
    fn next(&mut self, resident: Option<Role>) -> Result<Option<Task>> {
        self.serve()?;
        Ok(self.hand_out(0, resident).map(|work| Task { work, claim: None }))
    }

    fn between(&mut self) -> Result<()> {
        self.serve()
    }

    fn step(&mut self, now: &JobProgress) -> Result<bool> {
        self.rank_states[0] = state(self.comm, Some(now), &self.rank_states[0]);
        self.serve()?;
        Ok(self.stop.is_none())
    }

    fn deliver(&mut self, finished: Finished, now: &JobProgress) -> Result<()> {
        self.note(0, &Done::of(now))?;
        self.shard_writer.give(finished)
    }

    fn end(mut self: Box<Self>, mut unfinished: bool, times: TimeBreakdown) -> Result<Option<u8>> {
        let (own, own_end) = (WorkerSummary::new(unfinished, times), Instant::now());
        let everybody = 1..self.comm.size();
        loop {
            self.serve()?;
            if everybody.clone().all(|rank| self.ended[rank].is_some()) {
                break;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        self.account(own, own_end)?;
        unfinished |= self.ended.iter().flatten().any(|(ended, _)| ended.unfinished);
        unfinished |= self.scheduler.waiting() > 0;
        let code = self.stop.filter(|_| unfinished);
        self.shard_writer.end()?;
        self.comm.broadcast_bytes(0, &mut vec![code.unwrap_or(0)])?;
        Ok(code)
    }
}
