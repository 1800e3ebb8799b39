//! The device's own side: memory, views, copies, errors, and numbers that kernels refuse.

use crate::common::*;
use gradtx_emulator::{
    Order, Schedule, Variant, configure, cublaslt, device, device_with, late_kernels, on_device,
};
use gradtx_kernels::cuda::cubin::Cubins;
use gradtx_kernels::cuda::{CublasLt, Cuda, devices};
use gradtx_kernels::ops::{
    AdamW, Elementwise, Embedding, Gemm, GemmDims, Linear, LinearDims, LinearForward, Out, QkvDims, RmsNorm,
    RmsNormDims, RmsNormForward, Rope, RopeForward,
};
use gradtx_kernels::{
    AsyncCopy, Buffer, Complex64, CopyStream, Device, Error, GraphCapture, Pinned, Queues, Result, View,
    ViewMut,
};

fn plain() -> Cuda {
    configure(Schedule { order: Order::Forward, race: false });
    device(Variant::PLAIN)
}

#[test]
fn memory_views_and_copies() {
    let cuda = plain();
    assert_eq!(cuda.name(), "CUDA device 0, emulated device");
    let found = devices().expect("the stand-in shows a device");
    assert_eq!((found.len(), found[0].capability), (1, (8, 0)));
    let zeros = cuda.zeros::<f32>(123).unwrap();
    assert_eq!(cuda.to_host(zeros.all()).unwrap(), [0.0; 123]);
    assert!(cuda.zeros::<u32>(0).unwrap().is_empty());

    let values: Vec<u32> = (0..1000).collect();
    let mut buf = cuda.buffer_from(&values).unwrap();
    let part = buf.view(100..900).slice(1..11);
    assert_eq!(cuda.to_host(part).unwrap(), (101..111).collect::<Vec<_>>());
    let (mut low, high) = buf.view_mut(10..20).split_at_mut(4);
    cuda.copy(low.reborrow(), high.freeze().slice(1..5)).unwrap();
    assert_eq!(cuda.to_host(buf.view(9..16)).unwrap(), [9, 15, 16, 17, 18, 14, 15]);
    assert!(matches!(cuda.upload(buf.all_mut(), &[1, 2]), Err(Error::Shape { .. })));
}

/// Copies that take several pieces of pinned memory, and bytes that no piece ends at.
#[test]
fn large_copies() {
    let cuda = plain();
    let n = (9 << 20) + 5;
    let values: Vec<u8> = (0..n).map(|i| (i * 31 % 251) as u8).collect();
    let mut buf = cuda.buffer_from(&values).unwrap();
    assert!(cuda.to_host(buf.all()).unwrap() == values);
    cuda.upload(buf.view_mut(3..n - 2), &values[..n - 5]).unwrap();
    let back = cuda.to_host(buf.all()).unwrap();
    assert!(
        back[3..n - 2] == values[..n - 5] && back[..3] == values[..3] && back[n - 2..] == values[n - 2..]
    );
}

#[test]
fn filling_elements_of_every_size() {
    fn check<T: gradtx_kernels::Elem>(cuda: &Cuda, value: T) {
        let mut buf = cuda.zeros::<T>(37).unwrap();
        cuda.fill(buf.view_mut(3..30), value).unwrap();
        let back = cuda.to_host(buf.all()).unwrap();
        assert!(back[3..30].iter().all(|x| *x == value));
        assert!(back[..3].iter().chain(&back[30..]).all(|x| *x == T::zeroed()));
    }
    let cuda = plain();
    check(&cuda, 7u8);
    check(&cuda, gradtx_kernels::bf16::from_f32(1.5));
    check(&cuda, -2.25f32);
    check(&cuda, 0x0123_4567_89ab_cdefu64);
    check(&cuda, Complex64::new(1.0, -3.0));
}

#[test]
fn what_is_not_there_or_too_much_is_an_error() {
    let cuda = plain();
    let many = Cuda::with_cubins(3, Cubins::standard()).err().expect("there is one device").to_string();
    assert_eq!(many, "CUDA cannot be used: there is no device 3; the driver shows 1 of them");
    match cuda.zeros::<f64>(1 << 40).err() {
        Some(Error::OutOfMemory { device, bytes }) => {
            assert_eq!(bytes, 8 << 40);
            assert!(device.contains("bytes are free"), "{device}");
        }
        other => panic!("expected that memory is out, found {other:?}"),
    }
    assert!(cuda.zeros::<f64>(usize::MAX).is_err());
    let (free, total) = cuda.memory().unwrap();
    assert!(free > 0 && free <= total);
}

