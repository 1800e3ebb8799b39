//! Work among ranks: rank 0 hands it out, on demand, while it works too.
//!
//! Messages, each with a tag of its own:
//!
//! | tag | from, to | content |
//! |---|---|---|
//! | [`ASK`] | worker, chief | the model that it holds, as JSON |
//! | [`GIVE`] | chief, worker | a group, or nothing any more, as JSON |
//! | [`TELL`] | worker, chief | [`Told`] as JSON: how far it is, about once a second; that a group is trained |
//! | [`SHARD`] | worker, chief | what came of a group, where the chief writes for all |
//! | [`STOP`] | both ways | the exit code of the end that somebody asked for |
//! | [`END`] | worker, chief | everything of it is written; what its time was spent with |
//!
//! A worker asks a little before it needs the answer, so that it rarely waits for rank 0 to
//! come to the end of its stream. Point-to-point messages, not one-sided ones: a window's
//! owner has to look after it just as often, and a message says more.

use super::collection::{Collection, Finished, throughput};
use super::keeper::Keeper;
use super::office::{Now, Office, Spent, Task};
use crate::args::Role;
use crate::interrupt;
use crate::progress::{self, RankStanding};
use crate::schedule::{Scheduler, Work};
use crate::stages::jobs::Trained;
use crate::ui::{Progress, Ui};
use anyhow::{Context as _, Result};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::metrics::{JsonLines, Rate};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;
use std::time::{Duration, Instant};

const ASK: u8 = 1;
const GIVE: u8 = 2;
const TELL: u8 = 3;
const SHARD: u8 = 4;
const STOP: u8 = 5;
const END: u8 = 6;

/// A worker asks for its next group when so many steps of this one are left.
const AHEAD: u32 = 2;
/// How often it tells how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often rank 0 shows how far all are.
const SHOW_EVERY: Duration = Duration::from_millis(100);
/// A pause between looks while there is nothing to do.
const NAP: Duration = Duration::from_micros(200);

/// What a worker tells, in the order in which it happens.
#[derive(Serialize, Deserialize)]
enum Told {
    /// How far it is.
    Standing(RankStanding),
    /// A group is trained.
    Done(Done),
}

/// What is said of a finished group.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Done {
    work: Work,
    jobs: usize,
    tokens: u64,
    seconds: f64,
}

impl Done {
    fn of(now: &Now) -> Self {
        let Now { work, jobs, rate, .. } = *now;
        Self { work, jobs, tokens: rate.tokens, seconds: rate.time.as_secs_f64() }
    }

    fn rate(&self) -> Rate {
        Rate { tokens: self.tokens, time: Duration::from_secs_f64(self.seconds) }
    }
}

/// What is said at the end.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Ended {
    unfinished: bool,
    groups: usize,
    /// Groups whose results rank 0 has to write.
    sent: usize,
    training_s: f64,
    loading_s: f64,
    waiting_s: f64,
}

impl Ended {
    fn new(unfinished: bool, spent: Spent, sent: usize) -> Self {
        Self {
            unfinished,
            groups: spent.groups,
            sent,
            training_s: spent.training.as_secs_f64(),
            loading_s: spent.loading.as_secs_f64(),
            waiting_s: spent.waiting.as_secs_f64(),
        }
    }
}

fn say(comm: &dyn Comm, to: usize, tag: u8, what: &impl Serialize) -> Result<()> {
    Ok(comm.send(to, tag, &serde_json::to_vec(what)?)?)
}

fn read<T: DeserializeOwned>(from: usize, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).with_context(|| format!("rank {from} sent what nobody understands"))
}

/// How far a rank is, as rank 0 shows it.
pub fn standing(comm: &dyn Comm, now: Option<&Now>, before: &RankStanding) -> RankStanding {
    let mut told = RankStanding {
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
    }
    told
}

/// Rank 0, or a process alone.
pub struct Chief<'a> {
    comm: &'a dyn Comm,
    collection: &'a Collection,
    keeper: Keeper,
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
    standings: Vec<RankStanding>,
    ended: Vec<Option<(Ended, Instant)>>,
    received: Vec<usize>,
    stop: Option<u8>,
    ui: Ui,
}

