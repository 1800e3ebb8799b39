//! [`Worker`]: a rank that asks rank 0 for work. It asks a little before it needs the answer, so
//! that it rarely waits for rank 0 to come to the end of its stream. What is said is in
//! [`super::messages`].

use super::collection::Finished;
use super::keeper::Keeper;
use super::messages::{ASK, Done, END, Ended, GIVE, NAP, SHARD, STOP, TELL, Told, pack, read, say, standing};
use super::office::{Now, Office, Spent, Task};
use anyhow::Result;
use gradtx_run::interrupt;
use gradtx_run::progress::RankStanding;
use gradtx_run::role::Role;
use gradtx_runtime::comm::Comm;
use gradtx_train::lora::schedule::Work;
use std::time::{Duration, Instant};

/// It asks for its next group when so many steps of this one are left.
const AHEAD: u32 = 2;
/// How often it tells how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Any rank but the first.
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
        let Self { comm, keeper, sent, asked, .. } = *self;
        keeper.map_or(Ok(()), Keeper::end)?;
        // What it asked for and did not wait for may be a group that nobody does now.
        let unfinished = unfinished || asked;
        say(comm, 0, END, &Ended::new(unfinished, spent, sent))?;
        let mut code = vec![];
        comm.broadcast_bytes(0, &mut code)?;
        Ok(code.first().copied().filter(|&code| code != 0))
    }
}
