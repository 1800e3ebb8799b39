//! Matrix products against the definition, and the promises that packing rests on:
//! bits depend neither on threads nor on the other rows.

use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::{Gemm, GemmDims, Out};
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Complex64, Error, Real};

fn random<X: Real>(stream: &mut Stream, len: usize) -> Vec<X> {
    (0..len).map(|_| X::from_f64(stream.normal())).collect()
}

/// The definition, in f64.
fn naive(c: &[f64], a: &[f64], b: &[f64], d: &GemmDims) -> Vec<f64> {
    let mut out = c.to_vec();
    for i in 0..d.m {
        for j in 0..d.n {
            let sum: f64 = (0..d.k)
                .map(|l| {
                    let x = if d.trans_a { a[l * d.a_stride + i] } else { a[i * d.a_stride + l] };
                    let y = if d.trans_b { b[j * d.b_stride + l] } else { b[l * d.b_stride + j] };
                    x * y
                })
                .sum();
            let old = if d.out == Out::Add { c[i * d.c_stride + j] } else { 0.0 };
            out[i * d.c_stride + j] = old + d.alpha * sum;
        }
    }
    out
}

/// Largest difference between the device's product and the definition, relative to √k.
fn error<X: Real>(dims: GemmDims, threads: usize) -> f64
where
    Cpu: Gemm<X>,
{
    let mut stream = Stream::new(dims.m as u64 * 131 + dims.n as u64 * 17 + dims.k as u64);
    let rows = |trans: bool, r: usize, c: usize| if trans { c } else { r };
    let a: Vec<X> = random(&mut stream, rows(dims.trans_a, dims.m, dims.k) * dims.a_stride);
    let b: Vec<X> = random(&mut stream, rows(dims.trans_b, dims.k, dims.n) * dims.b_stride);
    let mut c: Vec<X> = random(&mut stream, dims.m * dims.c_stride);
    let wide = |x: &[X]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let expected = naive(&wide(&c), &wide(&a), &wide(&b), &dims);
    if dims.out == Out::Assign {
        for i in 0..dims.m {
            c[i * dims.c_stride..][..dims.n].fill(X::from_f64(f64::NAN));
        }
    }
    Cpu::new(threads).gemm(&mut c, &a, &b, dims).expect("the shapes fit");
    let scale = (dims.k as f64).sqrt().max(1.0);
    let differences =
        wide(&c).iter().zip(&expected).map(|(got, want)| (got - want).abs() / scale).collect::<Vec<_>>();
    // Not f64::max, which would lose a NaN.
    differences.into_iter().fold(0.0, |worst, d| if d.is_nan() || d > worst { d } else { worst })
}

#[test]
fn every_transpose_stride_and_output() {
    for (m, n, k) in
        [(1, 1, 1), (1, 7, 5), (5, 1, 123), (5, 123, 2), (123, 5, 1100), (17, 33, 0), (70, 66, 513)]
    {
        for case in 0..16 {
            let mut dims = GemmDims::new(m, n, k, case & 1 > 0, case & 2 > 0);
            if case & 4 > 0 {
                dims.a_stride += 3;
                dims.b_stride += 5;
                dims.c_stride += 7;
            }
            if case & 8 > 0 {
                dims = GemmDims { alpha: -0.75, ..dims.add() };
            }
            let [single, double, complex] =
                [error::<f32>(dims, 2), error::<f64>(dims, 2), error::<Complex64>(dims, 1)];
            assert!(single <= 5e-6, "f32 {single:e} {dims:?}");
            assert!(double <= 1e-13, "f64 {double:e} {dims:?}");
            assert!(complex <= 1e-13, "complex {complex:e} {dims:?}");
        }
    }
}

#[test]
fn the_check_sees_a_wrong_product() {
    let dims = GemmDims::new(4, 4, 4, false, false);
    let a: Vec<f64> = random(&mut Stream::new(1), 16);
    let b: Vec<f64> = random(&mut Stream::new(2), 16);
    let right = naive(&[0.0; 16], &a, &b, &dims);
    let wrong = naive(&[0.0; 16], &a, &b, &GemmDims { trans_b: true, ..dims });
    assert!(right.iter().zip(&wrong).any(|(x, y)| (x - y).abs() > 1e-3));
}

/// The m rows of `x wᵀ` (or `x w`) in f32, on this many threads.
fn product(x: &[f32], w: &[f32], m: usize, n: usize, k: usize, trans_b: bool, threads: usize) -> Vec<f32> {
    let mut c = vec![f32::NAN; m * n];
    Cpu::new(threads)
        .gemm(&mut c, &x[..m * k], w, GemmDims::new(m, n, k, false, trans_b))
        .expect("the shapes fit");
    c
}

#[test]
fn bits_depend_neither_on_threads_nor_on_other_rows() {
    let shapes = [
        (1152, 896),
        (128, 896),
        (64, 896),
        (8, 896),
        (5, 123),
        (33, 700),
        (300, 2816),
        (47, 1030),
        (16, 512),
        (1, 64),
        (2, 2),
    ];
    for (n, k) in shapes {
        for trans_b in [true, false] {
            let most = 150;
            let mut stream = Stream::new((n * k) as u64);
            let x: Vec<f32> = random(&mut stream, most * k);
            let w: Vec<f32> = random(&mut stream, n * k);
            let whole = product(&x, &w, most, n, k, trans_b, 1);
            for threads in [2, 3] {
                assert_eq!(
                    whole,
                    product(&x, &w, most, n, k, trans_b, threads),
                    "{threads} threads, {n}×{k}"
                );
            }
            for m in (1..=17).chain([31, 64, 65, 128]) {
                let first = (m * 7) % (most - m);
                let part = product(&x[first * k..], &w, m, n, k, trans_b, 2);
                assert_eq!(part, whole[first * n..(first + m) * n], "{m} rows alone, {n}×{k} {trans_b}");
            }
        }
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let cpu = Cpu::new(1);
    let (a, b, mut c) = (vec![1f32; 6], vec![1f32; 6], vec![0f32; 4]);
    let dims = GemmDims::new(2, 2, 3, false, false);
    cpu.gemm(&mut c, &a, &b, dims).expect("the shapes fit");
    assert_eq!(c, [3.0; 4]);
    let short = [
        cpu.gemm(&mut c[..3], &a, &b, dims),
        cpu.gemm(&mut c, &a[..5], &b, dims),
        cpu.gemm(&mut c, &a, &b[..5], dims),
    ];
    for (result, name) in short.into_iter().zip(["c", "a", "b"]) {
        assert!(matches!(result, Err(Error::Shape { what, .. }) if what == name));
    }
    let overlapping = GemmDims { c_stride: 1, ..dims };
    assert!(matches!(cpu.gemm(&mut c, &a, &b, overlapping), Err(Error::Unsupported { .. })));
}