impl<'a> Chief<'a> {
    /// With this work to hand out.
    pub fn new(
        comm: &'a dyn Comm,
        collection: &'a Collection,
        keeper: Keeper,
        work: &[Work],
        ui: &Ui,
    ) -> Result<Self> {
        let size = comm.size();
        let steps = work.iter().map(|w| collection.recipe(w.side).steps as u64).sum();
        let mut chief = Self {
            comm,
            collection,
            keeper,
            scheduler: Scheduler::new(work.iter().copied()),
            progress: ui.progress("curate", steps),
            steps,
            cost: work.iter().map(|w| w.cost).sum(),
            began: Instant::now(),
            done: (0, 0.0),
            shown: Instant::now(),
            standings: (0..size).map(|rank| RankStanding { rank, ..RankStanding::default() }).collect(),
            ended: vec![None; size],
            received: vec![0; size],
            stop: None,
            ui: ui.clone(),
        };
        // Everybody's first question has been sent by now, and is answered before rank 0 loads
        // a model, which takes a while.
        comm.barrier()?;
        chief.serve()?;
        Ok(chief)
    }

    /// Answers what has come.
    fn serve(&mut self) -> Result<()> {
        if let Some(code) = interrupt::asked() {
            self.stop_all(code)?;
        }
        while let Some(message) = self.comm.try_receive(None, STOP)? {
            self.stop_all(message.bytes.first().copied().unwrap_or(crate::failure::STOPPED))?;
        }
        while let Some(message) = self.comm.try_receive(None, TELL)? {
            match read(message.from, &message.bytes)? {
                Told::Standing(standing) => {
                    let groups = self.standings[message.from].groups;
                    self.standings[message.from] = RankStanding { groups, ..standing };
                }
                Told::Done(done) => self.note(message.from, &done)?,
            }
        }
        while let Some(message) = self.comm.try_receive(None, SHARD)? {
            self.received[message.from] += 1;
            self.keeper.give(unpack(message.from, &message.bytes)?)?;
        }
        while let Some(message) = self.comm.try_receive(None, ASK)? {
            let resident: Option<Role> = read(message.from, &message.bytes)?;
            let work = self.hand_out(message.from, resident);
            say(self.comm, message.from, GIVE, &work)?;
        }
        while let Some(message) = self.comm.try_receive(None, END)? {
            self.ended[message.from] = Some((read(message.from, &message.bytes)?, Instant::now()));
        }
        if self.shown.elapsed() >= SHOW_EVERY {
            self.show();
            self.shown = Instant::now();
        }
        Ok(())
    }

    fn hand_out(&mut self, to: usize, resident: Option<Role>) -> Option<Work> {
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
        self.done.0 += self.collection.recipe(work.side).steps as u64;
        self.done.1 += work.cost;
        let standing = &mut self.standings[rank];
        (standing.done, standing.total, standing.cost) = (0, 0, 0.0);
        standing.groups += 1;
        let path = self.collection.dir.join(format!("throughput-{}.jsonl", work.side.name()));
        let mut line = throughput(self.collection, &work, jobs, done.rate());
        line["rank"] = json!(rank);
        Ok(JsonLines::resume(&path, u64::MAX)?.write(&line)?)
    }

    /// Shows how far all ranks are.
    fn show(&mut self) {
        let (mut steps, mut cost) = self.done;
        let mut rate = 0.0;
        for standing in &self.standings {
            steps += standing.done;
            rate += standing.rate;
            cost += standing.cost * standing.done as f64 / standing.total.max(1) as f64;
        }
        let seconds = self.began.elapsed().as_secs_f64();
        // By cost, not by steps: the two models' steps are not alike.
        let left = (cost > 0.0).then(|| (self.cost - cost).max(0.0) * seconds / cost);
        let who = match self.comm.size() {
            1 => self.standings[0].part.clone(),
            size => format!("{size} ranks"),
        };
        // Rank 0 is here, and whoever has ended has nothing more to tell.
        let now = progress::unix_now();
        self.standings[0].updated = now;
        for (standing, ended) in self.standings.iter_mut().zip(&self.ended) {
            if ended.is_some() {
                (standing.part, standing.rate, standing.updated) = (progress::NO_MORE.into(), 0.0, now);
            }
        }
        if let Some(desk) = progress::current() {
            desk.set_ranks(&self.standings);
        }
        self.progress.set_with(steps.min(self.steps), left, format!("{who}, {rate:.0} tokens/s"));
    }

