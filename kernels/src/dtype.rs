//! Element types, and the arithmetic that operations are generic over.
//!
//! [`Elem`] is anything that a buffer can hold. [`Real`] is what the mathematics
//! runs on: `f32`, and `bf16` on devices that compute in it; `f64` and
//! [`Complex64`] run the very same code to check gradients (the complex-step
//! derivative `Im f(x + ih) / h` has no cancellation, so it is exact to rounding).

use crate::Device;
use bytemuck::Pod;
pub use half::{bf16, f16};
use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// Double-precision complex number: the type of complex-step gradient checks.
pub type Complex64 = num_complex::Complex<f64>;

/// Name of an element type, spelled as safetensors spells it where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DType {
    F64,
    F32,
    F16,
    Bf16,
    C128,
    U64,
    U32,
    U8,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::C128 => 16,
            Self::F64 | Self::U64 => 8,
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 => 1,
        }
    }
}

/// Anything that a buffer can hold: plain old data whose zero bytes are a value.
pub trait Elem: Pod + Send + Sync + Debug + PartialEq {
    /// Its name.
    const DTYPE: DType;
}

macro_rules! elem {
    ($($t:ty => $d:ident),*) => { $(impl Elem for $t { const DTYPE: DType = DType::$d; })* };
}
elem!(f64 => F64, f32 => F32, f16 => F16, bf16 => Bf16, Complex64 => C128, u64 => U64, u32 => U32, u8 => U8);

/// Numbers that models are computed in.
///
/// Functions take the analytic branch (`exp`, `tanh`, …), so that they also hold
/// for complex arguments near the real axis. Comparisons look at the real part
/// ([`Real::to_f64`]).
pub trait Real:
    Elem
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
{
    /// Type of sums, statistics, losses, trainable parameters, their gradients and
    /// moments: `f32` for `bf16`, otherwise the type itself.
    type Acc: Real<Acc = Self::Acc>;

    /// A buffer of values as one of accumulators, where the two types are one; otherwise the buffer itself.
    fn accumulators<D: Device>(
        values: &mut D::Buf<Self>,
    ) -> Result<&mut D::Buf<Self::Acc>, &mut D::Buf<Self>>;

    /// The nearest value to `x`.
    fn from_f64(x: f64) -> Self;
    /// The real part, widened.
    fn to_f64(self) -> f64;
    /// Exact conversion to the accumulator.
    fn widen(self) -> Self::Acc;
    /// The nearest value to an accumulator.
    fn narrow(acc: Self::Acc) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// e to the power of self.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Zero.
    #[inline(always)]
    fn zero() -> Self {
        Self::default()
    }
    /// One.
    #[inline(always)]
    fn one() -> Self {
        Self::from_f64(1.0)
    }
    /// The value with the larger real part (self when they are equal).
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other.to_f64() > self.to_f64() { other } else { self }
    }
    /// False for NaN and infinities, in either part.
    fn is_finite(self) -> bool;
}

macro_rules! real_float {
    ($t:ty) => {
        impl Real for $t {
            type Acc = $t;
            fn accumulators<D: Device>(
                values: &mut D::Buf<Self>,
            ) -> Result<&mut D::Buf<Self::Acc>, &mut D::Buf<Self>> {
                Ok(values)
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn widen(self) -> Self {
                self
            }
            #[inline(always)]
            fn narrow(acc: Self) -> Self {
                acc
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                if other > self { other } else { self }
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
        }
    };
}
real_float!(f32);
real_float!(f64);

impl Real for bf16 {
    type Acc = f32;
    fn accumulators<D: Device>(
        values: &mut D::Buf<Self>,
    ) -> Result<&mut D::Buf<Self::Acc>, &mut D::Buf<Self>> {
        Err(values)
    }
    fn from_f64(x: f64) -> Self {
        // Not its own conversion, which ignores the lowest bits of an f32 when it decides a tie: a
        // device rounds f32 correctly, and masters must give the same values on both sides.
        bf16::from_f32(x as f32)
    }
    fn to_f64(self) -> f64 {
        bf16::to_f64(self)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(acc: f32) -> Self {
        bf16::from_f32(acc)
    }
    fn sqrt(self) -> Self {
        bf16::from_f32(self.to_f32().sqrt())
    }
    fn exp(self) -> Self {
        bf16::from_f32(self.to_f32().exp())
    }
    fn ln(self) -> Self {
        bf16::from_f32(self.to_f32().ln())
    }
    fn tanh(self) -> Self {
        bf16::from_f32(self.to_f32().tanh())
    }
    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
}

impl Real for Complex64 {
    type Acc = Complex64;
    fn accumulators<D: Device>(
        values: &mut D::Buf<Self>,
    ) -> Result<&mut D::Buf<Self::Acc>, &mut D::Buf<Self>> {
        Ok(values)
    }
    fn from_f64(x: f64) -> Self {
        Complex64::new(x, 0.0)
    }
    fn to_f64(self) -> f64 {
        self.re
    }
    fn widen(self) -> Self {
        self
    }
    fn narrow(acc: Self) -> Self {
        acc
    }
    fn sqrt(self) -> Self {
        Complex64::sqrt(self)
    }
    fn exp(self) -> Self {
        Complex64::exp(self)
    }
    fn ln(self) -> Self {
        Complex64::ln(self)
    }
    fn tanh(self) -> Self {
        Complex64::tanh(self)
    }
    fn is_finite(self) -> bool {
        Complex64::is_finite(self)
    }
}
