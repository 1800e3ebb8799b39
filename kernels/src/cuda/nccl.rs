//! Groups of GPUs, by NVIDIA's NCCL, found at run time.
//!
//! In: views of device memory and shares of them. Out: the same memory, with sums or with the
//! other ranks' shares in it ([`Collective`]).
//!
//! What ranks do together goes on a stream of its own, which waits for what the compute stream
//! has queued so far and for nothing that comes later, so a backward pass continues meanwhile.
//! The host waits at the end: whatever is queued after that finds the result.
//!
//! A rank that has died, or has failed elsewhere, cannot be told from one that is slow: NCCL waits for it
//! without end, and says nothing where ranks share a node. So whoever waits does so up to a limit
//! (`GRADTX_NCCL_TIMEOUT`, in seconds), calls of the library that wait themselves are made on a thread of
//! their own, and a group that is dropped is aborted: only [`Collective::close_group`] destroys it, which
//! waits for the others.

use super::nccl_library::{
    ADVICE, Api, FLOAT32, ID_BYTES, IN_PROGRESS, RawComm, SUCCESS, SUM, TIMEOUT, UINT8, UniqueId, nccl,
    nccl_version, timeout,
};
use super::stream::{Event, Stream};
use super::{Cuda, CudaViewMut, failed, gate};
use crate::collective::{Candidate, Collective};
use crate::{Elem, Error, Result, ViewMut};
use cudarc::driver::{CudaContext, result, sys};
use std::ffi::{CStr, c_char, c_int};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// The limit, if that is shorter, until the group has worked once: what fails then usually fails on all ranks,
/// and those that wait for one of them can continue without a group.
const FIRST_TIMEOUT: Duration = Duration::from_secs(120);

/// What gives this device from those of other machines and from others of this one: the machine's
/// number since it was started, and the device's place on its bus. Parts of one GPU have one place.
fn place_of(cuda: &Cuda) -> Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let boot = boot.or_else(|_| std::fs::read_to_string("/proc/sys/kernel/hostname")).unwrap_or_default();
    let mut id = [0 as c_char; 32];
    // SAFETY: as many bytes may be written as there are; the device is one of the driver's.
    let status = unsafe {
        sys::cuDeviceGetPCIBusId(id.as_mut_ptr(), id.len() as c_int, cuda.stream()?.context.cu_device())
    };
    status.result().map_err(failed("tell the device's place on the bus"))?;
    // SAFETY: the driver ends the text with a zero, within the bytes above.
    let bus = unsafe { CStr::from_ptr(id.as_ptr()) }.to_string_lossy().into_owned();
    Ok(format!("{} {bus}", boot.trim()))
}

/// A stream for what devices exchange.
struct Beside {
    raw: sys::CUstream,
    context: Arc<CudaContext>,
}

impl Beside {
    fn new(stream: &Stream) -> Result<Self> {
        let _call = gate::enter();
        // Above the operations: other devices wait for what goes through here.
        let (_, greatest) =
            result::stream::get_priority_range().map_err(failed("tell its streams' priorities"))?;
        let kind = result::stream::StreamKind::NonBlocking;
        let raw = result::stream::create_with_priority(kind, greatest).map_err(failed("create a stream"))?;
        Ok(Self { raw, context: Arc::clone(&stream.context) })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let (raw, context) = (self.raw, Arc::clone(&self.context));
        gate::give_back(move || {
            if context.bind_to_thread().is_ok() {
                // SAFETY: created with this context, and destroyed once. Nothing can be done about a failure.
                let _ = unsafe { result::stream::destroy(raw) };
            }
        });
    }
}

/// A communicator on its way between threads.
struct Sent(RawComm);
// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Sent {}

impl Sent {
    fn raw(self) -> RawComm {
        self.0
    }
}

