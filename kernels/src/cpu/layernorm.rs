//! Layer norm on the CPU: rows are shared between threads; gradients of weight and bias are
//! summed over rows in order, columns shared between threads.

use super::simd::{Level, Task, dispatch};
use super::sums;
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::row_span;
use crate::ops::{LayerNorm, LayerNormBackward, LayerNormForward, Out, RmsNormDims};

/// Some rows; the slices begin at the first of them.
struct Forward<'a, X> {
    y: &'a mut [X],
    mean: &'a mut [X],
    inv: &'a mut [X],
    x: &'a [X],
    w: &'a [X],
    b: &'a [X],
    dims: RmsNormDims,
}

impl<X: CpuReal> Task for Forward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let RmsNormDims { cols, x_stride, y_stride, eps, .. } = self.dims;
        let per_column = X::from_f64(1.0 / cols as f64);
        let (w, b) = (&self.w[..cols], &self.b[..cols]);
        for (i, (mean, inv)) in self.mean.iter_mut().zip(self.inv).enumerate() {
            let (y, x) = (&mut self.y[i * y_stride..][..cols], &self.x[i * x_stride..][..cols]);
            let sum = sums::fold([x], X::zero(), |lane, [x]| lane + x, |a, b| a + b);
            let of_row = sum * per_column;
            let square = |lane: X, [x]: [X; 1]| (x - of_row).madd::<L>(x - of_row, lane);
            let variance = sums::fold([x], X::zero(), square, |a, b| a + b);
            (*mean, *inv) = (of_row, X::one() / (variance * per_column + X::from_f64(eps)).sqrt());
            for c in 0..cols {
                y[c] = ((x[c] - of_row) * *inv).madd::<L>(w[c], b[c]);
            }
        }
    }
}

/// Some rows; the slices begin at the first of them.
struct Backward<'a, X> {
    dx: &'a mut [X],
    dy: &'a [X],
    x: &'a [X],
    mean: &'a [X],
    inv: &'a [X],
    w: &'a [X],
    dims: RmsNormDims,
    out: Out,
}

impl<X: CpuReal> Task for Backward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let RmsNormDims { cols, x_stride, y_stride, .. } = self.dims;
        let per_column = X::from_f64(1.0 / cols as f64);
        let w = &self.w[..cols];
        for (i, (&mean, &inv)) in self.mean.iter().zip(self.inv).enumerate() {
            let dx = &mut self.dx[i * x_stride..][..cols];
            let (dy, x) = (&self.dy[i * y_stride..][..cols], &self.x[i * x_stride..][..cols]);
            let add = |a, b| a + b;
            let of_g = sums::fold([w, dy], X::zero(), |lane, [w, dy]| w.madd::<L>(dy, lane), add);
            let along = |lane: X, [w, dy, x]: [X; 3]| (w * dy).madd::<L>((x - mean) * inv, lane);
            let of_product = sums::fold([w, dy, x], X::zero(), along, add);
            let (of_g, of_product) = (of_g * per_column, of_product * per_column);
            for c in 0..cols {
                let value = (w[c] * dy[c] - of_g - (x[c] - mean) * inv * of_product) * inv;
                dx[c] = if self.out == Out::Add { dx[c] + value } else { value };
            }
        }
    }
}

/// All rows, and the columns from `first` that `dw` and `db` hold.
struct Weights<'a, X> {
    dw: &'a mut [X],
    db: &'a mut [X],
    first: usize,
    dy: &'a [X],
    x: &'a [X],
    mean: &'a [X],
    inv: &'a [X],
    dims: RmsNormDims,
}

impl<X: CpuReal> Task for Weights<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let cols = self.dw.len();
        let (dw, db) = (self.dw, &mut self.db[..cols]);
        for (i, (&mean, &inv)) in self.mean.iter().zip(self.inv).enumerate() {
            let dy = &self.dy[i * self.dims.y_stride + self.first..][..cols];
            let x = &self.x[i * self.dims.x_stride + self.first..][..cols];
            for c in 0..cols {
                dw[c] = (dy[c] * inv).madd::<L>(x[c] - mean, dw[c]);
                db[c] += dy[c];
            }
        }
    }
}

impl<X: CpuReal> LayerNorm<X> for Cpu {
    fn layernorm_forward(&self, args: LayerNormForward<Self, X>) -> Result<()> {
        let _timed = self.timed("layernorm_forward");
        args.check()?;
        let LayerNormForward { y, stats, x, w, b, dims } = args;
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 3 * cols);
        let (mean, inv) = stats.split_at_mut(rows);
        let parts = y[..row_span(rows, cols, y_stride)].chunks_mut(k * y_stride);
        let parts = parts.zip(mean.chunks_mut(k).zip(inv.chunks_mut(k))).enumerate();
        self.for_parts(parts, |(i, (y, (mean, inv)))| {
            dispatch(Forward { y, mean, inv, x: &x[i * k * x_stride..], w, b, dims });
        });
        Ok(())
    }

    fn layernorm_backward(&self, args: LayerNormBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("layernorm_backward");
        args.check()?;
        let LayerNormBackward { dx, dw_db, dy, x, stats, w, dims, out } = args;
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 5 * cols);
        let (mean, inv) = stats.split_at(rows);
        let parts = dx[..row_span(rows, cols, x_stride)].chunks_mut(k * x_stride);
        let parts = parts.zip(mean.chunks(k).zip(inv.chunks(k))).enumerate();
        self.for_parts(parts, |(i, (dx, (mean, inv)))| {
            let (dy, x) = (&dy[i * k * y_stride..], &x[i * k * x_stride..]);
            dispatch(Backward { dx, dy, x, mean, inv, w, dims, out });
        });
        let Some([dw, db]) = dw_db else { return Ok(()) };
        // As `for_columns`, of two outputs: whole cache lines of every row for each thread.
        const LINE: usize = 32;
        let columns = LINE * self.rows_per_part(cols.div_ceil(LINE), LINE * rows);
        let parts = dw.chunks_mut(columns).zip(db.chunks_mut(columns)).enumerate();
        self.for_parts(parts, |(i, (dw, db))| {
            dispatch(Weights { dw, db, first: i * columns, dy, x, mean, inv, dims });
        });
        Ok(())
    }
}
