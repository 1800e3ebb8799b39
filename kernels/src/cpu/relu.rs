//! ReLU on the CPU: one pass over each row.

use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::row_span;
use crate::ops::{Relu, ReluDims};

/// Rows of h, or of dx where `dh` is given.
struct Rows<'a, X> {
    out: &'a mut [X],
    x: &'a [X],
    dh: Option<&'a [X]>,
    dims: ReluDims,
}

impl<X: CpuReal> Task for Rows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let ReluDims { cols, h_stride, .. } = self.dims;
        let Some(dh) = self.dh else {
            for (h, x) in self.out.chunks_mut(h_stride).zip(self.x.chunks_exact(cols)) {
                for (h, &x) in h[..cols].iter_mut().zip(x) {
                    // NaN is not below 0.
                    *h = if x.to_f64() < 0.0 { X::zero() } else { x };
                }
            }
            return;
        };
        for ((dx, x), dh) in
            self.out.chunks_exact_mut(cols).zip(self.x.chunks_exact(cols)).zip(dh.chunks(h_stride))
        {
            for ((dx, &x), &dh) in dx.iter_mut().zip(x).zip(&dh[..cols]) {
                *dx = if x.to_f64() > 0.0 { dh } else { X::zero() };
            }
        }
    }
}

impl<X: CpuReal> Relu<X> for Cpu {
    fn relu_forward(&self, h: &mut [X], x: &[X], dims: ReluDims) -> Result<()> {
        let _timed = self.timed("relu_forward");
        dims.check("relu_forward", h.len(), &[x.len()])?;
        let ReluDims { rows, cols, h_stride } = dims;
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 2 * cols);
        let parts = h[..row_span(rows, cols, h_stride)].chunks_mut(k * h_stride).zip(x.chunks(k * cols));
        self.for_parts(parts, |(out, x)| dispatch(Rows { out, x, dh: None, dims }));
        Ok(())
    }

    fn relu_backward(&self, dx: &mut [X], dh: &[X], x: &[X], dims: ReluDims) -> Result<()> {
        let _timed = self.timed("relu_backward");
        dims.check("relu_backward", dh.len(), &[dx.len(), x.len()])?;
        let ReluDims { rows, cols, h_stride } = dims;
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 3 * cols);
        let parts = dx.chunks_mut(k * cols).zip(x.chunks(k * cols)).zip(dh.chunks(k * h_stride));
        self.for_parts(parts, |((out, x), dh)| dispatch(Rows { out, x, dh: Some(dh), dims }));
        Ok(())
    }
}