#[test]
#[should_panic(expected = "range 5..12 of a view of 10 elements")]
fn views_end_where_buffers_do() {
    let cuda = plain();
    let buf = cuda.zeros::<f32>(10).unwrap();
    let _ = buf.view(5..12);
}

/// Ids, targets and positions that are out of range are refused by the kernel, and reported by the
/// next wait; then the device continues.
#[test]
fn numbers_out_of_range() {
    let cuda = plain();
    let table = cuda.buffer_from(&[1.0f32; 12]).unwrap();
    let ids = cuda.buffer_from(&[0u32, 4, 1]).unwrap();
    let mut x = cuda.buffer_from(&[5.0f32; 9]).unwrap();
    cuda.embedding_forward(x.all_mut(), table.all(), ids.all(), 3).unwrap();
    let why = cuda.synchronize().unwrap_err().to_string();
    assert!(why.contains("not below the size of its table"), "{why}");
    assert_eq!(cuda.to_host(x.all()).unwrap(), [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0]);

    let dims = QkvDims { tokens: 1, heads: 1, kv_heads: 1, head_dim: 2 };
    let mut qkv = cuda.buffer_from(&[1.0f32; 6]).unwrap();
    let (angles, positions) = (cuda.zeros::<f32>(4).unwrap(), cuda.buffer_from(&[4u32]).unwrap());
    let angles = angles.all();
    cuda.rope_forward(RopeForward {
        qkv: qkv.all_mut(),
        bias: None,
        cos: angles,
        sin: angles,
        positions: positions.all(),
        dims,
    })
    .unwrap();
    let why = cuda.to_host(qkv.all()).unwrap_err().to_string();
    assert!(why.contains("position"), "{why}");
    assert_eq!(cuda.to_host(qkv.all()).unwrap(), [1.0; 6], "it is told once");

    // With a download of several pieces, or of nothing.
    let large = cuda.zeros::<u8>((9 << 20) + 1).unwrap();
    for part in [0..(9 << 20) + 1, 0..0] {
        cuda.embedding_forward(x.all_mut(), table.all(), ids.all(), 3).unwrap();
        let why = cuda.to_host(large.view(part.clone())).unwrap_err().to_string();
        assert!(why.contains("not below the size of its table"), "{why}");
        cuda.to_host(large.view(part)).unwrap();
    }
}

#[test]
fn wrong_shapes_are_refused_before_anything_runs() {
    let cuda = plain();
    let refused = |result: Result<()>| matches!(result, Err(Error::Shape { .. } | Error::Unsupported { .. }));
    let x = cuda.zeros::<f32>(10).unwrap();
    let [mut y, mut short] = [cuda.zeros::<f32>(10).unwrap(), cuda.zeros::<f32>(9).unwrap()];
    assert!(refused(cuda.axpby(short.all_mut(), 1.0, x.all(), 0.0)));
    let dims = RmsNormDims::new(2, 5, 1e-6);
    let w = x.view(0..5);
    let inv = short.all_mut();
    assert!(refused(cuda.rmsnorm_forward(RmsNormForward {
        y: y.all_mut(),
        inv_rms: inv,
        x: x.all(),
        w,
        dims
    })));
    let dims = GemmDims::new(2, 5, 3, false, true);
    assert!(refused(cuda.gemm(y.all_mut(), x.all(), x.all(), dims)));
    let overlapping = GemmDims { c_stride: 4, ..GemmDims::new(2, 5, 1, false, true) };
    assert!(refused(cuda.gemm(y.all_mut(), x.all(), x.all(), overlapping)));
}

/// No product at all, and a sum over nothing.
#[test]
fn empty_products() {
    let cuda = plain();
    let x = cuda.zeros::<f32>(0).unwrap();
    let mut c = cuda.buffer_from(&nan::<f32>(6)).unwrap();
    cuda.gemm(c.all_mut(), x.all(), x.all(), GemmDims::new(2, 3, 0, false, true)).unwrap();
    assert_eq!(cuda.to_host(c.all()).unwrap(), [0.0; 6]);
    let add = GemmDims { out: Out::Add, ..GemmDims::new(0, 3, 5, false, true) };
    cuda.gemm(c.view_mut(0..0), x.all(), x.all(), add).unwrap_err();
}