/// Does what may wait for other ranks without end on a thread of its own, with the device bound, and gives up
/// after `limit`; then the thread is left to itself, and `too_late` gets what comes of it in the end.
fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    context: &Arc<CudaContext>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
    too_late: impl FnOnce(T) + Send + 'static,
) -> Result<T> {
    let (tell, hear) = mpsc::channel();
    let context = Arc::clone(context);
    let run = move || {
        let done = context.bind_to_thread().map_err(failed("bind the device to a thread"));
        if let Err(mpsc::SendError(Ok(unheard))) = tell.send(done.and_then(|()| work())) {
            too_late(unheard);
        }
    };
    let failed = |why: String| Error::Driver { what: what.into(), why };
    let thread = std::thread::Builder::new().name("nccl".into()).spawn(run);
    thread.map_err(|e| failed(format!("cannot start a thread: {e}")))?;
    hear.recv_timeout(limit).unwrap_or_else(|_| Err(failed(not_in_time(limit))))
}

fn not_in_time(limit: Duration) -> String {
    let seconds = limit.as_secs();
    format!("not all ranks came within {seconds} s: one has failed, or {TIMEOUT} is too short. {ADVICE}")
}

/// One rank's place in a group of GPUs.
pub struct NcclGroup {
    api: &'static Api,
    /// Null once it was given back.
    comm: RawComm,
    rank: usize,
    size: usize,
    /// How long it waits for the other ranks: another limit until something was finished.
    limit: Duration,
    has_worked: bool,
    /// What the compute stream had queued when something was started.
    ready: Event,
    /// Everything that was started.
    done: Event,
    /// Whether something was started and not finished.
    busy: bool,
    stream: Beside,
    /// Keeps the compute stream alive, in which events were recorded.
    cuda: Cuda,
}

// SAFETY: a group may be used from any thread, one at a time.
unsafe impl Send for NcclGroup {}

impl NcclGroup {
    fn join(cuda: &Cuda, id: &[u8], rank: usize, size: usize) -> Result<Self> {
        let api = nccl().map_err(unavailable)?;
        let bytes: &[u8; ID_BYTES] = id.try_into().map_err(|_| {
            unavailable(format!("the id of a group has {ID_BYTES} bytes, this one {}", id.len()))
        })?;
        let id = UniqueId(bytes.map(|b| b as c_char));
        let limit = timeout().map_err(unavailable)?;
        let compute = cuda.stream()?;
        let what = format!("join a group of devices as rank {rank} of {size}");
        let init = {
            let what = what.clone();
            move || {
                let mut comm = ptr::null_mut();
                // SAFETY: the context is bound; one pointer is written.
                let status = unsafe { (api.init_rank)(&mut comm, size as c_int, id, rank as c_int) };
                api.check(&what, status, ptr::null_mut()).map(|()| Sent(comm))
            }
        };
        // SAFETY: nobody else knows it, and it is given back once. Nothing can be done about a failure.
        let too_late = |late: Sent| _ = unsafe { (api.abort)(late.raw()) };
        let comm = within(limit.min(FIRST_TIMEOUT), &what, &compute.context, init, too_late)?.raw();
        Ok(Self {
            ready: Event::new(compute)?,
            done: Event::new(compute)?,
            stream: Beside::new(compute)?,
            api,
            comm,
            rank,
            size,
            limit,
            has_worked: false,
            busy: false,
            cuda: cuda.clone(),
        })
    }

    /// Starts operations, as one, after what the compute stream has queued so far.
    fn start(&mut self, what: &str, operations: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.cuda.refuse_in_graph("exchange of values between devices")?;
        if self.comm.is_null() {
            return Err(Error::Driver { what: what.into(), why: "the group has failed before".into() });
        }
        self.ready.record(self.cuda.stream()?.raw)?;
        self.ready.hold(self.stream.raw)?;
        self.busy = true;
        // SAFETY: no arguments.
        self.api.check(what, unsafe { (self.api.group_start)() }, self.comm)?;
        let result = operations(self);
        // SAFETY: as above; ends what was started, also after a failure.
        let ended = unsafe { (self.api.group_end)() };
        result.and_then(|()| self.api.check(what, ended, self.comm))
    }

