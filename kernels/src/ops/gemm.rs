//! General matrix product over strided row-major matrices.

use super::Out;
use crate::{Device, Real, Result};

/// Shapes of `C[m, n] (=|+=) alpha · op(A)[m, k] · op(B)[k, n]`.
#[derive(Clone, Copy, Debug)]
pub struct GemmDims {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// The summed dimension.
    pub k: usize,
    /// A is stored as `[k, m]`.
    pub trans_a: bool,
    /// B is stored as `[n, k]`.
    pub trans_b: bool,
    /// Row stride of A as stored.
    pub a_stride: usize,
    /// Row stride of B as stored.
    pub b_stride: usize,
    /// Row stride of C.
    pub c_stride: usize,
    /// Factor of the product.
    pub alpha: f64,
    /// Assign C or add to it.
    pub out: Out,
}

impl GemmDims {
    /// Contiguous `C = op(A) · op(B)`.
    pub fn new(m: usize, n: usize, k: usize, trans_a: bool, trans_b: bool) -> Self {
        let a_stride = if trans_a { m } else { k };
        let b_stride = if trans_b { k } else { n };
        Self { m, n, k, trans_a, trans_b, a_stride, b_stride, c_stride: n, alpha: 1.0, out: Out::Assign }
    }

    /// The same with `C +=`.
    pub fn add(self) -> Self {
        Self { out: Out::Add, ..self }
    }
}

/// Matrix products.
pub trait Gemm<X: Real>: Device {
    /// `c (=|+=) alpha · op(a) · op(b)`. With `Out::Assign` what `c` held, NaN included, has no influence.
    fn gemm(
        &self,
        c: Self::ViewMut<'_, X>,
        a: Self::View<'_, X>,
        b: Self::View<'_, X>,
        dims: GemmDims,
    ) -> Result<()>;
}