/// `y += x` and `y` on the host.
fn added(cuda: &Cuda, y: &mut <Cuda as Device>::Buf<f32>, x: &<Cuda as Device>::Buf<f32>) -> Vec<f32> {
    cuda.axpby(y.all_mut(), 1.0, x.all(), 1.0).expect("shapes agree");
    cuda.to_host(y.all()).expect("lengths agree")
}

/// Uploads beside the operations arrive where they are waited for. Where nobody waits, data is not
/// there, or is there too early: the stand-in driver must show both.
#[test]
fn uploads_beside_operations() {
    let cuda = plain();
    let mut copies = cuda.copy_stream().unwrap();
    let mut x = cuda.buffer_from(&[1.0f32; 6]).unwrap();
    let mut y = cuda.buffer_from(&[10.0f32; 6]).unwrap();
    assert_eq!(added(&cuda, &mut y, &x), [11.0; 6]);
    copies.release().unwrap();
    copies.upload_async(x.all_mut(), &[2.0; 6]).unwrap();
    // A forgotten `wait`: a GPU may be faster.
    let early = added(&cuda, &mut y, &x);
    assert!(gradtx_emulator::on_device() || early == [12.0; 6], "late copies came early: {early:?}");
    copies.wait().unwrap();
    assert_eq!(added(&cuda, &mut y, &x), early.iter().map(|y| y + 2.0).collect::<Vec<_>>());

    // A new buffer is filled with zeros first.
    let mut fresh = cuda.zeros::<f32>(6).unwrap();
    let mut its_copies = cuda.copy_stream().unwrap();
    late_kernels(true);
    its_copies.upload_async(fresh.all_mut(), &[3.0; 6]).unwrap();
    its_copies.wait().unwrap();
    assert_eq!(cuda.to_host(fresh.all()).unwrap(), [3.0; 6]);

    for released in [true, false] {
        cuda.upload(x.all_mut(), &[1.0; 6]).unwrap();
        cuda.upload(y.all_mut(), &[10.0; 6]).unwrap();
        cuda.synchronize().unwrap();
        cuda.axpby(y.all_mut(), 1.0, x.all(), 1.0).unwrap();
        if released {
            copies.release().unwrap();
        }
        copies.upload_async(x.all_mut(), &[5.0; 6]).unwrap();
        let found = cuda.to_host(y.all()).unwrap();
        // A forgotten `release`: what the operation reads has been overwritten.
        let expected = if released { 11.0 } else { 15.0 };
        assert!((gradtx_emulator::on_device() && !released) || found == [expected; 6], "{found:?}");
        copies.wait().unwrap();
        assert_eq!(cuda.to_host(x.all()).unwrap(), [5.0; 6]);
    }
    late_kernels(false);
}

/// What is pinned goes up by itself; who wants to write there again waits for that.
#[test]
fn uploads_from_pinned_memory() {
    let cuda = plain();
    let mut copies = cuda.copy_stream().unwrap();
    let mut x = cuda.zeros::<f32>(4).unwrap();
    let mut pinned = cuda.pinned::<f32>(6).unwrap();
    assert_eq!(pinned.values(), [0.0; 6]);
    pinned.values_mut().unwrap().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let before = cuda.uploaded();
    copies.upload_pinned(x.all_mut(), &pinned, 1..5).unwrap();
    assert_eq!(cuda.uploaded() - before, 16);
    let early = cuda.to_host(x.all()).unwrap();
    assert!(gradtx_emulator::on_device() || early == [0.0; 4], "late copies came early: {early:?}");
    // From another thread, as whoever prepares the next batch does.
    std::thread::scope(|scope| {
        scope.spawn(|| pinned.values_mut().unwrap().fill(9.0));
    });
    copies.wait().unwrap();
    assert_eq!(cuda.to_host(x.all()).unwrap(), [2.0, 3.0, 4.0, 5.0], "of before they were overwritten");
    copies.release().unwrap();
    copies.upload_pinned(x.all_mut(), &pinned, 2..6).unwrap();
    drop(pinned);
    copies.wait().unwrap();
    assert_eq!(cuda.to_host(x.all()).unwrap(), [9.0; 4], "given back when the copy is done");
    let none = cuda.pinned::<u64>(0).unwrap();
    assert!(none.values().is_empty());
    let mut few = cuda.zeros::<u64>(1).unwrap();
    let refused = copies.upload_pinned(few.all_mut(), &none, 0..0);
    assert!(matches!(refused, Err(Error::Shape { .. })));
}

