//! Matrix products on the CPU: arguments are checked here, and multiplied in [`super::product`].

use super::Cpu;
use super::product::{Product, reach, stored};
use crate::error::expect_at_least;
use crate::ops::{Gemm, GemmDims};
use crate::{Error, Result};

/// Multiplications below which other threads would cost more than they save.
const PARALLEL_WORK: usize = 1 << 17;

impl<X: Product> Gemm<X> for Cpu {
    fn gemm(&self, c: &mut [X], a: &[X], b: &[X], dims: GemmDims) -> Result<()> {
        let _timed = self.timed("gemm");
        check("gemm", c.len(), a.len(), b.len(), &dims)?;
        if self.threads() == 1 || dims.m * dims.n * dims.k < PARALLEL_WORK {
            X::product(c, a, b, dims, 1);
        } else {
            self.run(|| X::product(c, a, b, dims, self.threads()));
        }
        Ok(())
    }
}

/// Fails unless the three matrices hold what `dims` says.
fn check(op: &'static str, c: usize, a: usize, b: usize, dims: &GemmDims) -> Result<()> {
    let [(a_rows, a_cols), (b_rows, b_cols)] = stored(dims);
    let matrices = [
        ("a", a, a_rows, a_cols, dims.a_stride),
        ("b", b, b_rows, b_cols, dims.b_stride),
        ("c", c, dims.m, dims.n, dims.c_stride),
    ];
    for (what, found, rows, cols, stride) in matrices {
        if rows > 1 && stride < cols {
            let why = format!("rows of `{what}` have {cols} values but are only {stride} apart");
            return Err(Error::Unsupported { op, why });
        }
        expect_at_least(op, what, found, reach(rows, cols, stride))?;
    }
    Ok(())
}
