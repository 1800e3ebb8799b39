//! Matrix products of slices.
//!
//! `f32` goes through the gemm library, which picks its instruction set at run time
//! (products of very few rows through a kernel of ours, [`super::skinny`]);
//! `f64` and complex run plain loops. Both keep two promises that "several adapters
//! in one stream are bit-identical to each alone" rests on:
//!
//! * an element's bits do not depend on how many threads worked;
//! * a row of C depends on its own row of op(A) and on B alone, not on the number of
//!   other rows or on their values.
//!
//! Every element of C is a sum over k in order, in chunks that depend on k only. The
//! library would choose other chunks, or other kernels that sum in another order, for
//! small matrices; [`library`] says how that is kept from happening.

#[cfg(target_arch = "x86_64")]
use super::skinny;
use crate::ops::{GemmDims, Out};
use crate::{Complex64, Real};
use gemm_common::Parallelism;
use rayon::prelude::*;

/// Longest sum over k that the library is asked for at once; it never splits one this short.
const K_CHUNK: usize = 512;

/// Types with a matrix product on slices. Dimensions must have been checked by [`super::gemm::check`].
pub trait Product: Real {
    /// [`Gemm::gemm`](crate::ops::Gemm::gemm) with up to `threads` threads of the rayon pool that it is called in.
    ///
    /// # Panics
    /// If a slice is shorter than `dims` says.
    fn product(c: &mut [Self], a: &[Self], b: &[Self], dims: GemmDims, threads: usize);
}

/// Elements that `rows` rows of `cols` with this stride reach over.
pub(super) fn reach(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// Rows and columns of A and B as they are stored.
pub(super) fn stored(dims: &GemmDims) -> [(usize, usize); 2] {
    let a = if dims.trans_a { (dims.k, dims.m) } else { (dims.m, dims.k) };
    let b = if dims.trans_b { (dims.n, dims.k) } else { (dims.k, dims.n) };
    [a, b]
}

/// Multiplies C by nothing: the case of an empty sum.
fn clear<X: Real>(c: &mut [X], dims: &GemmDims) {
    if dims.out == Out::Assign && dims.n > 0 {
        for row in c.chunks_mut(dims.c_stride.max(dims.n)).take(dims.m) {
            row[..dims.n].fill(X::zero());
        }
    }
}

impl Product for f32 {
    fn product(c: &mut [f32], a: &[f32], b: &[f32], dims: GemmDims, threads: usize) {
        let GemmDims { m, n, k, .. } = dims;
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            return clear(c, &dims);
        }
        let chunk = k.div_ceil(k.div_ceil(K_CHUNK));
        #[cfg(target_arch = "x86_64")]
        if skinny::fits(&dims) {
            let done = skinny::product(c, a, b, &dims, chunk, threads);
            if done < n {
                let rest = GemmDims { n: n - done, ..dims };
                library(&mut c[done..], a, &b[done * dims.b_stride..], rest, chunk, threads);
            }
            return;
        }
        library(c, a, b, dims, chunk, threads);
    }
}

/// Through the gemm library, with rows and columns exchanged (it likes columns of C to be
/// contiguous, so it computes `Cᵀ = op(B)ᵀ op(A)ᵀ`). No dimension may be 0.
///
/// Two measures make rows independent of each other. The sum over k is cut here, into
/// equal chunks of at most [`K_CHUNK`]: the library's own chunk length depends on all
/// three dimensions but is never shorter. And `conj_dst` is set, which means nothing for
/// real numbers but keeps the library from its special kernels for thin matrices, whose
/// order of summation is another one.
fn library(c: &mut [f32], a: &[f32], b: &[f32], dims: GemmDims, chunk: usize, threads: usize) {
    let GemmDims { m, n, k, .. } = dims;
    let [(a_rows, a_cols), (b_rows, b_cols)] = stored(&dims);
    assert!(c.len() >= reach(m, n, dims.c_stride) && (m == 1 || dims.c_stride >= n), "c is too short");
    assert!(a.len() >= reach(a_rows, a_cols, dims.a_stride), "a is too short");
    assert!(b.len() >= reach(b_rows, b_cols, dims.b_stride), "b is too short");
    let strides =
        |trans: bool, stride: usize| if trans { (1, stride as isize) } else { (stride as isize, 1) };
    let (a_row, a_k) = strides(dims.trans_a, dims.a_stride);
    let (b_k, b_col) = strides(dims.trans_b, dims.b_stride);
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let gemm = gemm_f32::gemm::f32::get_gemm_fn();
    for start in (0..k).step_by(chunk) {
        let depth = chunk.min(k - start);
        let read_c = start > 0 || dims.out == Out::Add;
        let (conj_dst, conj_lhs, conj_rhs) = (true, false, false);
        // SAFETY: the assertions above keep every element that these strides reach, for
        // `depth` values of k from `start`, inside the slices; C is borrowed mutably and
        // its rows do not overlap.
        unsafe {
            gemm(
                n,
                m,
                depth,
                c.as_mut_ptr(),
                dims.c_stride as isize,
                1,
                read_c,
                b.as_ptr().offset(start as isize * b_k),
                b_k,
                b_col,
                a.as_ptr().offset(start as isize * a_k),
                a_row,
                a_k,
                1.0,
                dims.alpha as f32,
                conj_dst,
                conj_lhs,
                conj_rhs,
                parallelism,
            );
        }
    }
}

/// The plain product, a row of C at a time: inner loops run over contiguous rows of B.
fn plain<X: Real>(c: &mut [X], a: &[X], b: &[X], dims: GemmDims, threads: usize) {
    if dims.m == 0 || dims.n == 0 {
        return;
    }
    if dims.k == 0 {
        return clear(c, &dims);
    }
    let alpha = X::from_f64(dims.alpha);
    let row = |(i, c_row): (usize, &mut [X])| {
        let c_row = &mut c_row[..dims.n];
        if dims.out == Out::Assign {
            c_row.fill(X::zero());
        }
        let a_at = |l: usize| if dims.trans_a { a[l * dims.a_stride + i] } else { a[i * dims.a_stride + l] };
        if dims.trans_b {
            for (j, value) in c_row.iter_mut().enumerate() {
                let b_row = &b[j * dims.b_stride..][..dims.k];
                let sum: X = b_row.iter().enumerate().map(|(l, &b)| a_at(l) * b).sum();
                *value += alpha * sum;
            }
        } else {
            for l in 0..dims.k {
                let factor = alpha * a_at(l);
                let b_row = &b[l * dims.b_stride..][..dims.n];
                for (value, &b) in c_row.iter_mut().zip(b_row) {
                    *value += factor * b;
                }
            }
        }
    };
    let c = &mut c[..reach(dims.m, dims.n, dims.c_stride)];
    let stride = dims.c_stride.max(dims.n);
    if threads > 1 {
        c.par_chunks_mut(stride).enumerate().for_each(row);
    } else {
        c.chunks_mut(stride).enumerate().for_each(row);
    }
}

impl Product for f64 {
    fn product(c: &mut [f64], a: &[f64], b: &[f64], dims: GemmDims, threads: usize) {
        plain(c, a, b, dims, threads);
    }
}

impl Product for Complex64 {
    fn product(c: &mut [Complex64], a: &[Complex64], b: &[Complex64], dims: GemmDims, threads: usize) {
        plain(c, a, b, dims, threads);
    }
}
