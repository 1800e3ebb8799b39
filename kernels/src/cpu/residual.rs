//! Residual sum, dropout and RMS norm on the CPU: one row after the other.

use super::dropout::drop_row;
use super::rmsnorm::{backward_row, forward_row};
use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::ops::{Out, ResidualNorm, ResidualNormBackward, ResidualNormDims, ResidualNormForward};

/// Rows from `first`; the slices begin there.
struct Forward<'a, X> {
    sum: &'a mut [X],
    y: &'a mut [X],
    inv_rms: &'a mut [X],
    residual: &'a [X],
    w: &'a [X],
    first: usize,
    keys: &'a [u64],
    dims: ResidualNormDims,
}

impl<X: CpuReal> Task for Forward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let ResidualNormDims { drop, eps } = self.dims;
        let rows = self.sum.chunks_exact_mut(drop.cols).zip(self.residual.chunks_exact(drop.cols));
        for (i, (sum, residual)) in rows.enumerate() {
            drop_row(sum, self.first + i, self.keys, drop);
            for c in 0..drop.cols {
                sum[c] = residual[c] + sum[c];
            }
            let y = &mut self.y[i * drop.cols..][..drop.cols];
            self.inv_rms[i] = forward_row::<L, X>(y, sum, self.w, eps);
        }
    }
}

/// Rows from `first`; the slices begin there.
struct Backward<'a, X> {
    dx: &'a mut [X],
    d_branch: &'a mut [X],
    dy: &'a [X],
    x: &'a [X],
    inv_rms: &'a [X],
    w: &'a [X],
    first: usize,
    keys: &'a [u64],
    dims: ResidualNormDims,
    out: Out,
}

impl<X: CpuReal> Task for Backward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let drop = self.dims.drop;
        let rows = self.dx.chunks_exact_mut(drop.cols).zip(self.d_branch.chunks_exact_mut(drop.cols));
        for (i, (dx, d_branch)) in rows.enumerate() {
            let row = i * drop.cols..(i + 1) * drop.cols;
            let (dy, x) = (&self.dy[row.clone()], &self.x[row]);
            backward_row::<L, X>(dx, dy, x, self.w, self.inv_rms[i], self.out);
            d_branch.copy_from_slice(dx);
            drop_row(d_branch, self.first + i, self.keys, drop);
        }
    }
}

impl<X: CpuReal> ResidualNorm<X> for Cpu {
    fn residual_norm_forward(&self, args: ResidualNormForward<Self, X>) -> Result<()> {
        let _timed = self.timed("residual_norm_forward");
        args.check()?;
        let ResidualNormForward { sum, y, inv_rms, residual, w, keys, dims } = args;
        let (rows, cols) = (dims.drop.rows, dims.drop.cols);
        if rows * cols == 0 {
            return Ok(());
        }
        // A random word costs as much as several loads.
        let k = self.rows_per_part(rows, 10 * cols);
        let outputs = sum.chunks_mut(k * cols).zip(y.chunks_mut(k * cols)).zip(inv_rms.chunks_mut(k));
        self.for_parts(outputs.enumerate(), |(i, ((sum, y), inv_rms))| {
            let residual = &residual[i * k * cols..];
            dispatch(Forward { sum, y, inv_rms, residual, w, first: i * k, keys, dims });
        });
        Ok(())
    }

    fn residual_norm_backward(&self, args: ResidualNormBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("residual_norm_backward");
        args.check()?;
        let ResidualNormBackward { dx, d_branch, dy, x, inv_rms, w, keys, dims, out } = args;
        let (rows, cols) = (dims.drop.rows, dims.drop.cols);
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 12 * cols);
        let outputs = dx.chunks_mut(k * cols).zip(d_branch.chunks_mut(k * cols)).zip(inv_rms.chunks(k));
        self.for_parts(outputs.enumerate(), |(i, ((dx, d_branch), inv_rms))| {
            let (dy, x) = (&dy[i * k * cols..], &x[i * k * cols..]);
            dispatch(Backward { dx, d_branch, dy, x, inv_rms, w, first: i * k, keys, dims, out });
        });
        Ok(())
    }
}