#[test]
fn repeated_work() {
    let cuda = plain();
    let mut x = cuda.buffer_from(&[1.0f32; 70]).unwrap();
    let mut y = cuda.zeros::<f32>(70).unwrap();
    let (mut graph, mut asked) = (Default::default(), 0);
    for round in 1..=4 {
        cuda.upload(x.all_mut(), &[round as f32; 70]).unwrap();
        cuda.capture_or_launch::<Error>(&mut graph, &mut || {
            asked += 1;
            cuda.fill(y.view_mut(60..70), 0.5)?;
            cuda.axpby(y.view_mut(0..60), 2.0, x.view(0..60), 1.0)
        })
        .unwrap();
        // 2 · (1 + … + round)
        let expected = (round * (round + 1)) as f32;
        let found = cuda.to_host(y.all()).unwrap();
        assert!(found[..60].iter().all(|&y| y == expected) && found[60..] == [0.5; 10], "{round}: {found:?}");
        cuda.fill(y.view_mut(60..70), 9.0).unwrap();
    }
    assert_eq!((asked, cuda.graph_launches()), (2, 3));
}

/// `y = x + 1` in the second queue, `z = 2 y` in the first: with all marks, or without one of them.
fn in_two_queues(
    cuda: &Cuda,
    bufs: &mut [<Cuda as Device>::Buf<f32>; 4],
    forgotten: Option<usize>,
) -> Result<()> {
    let second = cuda.second_queue();
    let [x, one, y, z] = bufs;
    let order = |place: usize, from: &Cuda, to: &Cuda| -> Result<()> {
        let mut event = Default::default();
        from.record(&mut event)?;
        if forgotten == Some(place) { Ok(()) } else { to.wait_for(&event) }
    };
    order(0, cuda, &second)?;
    second.copy(y.all_mut(), x.all())?;
    second.axpby(y.all_mut(), 1.0, one.all(), 1.0)?;
    order(1, &second, cuda)?;
    cuda.axpby(z.all_mut(), 2.0, y.all(), 0.0)?;
    // What the second queue still reads is overwritten by the first.
    order(2, cuda, &second)?;
    second.axpby(y.all_mut(), 0.0, x.all(), 1.0)?;
    order(3, &second, cuda)?;
    cuda.fill(x.all_mut(), -1.0)
}

/// Operations in two queues go in the order of their marks, also in a graph; where one is forgotten, the
/// stand-in driver shows it in a graph by a wrong result, or refuses branches that nobody waits for.
#[test]
fn work_in_two_queues() {
    let cuda = plain();
    for late in [false, true] {
        late_kernels(late);
        for forgotten in [None, Some(0), Some(1), Some(2), Some(3)] {
            let mut bufs = [0.0f32, 1.0, 0.0, 0.0].map(|x| cuda.buffer_from(&[x; 70]).unwrap());
            let (mut graph, mut wrong) = (Default::default(), 0);
            for round in 1..=3 {
                cuda.upload(bufs[0].all_mut(), &[round as f32; 70]).unwrap();
                let asked = cuda.capture_or_launch::<Error>(&mut graph, &mut || {
                    in_two_queues(&cuda, &mut bufs, forgotten)
                });
                cuda.synchronize().unwrap();
                let found = cuda.to_host(bufs[3].all()).unwrap();
                wrong += usize::from(asked.is_err() || found != [2.0 * (round as f32 + 1.0); 70]);
            }
            match forgotten {
                None => assert_eq!(wrong, 0, "late {late}"),
                // Without the first event nothing of the second queue is part of the graph, and without the
                // last a branch stays open; without the second the first queue does not wait, if it is first.
                Some(0 | 3) => {
                    assert!(wrong > 0 || gradtx_emulator::on_device(), "{forgotten:?}, late {late}")
                }
                Some(1) => assert!(wrong > 0 || late || gradtx_emulator::on_device()),
                _ => {}
            }
        }
        late_kernels(false);
    }
}

