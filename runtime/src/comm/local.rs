//! Ranks that are threads of one process.
//!
//! One meeting place is behind all operations: every rank brings bytes, and when the
//! last has come, each gets to see what all brought. A rank that ends early (it
//! failed, or panicked) makes the others fail instead of waiting for it forever, and
//! so do ranks that call different operations.

use super::{Comm, expect_root, expect_shares, sum_in_order};
use crate::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What one rank brings: the operation that it calls, and its bytes.
#[derive(Debug)]
struct Brought {
    operation: String,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Meeting {
    /// Meetings that were held.
    held: u64,
    /// What the ranks brought to the one that comes next.
    brought: Vec<Option<Brought>>,
    /// What they brought to the last one.
    last: Arc<Vec<Brought>>,
    /// A rank that is gone.
    gone: Option<usize>,
}

#[derive(Debug)]
struct Place {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        // No step inside leaves the meeting half changed when it panics.
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of several ranks in this process. Send it to a thread of its own.
#[derive(Debug)]
pub struct Local {
    rank: usize,
    size: usize,
    place: Arc<Place>,
}

/// `size` ranks that talk to each other.
pub fn local(size: usize) -> Vec<Local> {
    let meeting = Meeting { brought: (0..size).map(|_| None).collect(), ..Meeting::default() };
    let place = Arc::new(Place { meeting: Mutex::new(meeting), changed: Condvar::new() });
    (0..size).map(|rank| Local { rank, size, place: place.clone() }).collect()
}

impl Drop for Local {
    fn drop(&mut self) {
        self.place.lock().gone.get_or_insert(self.rank);
        self.place.changed.notify_all();
    }
}

impl Local {
    /// Brings bytes and waits for everyone else's.
    fn meet(&self, operation: String, bytes: Vec<u8>) -> Result<Arc<Vec<Brought>>> {
        let mut meeting = self.place.lock();
        meeting.brought[self.rank] = Some(Brought { operation, bytes });
        if meeting.brought.iter().all(Option::is_some) {
            meeting.last = Arc::new(meeting.brought.iter_mut().filter_map(Option::take).collect());
            meeting.held += 1;
            self.place.changed.notify_all();
        } else {
            let held = meeting.held;
            while meeting.held == held {
                if let Some(gone) = meeting.gone {
                    let why = format!("rank {gone} has ended, rank {} waits for it in vain", self.rank);
                    return Err(Error::invalid("communication", why));
                }
                meeting = self.place.changed.wait(meeting).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let all = meeting.last.clone();
        drop(meeting);
        let own = &all[self.rank].operation;
        match all.iter().position(|b| b.operation != *own) {
            None => Ok(all),
            Some(other) => {
                let why = format!("rank {other} calls {}, rank {} {own}", all[other].operation, self.rank);
                Err(Error::invalid("communication", why))
            }
        }
    }
}

/// The numbers in bytes that came from `&[f32]`.
fn floats(bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / size_of::<f32>()];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
    values
}

impl Comm for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let operation = format!("all-reduce of {} values", values.len());
        let all = self.meet(operation, bytemuck::cast_slice(values).to_vec())?;
        let parts: Vec<Vec<f32>> = all.iter().map(|b| floats(&b.bytes)).collect();
        sum_in_order(values, parts.iter().map(Vec::as_slice));
        Ok(())
    }

    fn reduce_scatter_sum(&self, values: &[f32], out: &mut [f32]) -> Result<()> {
        expect_shares("reduce-scatter", values.len(), out.len(), self.size)?;
        let operation = format!("reduce-scatter of {} values", values.len());
        let all = self.meet(operation, bytemuck::cast_slice(values).to_vec())?;
        let own = self.rank * out.len()..(self.rank + 1) * out.len();
        let parts: Vec<Vec<f32>> = all.iter().map(|b| floats(&b.bytes)[own.clone()].to_vec()).collect();
        sum_in_order(out, parts.iter().map(Vec::as_slice));
        Ok(())
    }

    fn all_gather(&self, part: &[f32], out: &mut [f32]) -> Result<()> {
        expect_shares("all-gather", out.len(), part.len(), self.size)?;
        let operation = format!("all-gather of {} values each", part.len());
        let all = self.meet(operation, bytemuck::cast_slice(part).to_vec())?;
        let whole: Vec<u8> = all.iter().flat_map(|b| &b.bytes).copied().collect();
        bytemuck::cast_slice_mut(out).copy_from_slice(&whole);
        Ok(())
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        expect_root("broadcast", root, self.size)?;
        let operation = format!("broadcast of {} values from rank {root}", values.len());
        let own = if self.rank == root { bytemuck::cast_slice(values).to_vec() } else { vec![] };
        let all = self.meet(operation, own)?;
        bytemuck::cast_slice_mut(values).copy_from_slice(&all[root].bytes);
        Ok(())
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        expect_root("broadcast", root, self.size)?;
        let own = if self.rank == root { std::mem::take(bytes) } else { vec![] };
        let all = self.meet(format!("broadcast of bytes from rank {root}"), own)?;
        bytes.clone_from(&all[root].bytes);
        Ok(())
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        expect_root("gather", root, self.size)?;
        let all = self.meet(format!("gather of bytes to rank {root}"), bytes.to_vec())?;
        Ok((self.rank == root).then(|| all.iter().map(|b| b.bytes.clone()).collect()))
    }

    fn barrier(&self) -> Result<()> {
        self.meet("barrier".into(), vec![]).map(|_| ())
    }
}
