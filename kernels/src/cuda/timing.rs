//! Times of short operations.

use super::failed;
use crate::Result;
use cudarc::driver::{result, sys};
use std::time::Instant;

/// Seconds of some work, launched as a graph as often as this on a device that does nothing else: so short operations are
/// not waited for by the host.
///
/// # Safety
/// The stream must be alive; `work` may only queue operations in it that have run before, on memory that stays.
pub(super) unsafe fn times(
    stream: sys::CUstream,
    work: impl FnOnce() -> Result<()>,
    rounds: usize,
) -> Result<Vec<f64>> {
    let wait = || result::ctx::synchronize().map_err(failed("time operations"));
    wait()?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream is alive.
    unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed("begin a graph"))?;
    let done = work();
    // SAFETY: as above; the capture is ended whatever came of the work.
    let graph = unsafe { result::stream::end_capture(stream) };
    done?;
    let graph = graph.map_err(failed("end a graph"))?;
    // SAFETY: the graph was captured just now, and is not needed by its instance.
    let executable = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
    // SAFETY: as above. Nothing can be done about a failure.
    let _ = unsafe { result::graph::destroy(graph) };
    let executable = executable.map_err(failed("prepare a graph"))?;
    let round = || {
        wait()?;
        let begin = Instant::now();
        // SAFETY: the executable and the stream are alive.
        unsafe { result::graph::launch(executable, stream) }.map_err(failed("launch a graph"))?;
        wait()?;
        Ok(begin.elapsed().as_secs_f64())
    };
    let times = (0..rounds).map(|_| round()).collect::<Result<Vec<f64>>>();
    // SAFETY: it does not run. Nothing can be done about a failure.
    let _ = unsafe { result::graph::exec_destroy(executable) };
    times
}
