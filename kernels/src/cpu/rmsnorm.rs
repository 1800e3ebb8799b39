//! RMS layer norm on the CPU: rows are shared between threads; the gradient of the
//! weight is summed over rows in order, columns shared between threads.

use super::simd::{Level, Task, dispatch};
use super::sums;
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::row_span;
use crate::ops::{Out, RmsNorm, RmsNormBackward, RmsNormBackwardWeight, RmsNormDims, RmsNormForward};

/// `y = x / rms(x) ⊙ w` for one row; returns `1 / rms(x)`.
#[inline(always)]
pub(super) fn forward_row<L: Level, X: CpuReal>(y: &mut [X], x: &[X], w: &[X], eps: f64) -> X {
    let cols = x.len();
    let (y, w) = (&mut y[..cols], &w[..cols]);
    let mean = sums::dot::<L, X>(x, x) * X::from_f64(1.0 / cols as f64);
    let inv = X::one() / (mean + X::from_f64(eps)).sqrt();
    for c in 0..cols {
        y[c] = x[c] * inv * w[c];
    }
    inv
}

/// `dx (=|+=) (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)) / rms` for one row.
#[inline(always)]
pub(super) fn backward_row<L: Level, X: CpuReal>(dx: &mut [X], dy: &[X], x: &[X], w: &[X], inv: X, out: Out) {
    let cols = x.len();
    let (dx, dy, w) = (&mut dx[..cols], &dy[..cols], &w[..cols]);
    let product =
        sums::fold([w, dy, x], X::zero(), |lane, [w, dy, x]| (w * dy).madd::<L>(x, lane), |a, b| a + b);
    // x̂ · mean(w dy x̂) / rms = x · (inv³ / cols) Σ w dy x.
    let along = -(product * inv * inv * inv * X::from_f64(1.0 / cols as f64));
    match out {
        Out::Assign => {
            for c in 0..cols {
                dx[c] = (w[c] * dy[c]).madd::<L>(inv, x[c] * along);
            }
        }
        Out::Add => {
            for c in 0..cols {
                dx[c] += (w[c] * dy[c]).madd::<L>(inv, x[c] * along);
            }
        }
    }
}

/// `dw += dy ⊙ x · inv` for some columns of one row.
#[inline(always)]
pub(super) fn weight_row<L: Level, X: CpuReal>(dw: &mut [X], dy: &[X], x: &[X], inv: X) {
    let cols = dw.len();
    let (dy, x) = (&dy[..cols], &x[..cols]);
    for c in 0..cols {
        dw[c] = (dy[c] * inv).madd::<L>(x[c], dw[c]);
    }
}

/// Some rows; the slices begin at the first of them.
struct Forward<'a, X> {
    y: &'a mut [X],
    inv_rms: &'a mut [X],
    x: &'a [X],
    w: &'a [X],
    dims: RmsNormDims,
}

impl<X: CpuReal> Task for Forward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let RmsNormDims { cols, x_stride, y_stride, eps, .. } = self.dims;
        for (i, inv) in self.inv_rms.iter_mut().enumerate() {
            let y = &mut self.y[i * y_stride..][..cols];
            *inv = forward_row::<L, X>(y, &self.x[i * x_stride..][..cols], self.w, eps);
        }
    }
}

/// Some rows; the slices begin at the first of them.
struct Backward<'a, X> {
    dx: &'a mut [X],
    dy: &'a [X],
    x: &'a [X],
    inv_rms: &'a [X],
    w: &'a [X],
    dims: RmsNormDims,
    out: Out,
}

impl<X: CpuReal> Task for Backward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let RmsNormDims { cols, x_stride, y_stride, .. } = self.dims;
        for (i, &inv) in self.inv_rms.iter().enumerate() {
            let dx = &mut self.dx[i * x_stride..][..cols];
            let (dy, x) = (&self.dy[i * y_stride..][..cols], &self.x[i * x_stride..][..cols]);
            backward_row::<L, X>(dx, dy, x, self.w, inv, self.out);
        }
    }
}

/// All rows, and the columns from `first` that `dw` holds.
struct Weight<'a, X> {
    dw: &'a mut [X],
    first: usize,
    dy: &'a [X],
    x: &'a [X],
    inv_rms: &'a [X],
    dims: RmsNormDims,
}

impl<X: CpuReal> Task for Weight<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (i, &inv) in self.inv_rms.iter().enumerate() {
            let dy = &self.dy[i * self.dims.y_stride + self.first..];
            let x = &self.x[i * self.dims.x_stride + self.first..];
            weight_row::<L, X>(self.dw, dy, x, inv);
        }
    }
}

impl<X: CpuReal> RmsNorm<X> for Cpu {
    fn rmsnorm_forward(&self, args: RmsNormForward<Self, X>) -> Result<()> {
        let _timed = self.timed("rmsnorm_forward");
        args.check()?;
        let RmsNormForward { y, inv_rms, x, w, dims } = args;
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        let span = row_span(rows, cols, y_stride);
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 2 * cols);
        let parts = y[..span].chunks_mut(k * y_stride).zip(inv_rms.chunks_mut(k)).enumerate();
        self.for_parts(parts, |(i, (y, inv_rms))| {
            dispatch(Forward { y, inv_rms, x: &x[i * k * x_stride..], w, dims });
        });
        Ok(())
    }

    fn rmsnorm_backward(&self, args: RmsNormBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("rmsnorm_backward");
        args.check()?;
        let RmsNormBackward { dx, dw, dy, x, inv_rms, w, dims, out } = args;
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        let span = row_span(rows, cols, x_stride);
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 3 * cols);
        let parts = dx[..span].chunks_mut(k * x_stride).zip(inv_rms.chunks(k)).enumerate();
        self.for_parts(parts, |(i, (dx, inv_rms))| {
            let (dy, x) = (&dy[i * k * y_stride..], &x[i * k * x_stride..]);
            dispatch(Backward { dx, dy, x, inv_rms, w, dims, out });
        });
        match dw {
            Some(dw) => self.rmsnorm_backward_weight(RmsNormBackwardWeight {
                dw,
                dy,
                x,
                inv_rms,
                dims,
                out: Out::Add,
            }),
            None => Ok(()),
        }
    }

    fn rmsnorm_backward_weight(&self, args: RmsNormBackwardWeight<Self, X>) -> Result<()> {
        let _timed = self.timed("rmsnorm_backward_weight");
        args.check()?;
        let RmsNormBackwardWeight { dw, dy, x, inv_rms, dims, out } = args;
        if out == Out::Assign {
            dw.fill(X::zero());
        }
        self.for_columns(dw, dims.rows, |first, dw| {
            dispatch(Weight { dw, first, dy, x, inv_rms, dims });
        });
        Ok(())
    }
}
