//! Device time of every operation: a pair of events around each launch.
//!
//! The device takes an event's time when everything before it is done, so a span holds its kernel
//! and, where the host is slower than the device, the time until the launch arrives. Graphs are not
//! used meanwhile: their launches cannot be distinguished.

use super::memory;
use super::stream::{Event, Stream};
use crate::Result;
use cudarc::driver::sys;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// What operations of one name took.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationTime {
    /// The kernel's name; products of matrices with their dimensions.
    pub name: String,
    /// Launches.
    pub calls: u64,
    /// Seconds of device time.
    pub seconds: f64,
    /// Floating-point operations, where the operation is bound by them; else 0.
    pub flops: f64,
    /// Bytes of the memory that it was given, each counted once; 0 if that says nothing.
    pub bytes: f64,
}

/// Work between two events.
struct Span {
    name: Cow<'static, str>,
    begin: Event,
    end: Event,
    work: Work,
}

/// What a launch has to do at least.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    pub flops: f64,
    pub bytes: f64,
}

/// The spans since the profile was started.
#[derive(Default)]
pub(super) struct Profile {
    on: AtomicBool,
    spans: Mutex<Vec<Span>>,
}

impl Profile {
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
    /// Forgets what was measured before, and measures from now on. The device is idle.
    pub fn start(&self) {
        memory::lock(&self.spans).clear();
        self.on.store(true, Ordering::Relaxed);
    }

    /// Measures nothing more.
    pub fn stop(&self) {
        self.on.store(false, Ordering::Relaxed);
    }

    /// What operations took since [`Self::start`], the longest first. The device is idle.
    pub fn times(&self) -> Result<Vec<OperationTime>> {
        let spans = std::mem::take(&mut *memory::lock(&self.spans));
        let mut times: HashMap<Cow<'static, str>, OperationTime> = HashMap::new();
        for Span { name, begin, end, work } in spans {
            let seconds = begin.seconds_until(&end)?;
            let time = times.entry(name).or_insert_with_key(|name| OperationTime {
                name: name.to_string(),
                calls: 0,
                seconds: 0.0,
                flops: 0.0,
                bytes: 0.0,
            });
            time.calls += 1;
            time.seconds += seconds;
            time.flops += work.flops;
            time.bytes += work.bytes;
        }
        let mut times: Vec<OperationTime> = times.into_values().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then_with(|| a.name.cmp(&b.name)));
        Ok(times)
    }

    /// Does what puts one operation into a queue, between two events; false if it put nothing there.
    pub fn span(
        &self,
        name: impl FnOnce() -> Cow<'static, str>,
        work: Work,
        stream: &Stream,
        queue: sys::CUstream,
        launch: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        let (begin, end) = (Event::with_time(stream)?, Event::with_time(stream)?);
        begin.record(queue)?;
        if !launch()? {
            return Ok(false);
        }
        end.record(queue)?;
        memory::lock(&self.spans).push(Span { name: name(), begin, end, work });
        Ok(true)
    }
}
