//! Sums that are under way: every rank's share goes to it, is added in the order of
//! ranks, and for an all-reduce goes back to all.

use super::requests::{Requests, Wire};
use super::{Idle, Mpi};
use crate::comm::number::{Scratch, sum_in_order};
use crate::comm::{Collective, Kind, Reduction, expect_length, ranges};
use crate::{Error, Result};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// One sum.
pub(super) struct Sum {
    collective: Collective,
    kind: Kind,
    /// Of every rank, in bytes of `whole`.
    shares: Vec<Range<usize>>,
    own: Range<usize>,
    /// This rank's values; at the end of an all-reduce the sum.
    whole: Scratch,
    /// This rank's share, from every rank (its own place is not used).
    incoming: Scratch,
    /// This rank's share of the sum.
    share: Scratch,
    tag: i32,
    requests: Requests,
    stage: Stage,
}

enum Stage {
    /// Shares are on the way to those who add them.
    Bringing,
    /// Parts of the sum are on the way to all.
    Handing,
    Done,
    Failed(Error),
}

/// All sums of a rank that are not done, and memory that was used for others.
#[derive(Default)]
pub(super) struct Sums {
    active: RefCell<Vec<Rc<RefCell<Sum>>>>,
    memory: RefCell<Vec<Scratch>>,
}

/// Pieces of memory that are kept: enough for some sums of three pieces each.
const KEPT: usize = 24;

impl Sums {
    /// Whether none is under way.
    pub fn is_empty(&self) -> bool {
        self.active.borrow().is_empty()
    }

    /// Starts a sum; `parts` are the values in every rank's share.
    pub fn start<'a>(
        &self,
        wire: &Wire,
        collective: Collective,
        kind: Kind,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Rc<RefCell<Sum>> {
        let lengths: Vec<usize> = parts.clone().map(<[u8]>::len).collect();
        let shares = ranges(&lengths);
        let own = shares[wire.rank].clone();
        let mut whole = self.scratch(lengths.iter().sum());
        for (share, part) in shares.iter().zip(parts) {
            whole.bytes_mut()[share.clone()].copy_from_slice(part);
        }
        let mut sum = Sum {
            collective,
            kind,
            whole,
            incoming: self.scratch(own.len() * wire.size),
            share: self.scratch(own.len()),
            shares,
            own,
            tag: wire.next_tag(),
            requests: Requests::default(),
            stage: Stage::Bringing,
        };
        sum.bring(wire);
        let sum = Rc::new(RefCell::new(sum));
        self.active.borrow_mut().push(sum.clone());
        sum
    }

    /// Moves all on.
    pub fn progress(&self, wire: &Wire) {
        self.active.borrow_mut().retain(|sum| {
            let mut sum = sum.borrow_mut();
            sum.advance(wire);
            !sum.is_over()
        });
    }

    fn scratch(&self, bytes: usize) -> Scratch {
        let mut scratch = self.memory.borrow_mut().pop().unwrap_or_default();
        scratch.resize(bytes);
        scratch
    }

    fn keep(&self, sum: &mut Sum) {
        let mut memory = self.memory.borrow_mut();
        // The other way round than they are taken, so that each is used for the same again.
        for scratch in [&mut sum.share, &mut sum.incoming, &mut sum.whole] {
            if memory.len() < KEPT {
                memory.push(std::mem::take(scratch));
            }
        }
    }
}

impl Sum {
    fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Failed(_))
    }

    fn bring(&mut self, wire: &Wire) {
        let length = self.own.len();
        let at = self.incoming.bytes_mut().as_mut_ptr();
        for (to, from) in wire.partners() {
            let part = &self.whole.bytes()[self.shares[to].clone()];
            // SAFETY: places for ranks do not overlap and lie in `incoming`, `part` in
            // `whole`; both stay as they are while there are requests. `Sums` keeps this sum
            // until it is over, and a drop of its requests before that ends the process.
            unsafe {
                wire.receive(&mut self.requests, from, self.tag, at.add(from * length), length);
                wire.send(&mut self.requests, to, self.tag, part);
            }
        }
    }

    fn hand(&mut self, wire: &Wire) {
        self.whole.bytes_mut()[self.own.clone()].copy_from_slice(self.share.bytes());
        let at = self.whole.bytes_mut().as_mut_ptr();
        for (to, from) in wire.partners() {
            let place = self.shares[from].clone();
            // SAFETY: as in `bring`; nothing of `whole` is on the way any more, and parts of
            // the sum are received where the shares of others were.
            unsafe {
                wire.receive(&mut self.requests, from, self.tag + 1, at.add(place.start), place.len());
                wire.send(&mut self.requests, to, self.tag + 1, self.share.bytes());
            }
        }
    }

    fn add(&mut self, wire: &Wire) {
        let length = self.own.len();
        let part = |rank: usize| match rank == wire.rank {
            true => &self.whole.bytes()[self.own.clone()],
            false => &self.incoming.bytes()[rank * length..][..length],
        };
        let parts: Vec<&[u8]> = (0..wire.size).map(part).collect();
        sum_in_order(self.kind, &parts, self.share.bytes_mut());
    }

    fn advance(&mut self, wire: &Wire) {
        while !self.is_over() {
            match self.requests.done() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    self.stage = Stage::Failed(error);
                    return;
                }
            }
            self.stage = match self.stage {
                Stage::Bringing => {
                    self.add(wire);
                    if self.collective == Collective::AllReduce {
                        self.hand(wire);
                        Stage::Handing
                    } else {
                        Stage::Done
                    }
                }
                _ => Stage::Done,
            };
        }
    }

    /// Whether it is done; its error, once.
    fn outcome(&mut self) -> Result<bool> {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Failed(error) => Err(error),
            Stage::Done => Ok(true),
            stage => {
                self.stage = stage;
                Ok(false)
            }
        }
    }
}

/// A sum in the hands of the one who started it.
pub(super) struct Started<'c> {
    pub mpi: &'c Mpi,
    pub sum: Rc<RefCell<Sum>>,
}

impl Reduction for Started<'_> {
    fn poll(&mut self) -> Result<bool> {
        self.mpi.progress();
        self.sum.borrow_mut().outcome()
    }

    fn wait(mut self: Box<Self>, out: &mut [u8]) -> Result<()> {
        let mut idle = Idle::default();
        while !self.poll()? {
            idle.pause();
        }
        let mut sum = self.sum.borrow_mut();
        let result = match sum.collective {
            Collective::AllReduce => sum.whole.bytes(),
            Collective::ReduceScatter => sum.share.bytes(),
        };
        expect_length("sum", out.len(), result.len())?;
        out.copy_from_slice(result);
        self.mpi.sums.keep(&mut sum);
        Ok(())
    }
}
