//! Ranks that are threads of one process.
//!
//! One meeting per collective operation is behind all of them: every rank brings bytes
//! to its next meeting, and when the last has come, each gets to see what all brought. A
//! rank that ends early (it failed, or panicked) makes the others fail instead of waiting
//! for it forever, and so do ranks that call different operations.

use super::number::{Scratch, sum_in_order};
use super::{
    Collective, Comm, Kind, Message, RankInfo, Reduction, expect_length, expect_parts, expect_peer,
    expect_root, ranges,
};
use crate::{Error, Result};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// What one rank brings: the operation that it calls, and its bytes.
#[derive(Debug)]
struct Brought {
    operation: String,
    bytes: Scratch,
}

/// A meeting that some ranks have come to.
#[derive(Debug)]
struct Meeting {
    brought: Vec<Option<Brought>>,
    /// What all brought, once all have come.
    all: Arc<OnceLock<Vec<Brought>>>,
}

/// A message that was sent and not yet taken.
#[derive(Debug)]
struct Letter {
    to: usize,
    tag: u8,
    message: Message,
}

#[derive(Debug, Default)]
struct State {
    /// Meetings not all have come to, by number.
    meetings: BTreeMap<u64, Meeting>,
    letters: Vec<Letter>,
    /// Ranks that have ended.
    gone: Vec<bool>,
}

#[derive(Debug)]
struct Hall {
    state: Mutex<State>,
    changed: Condvar,
}

impl Hall {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No step inside leaves the state half changed when it panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of several ranks in this process. Send it to a thread of its own.
#[derive(Debug)]
pub struct Local {
    rank: usize,
    size: usize,
    place: RankInfo,
    hall: Arc<Hall>,
    /// Number of the meeting that this rank goes to next.
    next: Cell<u64>,
}

/// `size` ranks that talk to each other.
pub fn local(size: usize) -> Vec<Local> {
    let state = State { gone: vec![false; size], ..State::default() };
    let hall = Arc::new(Hall { state: Mutex::new(state), changed: Condvar::new() });
    let one = |rank| Local {
        rank,
        size,
        place: RankInfo::here(rank, size),
        hall: hall.clone(),
        next: Cell::new(0),
    };
    (0..size).map(one).collect()
}

impl Drop for Local {
    fn drop(&mut self) {
        self.hall.lock().gone[self.rank] = true;
        self.hall.changed.notify_all();
    }
}

/// A rank's place in a meeting that it has come to.
struct Seat<'c> {
    rank: &'c Local,
    number: u64,
    operation: String,
    all: Arc<OnceLock<Vec<Brought>>>,
}

impl Seat<'_> {
    /// What all brought, if all have come.
    fn look(&self, state: &State) -> Result<Option<&[Brought]>> {
        let (own, rank) = (&self.operation, self.rank.rank);
        let Some(all) = self.all.get() else {
            let missing =
                |r: &usize| state.meetings.get(&self.number).is_some_and(|m| m.brought[*r].is_none());
            return match (0..self.rank.size).filter(missing).find(|&r| state.gone[r]) {
                None => Ok(None),
                Some(gone) => {
                    let why = format!("rank {gone} has ended, rank {rank} waits for it in vain ({own})");
                    Err(Error::invalid("communication", why))
                }
            };
        };
        match all.iter().position(|b| b.operation != *own) {
            None => Ok(Some(all)),
            Some(other) => {
                let why = format!("rank {other} calls {}, rank {rank} {own}", all[other].operation);
                Err(Error::invalid("communication", why))
            }
        }
    }

    /// Waits until all have come.
    fn wait(&self) -> Result<&[Brought]> {
        let mut state = self.rank.hall.lock();
        loop {
            if let Some(all) = self.look(&state)? {
                return Ok(all);
            }
            state = self.rank.hall.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Local {
    /// Brings bytes to the next meeting.
    fn bring(&self, operation: String, bytes: &[u8]) -> Seat<'_> {
        let number = self.next.replace(self.next.get() + 1);
        let mut state = self.hall.lock();
        let meeting = state.meetings.entry(number).or_insert_with(|| Meeting {
            brought: (0..self.size).map(|_| None).collect(),
            all: Arc::default(),
        });
        let all = meeting.all.clone();
        meeting.brought[self.rank] =
            Some(Brought { operation: operation.clone(), bytes: Scratch::copy_of(bytes) });
        if meeting.brought.iter().all(Option::is_some) {
            let brought = meeting.brought.iter_mut().filter_map(Option::take).collect();
            all.set(brought).expect("only the last to come sets it");
            state.meetings.remove(&number);
            self.hall.changed.notify_all();
        }
        Seat { rank: self, number, operation, all }
    }

    /// The oldest message for this rank with this tag.
    fn take(&self, state: &mut State, from: Option<usize>, tag: u8) -> Option<Message> {
        let wanted =
            |l: &Letter| (l.to, l.tag) == (self.rank, tag) && from.is_none_or(|from| from == l.message.from);
        let at = state.letters.iter().position(wanted)?;
        Some(state.letters.remove(at).message)
    }
}

/// A meeting for a sum.
struct Sum<'c> {
    seat: Seat<'c>,
    kind: Kind,
    /// The part of the sum that this rank wants.
    part: Range<usize>,
}

