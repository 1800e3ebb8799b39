//! Ctrl-C and SIGTERM while a stage works.
//!
//! The program may be killed at any moment and loses nothing that is finished, so these
//! signals need no help to be safe. What they get is a terminal without half a bar, a
//! message that says how to go on, and the exit code that a shell expects.

use crate::failure::Told;
use crate::ui::Ui;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use std::sync::{Arc, Once};

/// From now on, these signals end the program with a message.
pub fn watch(ui: &Ui) {
    static ONCE: Once = Once::new();
    let ui = ui.clone();
    ONCE.call_once(|| {
        // A file that grows past a limit is an error to be told, not a death.
        let _ = flag::register(SIGXFSZ, Arc::default());
        // Without the thread the signals end the program as they always do, only less politely.
        if let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) {
            let wait = move || {
                if let Some(signal) = signals.forever().next() {
                    end(&ui, signal);
                }
            };
            let _ = std::thread::Builder::new().name("signals".into()).spawn(wait);
        }
    });
}

fn end(ui: &Ui, signal: i32) {
    ui.clear();
    let message = if signal == SIGINT { "interrupted" } else { "terminated by SIGTERM" };
    let hint = "what is finished is safe: run the same command again to go on";
    let code = 128 + signal as u8;
    Told { message: message.into(), hint: Some(hint.into()), code }.print(ui.is_json());
    // At once, as a kill would: no destructor may run beside the stage that is still working.
    signal_hook::low_level::exit(code.into());
}
