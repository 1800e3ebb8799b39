//! Sums, gathers and conversions of flat memory on the CPU.

use super::embedding::table_rows;
use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::error::{expect_len, expect_rows};
use crate::ops::{Cast, Elementwise, RandomRows, StridedRows};
use crate::rng::{BELL_SPREAD, bell};
use crate::{Complex64, Elem, Real, Result, bf16, f16};
use half::slice::HalfFloatSliceExt;

/// `y = a·x + b·y`; with `b = 0` y is not read.
struct Axpby<'a, X> {
    y: &'a mut [X],
    a: f64,
    x: &'a [X],
    b: f64,
}

impl<X: CpuReal> Task for Axpby<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let (y, x) = (self.y, self.x);
        let n = y.len();
        let x = &x[..n];
        let (a, b) = (X::from_f64(self.a), X::from_f64(self.b));
        if self.b == 0.0 {
            for i in 0..n {
                y[i] = a * x[i];
            }
        } else {
            for i in 0..n {
                y[i] = a.madd::<L>(x[i], b * y[i]);
            }
        }
    }
}

/// `out = x − y`.
struct Difference<'a, X> {
    out: &'a mut [X],
    x: &'a [X],
    y: &'a [X],
}

impl<X: CpuReal> Task for Difference<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let n = self.out.len();
        let (x, y) = (&self.x[..n], &self.y[..n]);
        for i in 0..n {
            self.out[i] = x[i] - y[i];
        }
    }
}

/// `y += row` in every row.
struct AddRow<'a, X> {
    y: &'a mut [X],
    row: &'a [X],
}

impl<X: CpuReal> Task for AddRow<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for y in self.y.chunks_exact_mut(self.row.len()) {
            for (y, &x) in y.iter_mut().zip(self.row) {
                *y += x;
            }
        }
    }
}

impl<X: CpuReal> Elementwise<X> for Cpu {
    fn axpby(&self, y: &mut [X], a: f64, x: &[X], b: f64) -> Result<()> {
        let _timed = self.timed("axpby");
        expect_len("axpby", "x", x.len(), y.len())?;
        let k = self.rows_per_part(y.len(), 2);
        self.for_parts(y.chunks_mut(k).zip(x.chunks(k)), |(y, x)| dispatch(Axpby { y, a, x, b }));
        Ok(())
    }

    fn difference(&self, out: &mut [X], x: &[X], y: &[X]) -> Result<()> {
        let _timed = self.timed("difference");
        expect_len("difference", "x", x.len(), out.len())?;
        expect_len("difference", "y", y.len(), out.len())?;
        let k = self.rows_per_part(out.len(), 3);
        let parts = out.chunks_mut(k).zip(x.chunks(k).zip(y.chunks(k)));
        self.for_parts(parts, |(out, (x, y))| dispatch(Difference { out, x, y }));
        Ok(())
    }

    fn add_row(&self, y: &mut [X], row: &[X]) -> Result<()> {
        let _timed = self.timed("add_row");
        let cols = row.len();
        let rows = table_rows("add_row", y.len(), cols)?;
        let part = self.rows_per_part(rows, 2 * cols);
        self.for_parts(y.chunks_mut(part * cols), |y| dispatch(AddRow { y, row }));
        Ok(())
    }

    fn gather_rows(&self, out: &mut [X], x: &[X], rows: &[u32], cols: usize) -> Result<()> {
        let _timed = self.timed("gather_rows");
        self.copy_rows("gather_rows", out, x, rows, cols)
    }

    fn copy_strided(&self, out: &mut [X], x: &[X], rows: StridedRows) -> Result<()> {
        let _timed = self.timed("copy_strided");
        let StridedRows { rows, cols, out_stride, x_stride } = rows;
        expect_rows("copy_strided", "out", out.len(), rows, cols, out_stride)?;
        expect_rows("copy_strided", "x", x.len(), rows, cols, x_stride)?;
        let part = self.rows_per_part(rows, 2 * cols);
        let outs = out.chunks_mut(out_stride.max(1) * part).zip(x.chunks(x_stride.max(1) * part));
        let parts = outs.enumerate().map(|(i, (out, x))| (part.min(rows - (i * part).min(rows)), out, x));
        self.for_parts(parts, |(rows, out, x)| {
            for r in 0..rows {
                out[r * out_stride..][..cols].copy_from_slice(&x[r * x_stride..][..cols]);
            }
        });
        Ok(())
    }

