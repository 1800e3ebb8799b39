//! Time per operation, for benchmarks.
//!
//! Off by default, when an operation pays one relaxed load. While it is on, the time
//! of every operation that a caller asked for is added up under its name; what an
//! operation spends in others (the LM head in products, say) counts as its own.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Calls and time of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTime {
    /// Calls.
    pub calls: usize,
    /// Time in all of them.
    pub time: Duration,
}

/// What a device has measured.
#[derive(Debug, Default)]
pub(super) struct Profile {
    on: AtomicBool,
    depth: AtomicUsize,
    times: Mutex<BTreeMap<&'static str, OpTime>>,
}

/// Measures until it is dropped.
pub(super) struct Timed<'a> {
    profile: &'a Profile,
    op: &'static str,
    start: Option<Instant>,
}

impl Profile {
    /// [`super::Cpu::start_profile`].
    pub fn start(&self) {
        self.times.lock().expect("no holder of this lock panics").clear();
        self.on.store(true, Ordering::Relaxed);
    }

    /// [`super::Cpu::stop_profile`].
    pub fn stop(&self) -> BTreeMap<&'static str, OpTime> {
        self.on.store(false, Ordering::Relaxed);
        std::mem::take(&mut *self.times.lock().expect("no holder of this lock panics"))
    }

    /// [`super::Cpu::timed`].
    pub fn timed(&self, op: &'static str) -> Timed<'_> {
        if !self.on.load(Ordering::Relaxed) {
            return Timed { profile: self, op, start: None };
        }
        // Operations run one after another; a deeper one is part of the one that called it.
        let outermost = self.depth.fetch_add(1, Ordering::Relaxed) == 0;
        if !outermost {
            self.depth.fetch_sub(1, Ordering::Relaxed);
        }
        Timed { profile: self, op, start: outermost.then(Instant::now) }
    }
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            self.profile.depth.fetch_sub(1, Ordering::Relaxed);
            if let Ok(mut times) = self.profile.times.lock() {
                let entry = times.entry(self.op).or_default();
                entry.calls += 1;
                entry.time += start.elapsed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::Cpu;

    #[test]
    fn only_outermost_operations_count_and_only_while_on() {
        let cpu = Cpu::new(1);
        drop(cpu.timed("before"));
        cpu.start_profile();
        {
            let _outer = cpu.timed("outer");
            drop(cpu.timed("inner"));
        }
        drop(cpu.timed("outer"));
        let times = cpu.stop_profile();
        assert_eq!(times.keys().copied().collect::<Vec<_>>(), ["outer"]);
        assert_eq!(times["outer"].calls, 2);
        assert!(cpu.stop_profile().is_empty());
    }
}