    /// Waits until everything that was started is done, or will never be; then the group is aborted, so that
    /// nothing uses memory that may be given back next.
    fn finish(&mut self) -> Result<()> {
        let finished = self.wait();
        if finished.is_err() {
            self.abort();
        }
        finished
    }

    fn wait(&mut self) -> Result<()> {
        if !self.busy {
            return Ok(());
        }
        // Binds the context.
        self.cuda.stream()?;
        self.done.record(self.stream.raw)?;
        let limit = if self.has_worked { self.limit } else { self.limit.min(FIRST_TIMEOUT) };
        let begin = Instant::now();
        while !self.done.has_passed()? {
            self.check_async()?;
            if begin.elapsed() > limit {
                return Err(Error::Driver { what: self.exchange(), why: not_in_time(limit) });
            }
            // Most waits are short; a long one leaves the core to others.
            match begin.elapsed() < Duration::from_millis(5) {
                true => std::thread::yield_now(),
                false => std::thread::sleep(Duration::from_micros(50)),
            }
        }
        self.check_async()?;
        (self.busy, self.has_worked) = (false, true);
        Ok(())
    }

    fn exchange(&self) -> String {
        format!("exchange values between {} devices (this is rank {})", self.size, self.rank)
    }

    /// Ends the group without waiting for anybody.
    fn abort(&mut self) {
        let comm = std::mem::replace(&mut self.comm, ptr::null_mut());
        if !comm.is_null() && self.stream.context.bind_to_thread().is_ok() {
            // SAFETY: the group is alive, and given back once. Nothing can be done about a failure.
            let _ = unsafe { (self.api.abort)(comm) };
        }
    }

    /// Ends the group with all other ranks.
    fn close(mut self) -> Result<()> {
        self.finish()?;
        let (api, comm) = (self.api, Sent(self.comm));
        if comm.0.is_null() {
            return Ok(());
        }
        let what = "leave a group of devices";
        let destroy = move || {
            // SAFETY: the group is alive, and given back once.
            api.check(what, unsafe { (api.destroy)(comm.raw()) }, ptr::null_mut())
        };
        self.comm = ptr::null_mut();
        within(self.limit, what, &self.stream.context, destroy, drop)
    }

    /// What happened to the group on its own.
    fn check_async(&self) -> Result<()> {
        let mut error = SUCCESS;
        // SAFETY: the group is alive; one number is written.
        let status = unsafe { (self.api.async_error)(self.comm, &mut error) };
        let what = self.exchange();
        self.api.check(&what, status, self.comm)?;
        let error = if error == IN_PROGRESS { SUCCESS } else { error };
        self.api.check(&what, error, self.comm)
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        self.abort();
    }
}

fn unavailable(why: String) -> Error {
    Error::Unavailable { what: "a group of GPUs", why }
}

/// Fails unless shares are one per rank, one after the other, and all of `len` elements. Returns
/// the length of all of them where it is the same.
fn check_shares(op: &'static str, shares: &[Range<usize>], size: usize, len: usize) -> Result<Option<usize>> {
    let follow = shares.windows(2).all(|pair| pair[0].end == pair[1].start);
    let ends = (shares.first().map(|s| s.start), shares.last().map(|s| s.end));
    if shares.len() != size || !follow || ends != (Some(0), Some(len)) {
        let why = format!("{len} elements cannot be shared between {size} ranks as {shares:?}");
        return Err(Error::Unsupported { op, why });
    }
    let first = shares[0].len();
    Ok(shares.iter().all(|share| share.len() == first).then_some(first))
}

impl Collective for Cuda {
    type Group = NcclGroup;

    fn candidate(&self) -> Candidate {
        let place = || place_of(self).map_err(|e| e.to_string());
        match nccl_version().and_then(|version| Ok((version, place()?))) {
            Ok((version, device)) => Candidate::Able { device, library: format!("NCCL {version}") },
            Err(why) => Candidate::Unable(why),
        }
    }