/// What was there when the copies were released is read beside later operations.
#[test]
fn downloads_beside_operations() {
    let cuda = plain();
    let mut copies = cuda.copy_stream().unwrap();
    let x = cuda.buffer_from(&[1.0f32; 6]).unwrap();
    let mut y = cuda.buffer_from(&[10.0f32; 6]).unwrap();
    for late in [false, true] {
        late_kernels(late);
        cuda.upload(y.all_mut(), &[10.0; 6]).unwrap();
        cuda.axpby(y.all_mut(), 1.0, x.all(), 1.0).unwrap();
        copies.release().unwrap();
        let mut found = [0.0; 6];
        copies.download(&mut found, y.all()).unwrap();
        assert_eq!(found, [11.0; 6]);
        // Negative control: of what was asked for since then it knows nothing.
        cuda.fill(y.all_mut(), 5.0).unwrap();
        copies.download(&mut found, y.all()).unwrap();
        assert!(
            gradtx_emulator::on_device() || found == if late { [11.0; 6] } else { [5.0; 6] },
            "{found:?}"
        );
        assert!(copies.download(&mut found[..5], y.all()).is_err());
        late_kernels(false);
    }
}

/// What a graph cannot hold is an error, and the device continues.
#[test]
fn work_that_cannot_be_repeated() {
    let cuda = plain();
    let mut x = cuda.buffer_from(&[1.0f32; 8]).unwrap();
    fn refused(cuda: &Cuda, what: &str, mut work: impl FnMut() -> Result<()>) {
        let mut graph = Default::default();
        cuda.capture_or_launch::<Error>(&mut graph, &mut work).expect("the first time anything goes");
        let why = cuda.capture_or_launch::<Error>(&mut graph, &mut work).unwrap_err().to_string();
        assert!(why.contains(what) && why.contains("replayed as a graph"), "{why}");
        cuda.capture_or_launch::<Error>(&mut graph, &mut work).expect("then it begins again");
    }
    refused(&cuda, "upload", || cuda.upload(x.all_mut(), &[2.0; 8]));
    refused(&cuda, "download", || cuda.to_host(x.all()).map(drop));
    refused(&cuda, "zeros", || cuda.zeros::<f32>(5).map(drop));
    refused(&cuda, "synchronize", || cuda.synchronize());
    assert_eq!(cuda.to_host(x.all()).unwrap(), [2.0; 8]);
}

/// A graph holds the address of scratch memory; when that has moved the work starts over.
#[test]
fn repeated_work_after_scratch_memory_has_grown() {
    let cuda = plain();
    let mut g = cuda.buffer_from(&vec![2.0f32; 5000]).unwrap();
    let mut sums = cuda.zeros::<f32>(1).unwrap();
    let mut graph = Default::default();
    for round in 0..6 {
        cuda.fill(g.all_mut(), round as f32).unwrap();
        cuda.capture_or_launch::<Error>(&mut graph, &mut || {
            cuda.sum_squares(sums.all_mut(), g.all(), 1, 5000)
        })
        .unwrap();
        assert_eq!(cuda.to_host(sums.all()).unwrap(), [5000.0 * (round * round) as f32]);
        if round == 2 {
            // A partial sum for each of more rows than there is scratch memory for.
            let (many, mut each) = (cuda.zeros::<f32>(2_000).unwrap(), cuda.zeros::<f32>(2_000).unwrap());
            let before = cuda.allocations();
            for grown in [1, 1] {
                cuda.sum_squares(each.all_mut(), many.all(), 2_000, 1).unwrap();
                assert_eq!(cuda.allocations(), before + grown);
            }
        }
    }
    assert_eq!(cuda.graph_launches(), 2 + 2);
}

/// Device time by operation, with what each has to do; graphs run as single launches meanwhile.
#[test]
fn operations_are_measured_one_by_one() {
    let cuda = plain();
    let a = cuda.buffer_from(&[1.0f32; 32 * 48]).unwrap();
    let mut c = cuda.zeros::<f32>(32 * 32).unwrap();
    let dims = GemmDims::new(32, 32, 48, false, true);
    let mut graph = Default::default();
    let mut multiply = |cuda: &Cuda| {
        cuda.capture_or_launch(&mut graph, &mut || cuda.gemm(c.all_mut(), a.all(), a.all(), dims))
    };
    multiply(&cuda).unwrap();
    cuda.start_profile().unwrap();
    for _ in 0..3 {
        multiply(&cuda).unwrap();
    }
    let mut copy = cuda.zeros::<f32>(32 * 48).unwrap();
    cuda.copy(copy.all_mut(), a.all()).unwrap();
    let found = cuda.stop_profile().unwrap();
    assert_eq!(cuda.graph_launches(), 0);
    let named =
        |name: &str| found.iter().find(|o| o.name == name).unwrap_or_else(|| panic!("{name}: {found:?}"));
    let product = named("gemm_nt_64");
    assert_eq!((product.calls, product.flops), (3, 3.0 * 2.0 * 32.0 * 32.0 * 48.0));
    assert_eq!(named("copy").bytes, 2.0 * 4.0 * 32.0 * 48.0);
    assert_eq!(named("set memory").calls, 1);
    assert!(found.windows(2).all(|pair| pair[0].seconds >= pair[1].seconds), "{found:?}");
    assert!(found.iter().all(|o| o.seconds > 0.0 && o.seconds < 60.0), "{found:?}");

    multiply(&cuda).unwrap();
    cuda.start_profile().unwrap();
    assert_eq!(cuda.stop_profile().unwrap(), [], "what ran before is forgotten");
}

