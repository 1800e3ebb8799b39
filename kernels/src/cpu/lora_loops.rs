//! The rank-r products of adapted layers, as loops that vectorise.
//!
//! Products run along contiguous rows: A's rows are read as they are; B `[out_len, r]`
//! is transposed into working memory once per part, for r is too short to run along.

use super::CpuReal;
use super::mask::{MASK_BLOCK, Mask};
use super::matrix::MatrixMut;
use super::simd::{Level, Task};
use super::sums::dot;
use crate::ops::{LoraDims, LoraTarget};
use std::ops::Range;

/// Tokens that are summed together, and their mask; positions count from the first of them.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub tokens: Range<usize>,
    pub drop: Option<Mask>,
}

/// `y += a · x`.
#[inline(always)]
fn axpy<L: Level, X: CpuReal>(y: &mut [X], a: X, x: &[X]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.madd::<L>(x, *y);
    }
}

/// `s = (α/r) drop(x) Aᵀ` of one target, for consecutive tokens of one segment.
pub(super) struct DownForward<'a, X> {
    /// `[tokens, tail]`, of which columns `column .. column + r`.
    pub s: &'a mut [X],
    /// `[tokens, in_dim]`.
    pub x: &'a [X],
    /// `[r, in_dim]`.
    pub a: &'a [X],
    /// `[in_dim]`, working memory.
    pub masked: &'a mut [X],
    pub drop: Option<Mask>,
    /// Position of the first token in its segment.
    pub position: usize,
    pub column: usize,
    pub dims: LoraDims<'a>,
}

impl<X: CpuReal> Task for DownForward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { s, x, a, masked, drop, position, column, dims } = self;
        let scale = X::from_f64(dims.scale);
        for (t, (s, x)) in s.chunks_mut(dims.tail()).zip(x.chunks(dims.in_dim)).enumerate() {
            let x = match drop {
                None => x,
                Some(mask) => {
                    mask.apply(masked, x, position + t);
                    &*masked
                }
            };
            for (s, a) in s[column..][..dims.rank].iter_mut().zip(a.chunks(dims.in_dim)) {
                *s = scale * dot::<L, X>(x, a);
            }
        }
    }
}

/// B `[out_len, r]` of a target, as `[r, out_len]`.
#[inline(always)]
fn transpose_b<'a, X: CpuReal>(b_t: &'a mut [X], adapter: &[X], target: &LoraTarget, rank: usize) -> &'a [X] {
    let b = &adapter[target.b_offset..][..rank * target.out_len];
    let b_t = &mut b_t[..rank * target.out_len];
    for (i, row) in b_t.chunks_mut(target.out_len.max(1)).enumerate() {
        for (x, b) in row.iter_mut().zip(b.chunks(rank)) {
            *x = b[i];
        }
    }
    b_t
}

/// `y += s Bᵀ` of every target, for consecutive tokens of one segment.
pub(super) struct UpForward<'a, X> {
    /// `[tokens, out_dim]`.
    pub y: &'a mut [X],
    /// `[tokens, tail]`.
    pub s: &'a [X],
    pub adapter: &'a [X],
    /// `[r, out_dim]`, working memory.
    pub b_t: &'a mut [X],
    pub dims: LoraDims<'a>,
}

impl<X: CpuReal> Task for UpForward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { y, s, adapter, b_t, dims } = self;
        for (n, target) in dims.targets.iter().enumerate() {
            let b_t = transpose_b(b_t, adapter, target, dims.rank);
            for (y, s) in y.chunks_mut(dims.out_dim).zip(s.chunks(dims.tail())) {
                let y = &mut y[target.out_start..][..target.out_len];
                let s = &s[n * dims.rank..][..dims.rank];
                for (&s, b) in s.iter().zip(b_t.chunks(target.out_len.max(1))) {
                    axpy::<L, X>(y, s, b);
                }
            }
        }
    }
}

/// `ds = dy B` of every target, for consecutive tokens of one segment.
pub(super) struct UpBackward<'a, X> {
    /// `[tokens, tail]`.
    pub ds: &'a mut [X],
    /// `[tokens, out_dim]`.
    pub dy: &'a [X],
    pub adapter: &'a [X],
    /// `[r, out_dim]`, working memory.
    pub b_t: &'a mut [X],
    pub dims: LoraDims<'a>,
}

impl<X: CpuReal> Task for UpBackward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { ds, dy, adapter, b_t, dims } = self;
        for (n, target) in dims.targets.iter().enumerate() {
            let b_t = transpose_b(b_t, adapter, target, dims.rank);
            for (ds, dy) in ds.chunks_mut(dims.tail()).zip(dy.chunks(dims.out_dim)) {
                let dy = &dy[target.out_start..][..target.out_len];
                let ds = &mut ds[n * dims.rank..][..dims.rank];
                for (ds, b) in ds.iter_mut().zip(b_t.chunks(target.out_len.max(1))) {
                    *ds = dot::<L, X>(dy, b);
                }
            }
        }
    }
}

/// `dB += dyᵀ s` of some outputs of one target, for the tokens of one segment.
pub(super) struct UpGradient<'a, X> {
    /// `[outs, r]`.
    pub db: &'a mut [X],
    /// `[r, outs]`, working memory.
    pub sums: &'a mut [X],
    /// Rows of dy, from the first token and the first of these outputs.
    pub dy: &'a [X],
    /// Rows of s, from the first token.
    pub s: &'a [X],
    /// First column of s that belongs to the target.
    pub first: usize,
    pub tokens: usize,
    pub dims: LoraDims<'a>,
}