    /// What every rank's time was spent with, to a file and in a line.
    fn account(&self, own: Ended) -> Result<()> {
        let end = Instant::now();
        let wall = (end - self.began).as_secs_f64().max(1e-9);
        let mut file = JsonLines::resume(&self.collection.dir.join("throughput-ranks.jsonl"), u64::MAX)?;
        let mut sums = Ended::default();
        for (rank, ended) in self.ended.iter().enumerate() {
            let (ended, at) = ended.unwrap_or((own, end));
            let tail = (end - at).as_secs_f64();
            file.write(&json!({
                "step": 0,
                "rank": rank,
                "node": if rank == 0 { &self.comm.place().node } else { &self.standings[rank].node },
                "groups": ended.groups,
                "wall_s": wall,
                "training_s": ended.training_s,
                "loading_s": ended.loading_s,
                "waiting_s": ended.waiting_s,
                "after_s": tail,
            }))?;
            sums.groups += ended.groups;
            sums.training_s += ended.training_s;
            sums.loading_s += ended.loading_s;
            sums.waiting_s += ended.waiting_s;
        }
        if self.comm.size() > 1 {
            let share = |seconds: f64| 100.0 * seconds / (wall * self.comm.size() as f64);
            self.ui.line(format!(
                "curate: {} groups on {} ranks; of their time {:.1} % training, {:.1} % loading models, \
                 {:.2} % waiting for work",
                sums.groups,
                self.comm.size(),
                share(sums.training_s),
                share(sums.loading_s),
                share(sums.waiting_s),
            ));
        }
        Ok(())
    }
}

impl Office for Chief<'_> {
    fn next(&mut self, resident: Option<Role>) -> Result<Option<Task>> {
        self.serve()?;
        Ok(self.hand_out(0, resident).map(|work| Task { work, claim: None }))
    }

    fn between(&mut self) -> Result<()> {
        self.serve()
    }

    fn step(&mut self, now: &Now) -> Result<bool> {
        self.standings[0] = standing(self.comm, Some(now), &self.standings[0]);
        self.serve()?;
        Ok(self.stop.is_none())
    }

    fn deliver(&mut self, finished: Finished, now: &Now) -> Result<()> {
        self.note(0, &Done::of(now))?;
        self.keeper.give(finished)
    }

    fn end(mut self: Box<Self>, mut unfinished: bool, spent: Spent) -> Result<Option<u8>> {
        let own = Ended::new(unfinished, spent, 0);
        let everybody = 1..self.comm.size();
        loop {
            self.serve()?;
            let has_ended =
                |rank: usize| self.ended[rank].is_some_and(|(ended, _)| self.received[rank] == ended.sent);
            if everybody.clone().all(has_ended) {
                break;
            }
            std::thread::sleep(NAP);
        }
        self.account(own)?;
        unfinished |= self.ended.iter().flatten().any(|(ended, _)| ended.unfinished);
        unfinished |= self.scheduler.waiting() > 0;
        let code = self.stop.filter(|_| unfinished);
        self.keeper.end()?;
        self.comm.broadcast_bytes(0, &mut vec![code.unwrap_or(0)])?;
        Ok(code)
    }
}

/// Any other rank.
pub struct Worker<'a> {
    comm: &'a dyn Comm,
    /// None where rank 0 writes for all.
    keeper: Option<Keeper>,
    sent: usize,
    /// Whether an answer is under way.
    asked: bool,
    stop: Option<u8>,
    standing: RankStanding,
    told: Instant,
}

impl<'a> Worker<'a> {
    /// With a keeper, unless rank 0 is to write for it.
    pub fn new(comm: &'a dyn Comm, keeper: Option<Keeper>) -> Result<Self> {
        let mut worker = Self {
            comm,
            keeper,
            sent: 0,
            asked: false,
            stop: None,
            standing: standing(comm, None, &RankStanding::default()),
            told: Instant::now(),
        };
        say(comm, 0, TELL, &Told::Standing(worker.standing.clone()))?;
        worker.ask(None)?;
        comm.barrier()?;
        Ok(worker)
    }

    fn ask(&mut self, resident: Option<Role>) -> Result<()> {
        if !self.asked {
            say(self.comm, 0, ASK, &resident)?;
            self.asked = true;
        }
        Ok(())
    }