/// An algorithm may depend on the alignment of everything that it is given: the stand-in refuses one that was
/// asked for with a bias at a rounder address.
#[test]
fn products_with_biases_of_other_alignments() {
    if on_device() && cublaslt().describe().is_err() {
        return;
    }
    let cuda = device_with(Variant::PLAIN, &cublaslt());
    let values: Vec<f32> = (0..72).map(|i| (i % 7) as f32).collect();
    let x = cuda.buffer_from(&values[..64]).unwrap();
    let w = cuda.buffer_from(&[1.0f32; 64]).unwrap();
    let biases = cuda.buffer_from(&values).unwrap();
    let dims = LinearDims::new(8, 8, 8);
    for first in [0, 1, 2, 4, 0, 3] {
        let mut y = cuda.zeros::<f32>(64).unwrap();
        let bias = Some(biases.view(first..first + 8));
        cuda.linear_forward(LinearForward {
            y: y.all_mut(),
            x: x.all(),
            w: w.all(),
            bias,
            residual: None,
            dims,
        })
        .unwrap();
        let row = |i: usize| values[8 * i..8 * i + 8].iter().sum::<f32>();
        let expected: Vec<f32> = (0..64).map(|i| row(i / 8) + values[first + i % 8]).collect();
        assert_eq!(cuda.to_host(y.all()).unwrap(), expected, "a bias at element {first}");
    }
}

/// Algorithms are measured in a product's first launch, and the product is right from the next one on.
#[test]
fn algorithms_are_measured() {
    if on_device() && cublaslt().describe().is_err() {
        return;
    }
    let cuda = device_with(Variant::PLAIN, &cublaslt());
    let x = cuda.buffer_from(&[2.0f32; 64]).unwrap();
    let w = cuda.buffer_from(&[1.0f32; 64]).unwrap();
    let mut y = cuda.zeros::<f32>(64).unwrap();
    let dims = LinearDims::new(8, 8, 8);
    let mut multiply = || {
        let (x, w) = (x.all(), w.all());
        let y = y.all_mut();
        cuda.linear_forward(LinearForward { y, x, w, bias: None, residual: None, dims }).unwrap();
    };
    multiply();
    cuda.start_tuning();
    multiply();
    // Whether another algorithm is faster is up to the device.
    for line in cuda.stop_tuning() {
        assert!(line.contains("8x8x8") && line.split('\t').count() == 6, "{line}");
    }
    multiply();
    assert_eq!(cuda.stop_tuning(), [""; 0]);
    assert_eq!(cuda.to_host(y.all()).unwrap(), [16.0; 64]);
}

#[test]
fn which_library_multiplies() {
    let cuda = plain();
    assert_eq!(cuda.gemm_backend(), "kernels of our own (cuBLASLt is turned off)");
    if !gradtx_emulator::on_device() {
        let with = device_with(Variant::PLAIN, &cublaslt());
        assert_eq!(with.gemm_backend(), "cuBLASLt 12.4.5");
        assert_eq!(cublaslt().describe(), Ok("cuBLASLt 12.4.5".into()));
    }
    let nowhere = CublasLt::At("/nowhere/libcublasLt.so".into());
    let why = Cuda::with_parts(0, Cubins::standard(), &nowhere).err().expect("it is not there").to_string();
    assert!(why.starts_with("cuBLASLt cannot be used") && why.contains("/nowhere"), "{why}");
    // The driver's library is no cuBLASLt.
    let other = Cuda::with_parts(0, Cubins::standard(), &CublasLt::At("libcuda.so".into()));
    assert!(other.err().expect("it has no such functions").to_string().contains("cublasLt"));
}
