//! What MPI does while we do something else: requests, and the wire they go over.

use crate::{Error, Result};
use mpi::ffi;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{AsRaw, Communicator};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

/// Requests that were started together.
///
/// MPI reads and writes memory until they are done, so they may be dropped only then;
/// dropped before, they end the process.
#[derive(Default)]
pub(super) struct Requests {
    raw: Vec<ffi::MPI_Request>,
    /// Sender and bytes of those that receive.
    receives: Vec<Option<(usize, usize)>>,
}

impl Requests {
    fn add(&mut self, receives: Option<(usize, usize)>, start: impl FnOnce(*mut ffi::MPI_Request)) {
        let mut request = MaybeUninit::uninit();
        start(request.as_mut_ptr());
        // SAFETY: `start` calls one of MPI's I… functions, which write the request or end
        // the process.
        self.raw.push(unsafe { request.assume_init() });
        self.receives.push(receives);
    }

    /// Starts to receive a message that was found.
    ///
    /// # Safety
    /// The bytes, as many as the message has, stay where they are, and nobody else uses
    /// them, until the requests are done.
    pub unsafe fn receive_found(&mut self, message: &mut ffi::MPI_Message, bytes: &mut [u8]) {
        let (at, count) = (bytes.as_mut_ptr().cast::<c_void>(), bytes.len() as c_int);
        self.add(None, |request| {
            // SAFETY: `count` bytes at `at`, which the caller keeps for us.
            unsafe {
                ffi::MPI_Imrecv(at, count, ffi::RSMPI_UINT8_T, message, request);
            }
        });
    }

    /// Whether all are done; does not wait. Fails, with all of them done, if someone sent
    /// another number of bytes than was expected.
    pub fn done(&mut self) -> Result<bool> {
        if self.raw.is_empty() {
            return Ok(true);
        }
        let mut statuses = vec![MaybeUninit::<ffi::MPI_Status>::uninit(); self.raw.len()];
        let mut done: c_int = 0;
        // SAFETY: both arrays have as many entries as is said. The statuses are written
        // where all requests are done, and read only then.
        unsafe {
            let count = self.raw.len() as c_int;
            ffi::MPI_Testall(count, self.raw.as_mut_ptr(), &mut done, statuses.as_mut_ptr().cast());
        }
        if done == 0 {
            return Ok(false);
        }
        self.raw.clear();
        for (status, expected) in statuses.iter().zip(std::mem::take(&mut self.receives)) {
            let Some((from, bytes)) = expected else { continue };
            // SAFETY: written by MPI_Testall, which said that all requests are done.
            let found = unsafe { received(status.assume_init_ref()) };
            if found != bytes {
                let why = format!(
                    "rank {from} sent {found} bytes where {bytes} were expected: \
                     do all ranks call the same operations?"
                );
                return Err(Error::invalid("communication", why));
            }
        }
        Ok(true)
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        if !self.raw.is_empty() {
            eprintln!("error: requests of MPI were dropped before they were done");
            super::abort::end_world(1);
        }
    }
}

/// Bytes that a finished receive got.
///
/// # Safety
/// The status was written by MPI for a receive.
pub(super) unsafe fn received(status: &ffi::MPI_Status) -> usize {
    let mut count: c_int = 0;
    // SAFETY: the caller's word for the status; MPI's constant of a type is always valid.
    unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut count) };
    count as usize
}

/// One rank's end of a communicator that nobody else uses.
pub(super) struct Wire {
    comm: SimpleCommunicator,
    pub rank: usize,
    pub size: usize,
    /// Bytes of one message at most.
    pub limit: usize,
    operations: Cell<u64>,
}

impl Wire {
    pub fn new(comm: SimpleCommunicator, limit: usize) -> Self {
        let (rank, size) = (comm.rank() as usize, comm.size() as usize);
        Self { comm, rank, size, limit, operations: Cell::new(0) }
    }

    pub fn raw(&self) -> ffi::MPI_Comm {
        self.comm.as_raw()
    }

    /// A tag for the next collective operation, the same on all ranks since they call the
    /// same ones in the same order. Operations may overlap, and move on in any order.
    /// (`tag` + 1 is free as well.)
    pub(crate) fn next_tag(&self) -> c_int {
        let number = self.operations.replace(self.operations.get() + 1);
        // MPI has tags up to 32767 everywhere; so many operations never overlap.
        (number % 16_000) as c_int * 2
    }

    /// The other ranks, as (whom to send to, whom to receive from), beginning with the
    /// neighbours: no rank is everyone's first.
    pub(crate) fn partners(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (rank, size) = (self.rank, self.size);
        (1..size).map(move |step| ((rank + step) % size, (rank + size - step) % size))
    }

    /// Starts to send; nothing for no bytes.
    ///
    /// # Safety
    /// The bytes stay where they are, unchanged, until the requests are done.
    pub unsafe fn send(&self, requests: &mut Requests, to: usize, tag: c_int, bytes: &[u8]) {
        for part in bytes.chunks(self.limit) {
            let (at, count) = (part.as_ptr().cast::<c_void>(), part.len() as c_int);
            requests.add(None, |request| {
                // SAFETY: `count` bytes at `at`, which the caller keeps in place.
                unsafe {
                    ffi::MPI_Isend(at, count, ffi::RSMPI_UINT8_T, to as c_int, tag, self.raw(), request);
                }
            });
        }
    }

    /// Starts to receive `length` bytes into memory at `at`; nothing for no bytes.
    ///
    /// # Safety
    /// The memory is valid and nobody else uses it until the requests are done.
    pub unsafe fn receive(
        &self,
        requests: &mut Requests,
        from: usize,
        tag: c_int,
        at: *mut u8,
        length: usize,
    ) {
        for start in (0..length).step_by(self.limit) {
            let bytes = self.limit.min(length - start);
            requests.add(Some((from, bytes)), |request| {
                // SAFETY: `bytes` bytes at this place, which the caller keeps for us.
                unsafe {
                    let (at, count) = (at.add(start).cast::<c_void>(), bytes as c_int);
                    ffi::MPI_Irecv(at, count, ffi::RSMPI_UINT8_T, from as c_int, tag, self.raw(), request);
                }
            });
        }
    }

    /// Starts to broadcast from `root`.
    ///
    /// # Safety
    /// The bytes stay where they are, and nobody else uses them, until the requests are done.
    pub unsafe fn broadcast(&self, requests: &mut Requests, root: usize, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(self.limit) {
            let (at, count) = (part.as_mut_ptr().cast::<c_void>(), part.len() as c_int);
            requests.add(None, |request| {
                // SAFETY: `count` bytes at `at`, which the caller keeps for us.
                unsafe {
                    ffi::MPI_Ibcast(at, count, ffi::RSMPI_UINT8_T, root as c_int, self.raw(), request);
                }
            });
        }
    }

    /// Starts to wait for everyone.
    pub fn barrier(&self, requests: &mut Requests) {
        requests.add(None, |request| {
            // SAFETY: only the request is written.
            unsafe {
                ffi::MPI_Ibarrier(self.raw(), request);
            }
        });
    }
}
