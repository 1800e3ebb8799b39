//! Signals while a stage works: Ctrl-C, SIGTERM, and SIGUSR1, which SLURM sends before
//! the time of a job is over.
//!
//! The program may be killed at any moment and loses nothing that is finished. What a
//! signal gets beyond that depends on the stage:
//!
//! * One that works in steps for hours holds [`ShutdownGuard`]. The first signal then only asks
//!   ([`stop_requested`]); the stage goes to the end of its step, agrees with the other ranks, puts its
//!   checkpoint, and ends with [`crate::failure::stopped`]. A second signal ends it at once.
//! * Any other ends at once: with a terminal without half a bar, a message that says how to
//!   continue, and the exit code that a shell or a batch script expects.

use crate::failure::{ErrorReport, INTERRUPTED, STOPPED, TERMINATED};
use crate::ui::{self, Ui};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

/// Stages that will look at [`stop_requested`].
static GUARDS: AtomicUsize = AtomicUsize::new(0);
/// The exit code of the end that was stop_requested for; 0 while nobody asks.
static STOP_REQUESTED: AtomicU8 = AtomicU8::new(0);

/// The exit code that the stage should end with, once somebody has stop_requested it to.
pub fn stop_requested() -> Option<u8> {
    match STOP_REQUESTED.load(Ordering::Relaxed) {
        0 => None,
        code => Some(code),
    }
}

/// While this lives, signals ask, and the stage looks at [`stop_requested`] after every step.
pub struct ShutdownGuard(());

impl ShutdownGuard {
    /// The stage begins to look.
    pub fn begin() -> Self {
        GUARDS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for ShutdownGuard {
    fn drop(&mut self) {
        GUARDS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// From now on, these signals are answered.
pub fn watch(ui: &Ui) {
    static ONCE: Once = Once::new();
    let ui = ui.clone();
    ONCE.call_once(|| {
        // A file that grows past a limit is an error to be reported, not a death.
        let _ = flag::register(SIGXFSZ, Arc::default());
        // Without the thread the signals end the program as they always do, only less politely.
        if let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGUSR1]) {
            let wait = move || {
                for signal in signals.forever() {
                    answer(&ui, signal);
                }
            };
            let _ = std::thread::Builder::new().name("signals".into()).spawn(wait);
        }
    });
}

fn answer(ui: &Ui, signal: i32) {
    if GUARDS.load(Ordering::Relaxed) == 0 || stop_requested().is_some() {
        end(ui, signal);
    }
    STOP_REQUESTED.store(if signal == SIGINT { INTERRUPTED } else { STOPPED }, Ordering::Relaxed);
    ui.notice("stopping at the end of this step; once more to end at once");
}

fn end(ui: &Ui, signal: i32) {
    ui.clear();
    let (message, code) = match signal {
        SIGINT => ("interrupted", INTERRUPTED),
        SIGTERM => ("terminated by SIGTERM", TERMINATED),
        _ => ("ended by SIGUSR1", STOPPED),
    };
    let hint = "what is finished is safe: run the same command again to resume";
    if !ui::is_silent() {
        ErrorReport { message: message.into(), hint: Some(hint.into()), code }.print(ui.is_json());
    }
    // At once, as a kill would: no destructor may run beside the stage that is still working.
    signal_hook::low_level::exit(code.into());
}