impl<X: CpuReal> Task for UpGradient<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { db, sums, dy, s, first, tokens, dims } = self;
        let outs = db.len() / dims.rank;
        sums.fill(X::zero());
        for (dy, s) in dy.chunks(dims.out_dim).zip(s.chunks(dims.tail())).take(tokens) {
            let dy = &dy[..outs];
            for (sums, &s) in sums.chunks_mut(outs).zip(&s[first..][..dims.rank]) {
                axpy::<L, X>(sums, s, dy);
            }
        }
        for (o, db) in db.chunks_mut(dims.rank).enumerate() {
            for (i, db) in db.iter_mut().enumerate() {
                *db += sums[i * outs + o];
            }
        }
    }
}

/// `dx += (α/r) mask ⊙ (ds A)` and `dA += (α/r) dsᵀ drop(x)`, for some columns of one
/// target and the tokens of one segment.
pub(super) struct DownBackward<'a, 'm, X> {
    /// These columns of dA, r rows.
    pub da: &'a mut MatrixMut<'m, X>,
    /// These columns of dx, a row for every token of the stream.
    pub dx: &'a mut MatrixMut<'m, X>,
    /// At least r rows of these columns, working memory.
    pub sums: &'a mut [X],
    /// `[T, in_dim]`.
    pub x: &'a [X],
    /// `[T, tail]`.
    pub ds: &'a [X],
    /// `[r, in_dim]`.
    pub a: &'a [X],
    pub span: Span,
    /// The first of these columns, a multiple of [`MASK_BLOCK`].
    pub column: usize,
    /// First column of ds that belongs to the target.
    pub first: usize,
    pub dims: LoraDims<'a>,
}

impl<X: CpuReal> Task for DownBackward<'_, '_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { da, dx, sums, x, ds, a, span, column, first, dims } = self;
        let scale = X::from_f64(dims.scale);
        let width = da.row(0).len();
        let sums = &mut sums[..dims.rank * width];
        sums.fill(X::zero());
        let start = span.tokens.start;
        for t in span.tokens.clone() {
            let ds = &ds[t * dims.tail() + first..][..dims.rank];
            let x = &x[t * dims.in_dim + column..][..width];
            let row = dx.row(t);
            for from in (0..width).step_by(MASK_BLOCK) {
                let len = MASK_BLOCK.min(width - from);
                let block = (column + from) / MASK_BLOCK;
                let mut factors = [X::one(); MASK_BLOCK];
                if let Some(drop) = span.drop {
                    factors = drop.factors(t - start, block);
                }
                let factors = &factors[..len];
                let mut d = [X::zero(); MASK_BLOCK];
                let mut masked = [X::zero(); MASK_BLOCK];
                for ((m, &x), &f) in masked.iter_mut().zip(&x[from..from + len]).zip(factors) {
                    *m = x * f;
                }
                for (i, &ds) in ds.iter().enumerate() {
                    axpy::<L, X>(&mut d[..len], ds, &a[i * dims.in_dim + column + from..][..len]);
                    axpy::<L, X>(&mut sums[i * width + from..][..len], ds, &masked[..len]);
                }
                for ((dx, &d), &f) in row[from..from + len].iter_mut().zip(&d).zip(factors) {
                    *dx = (scale * f).madd::<L>(d, *dx);
                }
            }
        }
        for i in 0..dims.rank {
            axpy::<L, X>(da.row(i), scale, &sums[i * width..][..width]);
        }
    }
}

/// `dx += (α/r) mask ⊙ (ds A)` of one target, for consecutive tokens of one segment: what [`DownBackward`]
/// leaves in dx.
pub(super) struct DownToRows<'a, X> {
    /// `[tokens, in_dim]`.
    pub dx: &'a mut [X],
    /// `[tokens, tail]`.
    pub ds: &'a [X],
    /// `[r, in_dim]`.
    pub a: &'a [X],
    pub drop: Option<Mask>,
    /// Position of the first token in its segment.
    pub position: usize,
    /// First column of ds that belongs to the target.
    pub first: usize,
    pub dims: LoraDims<'a>,
}

impl<X: CpuReal> Task for DownToRows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { dx, ds, a, drop, position, first, dims } = self;
        let scale = X::from_f64(dims.scale);
        for (t, (dx, ds)) in dx.chunks_mut(dims.in_dim).zip(ds.chunks(dims.tail())).enumerate() {
            let ds = &ds[first..][..dims.rank];
            for (block, row) in dx.chunks_mut(MASK_BLOCK).enumerate() {
                let (from, len) = (block * MASK_BLOCK, row.len());
                let factors = drop.map_or([X::one(); MASK_BLOCK], |drop| drop.factors(position + t, block));
                let mut d = [X::zero(); MASK_BLOCK];
                for (i, &ds) in ds.iter().enumerate() {
                    axpy::<L, X>(&mut d[..len], ds, &a[i * dims.in_dim + from..][..len]);
                }
                for ((dx, &d), &f) in row.iter_mut().zip(&d).zip(&factors) {
                    *dx = (scale * f).madd::<L>(d, *dx);
                }
            }
        }
    }
}
