//! The device's own side: memory, views, copies, errors, and numbers that kernels refuse.

use crate::common::*;
use crate::emulator::{Order, Schedule, Variant, configure, device};
use gradtx_kernels::cuda::cubin::Cubins;
use gradtx_kernels::cuda::{Cuda, devices};
use gradtx_kernels::ops::{Elementwise, Embedding, Gemm, GemmDims, Out, QkvDims, RmsNorm, RmsNormDims, Rope};
use gradtx_kernels::{Complex64, Device, Error, Result};

fn plain() -> Cuda {
    configure(Schedule { order: Order::Forward, race: false });
    device(Variant { race: false, plant: None })
}

#[test]
fn memory_views_and_copies() {
    let cuda = plain();
    assert_eq!(cuda.name(), "CUDA device 0, emulated device");
    let found = devices().expect("the stand-in shows a device");
    assert_eq!((found.len(), found[0].capability), (1, (8, 0)));
    let zeros = cuda.zeros::<f32>(123).unwrap();
    assert_eq!(cuda.to_host(Cuda::all(&zeros)).unwrap(), [0.0; 123]);
    assert_eq!(Cuda::len(&cuda.zeros::<u32>(0).unwrap()), 0);

    let values: Vec<u32> = (0..1000).collect();
    let mut buf = cuda.buffer_from(&values).unwrap();
    let part = Cuda::slice(Cuda::view(&buf, 100..900), 1..11);
    assert_eq!(cuda.to_host(part).unwrap(), (101..111).collect::<Vec<_>>());
    let (mut low, high) = Cuda::split_mut(Cuda::view_mut(&mut buf, 10..20), 4);
    cuda.copy(Cuda::reborrow(&mut low), Cuda::slice(Cuda::freeze(&high), 1..5)).unwrap();
    assert_eq!(cuda.to_host(Cuda::view(&buf, 9..16)).unwrap(), [9, 15, 16, 17, 18, 14, 15]);
    assert!(matches!(cuda.upload(Cuda::all_mut(&mut buf), &[1, 2]), Err(Error::Shape { .. })));
}

/// Copies that take several pieces of pinned memory, and bytes that no piece ends at.
#[test]
fn large_copies() {
    let cuda = plain();
    let n = (9 << 20) + 5;
    let values: Vec<u8> = (0..n).map(|i| (i * 31 % 251) as u8).collect();
    let mut buf = cuda.buffer_from(&values).unwrap();
    assert!(cuda.to_host(Cuda::all(&buf)).unwrap() == values);
    cuda.upload(Cuda::view_mut(&mut buf, 3..n - 2), &values[..n - 5]).unwrap();
    let back = cuda.to_host(Cuda::all(&buf)).unwrap();
    assert!(
        back[3..n - 2] == values[..n - 5] && back[..3] == values[..3] && back[n - 2..] == values[n - 2..]
    );
}

#[test]
fn filling_elements_of_every_size() {
    fn check<T: gradtx_kernels::Elem>(cuda: &Cuda, value: T) {
        let mut buf = cuda.zeros::<T>(37).unwrap();
        cuda.fill(Cuda::view_mut(&mut buf, 3..30), value).unwrap();
        let back = cuda.to_host(Cuda::all(&buf)).unwrap();
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
    let _ = Cuda::view(&buf, 5..12);
}

/// Ids, targets and positions that are out of range are refused by the kernel, and reported by the
/// next wait; then the device goes on.
#[test]
fn numbers_out_of_range() {
    let cuda = plain();
    let table = cuda.buffer_from(&[1.0f32; 12]).unwrap();
    let ids = cuda.buffer_from(&[0u32, 4, 1]).unwrap();
    let mut x = cuda.buffer_from(&[5.0f32; 9]).unwrap();
    cuda.embedding_forward(Cuda::all_mut(&mut x), Cuda::all(&table), Cuda::all(&ids), 3).unwrap();
    let why = cuda.synchronize().unwrap_err().to_string();
    assert!(why.contains("not below the size of its table"), "{why}");
    assert_eq!(cuda.to_host(Cuda::all(&x)).unwrap(), [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0]);

    let dims = QkvDims { tokens: 1, heads: 1, kv_heads: 1, head_dim: 2 };
    let mut qkv = cuda.buffer_from(&[1.0f32; 6]).unwrap();
    let (angles, positions) = (cuda.zeros::<f32>(4).unwrap(), cuda.buffer_from(&[4u32]).unwrap());
    let angles = Cuda::all(&angles);
    cuda.rope_forward(Cuda::all_mut(&mut qkv), None, angles, angles, Cuda::all(&positions), dims).unwrap();
    let why = cuda.to_host(Cuda::all(&qkv)).unwrap_err().to_string();
    assert!(why.contains("position"), "{why}");
}

#[test]
fn wrong_shapes_are_refused_before_anything_runs() {
    let cuda = plain();
    let refused = |result: Result<()>| matches!(result, Err(Error::Shape { .. } | Error::Unsupported { .. }));
    let x = cuda.zeros::<f32>(10).unwrap();
    let [mut y, mut short] = [cuda.zeros::<f32>(10).unwrap(), cuda.zeros::<f32>(9).unwrap()];
    assert!(refused(cuda.axpby(Cuda::all_mut(&mut short), 1.0, Cuda::all(&x), 0.0)));
    let dims = RmsNormDims::new(2, 5, 1e-6);
    let w = Cuda::view(&x, 0..5);
    let inv = Cuda::all_mut(&mut short);
    assert!(refused(cuda.rmsnorm_forward(Cuda::all_mut(&mut y), inv, Cuda::all(&x), w, dims)));
    let dims = GemmDims::new(2, 5, 3, false, true);
    assert!(refused(cuda.gemm(Cuda::all_mut(&mut y), Cuda::all(&x), Cuda::all(&x), dims)));
    let overlapping = GemmDims { c_stride: 4, ..GemmDims::new(2, 5, 1, false, true) };
    assert!(refused(cuda.gemm(Cuda::all_mut(&mut y), Cuda::all(&x), Cuda::all(&x), overlapping)));
}

/// No product at all, and a sum over nothing.
#[test]
fn empty_products() {
    let cuda = plain();
    let x = cuda.zeros::<f32>(0).unwrap();
    let mut c = cuda.buffer_from(&nan::<f32>(6)).unwrap();
    cuda.gemm(Cuda::all_mut(&mut c), Cuda::all(&x), Cuda::all(&x), GemmDims::new(2, 3, 0, false, true))
        .unwrap();
    assert_eq!(cuda.to_host(Cuda::all(&c)).unwrap(), [0.0; 6]);
    let add = GemmDims { out: Out::Add, ..GemmDims::new(0, 3, 5, false, true) };
    cuda.gemm(Cuda::view_mut(&mut c, 0..0), Cuda::all(&x), Cuda::all(&x), add).unwrap_err();
}