impl Reduction for Sum<'_> {
    fn poll(&mut self) -> Result<bool> {
        let state = self.seat.rank.hall.lock();
        Ok(self.seat.look(&state)?.is_some())
    }

    fn wait(self: Box<Self>, out: &mut [u8]) -> Result<()> {
        expect_length("sum", out.len(), self.part.len())?;
        let all = self.seat.wait()?;
        let parts: Vec<&[u8]> = all.iter().map(|b| &b.bytes.bytes()[self.part.clone()]).collect();
        sum_in_order(self.kind, &parts, out);
        Ok(())
    }
}

impl Comm for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn place(&self) -> &RankInfo {
        &self.place
    }

    fn start_sum<'c>(
        &'c self,
        collective: Collective,
        kind: Kind,
        values: &[u8],
        lengths: &[usize],
    ) -> Result<Box<dyn Reduction + 'c>> {
        let (operation, part) = match collective {
            Collective::AllReduce => {
                (format!("all-reduce of {} bytes of {kind:?}", values.len()), 0..values.len())
            }
            Collective::ReduceScatter => {
                let own = lengths.get(self.rank).copied().unwrap_or(0);
                expect_parts("reduce-scatter", values.len(), lengths, self.rank, self.size, own)?;
                let operation = format!("reduce-scatter of {lengths:?} bytes of {kind:?}");
                (operation, ranges(lengths)[self.rank].clone())
            }
        };
        Ok(Box::new(Sum { seat: self.bring(operation, values), kind, part }))
    }

    fn sum_share(&self, kind: Kind, values: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        expect_parts("reduce-scatter", values.len(), lengths, self.rank, self.size, out.len())?;
        self.start_sum(Collective::ReduceScatter, kind, values, lengths)?.wait(out)
    }

    fn gather_all(&self, part: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        expect_parts("all-gather", out.len(), lengths, self.rank, self.size, part.len())?;
        let seat = self.bring(format!("all-gather of {lengths:?} bytes"), part);
        for (range, from) in ranges(lengths).into_iter().zip(seat.wait()?) {
            out[range].copy_from_slice(from.bytes.bytes());
        }
        Ok(())
    }

    fn broadcast_exact(&self, root: usize, bytes: &mut [u8]) -> Result<()> {
        expect_root("broadcast", root, self.size)?;
        let own = if self.rank == root { &*bytes } else { &[] };
        let seat = self.bring(format!("broadcast of {} bytes from rank {root}", bytes.len()), own);
        bytes.copy_from_slice(seat.wait()?[root].bytes.bytes());
        Ok(())
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        expect_root("broadcast", root, self.size)?;
        let own = if self.rank == root { &bytes[..] } else { &[] };
        let seat = self.bring(format!("broadcast of bytes from rank {root}"), own);
        *bytes = seat.wait()?[root].bytes.bytes().to_vec();
        Ok(())
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        expect_root("gather", root, self.size)?;
        let seat = self.bring(format!("gather of bytes to rank {root}"), bytes);
        let all = seat.wait()?;
        Ok((self.rank == root).then(|| all.iter().map(|b| b.bytes.bytes().to_vec()).collect()))
    }

    fn barrier(&self) -> Result<()> {
        self.bring("barrier".into(), &[]).wait().map(|_| ())
    }

    fn send(&self, to: usize, tag: u8, bytes: &[u8]) -> Result<()> {
        expect_peer("send", to, self.rank, self.size)?;
        let message = Message { from: self.rank, bytes: bytes.to_vec() };
        self.hall.lock().letters.push(Letter { to, tag, message });
        self.hall.changed.notify_all();
        Ok(())
    }

    fn try_receive(&self, from: Option<usize>, tag: u8) -> Result<Option<Message>> {
        from.map_or(Ok(()), |from| expect_peer("receive", from, self.rank, self.size))?;
        Ok(self.take(&mut self.hall.lock(), from, tag))
    }

    fn receive(&self, from: Option<usize>, tag: u8) -> Result<Message> {
        from.map_or(Ok(()), |from| expect_peer("receive", from, self.rank, self.size))?;
        let mut state = self.hall.lock();
        loop {
            if let Some(message) = self.take(&mut state, from, tag) {
                return Ok(message);
            }
            let mut senders = (0..self.size).filter(|&r| r != self.rank && from.is_none_or(|from| from == r));
            if senders.all(|r| state.gone[r]) {
                let why = format!("rank {} waits for a message, but who could send one has ended", self.rank);
                return Err(Error::invalid("receive", why));
            }
            state = self.hall.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