    fn new_group(&self) -> Result<Vec<u8>> {
        let api = nccl().map_err(unavailable)?;
        // Binds the context.
        self.stream()?;
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: one id is written.
        let status = unsafe { (api.unique_id)(&mut id) };
        api.check("make a group of devices", status, ptr::null_mut())?;
        Ok(id.0.map(|b| b as u8).to_vec())
    }

    fn join_group(&self, id: &[u8], rank: usize, size: usize) -> Result<NcclGroup> {
        NcclGroup::join(self, id, rank, size)
    }

    fn start_sums(
        &self,
        group: &mut NcclGroup,
        values: CudaViewMut<'_, f32>,
        shares: &[Range<usize>],
    ) -> Result<()> {
        let equal = check_shares("sums between devices", shares, group.size, values.len())?;
        let at = |share: &Range<usize>| values.pointer() + (share.start * size_of::<f32>()) as u64;
        let what = "start sums between devices";
        group.start(what, |group| {
            let NcclGroup { api, comm, rank, stream, .. } = group;
            if let Some(len) = equal {
                let own = at(&shares[*rank]);
                // SAFETY: `values` holds one share of `len` elements per rank, and the own one is at `own`.
                let status = unsafe {
                    (api.reduce_scatter)(values.pointer(), own, len, FLOAT32, SUM, *comm, stream.raw)
                };
                return api.check(what, status, *comm);
            }
            for (root, share) in shares.iter().enumerate().filter(|(_, share)| !share.is_empty()) {
                let (place, len, root) = (at(share), share.len(), root as c_int);
                // SAFETY: the share lies within `values`.
                let status =
                    unsafe { (api.reduce)(place, place, len, FLOAT32, SUM, root, *comm, stream.raw) };
                api.check(what, status, *comm)?;
            }
            Ok(())
        })
    }

    fn start_gather<T: Elem>(
        &self,
        group: &mut NcclGroup,
        values: CudaViewMut<'_, T>,
        shares: &[Range<usize>],
    ) -> Result<()> {
        let equal = check_shares("gathering between devices", shares, group.size, values.len())?;
        let at = |share: &Range<usize>| values.pointer() + (share.start * size_of::<T>()) as u64;
        let what = "start to gather values between devices";
        group.start(what, |group| {
            let NcclGroup { api, comm, rank, stream, .. } = group;
            if let Some(len) = equal {
                let (own, bytes) = (at(&shares[*rank]), len * size_of::<T>());
                // SAFETY: `values` holds one share of `bytes` bytes per rank, and the own one is at `own`.
                let status =
                    unsafe { (api.all_gather)(own, values.pointer(), bytes, UINT8, *comm, stream.raw) };
                return api.check(what, status, *comm);
            }
            for (root, share) in shares.iter().enumerate().filter(|(_, share)| !share.is_empty()) {
                let (place, bytes, root) = (at(share), share.len() * size_of::<T>(), root as c_int);
                // SAFETY: the share lies within `values`.
                let status = unsafe { (api.broadcast)(place, place, bytes, UINT8, root, *comm, stream.raw) };
                api.check(what, status, *comm)?;
            }
            Ok(())
        })
    }

    fn finish_group(&self, group: &mut NcclGroup) -> Result<()> {
        group.finish()
    }

    fn close_group(&self, group: NcclGroup) -> Result<()> {
        group.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_must_be_whole_and_one_per_rank() {
        let check = |shares: &[Range<usize>], len| check_shares("sums", shares, 2, len);
        assert_eq!(check(&[0..3, 3..6], 6).unwrap(), Some(3));
        assert_eq!(check(&[0..3, 3..3], 3).unwrap(), None);
        for shares in [[0..3, 4..6], [0..3, 3..5], [1..3, 3..6]] {
            assert!(check(&shares, 6).is_err(), "{shares:?} of 6");
        }
        assert!(check_shares("sums", &[0..3, 3..6], 3, 6).is_err(), "two shares of three ranks");
    }
}
