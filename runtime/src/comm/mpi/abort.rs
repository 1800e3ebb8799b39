//! How a job ends when one of its ranks cannot continue.

use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;
use std::io::Write;
use std::time::Duration;

/// How long MPI may take to end everything before this process ends itself, which the
/// launcher notices too.
const PATIENCE: Duration = Duration::from_secs(3);

/// Time for the last words of this process to pass through the launcher, which otherwise
/// puts words of its own into the middle of them.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Exit code of a job that ended in a panic; the same as a single process has.
const PANICKED: u8 = 101;

/// Ends all ranks with this exit code. May be called by any thread: MPI was promised calls
/// of one thread only, but after this one there is nothing left that could be disturbed,
/// and should MPI not manage to end, this process does without it.
pub(super) fn end_world(code: u8) -> ! {
    let give_up = || {
        std::thread::sleep(PATIENCE);
        std::process::abort();
    };
    // Without the thread only the second chance is lost.
    let _ = std::thread::Builder::new().name("end".into()).spawn(give_up);
    std::thread::sleep(LAST_WORDS);
    if mpi::is_initialized() && !mpi::is_finalized() {
        SimpleCommunicator::world().abort(code.into());
    }
    std::process::exit(code.into());
}

/// From now on a panic, in whatever thread, ends all ranks, and the message says `who`
/// panicked. That holds for panics that would be caught as well.
pub(super) fn on_panic(who: String) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        // In one piece: other ranks write to the same place. To a closed one nothing can be said.
        let _ = std::io::stderr().write_all(format!("error: {who} panicked; all ranks end\n").as_bytes());
        end_world(PANICKED);
    }));
}
