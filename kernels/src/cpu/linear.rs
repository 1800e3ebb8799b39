//! Linear layers: the matrix product, with bias and residual laid down first.

use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::{expect_len, expect_rows};
use crate::ops::{Gemm, GemmDims, Linear, LinearDims, Out};

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
    fn linear_forward(
        &self,
        y: &mut [X],
        x: &[X],
        w: &[X],
        bias: Option<&[X]>,
        residual: Option<&[X]>,
        dims: LinearDims,
    ) -> Result<()> {
        let _timed = self.timed("linear_forward");
        const OP: &str = "linear_forward";
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        expect_len(OP, "y", y.len(), rows * out_dim)?;
        expect_len(OP, "w", w.len(), out_dim * in_dim)?;
        expect_rows(OP, "x", x.len(), rows, in_dim, x_stride)?;
        if let Some(bias) = bias {
            expect_len(OP, "bias", bias.len(), out_dim)?;
        }
        if let Some(residual) = residual {
            expect_len(OP, "residual", residual.len(), rows * out_dim)?;
        }
        let mut product =
            GemmDims { a_stride: x_stride, ..GemmDims::new(rows, out_dim, in_dim, false, true) };
        if bias.is_some() || residual.is_some() {
            start(self, y, bias, residual, out_dim);
            product = product.add();
        }
        self.gemm(y, x, w, product)
    }

    fn linear_backward_input(
        &self,
        dx: &mut [X],
        dy: &[X],
        w: &[X],
        dims: LinearDims,
        out: Out,
    ) -> Result<()> {
        let _timed = self.timed("linear_backward_input");
        const OP: &str = "linear_backward_input";
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        expect_rows(OP, "dx", dx.len(), rows, in_dim, x_stride)?;
        expect_len(OP, "dy", dy.len(), rows * out_dim)?;
        expect_len(OP, "w", w.len(), out_dim * in_dim)?;
        let product = GemmDims::new(rows, in_dim, out_dim, false, false);
        self.gemm(dx, dy, w, GemmDims { c_stride: x_stride, out, ..product })
    }

    fn linear_backward_weight(
        &self,
        dw: &mut [X],
        dbias: Option<&mut [X]>,
        dy: &[X],
        x: &[X],
        dims: LinearDims,
        out: Out,
    ) -> Result<()> {
        let _timed = self.timed("linear_backward_weight");
        const OP: &str = "linear_backward_weight";
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        expect_len(OP, "dw", dw.len(), out_dim * in_dim)?;
        expect_len(OP, "dy", dy.len(), rows * out_dim)?;
        expect_rows(OP, "x", x.len(), rows, in_dim, x_stride)?;
        if let Some(dbias) = dbias {
            expect_len(OP, "dbias", dbias.len(), out_dim)?;
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
