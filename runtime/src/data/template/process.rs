//! Templates in child processes: one that runs out of memory, stack or time ends its own
//! process only.
//!
//! The child is this program again, started with [`SERVER_ARGUMENT`]. It reads one JSON
//! object per line, first the template, then conversations, and answers each with a line.
//! It ends when its standard input does.

use super::jinja::Jinja;
use super::{Request, Source};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The first argument of the program when it is to render templates.
pub const SERVER_ARGUMENT: &str = "__render-chat-templates";

/// Bytes of address space of a child.
const MEMORY: u64 = 1 << 30;
/// Seconds of computing that one conversation may take.
const SECONDS: i64 = 10;
/// Seconds that it may take where it does not compute.
const WAITING_SECONDS: i64 = 60;
/// Stack of the thread that compiles and renders.
const STACK: usize = 64 << 20;

static ISOLATED: AtomicBool = AtomicBool::new(false);

/// From now on templates are rendered in child processes. For programs that call [`serve`]
/// when they are started with [`SERVER_ARGUMENT`].
pub fn isolate() {
    ISOLATED.store(true, Ordering::Relaxed);
}

pub(super) fn is_isolated() -> bool {
    ISOLATED.load(Ordering::Relaxed)
}

/// An answer of a child.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Text(String),
    Error(String),
}

/// Children that render one template, as many as there are threads that ask at once.
pub(super) struct Pool {
    source: Source,
    idle: Mutex<Vec<Server>>,
}

impl Pool {
    /// Starts a first child, which compiles the template.
    pub fn start(source: Source) -> Result<Self, String> {
        let first = Server::start(&source)?;
        Ok(Self { source, idle: Mutex::new(vec![first]) })
    }

    /// The text of a conversation.
    pub fn render(&self, request: &Request) -> Result<String, String> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut server = match idle {
            Some(server) => server,
            None => Server::start(&self.source)?,
        };
        let reply = server.ask(request)?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(server);
        match reply {
            Reply::Text(text) => Ok(text),
            Reply::Error(why) => Err(why),
        }
    }
}

/// A child that has compiled the template.
struct Server {
    child: Child,
    replies: BufReader<ChildStdout>,
}

impl Server {
    fn start(source: &Source) -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("cannot start the process that renders it: {e}");
        // Names this program's file even where that was replaced since it was started.
        let mut child = Command::new("/proc/self/exe")
            .arg(SERVER_ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let replies = child.stdout.take().ok_or("cannot read from the process that renders it")?;
        let mut server = Self { child, replies: BufReader::new(replies) };
        match server.ask(source)? {
            Reply::Text(_) => Ok(server),
            Reply::Error(why) => Err(why),
        }
    }

    /// Sends a line and waits for the answer. The child has ended where this is an error.
    fn ask(&mut self, what: &impl Serialize) -> Result<Reply, String> {
        let mut line = serde_json::to_vec(what).map_err(|e| e.to_string())?;
        line.push(b'\n');
        let written = self.child.stdin.as_mut().map(|input| input.write_all(&line));
        let mut reply = String::new();
        let read = self.replies.read_line(&mut reply);
        if matches!(written, Some(Ok(()))) && read.is_ok() && reply.ends_with('\n') {
            return serde_json::from_str(&reply).map_err(|e| format!("the process that renders it: {e}"));
        }
        let ended = self.child.wait().map_err(|e| format!("the process that renders it: {e}"))?;
        Err(cause(ended))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Waiting closes the child's standard input first, which ends it.
        let _ = self.child.wait();
    }
}

/// Why a child is gone.
fn cause(ended: ExitStatus) -> String {
    match ended.signal() {
        Some(libc::SIGVTALRM | libc::SIGALRM) => {
            format!("rendering it takes more than {SECONDS} seconds; it may never end")
        }
        Some(libc::SIGABRT | libc::SIGSEGV | libc::SIGBUS) => format!(
            "rendering it takes more than {} MiB of memory, or it nests too deeply; it may never end",
            MEMORY >> 20
        ),
        _ => format!("the process that renders it ended by itself ({ended})"),
    }
}

/// The child: answers lines until there are no more.
pub fn serve() -> ExitCode {
    if let Err(error) = bound() {
        eprintln!("cannot limit this process: {error}");
        return ExitCode::FAILURE;
    }
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(answer_lines);
    match thread.map(|thread| thread.join()) {
        Ok(Ok(Ok(()))) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn answer_lines() -> std::io::Result<()> {
    let mut jinja: Option<Jinja> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        time_left(SECONDS, WAITING_SECONDS)?;
        let reply = match &jinja {
            None => serde_json::from_str::<Source>(&line).map_err(|e| e.to_string()).and_then(|source| {
                jinja = Some(Jinja::new(&source)?);
                Ok(String::new())
            }),
            Some(jinja) => serde_json::from_str::<Request>(&line)
                .map_err(|e| e.to_string())
                .and_then(|request| jinja.render(&request)),
        };
        time_left(0, 0)?;
        let reply = match reply {
            Ok(text) => Reply::Text(text),
            Err(why) => Reply::Error(why),
        };
        let mut out = serde_json::to_vec(&reply)?;
        out.push(b'\n');
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(&out)?;
        stdout.flush()?;
    }
    Ok(())
}

/// Bounds this process's memory, and leaves to its parent what signals of a terminal or a
/// batch system mean.
fn bound() -> std::io::Result<()> {
    for (what, bytes) in [(libc::RLIMIT_AS, MEMORY), (libc::RLIMIT_CORE, 0)] {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: `limit` is a valid rlimit that lives through the call.
        if unsafe { libc::setrlimit(what, &limit) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    Ok(())
}

/// After so many seconds of computing, or of any time, a signal ends the process; 0 for never.
fn time_left(computing: i64, any: i64) -> std::io::Result<()> {
    for (which, seconds) in [(libc::ITIMER_VIRTUAL, computing), (libc::ITIMER_REAL, any)] {
        let timer = libc::itimerval {
            it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
            it_value: libc::timeval { tv_sec: seconds, tv_usec: 0 },
        };
        // SAFETY: `timer` is a valid itimerval that lives through the call; the old one is not asked for.
        if unsafe { libc::setitimer(which, &timer, std::ptr::null_mut()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}
