//! [`AdapterView`]: the adapters of a pass.

use crate::lora::BlockLayout;
use gradtx_kernels::{Device, Real};

/// Adapters that a pass uses: `values` `[adapters, L·d]`; a segment names its row.
pub struct AdapterView<'a, D: Device, A: Real> {
    /// The adapters.
    pub values: &'a D::Buf<A>,
    /// Their layout.
    pub layout: &'a BlockLayout,
    /// Dropout probability on their input; 0 outside training.
    pub dropout: f64,
}

impl<D: Device, A: Real> Clone for AdapterView<'_, D, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device, A: Real> Copy for AdapterView<'_, D, A> {}
