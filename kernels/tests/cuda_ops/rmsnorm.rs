//! RMS layer norm, alone and in the joint of two sublayers.

use crate::common::*;
use gradtx_kernels::ops::{
    DropoutDims, Out, ResidualNormBackward, ResidualNormDims, ResidualNormForward, RmsNormBackward,
    RmsNormBackwardWeight, RmsNormDims, RmsNormForward,
};
use gradtx_kernels::{Backend, Buffer, Real, Result};

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
        d.rmsnorm_forward(RmsNormForward {
            y: y.all_mut(),
            inv_rms: inv.all_mut(),
            x: x.all(),
            w: w.all(),
            dims,
        })?;

        let dy = put(d, &spread(&inputs.values::<X>("dy", n), cols, y_stride))?;
        let old = if self.out == Out::Add { inputs.values::<X>("old", n) } else { nan(n) };
        let mut dx = put(d, &spread(&old, cols, x_stride))?;
        let mut dw = put(d, &inputs.sums::<X::Acc>("dw", cols))?;
        let (to, dw_view) = (dx.all_mut(), Some(dw.all_mut()));
        d.rmsnorm_backward(RmsNormBackward {
            dx: to,
            dw: dw_view,
            dy: dy.all(),
            x: x.all(),
            inv_rms: inv.all(),
            w: w.all(),
            dims,
            out: self.out,
        })?;
        let mut alone = put(d, &nan::<X::Acc>(cols))?;
        let to = alone.all_mut();
        d.rmsnorm_backward_weight(RmsNormBackwardWeight {
            dw: to,
            dy: dy.all(),
            x: x.all(),
            inv_rms: inv.all(),
            dims,
            out: Out::Assign,
        })?;
        let mut results = Results::default();
        results.take_rows(d, "y", &y, cols, y_stride)?;
        results.take(d, "inv_rms", &inv)?;
        results.take_rows(d, "dx", &dx, cols, x_stride)?;
        results.take(d, "dw", &dw)?;
        results.take(d, "dw alone", &alone)?;
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
        (300, 32, 0, Out::Assign),
        (2, 1024, 0, Out::Add),
        (3, 4104, 16, Out::Assign),
    ] {
        let case = Norm { rows, cols, gap, out };
        check(&format!("rmsnorm {rows}×{cols}"), &case, Tolerance::ROUNDING);
    }
}

struct Joint {
    rows_per_key: usize,
    examples: usize,
    cols: usize,
    p: f64,
    out: Out,
}

impl Case for Joint {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Self { rows_per_key, examples, cols, p, out } = *self;
        let rows = rows_per_key * examples;
        let n = rows * cols;
        let dims =
            ResidualNormDims { drop: DropoutDims { rows, cols, rows_per_key, p, site: 70 }, eps: 0.05 };
        let keys: Vec<u64> = (0..examples as u64).map(|b| b << 40 | (b * 77 + 5)).collect();
        let keys = put(d, if p > 0.0 { &keys[..] } else { &[] })?;
        let (mut sum, w) =
            (put(d, &inputs.values::<X>("branch", n))?, put(d, &inputs.values::<X>("w", cols))?);
        let residual = put(d, &inputs.values::<X>("residual", n))?;
        let (mut y, mut inv) = (put(d, &nan::<X>(n))?, put(d, &nan::<X::Acc>(rows))?);
        d.residual_norm_forward(ResidualNormForward {
            sum: sum.all_mut(),
            y: y.all_mut(),
            inv_rms: inv.all_mut(),
            residual: residual.all(),
            w: w.all(),
            keys: keys.all(),
            dims,
        })?;

        // From inputs that all can hold, so that the two passes are compared each alone.
        let x = put(d, &inputs.values::<X>("x", n))?;
        let inverse = put(d, &inputs.sums::<X::Acc>("inv", rows))?;
        let dy = put(d, &inputs.values::<X>("dy", n))?;
        let mut dx = put(d, &if out == Out::Add { inputs.values::<X>("dx", n) } else { nan(n) })?;
        let mut d_branch = put(d, &nan::<X>(n))?;
        d.residual_norm_backward(ResidualNormBackward {
            dx: dx.all_mut(),
            d_branch: d_branch.all_mut(),
            dy: dy.all(),
            x: x.all(),
            inv_rms: inverse.all(),
            w: w.all(),
            keys: keys.all(),
            dims,
            out,
        })?;
        let mut results = Results::default();
        results.take(d, "sum", &sum)?;
        results.take(d, "y", &y)?;
        results.take(d, "inv_rms", &inv)?;
        results.take(d, "dx", &dx)?;
        results.take(d, "d_branch", &d_branch)?;
        Ok(results)
    }
}

#[test]
fn joints_of_sublayers() {
    for (rows_per_key, examples, cols, p, out) in [
        (1, 1, 3, 0.3, Out::Assign),
        (3, 2, 123, 0.3, Out::Add),
        (5, 3, 64, 0.0, Out::Add),
        (2, 2, 1032, 0.3, Out::Assign),
        (1, 2, 4104, 0.3, Out::Add),
    ] {
        let case = Joint { rows_per_key, examples, cols, p, out };
        // The sum is rounded before it is normed, and dx before it goes on to the branch.
        check(&format!("joint of {cols} columns"), &case, Tolerance::ROUNDING);
    }
}
