//! Messages between two ranks. The first part of a message begins with its length; what
//! does not fit follows with the same tag, and MPI keeps the order.

use super::requests::{Requests, Wire, received};
use crate::comm::Message;
use crate::{Error, Result};
use mpi::ffi;
use mpi::topology::SimpleCommunicator;
use std::cell::RefCell;
use std::ffi::c_int;
use std::mem::MaybeUninit;

/// Bytes of a message's length.
const LENGTH: usize = size_of::<u64>();

/// Messages that were sent and not yet taken, and where others come in.
pub(super) struct Mail {
    wire: Wire,
    // A message's bytes stay where they are when this list grows.
    sent: RefCell<Vec<(Requests, Vec<u8>)>>,
}

impl Mail {
    pub fn new(comm: SimpleCommunicator, limit: usize) -> Self {
        Self { wire: Wire::new(comm, limit), sent: RefCell::default() }
    }

    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.wire.limit = limit;
    }

    /// Whether everything that was sent is taken.
    pub fn is_empty(&self) -> bool {
        self.sent.borrow().is_empty()
    }

    pub fn send(&self, to: usize, tag: u8, bytes: &[u8]) {
        let mut whole = Vec::with_capacity(LENGTH + bytes.len());
        whole.extend((bytes.len() as u64).to_le_bytes());
        whole.extend(bytes);
        let mut requests = Requests::default();
        // SAFETY: `whole` is kept, unchanged, until its requests are done.
        unsafe { self.wire.send(&mut requests, to, tag.into(), &whole) };
        self.sent.borrow_mut().push((requests, whole));
        self.progress();
    }

    pub fn progress(&self) {
        // A send expects no number of bytes, so it cannot fail.
        self.sent.borrow_mut().retain_mut(|(requests, _)| !matches!(requests.done(), Ok(true)));
    }

    /// The first part of a message, if one has come; complete when the requests are done.
    pub fn first_part(&self, from: Option<usize>, tag: u8) -> Option<(usize, Vec<u8>, Requests)> {
        let mut found: c_int = 0;
        let mut message = MaybeUninit::uninit();
        let mut status = MaybeUninit::<ffi::MPI_Status>::uninit();
        // SAFETY: MPI writes `found`, and where that is not 0 the message and its status.
        unsafe {
            let source = from.map_or(ffi::RSMPI_ANY_SOURCE, |from| from as c_int);
            let (comm, tag) = (self.wire.raw(), tag.into());
            ffi::MPI_Improbe(source, tag, comm, &mut found, message.as_mut_ptr(), status.as_mut_ptr());
        }
        if found == 0 {
            return None;
        }
        // SAFETY: a message was found, so both are written.
        let (mut message, status) = unsafe { (message.assume_init(), status.assume_init()) };
        // SAFETY: the status is that of a message which is to be received.
        let mut bytes = vec![0u8; unsafe { received(&status) }];
        let mut requests = Requests::default();
        // SAFETY: as for the rest of a message, below.
        unsafe { requests.receive_found(&mut message, &mut bytes) };
        Some((status.MPI_SOURCE as usize, bytes, requests))
    }

    /// The whole message of which this is the first part; complete when the requests are done.
    pub fn rest(&self, from: usize, tag: u8, mut bytes: Vec<u8>) -> Result<(Message, Requests)> {
        let nonsense = || Error::invalid("receive", format!("rank {from} sent something that is no message"));
        let length = bytes.first_chunk::<LENGTH>().ok_or_else(nonsense)?;
        let length = u64::from_le_bytes(*length) as usize;
        let here = bytes.len() - LENGTH;
        if length < here || (length > here && bytes.len() != self.wire.limit) {
            return Err(nonsense());
        }
        bytes.drain(..LENGTH);
        bytes.resize(length, 0);
        let rest = &mut bytes[here..];
        let mut requests = Requests::default();
        // SAFETY: the bytes on the heap stay where they are when their owner is moved, and
        // whoever gets them waits for the requests before anything else.
        unsafe { self.wire.receive(&mut requests, from, tag.into(), rest.as_mut_ptr(), rest.len()) };
        Ok((Message { from, bytes }, requests))
    }
}
