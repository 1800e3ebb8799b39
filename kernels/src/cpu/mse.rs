//! Squared error on the CPU, row by row.

use super::simd::{Level, Task, dispatch};
use super::sums;
use super::{Cpu, CpuReal};
use crate::Result;
use crate::ops::{Mse, MseDims, SquaredError};

/// Some rows; the slices begin at the first of them.
struct Rows<'a, X> {
    sums: &'a mut [X],
    d_pred: Option<&'a mut [X]>,
    pred: &'a [X],
    target: &'a [X],
    dims: MseDims,
}

impl<X: CpuReal> Task for Rows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(mut self) {
        let cols = self.dims.cols;
        let scale = X::from_f64(self.dims.grad_scale);
        for (i, sum) in self.sums.iter_mut().enumerate() {
            let row = i * cols..(i + 1) * cols;
            let (pred, target) = (&self.pred[row.clone()], &self.target[row.clone()]);
            let step = |lane: X, [p, t]: [X; 2]| (p - t).madd::<L>(p - t, lane);
            *sum = sums::fold([pred, target], X::zero(), step, |a, b| a + b);
            if let Some(d_pred) = &mut self.d_pred {
                let d_pred = &mut d_pred[row];
                for c in 0..cols {
                    d_pred[c] = scale * (pred[c] - target[c]);
                }
            }
        }
    }
}

impl<X: CpuReal> Mse<X> for Cpu {
    fn mse(&self, args: SquaredError<Self, X>) -> Result<()> {
        let _timed = self.timed("mse");
        args.check()?;
        let SquaredError { sums, d_pred, pred, target, dims } = args;
        let MseDims { rows, cols, .. } = dims;
        if cols == 0 {
            sums.fill(X::zero());
            return Ok(());
        }
        let k = self.rows_per_part(rows, 3 * cols);
        let mut d_parts = d_pred.map(|d| d.chunks_mut(k * cols));
        let parts = sums.chunks_mut(k).enumerate();
        let parts = parts.map(move |(i, sums)| (i, sums, d_parts.as_mut().and_then(|d| d.next())));
        self.for_parts(parts, |(i, sums, d_pred)| {
            let (pred, target) = (&pred[i * k * cols..], &target[i * k * cols..]);
            dispatch(Rows { sums, d_pred, pred, target, dims });
        });
        Ok(())
    }
}
