//! Graphs: operations that are asked for again and again, remembered by the driver.
//!
//! Work that is done for the first time runs as it is: kernels are loaded, scratch memory grows. The
//! second time it is captured instead of run, and the graph is launched; from then on a launch is all.
//! A graph holds addresses. Those of the caller's buffers stay the same by contract; when scratch
//! memory has moved since, the graph is forgotten and the work starts over.
//!
//! While one thread captures, no other makes calls that would invalidate the capture (`gate.rs`).

use super::{Cuda, failed, gate, memory};
use crate::{Error, GraphCapture, Result};
use cudarc::driver::{result, sys};
use std::sync::atomic::Ordering;

/// What is remembered of some work.
#[derive(Default)]
pub struct CudaGraph {
    state: State,
}

#[derive(Default)]
enum State {
    /// Nothing has run yet, or not with the scratch memory of now.
    #[default]
    New,
    /// It has run once, with scratch memory at these addresses.
    Known { workspace: [u64; 2] },
    /// It has been captured.
    Captured { workspace: [u64; 2], executable: Executable },
}

/// A graph that can be launched.
struct Executable {
    raw: sys::CUgraphExec,
    /// Keeps the stream alive on which it runs.
    cuda: Cuda,
}

// SAFETY: the driver's handles may be used from any thread; a graph is used by one at a time.
unsafe impl Send for Executable {}

impl Drop for Executable {
    fn drop(&mut self) {
        let (raw, cuda) = (self.raw, self.cuda.clone());
        gate::give_back(move || {
            if let Ok(stream) = cuda.stream() {
                // The graph may still be running. Nothing can be done about a failure.
                let _ = stream.synchronize();
                // SAFETY: instantiated in this context and destroyed once, when it does not run.
                let _ = unsafe { result::graph::exec_destroy(raw) };
            }
        });
    }
}

/// Ends a capture, also when the work panics.
struct Capture<'a> {
    cuda: &'a Cuda,
    stream: sys::CUstream,
    open: bool,
    /// Until the end, so dropped after it.
    _alone: gate::Capturing,
}

impl<'a> Capture<'a> {
    fn begin(cuda: &'a Cuda) -> Result<Self> {
        cuda.refuse_in_graph("capture_or_launch")?;
        let stream = cuda.stream()?.raw;
        let alone = gate::Capturing::begin()?;
        // Other threads may continue with their own streams.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed("begin a graph"))?;
        cuda.inner.capturing.store(true, Ordering::Release);
        Ok(Self { cuda, stream, open: true, _alone: alone })
    }

    fn end(&mut self) -> Result<sys::CUgraph> {
        self.open = false;
        self.cuda.inner.capturing.store(false, Ordering::Release);
        // SAFETY: the stream is alive and being captured.
        unsafe { result::stream::end_capture(self.stream) }.map_err(failed("end a graph"))
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open
            && let Ok(graph) = self.end()
        {
            // SAFETY: just made, and not used. Nothing can be done about a failure.
            let _ = unsafe { result::graph::destroy(graph) };
        }
    }
}

impl Cuda {
    /// Graphs launched so far, for tests and measurements.
    pub fn graph_launches(&self) -> u64 {
        self.inner.graph_launches.load(Ordering::Relaxed)
    }

    /// Fails while a graph is captured: what `op` does would not be part of it.
    pub(super) fn refuse_in_graph(&self, op: &'static str) -> Result<()> {
        if !self.inner.capturing.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::Unsupported { op, why: "work that is replayed as a graph cannot do this".into() })
    }

    /// The operations that `work` asks for, without doing them.
    fn capture<E: From<Error>>(
        &self,
        work: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Executable, E> {
        let mut capture = Capture::begin(self)?;
        // Its own error says more than that of the driver about a capture that is spoiled.
        work()?;
        let graph = capture.end()?;
        // SAFETY: the graph was captured just now.
        let raw = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: as above; an instance does not need it any more. Nothing can be done about a failure.
        let _ = unsafe { result::graph::destroy(graph) };
        let raw = raw.map_err(failed("prepare a graph"))?;
        Ok(Executable { raw, cuda: self.clone() })
    }

    fn workspace_pointers(&self) -> [u64; 2] {
        self.inner.workspaces.each_ref().map(|workspace| memory::lock(workspace).pointer())
    }
}

impl GraphCapture for Cuda {
    type Graph = CudaGraph;

    fn capture_or_launch<E: From<Error>>(
        &self,
        graph: &mut CudaGraph,
        work: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        if self.inner.profile.is_on() {
            return work();
        }
        let now = self.workspace_pointers();
        let same = match &graph.state {
            State::New => false,
            State::Known { workspace } | State::Captured { workspace, .. } => *workspace == now,
        };
        if !same {
            graph.state = State::New;
            work()?;
            graph.state = State::Known { workspace: self.workspace_pointers() };
            return Ok(());
        }
        if let State::Known { workspace } = graph.state {
            graph.state = State::New;
            let executable = self.capture(work)?;
            graph.state = State::Captured { workspace, executable };
        }
        if let State::Captured { executable, .. } = &graph.state {
            self.inner.graph_launches.fetch_add(1, Ordering::Relaxed);
            let stream = self.stream()?.raw;
            // SAFETY: graph and stream are alive; its addresses are those of buffers that the caller
            // keeps, and of scratch memory that has not moved.
            unsafe { result::graph::launch(executable.raw, stream) }.map_err(failed("launch a graph"))?;
        }
        Ok(())
    }
}
