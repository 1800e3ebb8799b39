//! Captures of graphs beside other threads. What a capture makes illegal in its whole context must wait for its
//! end, whichever thread asks for it; where it does not, the stand-in driver invalidates the capture as a GPU does.

use gradtx_emulator::{
    DriverCall, Order, Schedule, Variant, call_driver, configure, cublaslt, device, device_of_rank,
    device_with, on_device,
};
use gradtx_kernels::cuda::{Cuda, CudaGraph};
use gradtx_kernels::ops::{AdamW, Elementwise, Gemm, GemmDims};
use gradtx_kernels::{AsyncCopy, Buffer, Device, Error, GraphCapture, Result};
use std::sync::Barrier;
use std::time::Duration;

const PLAIN: Variant = Variant::PLAIN;
/// In which another thread can come into a capture.
const MOMENT: Duration = Duration::from_millis(30);

fn plain() -> Cuda {
    configure(Schedule { order: Order::Forward, race: false });
    device(PLAIN)
}

/// Four rounds of `y += x` by one graph on `cuda`, the second of which is captured. `meanwhile` is called in that
/// capture, between two operations.
fn rounds(cuda: &Cuda, before_capture: impl Fn(), meanwhile: impl Fn()) -> Result<()> {
    let x = cuda.buffer_from(&[1.0f32; 70])?;
    let mut y = cuda.zeros::<f32>(70)?;
    let mut graph = CudaGraph::default();
    for round in 1..=4 {
        if round == 2 {
            before_capture();
        }
        cuda.capture_or_launch::<Error>(&mut graph, &mut || {
            cuda.axpby(y.all_mut(), 0.5, x.all(), 1.0)?;
            if round == 2 {
                meanwhile();
            }
            cuda.axpby(y.all_mut(), 0.5, x.all(), 1.0)
        })?;
        assert_eq!(cuda.to_host(y.all())?, [round as f32; 70]);
    }
    assert_eq!(cuda.graph_launches(), 3);
    Ok(())
}

/// What another thread does with a device while this one captures. It is given the device, and a function that it
/// calls when it has prepared everything.
fn beside_a_capture(what: &str, cuda: Cuda, other: impl FnOnce(Cuda, &dyn Fn()) + Send) {
    let meet = Barrier::new(2);
    let capturing = plain();
    std::thread::scope(|scope| {
        let theirs = scope.spawn(|| {
            configure(Schedule { order: Order::Forward, race: false });
            let ready = || {
                // The capture begins, and is open.
                meet.wait();
                meet.wait();
            };
            other(cuda, &ready);
        });
        let in_capture = || {
            meet.wait();
            std::thread::sleep(MOMENT);
        };
        let found = rounds(&capturing, || _ = meet.wait(), in_capture);
        theirs.join().unwrap_or_else(|_| panic!("{what}: the other thread failed"));
        found.unwrap_or_else(|e| panic!("{what} in another thread: {e}"));
    });
}

#[test]
fn captures_survive_what_other_threads_do() {
    beside_a_capture("memory given back", plain(), |cuda, ready| {
        let buf = cuda.zeros::<f32>(100).expect("there is memory");
        ready();
        drop(buf);
    });
    beside_a_capture("memory taken", plain(), |cuda, ready| {
        ready();
        cuda.zeros::<f32>(100).expect("there is memory");
    });
    beside_a_capture("the first use of a kernel", plain(), |cuda, ready| {
        let x = cuda.buffer_from(&[1.0f32; 8]).expect("there is memory");
        let mut y = cuda.zeros::<f32>(8).expect("there is memory");
        ready();
        cuda.axpby(y.all_mut(), 3.0, x.all(), 1.0).expect("shapes agree");
        assert_eq!(cuda.to_host(y.all()).expect("lengths agree"), [3.0; 8]);
    });
    beside_a_capture("scratch memory that grows", plain(), |cuda, ready| {
        let values = cuda.zeros::<f32>(2_000).expect("there is memory");
        let mut sums = cuda.zeros::<f32>(2_000).expect("there is memory");
        ready();
        cuda.sum_squares(sums.all_mut(), values.all(), 2_000, 1).expect("shapes agree");
    });
    beside_a_capture("the first product by the library", device_with(PLAIN, &cublaslt()), |cuda, ready| {
        let a = cuda.buffer_from(&[1.0f32; 64]).expect("there is memory");
        let mut c = cuda.zeros::<f32>(64).expect("there is memory");
        ready();
        let dims = GemmDims::new(8, 8, 8, false, true);
        cuda.gemm(c.all_mut(), a.all(), a.all(), dims).expect("shapes agree");
        assert_eq!(cuda.to_host(c.all()).expect("lengths agree"), [8.0; 64]);
    });
    beside_a_capture("pinned memory taken and given back", plain(), |cuda, ready| {
        let held = cuda.pinned::<f32>(100).expect("there is memory");
        ready();
        drop(held);
        cuda.pinned::<f32>(200).expect("there is memory");
    });
    beside_a_capture("a new device, and one given back", plain(), |cuda, ready| {
        ready();
        drop(cuda);
        drop(plain());
    });
    beside_a_capture("another capture", plain(), |cuda, ready| {
        ready();
        rounds(&cuda, || (), || ()).expect("it waits for the first");
    });
}

/// It would be freed while it is recorded, or by a call that invalidates the recording.
#[test]
fn memory_dropped_in_a_capture_is_freed_after_it() {
    let cuda = plain();
    let mut y = cuda.zeros::<f32>(70).unwrap();
    let mut graph = CudaGraph::default();
    let mut spare = vec![cuda.zeros::<f32>(7).unwrap(), cuda.zeros::<f32>(8).unwrap()];
    for _ in 0..3 {
        cuda.capture_or_launch::<Error>(&mut graph, &mut || {
            cuda.fill(y.all_mut(), 1.0)?;
            drop(spare.pop());
            cuda.fill(y.all_mut(), 2.0)
        })
        .unwrap();
        assert_eq!(cuda.to_host(y.all()).unwrap(), [2.0; 70]);
    }
    assert_eq!((spare.len(), cuda.graph_launches()), (0, 2));
}

/// Calls that do not wait for the capture, which only the stand-in can be given: each invalidates it, and the next
/// one succeeds. On a device of its own, for the whole context is concerned.
#[test]
fn planted_calls_of_a_thread_invalidate_a_capture() {
    if on_device() {
        return;
    }
    for call in [
        DriverCall::SynchronizeContext,
        DriverCall::FreeMemory,
        DriverCall::FreeHostMemory,
        DriverCall::LoadModule,
        DriverCall::CopyOnDefaultStream,
    ] {
        configure(Schedule { order: Order::Forward, race: false });
        let cuda = device_of_rank(9);
        let planted = || assert_ne!(in_another_thread(&cuda, call), 0, "{call:?} is illegal now");
        let why = rounds(&cuda, || (), planted).expect_err("the capture is invalidated").to_string();
        assert!(why.contains("STREAM_CAPTURE_INVALIDATED"), "{call:?}: {why}");
        let elsewhere = device_of_rank(8);
        let planted = || _ = in_another_thread(&elsewhere, call);
        rounds(&cuda, || (), planted).unwrap_or_else(|e| panic!("{call:?} in another context: {e}"));
    }
}

/// What a call of the driver's returns in another thread, in this device's context.
fn in_another_thread(cuda: &Cuda, call: DriverCall) -> i32 {
    let other = || {
        cuda.memory().expect("its context can be bound");
        call_driver(call)
    };
    std::thread::scope(|scope| scope.spawn(other).join().expect("it does not panic"))
}
