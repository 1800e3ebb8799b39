//! Layer norm.

use crate::common::*;
use gradtx_kernels::ops::{LayerNormBackward, LayerNormForward, Out, RmsNormDims};
use gradtx_kernels::{Backend, Buffer, Real, Result};

pub struct LayerNorm {
    pub rows: usize,
    pub cols: usize,
    pub gap: usize,
    pub out: Out,
}

impl Case for LayerNorm {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, cols, gap) = (self.rows, self.cols, self.gap);
        let (x_stride, y_stride) = (cols + gap, cols + 2 * gap);
        let dims = RmsNormDims { x_stride, y_stride, ..RmsNormDims::new(rows, cols, 0.05) };
        let n = rows * cols;
        let x = put(d, &spread(&inputs.values::<X>("x", n), cols, x_stride))?;
        let (w, b) = (put(d, &inputs.values::<X>("w", cols))?, put(d, &inputs.values::<X>("b", cols))?);
        let mut y = put(d, &spread(&nan::<X>(n), cols, y_stride))?;
        let mut stats = put(d, &nan::<X::Acc>(2 * rows))?;
        d.layernorm_forward(LayerNormForward {
            y: y.all_mut(),
            stats: stats.all_mut(),
            x: x.all(),
            w: w.all(),
            b: b.all(),
            dims,
        })?;

        let dy = put(d, &spread(&inputs.values::<X>("dy", n), cols, y_stride))?;
        let old = if self.out == Out::Add { inputs.values::<X>("old", n) } else { nan(n) };
        let mut dx = put(d, &spread(&old, cols, x_stride))?;
        let mut dw = put(d, &inputs.sums::<X::Acc>("dw", cols))?;
        let mut db = put(d, &inputs.sums::<X::Acc>("db", cols))?;
        d.layernorm_backward(LayerNormBackward {
            dx: dx.all_mut(),
            dw_db: Some([dw.all_mut(), db.all_mut()]),
            dy: dy.all(),
            x: x.all(),
            stats: stats.all(),
            w: w.all(),
            dims,
            out: self.out,
        })?;
        let mut results = Results::default();
        results.take_rows(d, "y", &y, cols, y_stride)?;
        results.take(d, "stats", &stats)?;
        results.take_rows(d, "dx", &dx, cols, x_stride)?;
        results.take(d, "dw", &dw)?;
        results.take(d, "db", &db)?;
        Ok(results)
    }
}

#[test]
fn odd_shapes() {
    // Rows of three columns have a gradient in one direction alone: most of the sum cancels, and rounding stays.
    for (rows, cols, gap, out) in [
        (1, 7, 0, Out::Assign),
        (3, 9, 3, Out::Add),
        (5, 123, 0, Out::Assign),
        (37, 64, 8, Out::Add),
        (300, 32, 0, Out::Assign),
        (2, 1024, 0, Out::Add),
        (3, 4104, 16, Out::Assign),
    ] {
        let case = LayerNorm { rows, cols, gap, out };
        check(&format!("layernorm {rows}×{cols}"), &case, Tolerance::ROUNDING);
    }
}
