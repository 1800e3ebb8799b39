//! Numbers that kernels refuse: an index out of range in data that only the device sees.
//!
//! A kernel that meets one does nothing with it and writes its kind into a word of device
//! memory. Whenever the host waits for a copy from the device anyway, that word is copied with it.

use super::{Cuda, memory};
use crate::{Error, Result};

/// What is wrong, by the codes of `enum Fault` in `cu/common.cuh`.
const SENTENCES: [&str; 7] = [
    "a kernel reported a fault of no known kind",
    "a token id or row number is not below the size of its table",
    "a target is not below the size of the vocabulary",
    "a position is beyond the tables of angles or the cache",
    "a slot is not below the number of slots of the cache",
    "a bucket is not below the number of buckets",
    "the offsets of segments, their adapters or gradient rows do not fit their dimensions",
];

impl Cuda {
    /// Fails if a kernel that is done has refused a number, and forgets it.
    pub(super) fn check_fault(&self) -> Result<()> {
        let stream = self.stream()?.raw;
        let code = memory::lock(&self.inner.staging).download(stream, &mut [], 0, self.fault_pointer())?;
        self.refuse_fault(code)
    }

    /// Fails if this, what the word held, is the code of a fault, and forgets it.
    pub(super) fn refuse_fault(&self, code: u32) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let word = &self.inner.fault;
        self.set_bytes(word.pointer(), 0, word.bytes())?;
        let why = SENTENCES.get(code as usize).unwrap_or(&SENTENCES[0]);
        Err(Error::Unsupported { op: "an operation on the CUDA device", why: (*why).into() })
    }

    /// Where kernels report, as an argument.
    pub(super) fn fault_pointer(&self) -> u64 {
        self.inner.fault.pointer()
    }
}