    fn random_rows(&self, out: &mut [X], rows: RandomRows) -> Result<()> {
        let _timed = self.timed("random_rows");
        let RandomRows { rows, cols, stride, key, std } = rows;
        expect_rows("random_rows", "out", out.len(), rows, cols, stride)?;
        let scale = (std / BELL_SPREAD) as f32;
        let part = self.rows_per_part(cols, 1).next_multiple_of(4);
        let of_row = |(r, row): (usize, &'_ mut [X])| {
            let used = row.len().min(cols);
            let parts = row.split_at_mut(used).0.chunks_mut(part).enumerate();
            self.for_parts(parts, |(i, part_of_row)| draw(part_of_row, key, r * cols + i * part, scale));
        };
        out.chunks_mut(stride.max(1)).take(rows).enumerate().for_each(of_row);
        Ok(())
    }
}

/// Numbers from the `first` on, scaled.
fn draw<X: CpuReal>(out: &mut [X], key: u64, first: usize, scale: f32) {
    let mut at = first;
    let mut rest = out;
    while !rest.is_empty() {
        let numbers = &bell(key, at as u64 / 4)[at % 4..];
        let (now, later) = rest.split_at_mut(numbers.len().min(rest.len()));
        for (to, number) in now.iter_mut().zip(numbers) {
            *to = X::from_f64(f64::from(number * scale));
        }
        at += now.len();
        rest = later;
    }
}

/// Conversion of one element; a loop over it vectorises.
trait Convert<To>: Elem {
    fn convert(self) -> To;
}

macro_rules! convert {
    ($($from:ty => $to:ty: |$x:ident| $value:expr;)*) => { $(
        impl Convert<$to> for $from {
            #[inline(always)]
            fn convert(self) -> $to {
                let $x = self;
                $value
            }
        }
        impl Cast<$from, $to> for Cpu {
            fn cast(&self, dst: &mut [$to], src: &[$from]) -> Result<()> {
                self.cast_parts(dst, src, |dst, src| dispatch(Converted { dst, src }))
            }
        }
    )* };
}

convert! {
    f32 => f32: |x| x;
    f64 => f64: |x| x;
    Complex64 => Complex64: |x| x;
    f32 => f64: |x| x as f64;
    f64 => f32: |x| x as f32;
    bf16 => f32: |x| f32::from_bits((x.to_bits() as u32) << 16);
    f32 => bf16: |x| round_to_bf16(x);
}

/// To the nearest, ties to even; NaN stays NaN. Without branches, unlike the library's.
#[inline(always)]
fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    // Half of the last kept bit, less one where that bit is even.
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    // A NaN could lose its last set bit, or overflow: cut it off and make it quiet.
    let nan = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { nan } else { rounded } as u16)
}

/// `to = from`, rounded to the nearest of its type, on the caller's thread.
///
/// # Panics
/// When the lengths differ.
pub fn narrow<X: Real>(to: &mut [X], from: &[f32]) {
    assert_eq!(to.len(), from.len(), "as many values as there is room for");
    if X::DTYPE == bf16::DTYPE {
        let dst: &mut [bf16] = bytemuck::cast_slice_mut(to);
        dispatch(Converted { dst, src: from });
    } else if X::DTYPE == f32::DTYPE {
        bytemuck::cast_slice_mut(to).copy_from_slice(from);
    } else {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = X::from_f64(from.into()));
    }
}

struct Converted<'a, From, To> {
    dst: &'a mut [To],
    src: &'a [From],
}

impl<From: Convert<To>, To> Task for Converted<'_, From, To> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (dst, src) in self.dst.iter_mut().zip(self.src) {
            *dst = src.convert();
        }
    }
}

impl Cpu {
    fn cast_parts<From: Elem, To: Elem>(
        &self,
        dst: &mut [To],
        src: &[From],
        work: impl Fn(&mut [To], &[From]) + Sync + Send,
    ) -> Result<()> {
        expect_len("cast", "src", src.len(), dst.len())?;
        let k = self.rows_per_part(dst.len(), 2);
        self.for_parts(dst.chunks_mut(k).zip(src.chunks(k)), |(dst, src)| work(dst, src));
        Ok(())
    }
}

// The library uses the processor's own half-precision instructions.
impl Cast<f16, f32> for Cpu {
    fn cast(&self, dst: &mut [f32], src: &[f16]) -> Result<()> {
        self.cast_parts(dst, src, |dst, src| src.convert_to_f32_slice(dst))
    }
}

impl Cast<f32, f16> for Cpu {
    fn cast(&self, dst: &mut [f16], src: &[f32]) -> Result<()> {
        self.cast_parts(dst, src, |dst, src| dst.convert_from_f32_slice(src))
    }
}
