//! What may not happen while a graph is captured.
//!
//! A stream that is captured makes calls illegal that concern its whole context: waiting for the
//! context, giving back memory, loading and unloading code, changing what a kernel may use. Made by
//! any thread, they fail, and the capture is invalidated: its next launch fails with
//! `CUDA_ERROR_STREAM_CAPTURE_INVALIDATED`. All devices of a process that have one ordinal share one
//! context, so a thread cannot know what another one captures.
//!
//! Therefore captures and such calls exclude each other in the whole process. A capture waits until no
//! call is under way, and calls wait for its end, which is a matter of milliseconds: capturing runs
//! nothing. A thread that captures cannot wait for itself: what it gives back meanwhile
//! ([`give_back`]) is given back after the capture.
//!
//! Locks of a device (of its kernels, its plans of products) are taken after entering, never before.

use crate::{Error, Result};
use std::cell::{Cell, RefCell};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Read by calls, written by a capture.
static GATE: RwLock<()> = RwLock::new(());

/// What a thread gives back after its capture.
type Deferred = Vec<Box<dyn FnOnce()>>;

thread_local! {
    /// Calls under way on this thread, one within another.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// While this thread captures.
    static DEFERRED: RefCell<Option<Deferred>> = const { RefCell::new(None) };
}

/// A call is under way. Within another one, or within this thread's own capture, it waits for nothing.
pub(super) struct Call {
    _held: Option<RwLockReadGuard<'static, ()>>,
}

/// Enters: waits for the end of a capture in another thread.
pub(super) fn enter() -> Call {
    let within = DEPTH.replace(DEPTH.get() + 1) > 0 || is_capturing();
    Call { _held: (!within).then(|| GATE.read().unwrap_or_else(PoisonError::into_inner)) }
}

impl Drop for Call {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

fn is_capturing() -> bool {
    // At the end of a thread there is no capture any more.
    DEFERRED.try_with(|deferred| deferred.borrow().is_some()).unwrap_or(false)
}

/// Does what gives something back to the driver, once nothing is captured: now, or at the end of this
/// thread's own capture.
pub(super) fn give_back(work: impl FnOnce() + 'static) {
    if is_capturing() {
        let work: Box<dyn FnOnce()> = Box::new(work);
        return DEFERRED.with(|deferred| deferred.borrow_mut().get_or_insert_default().push(work));
    }
    let _call = enter();
    work();
}

/// This thread captures; no other does, and none makes calls that would invalidate the capture.
pub(super) struct Capturing {
    held: Option<RwLockWriteGuard<'static, ()>>,
}

impl Capturing {
    /// Waits for the calls and captures of other threads.
    ///
    /// # Errors
    /// If this thread captures already, or is within a call.
    pub fn begin() -> Result<Self> {
        if is_capturing() || DEPTH.get() > 0 {
            let why = "this thread captures another graph, or must not capture any now".into();
            return Err(Error::Unsupported { op: "capture of a graph", why });
        }
        let held = Some(GATE.write().unwrap_or_else(PoisonError::into_inner));
        DEFERRED.set(Some(Deferred::new()));
        Ok(Self { held })
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        let deferred = DEFERRED.take().unwrap_or_default();
        drop(self.held.take());
        for work in deferred {
            give_back(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    #[test]
    fn calls_wait_for_the_capture_of_another_thread() {
        let capture = Capturing::begin().unwrap();
        let (done, waits) = mpsc::channel();
        let call = std::thread::spawn(move || {
            let outer = enter();
            drop((enter(), outer));
            done.send(()).unwrap();
        });
        assert!(waits.recv_timeout(Duration::from_millis(50)).is_err(), "a call came into a capture");
        drop(capture);
        waits.recv().unwrap();
        call.join().unwrap();
    }

    #[test]
    fn a_capture_waits_for_calls() {
        let ended = Arc::new(AtomicBool::new(false));
        let call = enter();
        let capture = std::thread::spawn({
            let ended = Arc::clone(&ended);
            move || {
                let _capture = Capturing::begin().unwrap();
                assert!(ended.load(Ordering::SeqCst), "a capture began during a call");
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        ended.store(true, Ordering::SeqCst);
        drop(call);
        capture.join().unwrap();
    }

    #[test]
    fn memory_given_back_in_a_capture_waits_for_its_end() {
        let count = Arc::new(AtomicUsize::new(0));
        let add = |n: usize| {
            let count = Arc::clone(&count);
            move || assert_eq!(count.fetch_add(1, Ordering::SeqCst), n, "not in order")
        };
        let capture = Capturing::begin().unwrap();
        assert!(Capturing::begin().is_err(), "two captures of one thread");
        drop(enter());
        give_back(add(0));
        give_back(add(1));
        assert_eq!(count.load(Ordering::SeqCst), 0);
        drop(capture);
        assert_eq!(count.load(Ordering::SeqCst), 2);
        give_back(add(2));
        assert_eq!(count.load(Ordering::SeqCst), 3);
        let _call = enter();
        assert!(Capturing::begin().is_err(), "a capture within a call");
    }
}
