//! Operations on the CPU: the readable form of every contract, and the fast one.
//!
//! Code is generic over [`CpuReal`]; `f32` is the type that must be fast, `f64` and
//! complex run the same lines to check gradients. Work is split over a thread pool
//! of the device's own by rows or heads of the *output*; no sum is split between
//! threads, so results do not depend on their number.

mod activation;
mod adamw;
mod attention;
mod collective;
mod dropout;
mod elementwise;
mod embedding;
mod gemm;
mod linear;
mod lm_head;
mod lora;
mod lora_loops;
mod mask;
mod math;
mod matrix;
mod memory;
mod mse;
mod normals;
mod parallel;
mod profile;
mod residual;
mod rmsnorm;
mod rope;
mod scratch;
pub mod simd;
#[cfg(target_arch = "x86_64")]
mod skinny;
mod softmax;
mod streams;
mod t5_attention;

pub use elementwise::narrow;
pub use memory::CpuBuf;
pub use normals::add_normals;
pub use profile::OpTime;

use crate::{Device, Elem, Real, Result, error::expect_len};
use simd::Level;
use std::sync::Arc;

/// The CPU as a device: a pool of threads.
#[derive(Clone)]
pub struct Cpu {
    pool: Arc<rayon::ThreadPool>,
    profile: Arc<profile::Profile>,
}

/// Types that the CPU computes in: accumulation is in the type itself.
///
/// The functions are those that inner loops call: in `f32` they vectorise at level
/// `L` (relative error below 2e-7), in the other types they are the exact ones.
pub trait CpuReal: Real<Acc = Self> + gemm::Product {
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
impl CpuReal for crate::Complex64 {}

impl Cpu {
    /// A CPU device with this many threads of its own.
    pub fn new(threads: usize) -> Self {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .expect("the operating system starts threads");
        Self { pool: Arc::new(pool), profile: Arc::default() }
    }

    /// Threads of this device.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` inside the pool, so that rayon's iterators use it. One thread alone is the
    /// caller's: waking another one takes longer than many operations, and no work for one
    /// thread may use rayon.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        if self.threads() == 1 { work() } else { self.pool.install(work) }
    }
}

impl Default for Cpu {
    /// As many threads as this process may run on.
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, |n| n.get()))
    }
}

impl Device for Cpu {
    type Buf<T: Elem> = CpuBuf<T>;
    type View<'a, T: Elem> = &'a [T];
    type ViewMut<'a, T: Elem> = &'a mut [T];

    fn name(&self) -> String {
        format!("CPU, {} threads", self.threads())
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn zeros<T: Elem>(&self, len: usize) -> Result<CpuBuf<T>> {
        CpuBuf::zeros(len)
    }

    fn upload<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        expect_len("upload", "src", src.len(), dst.len())?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn download<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        expect_len("download", "dst", dst.len(), src.len())?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn copy<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        expect_len("copy", "src", src.len(), dst.len())?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn fill<T: Elem>(&self, dst: &mut [T], value: T) -> Result<()> {
        dst.fill(value);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
