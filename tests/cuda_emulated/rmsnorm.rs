//! RMS layer norm.

use crate::common::*;
use gradtx_kernels::ops::{Out, RmsNormDims};
use gradtx_kernels::{Backend, Real, Result};

pub struct Norm {
    pub rows: usize,
    pub cols: usize,
    pub gap: usize,
    pub out: Out,
}

impl Case for Norm {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, cols, gap) = (self.rows, self.cols, self.gap);
        let (x_stride, y_stride) = (cols + gap, cols + 2 * gap);
        let dims = RmsNormDims { x_stride, y_stride, ..RmsNormDims::new(rows, cols, 0.05) };
        let n = rows * cols;
        let x = put(d, &spread(&inputs.values::<X>("x", n), cols, x_stride))?;
        let w = put(d, &inputs.values::<X>("w", cols))?;
        let mut y = put(d, &spread(&nan::<X>(n), cols, y_stride))?;
        let mut inv = put(d, &nan::<X::Acc>(rows))?;
        d.rmsnorm_forward(D::all_mut(&mut y), D::all_mut(&mut inv), D::all(&x), D::all(&w), dims)?;

        let dy = put(d, &spread(&inputs.values::<X>("dy", n), cols, y_stride))?;
        let old = if self.out == Out::Add { inputs.values::<X>("old", n) } else { nan(n) };
        let mut dx = put(d, &spread(&old, cols, x_stride))?;
        let mut dw = put(d, &inputs.sums::<X::Acc>("dw", cols))?;
        let (to, dw_view) = (D::all_mut(&mut dx), Some(D::all_mut(&mut dw)));
        d.rmsnorm_backward(to, dw_view, D::all(&dy), D::all(&x), D::all(&inv), D::all(&w), dims, self.out)?;
        let mut results = Results::default();
        results.take_rows(d, "y", &y, cols, y_stride)?;
        results.take(d, "inv_rms", &inv)?;
        results.take_rows(d, "dx", &dx, cols, x_stride)?;
        results.take(d, "dw", &dw)?;
        Ok(results)
    }
}

#[test]
fn odd_shapes() {
    for (rows, cols, gap, out) in [
        (1, 3, 0, Out::Assign),
        (3, 5, 3, Out::Add),
        (5, 123, 0, Out::Assign),
        (37, 64, 8, Out::Add),
        (2, 1024, 0, Out::Add),
        (3, 4104, 16, Out::Assign),
    ] {
        let case = Norm { rows, cols, gap, out };
        check(&format!("rmsnorm {rows}×{cols}"), &case, Tolerance::ROUNDING);
    }
}
