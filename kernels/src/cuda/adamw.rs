//! AdamW and gradient norms on CUDA.

use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Result, expect_len};
use crate::ops::{AdamW, AdamWCast, AdamWUpdate};
use crate::{View, ViewMut};

const MODULE: &str = "adamw";
const THREADS: usize = 256;
/// Partial sums of a row. Fixed, so that a norm's bits do not depend on the device.
const PARTIAL_SUMS: usize = 512;
/// Elements that are worth a block of their own.
const MIN_SHARE: usize = 4096;

impl AdamW<f32> for Cuda {
    fn sum_squares(
        &self,
        sums: CudaViewMut<'_, f32>,
        g: CudaView<'_, f32>,
        rows: usize,
        len: usize,
    ) -> Result<()> {
        const OP: &str = "sum_squares";
        expect_len(OP, "sums", sums.len(), rows)?;
        expect_len(OP, "g", g.len(), rows * len)?;
        let parts = len.div_ceil(MIN_SHARE).clamp(1, PARTIAL_SUMS);
        let scratch = self.workspace(rows * parts * size_of::<f32>())?;
        let kernel =
            self.kernel(MODULE, "sum_squares_partial").address::<f32>(scratch.pointer).read(g).long(len);
        // SAFETY: g holds `rows` rows of `len`, and the scratch memory `parts` sums for each.
        unsafe { kernel.run([parts, rows, 1], THREADS, 0) }?;
        let kernel =
            self.kernel(MODULE, "sum_squares_final").write(&sums).address::<f32>(scratch.pointer).int(parts);
        // SAFETY: as above, and `sums` holds one per row.
        unsafe { kernel.run([rows, 1, 1], THREADS, 0) }
    }

    fn clip_scale(
        &self,
        scale: CudaViewMut<'_, f32>,
        sums: CudaView<'_, f32>,
        rows: usize,
        max_norm: f64,
    ) -> Result<()> {
        expect_len("clip_scale", "scale", scale.len(), rows)?;
        expect_len("clip_scale", "sums", sums.len(), rows)?;
        let kernel = self.kernel(MODULE, "clip_scale").write(&scale).read(sums).int(rows).float(max_norm);
        // SAFETY: both views hold an element per row.
        unsafe { kernel.run([rows.div_ceil(THREADS), 1, 1], THREADS, 0) }
    }

    fn adamw(&self, args: AdamWUpdate<Self, f32>) -> Result<()> {
        self.adamw_step::<f32>(None, args)
    }
}

impl<X: CudaReal> AdamWCast<X> for Cuda {
    fn adamw_cast(&self, y: CudaViewMut<'_, X>, args: AdamWUpdate<Self, f32>) -> Result<()> {
        self.adamw_step(Some(y), args)
    }
}

impl Cuda {
    /// One step, and where there is a `y`, `y = p`.
    fn adamw_step<X: CudaReal>(
        &self,
        y: Option<CudaViewMut<'_, X>>,
        args: AdamWUpdate<Self, f32>,
    ) -> Result<()> {
        const OP: &str = "adamw";
        args.check()?;
        let AdamWUpdate { p, m, v, g, scale, rows, len, step } = args;
        if let Some(y) = &y {
            expect_len(OP, "y", y.len(), rows * len)?;
        }
        let correction1 = 1.0 - step.beta1.powf(step.step.into());
        let correction2 = 1.0 - step.beta2.powf(step.step.into());
        let kernel = self.kernel_of::<X>(MODULE, OP).write_if(&y).write(&p).write(&m).write(&v);
        let kernel = kernel.read(g).read(scale).long(len);
        let kernel = kernel.float(step.beta1).float(1.0 - step.beta1);
        let kernel = kernel.float(step.beta2).float(1.0 - step.beta2);
        let kernel = kernel.float(1.0 - step.lr * step.weight_decay).float(step.lr / correction1);
        let kernel = kernel.float(1.0 / correction2.sqrt()).float(step.eps);
        // SAFETY: the matrices hold `rows` rows of `len`, and `scale` one factor for each.
        unsafe { kernel.run([self.flat_blocks::<X>(len), rows, 1], THREADS, 0) }
    }
}
