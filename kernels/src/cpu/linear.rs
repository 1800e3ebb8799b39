//! Linear layers: the matrix product, with bias and residual laid down first.

use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::ops::{
    Gemm, GemmDims, Linear, LinearBackwardInput, LinearBackwardWeight, LinearDims, LinearForward, Out,
};

/// Adds rows of `cols` values, `stride` apart, to `sums`, in order.
struct SumRows<'a, X> {
    sums: &'a mut [X],
    rows: &'a [X],
    stride: usize,
}

impl<X: CpuReal> Task for SumRows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for row in self.rows.chunks(self.stride) {
            for (sum, &x) in self.sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
}

/// `y = residual + bias`, the start of a linear layer's sum. At least one is there.
pub(super) fn start<X: CpuReal>(
    cpu: &Cpu,
    y: &mut [X],
    bias: Option<&[X]>,
    residual: Option<&[X]>,
    cols: usize,
) {
    let rows = cpu.rows_per_part(y.len() / cols.max(1), cols);
    let parts = y.chunks_mut((rows * cols).max(1)).enumerate();
    cpu.for_parts(parts, |(i, part)| {
        if let Some(residual) = residual {
            part.copy_from_slice(&residual[i * rows * cols..][..part.len()]);
        }
        for row in part.chunks_mut(cols) {
            match (bias, residual) {
                (Some(bias), Some(_)) => row.iter_mut().zip(bias).for_each(|(y, &b)| *y += b),
                (Some(bias), None) => row.copy_from_slice(bias),
                (None, _) => {}
            }
        }
    });
}

impl<X: CpuReal> Linear<X> for Cpu {
    fn linear_forward(&self, args: LinearForward<Self, X>) -> Result<()> {
        let _timed = self.timed("linear_forward");
        args.check()?;
        let LinearForward { y, x, w, bias, residual, dims } = args;
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        let mut product =
            GemmDims { a_stride: x_stride, ..GemmDims::new(rows, out_dim, in_dim, false, true) };
        if bias.is_some() || residual.is_some() {
            start(self, y, bias, residual, out_dim);
            product = product.add();
        }
        self.gemm(y, x, w, product)
    }

    fn linear_backward_input(&self, args: LinearBackwardInput<Self, X>) -> Result<()> {
        let _timed = self.timed("linear_backward_input");
        args.check()?;
        let LinearBackwardInput { dx, dy, w, dims, out } = args;
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        let product = GemmDims::new(rows, in_dim, out_dim, false, false);
        self.gemm(dx, dy, w, GemmDims { c_stride: x_stride, out, ..product })
    }

    fn linear_backward_weight(&self, args: LinearBackwardWeight<Self, X>) -> Result<()> {
        let _timed = self.timed("linear_backward_weight");
        args.check()?;
        let LinearBackwardWeight { dw, dbias, dy, x, dims, out } = args;
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        if let Some(dbias) = dbias {
            if out == Out::Assign {
                dbias.fill(X::zero());
            }
            self.for_columns(dbias, rows, |first, sums| {
                if let Some(rows) = dy.get(first..) {
                    dispatch(SumRows { sums, rows, stride: out_dim });
                }
            });
        }
        let product = GemmDims::new(out_dim, in_dim, rows, true, false);
        self.gemm(dw, dy, x, GemmDims { b_stride: x_stride, out, ..product })
    }
}
