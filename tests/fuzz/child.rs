//! The process that reads mutated files: it may panic, abort, hang or run out of memory.
//!
//! In: a [`Job`] in an environment variable. Out, on the standard output that it was started
//! with: a line before every input and a line after it; the program's own output goes nowhere.

use crate::home;
use crate::mutate::Recipe;
use crate::random::{Random, number_of};
use crate::targets::{TARGETS, Target};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Environment variable of the job, as JSON.
pub const JOB: &str = "GRADTX_FUZZ_JOB";
/// Begins every line for the parent.
pub const MARK: &str = "@fuzz";
/// Address space that an input may take, in bytes, beyond what the process has when it starts.
const MEMORY: u64 = 2 << 30;
/// The stack of a program's main thread.
const STACK: usize = 8 << 20;

/// The program starts itself to render chat templates; started from here, that is this test.
/// It answers before the test harness reads its arguments.
#[used]
#[unsafe(link_section = ".init_array")]
static RENDERS: extern "C" fn() = render_if_asked;

extern "C" fn render_if_asked() {
    if std::env::args_os().nth(1).is_some_and(|arg| arg == gradtx_runtime::data::SERVER_ARGUMENT) {
        let is_well = gradtx_runtime::data::serve() == ExitCode::SUCCESS;
        std::process::exit(i32::from(!is_well));
    }
}

/// What a child does.
#[derive(Serialize, Deserialize)]
pub struct Job {
    /// Name of the target, or of a control.
    pub target: String,
    /// The home directory as it was made.
    pub home: PathBuf,
    /// The inputs.
    pub inputs: Inputs,
}

/// Inputs of a job.
#[derive(Clone, Serialize, Deserialize)]
pub enum Inputs {
    /// The seed files as they are.
    Seeds,
    /// Mutations, by number.
    Mutated {
        /// Seed of the whole run.
        seed: u64,
        /// The first.
        from: usize,
        /// The one after the last.
        to: usize,
    },
    /// One file.
    File(PathBuf),
}

/// The recipe of an input of a target.
pub fn recipe(target: &Target, seed: u64, index: usize) -> Recipe {
    Recipe::of(&mut Random::of(&[seed, number_of(target.name), index as u64]), target.seeds.len())
}

/// Does the job.
pub fn work(job: &Job) {
    let mut lines = take_output();
    let copy = tempfile::tempdir().unwrap();
    home::copy(&job.home, copy.path());
    std::env::set_current_dir(copy.path()).unwrap();
    limit_memory();
    let mut each = |index: usize, bytes: &[u8]| {
        writeln!(lines, "{MARK} begin {index}").unwrap();
        let verdict = read(job, bytes);
        writeln!(lines, "{MARK} {verdict} {index}").unwrap();
    };
    let target = TARGETS.iter().find(|target| target.name == job.target);
    match (&job.inputs, target) {
        (Inputs::File(path), _) => each(0, &std::fs::read(path).unwrap()),
        (Inputs::Seeds, Some(target)) => {
            home::seeds(&job.home, target).iter().enumerate().for_each(|(i, bytes)| each(i, bytes));
        }
        (&Inputs::Mutated { seed, from, to }, Some(target)) => {
            let seeds = home::seeds(&job.home, target);
            (from..to).for_each(|i| each(i, &recipe(target, seed, i).make(target.form, &seeds)));
        }
        (_, None) => panic!("no target of the name {}", job.target),
    }
}

/// The parent's pipe; from now on, what is printed goes nowhere.
fn take_output() -> File {
    let nowhere = File::options().write(true).open("/dev/null").unwrap();
    // SAFETY: both descriptors are open, and the copy belongs to nobody else.
    unsafe {
        let kept = libc::dup(1);
        libc::dup2(nowhere.as_raw_fd(), 1);
        File::from_raw_fd(kept)
    }
}

fn limit_memory() {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').next().and_then(|n| n.parse().ok()).unwrap();
    let most = pages * 4096 + MEMORY;
    let limits = [
        (libc::RLIMIT_AS, most),
        // Neither dumps nor giant files of inputs that go wrong.
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_FSIZE, 1 << 30),
    ];
    for (what, most) in limits {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the limit is a valid struct.
        assert_eq!(unsafe { libc::setrlimit(what, &limit) }, 0);
    }
}

/// Reads one input; how that ended: `ok`, `error` or `panic`.
fn read(job: &Job, bytes: &[u8]) -> &'static str {
    let control = CONTROLS.iter().find(|(name, _)| *name == job.target);
    let run = || match control {
        Some((_, read)) => read(bytes),
        None => {
            let target = TARGETS.iter().find(|target| target.name == job.target).unwrap();
            command(&job.home, target, bytes)
        }
    };
    let caught = || catch_unwind(AssertUnwindSafe(run));
    let ended = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, caught);
        thread.unwrap().join()
    });
    match ended {
        Ok(Ok(code)) if code == ExitCode::SUCCESS => "ok",
        Ok(Ok(code)) if code != ExitCode::from(101) => "error",
        _ => "panic",
    }
}

/// Puts an input into its place, runs the command, and tidies up.
fn command(home: &Path, target: &Target, bytes: &[u8]) -> ExitCode {
    for dir in target.fresh {
        let _ = std::fs::remove_dir_all(dir);
        // A translator is trained again, not repaired.
        if *dir != "run/translator" {
            home::copy(&home.join(dir), Path::new(dir));
        }
    }
    let place = home::resolve(home, target.place);
    std::fs::write(&place, bytes).unwrap();
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<&str> = match target.command {
        "" => text.lines().collect(),
        words => words.split(' ').collect(),
    };
    let words = ["gradtx", "--quiet", "--threads", "1"].into_iter().chain(words);
    let code = gradtx::run(words.map(Into::into));
    for made in ["out", "out.html", "out.json"] {
        let _ = std::fs::remove_dir_all(made);
        let _ = std::fs::remove_file(made);
    }
    // The directory may be gone: a finished training has no checkpoints.
    let _ = match std::fs::read(home.join(&place)) {
        Ok(before) => std::fs::write(&place, before),
        Err(_) => std::fs::remove_file(&place),
    };
    code
}

/// Readers that fail as the driver must notice, and one that does not.
const CONTROLS: [(&str, fn(&[u8]) -> ExitCode); 6] = [
    ("control-good", |_| ExitCode::SUCCESS),
    ("control-error", |_| ExitCode::from(1)),
    ("control-panic", |bytes| if bytes.contains(&7) { panic!("a byte 7") } else { ExitCode::SUCCESS }),
    ("control-hang", |_| {
        loop {
            std::thread::park();
        }
    }),
    ("control-memory", |_| {
        let bytes = vec![1u8; std::hint::black_box(4 << 30)];
        ExitCode::from(std::hint::black_box(bytes)[0])
    }),
    ("control-stack", |_| ExitCode::from(deep(1) as u8)),
];

#[expect(unconditional_recursion, reason = "the control that overflows the stack")]
fn deep(depth: u64) -> u64 {
    let here = std::hint::black_box([depth; 16]);
    deep(depth + 1) + here[3]
}
