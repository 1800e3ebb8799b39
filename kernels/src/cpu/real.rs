//! Number types of the CPU.

use super::math;
use super::product::Product;
use super::simd::Level;
use crate::{Complex64, Real};

/// Types that the CPU computes in: accumulation is in the type itself.
///
/// The functions are those that inner loops call: in `f32` they vectorise at level
/// `L` (relative error below 2e-7), in the other types they are the exact ones.
pub trait CpuReal: Real<Acc = Self> + Product {
    /// `self·a + b`, rounded once where that is an instruction.
    #[inline(always)]
    fn madd<L: Level>(self, a: Self, b: Self) -> Self {
        self * a + b
    }
    /// `e^self`.
    #[inline(always)]
    fn fast_exp<L: Level>(self) -> Self {
        self.exp()
    }
    /// `1 / (1 + e^−self)`.
    #[inline(always)]
    fn fast_sigmoid<L: Level>(self) -> Self {
        Self::one() / (Self::one() + (-self).fast_exp::<L>())
    }
}

impl CpuReal for f32 {
    #[inline(always)]
    fn madd<L: Level>(self, a: Self, b: Self) -> Self {
        math::madd::<L>(self, a, b)
    }
    #[inline(always)]
    fn fast_exp<L: Level>(self) -> Self {
        math::exp::<L>(self)
    }
}
impl CpuReal for f64 {}
impl CpuReal for Complex64 {}