    /// Whether somebody wants the end.
    fn should_stop(&mut self) -> Result<bool> {
        if self.stop.is_none()
            && let Some(code) = interrupt::asked()
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

impl Office for Worker<'_> {
    fn next(&mut self, resident: Option<Role>) -> Result<Option<Task>> {
        self.ask(resident)?;
        loop {
            if let Some(message) = self.comm.try_receive(Some(0), GIVE)? {
                self.asked = false;
                let work: Option<Work> = read(0, &message.bytes)?;
                return Ok(work.map(|work| Task { work, claim: None }));
            }
            if self.should_stop()? {
                return Ok(None);
            }
            std::thread::sleep(NAP);
        }
    }

    fn between(&mut self) -> Result<()> {
        Ok(self.comm.poll()?)
    }

    fn step(&mut self, now: &Now) -> Result<bool> {
        if self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            self.standing = standing(self.comm, Some(now), &self.standing);
            say(self.comm, 0, TELL, &Told::Standing(self.standing.clone()))?;
        }
        let go_on = !self.should_stop()?;
        if go_on && now.done + AHEAD >= now.steps {
            self.ask(Some(now.work.side))?;
        }
        Ok(go_on)
    }

    fn deliver(&mut self, finished: Finished, now: &Now) -> Result<()> {
        say(self.comm, 0, TELL, &Told::Done(Done::of(now)))?;
        match &mut self.keeper {
            Some(keeper) => keeper.give(finished),
            None => {
                self.sent += 1;
                Ok(self.comm.send(0, SHARD, &pack(&finished)?)?)
            }
        }
    }

    fn end(self: Box<Self>, unfinished: bool, spent: Spent) -> Result<Option<u8>> {
        let Self { comm, keeper, sent, .. } = *self;
        keeper.map_or(Ok(()), Keeper::end)?;
        say(comm, 0, END, &Ended::new(unfinished, spent, sent))?;
        let mut code = vec![];
        comm.broadcast_bytes(0, &mut code)?;
        Ok(code.first().copied().filter(|&code| code != 0))
    }
}

/// What came of a group, as bytes: a line of JSON, and the updates of every job.
fn pack(finished: &Finished) -> Result<Vec<u8>> {
    // Losses as bits, since decimal numbers may lose their last one.
    let bits = |t: &Trained| -> Vec<u64> { t.losses.iter().map(|loss| loss.to_bits()).collect() };
    let losses: Vec<Vec<u64>> = finished.jobs.iter().map(bits).collect();
    let mut bytes = serde_json::to_vec(&(finished.work, losses))?;
    bytes.push(b'\n');
    for job in &finished.jobs {
        bytes.extend(gradtx_runtime::artifact::little_endian(&job.updates).iter());
    }
    Ok(bytes)
}

fn unpack(from: usize, bytes: &[u8]) -> Result<Finished> {
    let end = bytes.iter().position(|&b| b == b'\n').unwrap_or(bytes.len());
    let (work, losses): (Work, Vec<Vec<u64>>) = read(from, &bytes[..end])?;
    let values: Vec<f32> = bytes[(end + 1).min(bytes.len())..]
        .chunks_exact(size_of::<f32>())
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let each = values.len() / losses.len().max(1);
    let job = |(losses, updates): (Vec<u64>, &[f32])| Trained {
        losses: losses.into_iter().map(f64::from_bits).collect(),
        updates: updates.to_vec(),
    };
    // The shards say how many values they need, and refuse any other number.
    let jobs = losses.into_iter().zip(values.chunks(each.max(1))).map(job).collect();
    Ok(Finished { work, jobs, claim: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_of_a_group_can_be_sent() {
        let work = Work { side: Role::Llm, group: 3, cost: 0.25 };
        let job =
            |x: f64| Trained { losses: vec![x, 0.1 + x], updates: vec![x as f32, -1.5, f32::MIN_POSITIVE] };
        let sent = Finished { work, jobs: vec![job(0.3), job(1.0 / 3.0)], claim: None };
        let got = unpack(1, &pack(&sent).unwrap()).unwrap();
        assert_eq!(got.work, work);
        for (a, b) in sent.jobs.iter().zip(&got.jobs) {
            assert_eq!((&a.losses, &a.updates), (&b.losses, &b.updates));
        }
        assert_eq!(got.jobs.len(), 2);
        assert!(unpack(1, b"nonsense\n").is_err());
    }
}
