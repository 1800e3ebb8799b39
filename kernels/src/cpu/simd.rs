//! How generic loops become fast ones: one body, several instruction sets.
//!
//! A hot loop is written once, as the [`Task::run`] of a small struct that holds its
//! slices. [`dispatch`] runs it in the widest variant that the processor has: the
//! body is inlined into a function compiled with those instructions, and the
//! compiler vectorises it there. So `run`, and every function it calls, must be
//! `#[inline(always)]`, and loops are plain ones: what is not inlined, be it the library's
//! `map` over an array or the `sum` of an iterator, stays in baseline code and is many
//! times slower.
//!
//! [`Level::FMA`] gives the body whether fused multiply-add is an instruction. Where
//! it is not, `mul_add` would be a library call: use [`CpuReal::madd`](super::CpuReal::madd), which asks.

use std::sync::LazyLock;

/// An instruction set that loop bodies are compiled for.
pub trait Level: Copy + Send + Sync + 'static {
    /// Fused multiply-add is an instruction.
    const FMA: bool;
}

/// What every processor of the target has.
#[derive(Clone, Copy, Debug)]
pub enum Baseline {}
impl Level for Baseline {
    const FMA: bool = false;
}

/// AVX2 and FMA: vectors of 256 bits.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub enum Avx2 {}
#[cfg(target_arch = "x86_64")]
impl Level for Avx2 {
    const FMA: bool = true;
}

/// AVX-512 (F, VL, BW, DQ): vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub enum Avx512 {}
#[cfg(target_arch = "x86_64")]
impl Level for Avx512 {
    const FMA: bool = true;
}

/// A loop body and the slices it works on.
pub trait Task {
    /// What the loop returns.
    type Out;
    /// The body. Mark every implementation `#[inline(always)]`.
    fn run<L: Level>(self) -> Self::Out;
}

/// Runs a task with the widest instructions of this processor.
///
/// Threads go outside, tasks inside: a closure given to another thread is not inlined.
#[inline]
pub fn dispatch<T: Task>(task: T) -> T::Out {
    #[cfg(target_arch = "x86_64")]
    match *WIDEST {
        // SAFETY: `WIDEST` was found by asking the processor for these very features.
        Isa::Avx512 => return unsafe { run_avx512(task) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { run_avx2(task) },
        Isa::Baseline => {}
    }
    task.run::<Baseline>()
}

/// The instructions that [`dispatch`] runs tasks with here, by name.
pub fn widest() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match *WIDEST {
        Isa::Avx512 => return "AVX-512",
        Isa::Avx2 => return "AVX2 with FMA",
        Isa::Baseline => {}
    }
    "the baseline of the architecture"
}

/// The variants that are compiled.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Isa {
    Baseline,
    Avx2,
    Avx512,
}

#[cfg(target_arch = "x86_64")]
static WIDEST: LazyLock<Isa> = LazyLock::new(|| {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Baseline,
    }
});

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<T: Task>(task: T) -> T::Out {
    task.run::<Avx2>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
fn run_avx512<T: Task>(task: T) -> T::Out {
    task.run::<Avx512>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::sums::dot;
    use crate::rng::Stream;

    #[derive(Clone, Copy)]
    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl Task for Dot<'_> {
        type Out = f32;
        #[inline(always)]
        fn run<L: Level>(self) -> f32 {
            dot::<L, f32>(self.0, self.1)
        }
    }

    #[test]
    fn every_variant_computes_the_same_sum() {
        let mut stream = Stream::new(11);
        for len in [0, 1, 5, 31, 32, 33, 123, 896] {
            let a: Vec<f32> = (0..len).map(|_| stream.normal() as f32).collect();
            let b: Vec<f32> = (0..len).map(|_| stream.normal() as f32).collect();
            let exact: f64 = a.iter().zip(&b).map(|(&a, &b)| a as f64 * b as f64).sum();
            let mut found = vec![Dot(&a, &b).run::<Baseline>(), dispatch(Dot(&a, &b))];
            #[cfg(target_arch = "x86_64")]
            {
                if *WIDEST >= Isa::Avx2 {
                    // SAFETY: the processor has AVX2 and FMA.
                    found.push(unsafe { run_avx2(Dot(&a, &b)) });
                }
                if *WIDEST >= Isa::Avx512 {
                    // SAFETY: the processor has AVX-512.
                    found.push(unsafe { run_avx512(Dot(&a, &b)) });
                }
            }
            for x in found {
                let diff = (x as f64 - exact).abs();
                assert!(diff <= 1e-6 * (len as f64).sqrt().max(1.0), "{len} products: {x} for {exact}");
            }
        }
    }
}
