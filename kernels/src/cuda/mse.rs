//! Squared error on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal};
use crate::Result;
use crate::ops::{Mse, MseDims, SquaredError};

const MAX_THREADS: usize = 512;

impl<X: CudaReal> Mse<X> for Cuda {
    fn mse(&self, args: SquaredError<Self, X>) -> Result<()> {
        args.check()?;
        let SquaredError { sums, d_pred, pred, target, dims } = args;
        const OP: &str = "mse";
        let MseDims { rows, cols, grad_scale } = dims;
        let kernel = self.kernel_of::<X>(OP, OP).write(&sums).write_if(&d_pred).read(pred).read(target);
        let kernel = kernel.int(cols).float(grad_scale);
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}
