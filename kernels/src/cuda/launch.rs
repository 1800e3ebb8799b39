//! Launches: a kernel with its arguments, which are compared with its signature.

use super::profile::Work;
use super::signature::Kind;
use super::{Cuda, CudaReal, CudaView, CudaViewMut, failed};
use crate::{Elem, Error, Result, View, ViewMut};
use cudarc::driver::result;
use std::ffi::c_void;

/// An argument. Numbers of 4 bytes are the lower half.
#[derive(Clone, Copy)]
struct Argument {
    bits: u64,
    kind: Kind,
}

/// A kernel with its arguments, in the order of its parameters.
pub(super) struct Launch<'a> {
    cuda: &'a Cuda,
    module: &'static str,
    name: &'static str,
    suffix: &'static str,
    arguments: Vec<Argument>,
    /// A size that the kernel's parameter cannot hold.
    too_large: Option<usize>,
    /// An address that is no multiple of its elements' alignment.
    misaligned: Option<u64>,
    /// For a profile.
    work: Work,
}

impl Cuda {
    /// The kernel `name` of `cu/{module}.cu`.
    pub(super) fn kernel(&self, module: &'static str, name: &'static str) -> Launch<'_> {
        let arguments = Vec::with_capacity(24);
        let (too_large, misaligned, work) = (None, None, Work::default());
        Launch { cuda: self, module, name, suffix: "", arguments, too_large, misaligned, work }
    }

    /// Its instance for `X`.
    pub(super) fn kernel_of<X: CudaReal>(&self, module: &'static str, name: &'static str) -> Launch<'_> {
        Launch { suffix: X::SUFFIX, ..self.kernel(module, name) }
    }

    /// Its instance with this end of its name.
    pub(super) fn kernel_typed(
        &self,
        module: &'static str,
        name: &'static str,
        suffix: &'static str,
    ) -> Launch<'_> {
        Launch { suffix, ..self.kernel(module, name) }
    }

    /// Blocks of `threads` that share `items` between them in a loop: enough to fill the device.
    pub(super) fn blocks_for(&self, items: usize, threads: usize) -> usize {
        items.div_ceil(threads).min(16 * self.inner.processors)
    }

    /// Bytes of dynamic shared memory that a block of this kernel may have here.
    pub(super) fn most_shared<X: CudaReal>(&self, module: &'static str, name: &'static str) -> Result<usize> {
        let limits = &self.inner.limits;
        self.stream()?;
        let function = self.inner.functions.get(module, name, X::SUFFIX, limits)?;
        Ok(limits.most_shared.saturating_sub(function.declared_shared()))
    }
}

impl Launch<'_> {
    fn argument(mut self, bits: u64, kind: Kind) -> Self {
        self.arguments.push(Argument { bits, kind });
        self
    }

    /// The address of so many elements.
    fn elements<T: Elem>(mut self, address: u64, len: usize, kind: Kind) -> Self {
        if len > 0 && !address.is_multiple_of(align_of::<T>() as u64) {
            self.misaligned = Some(address);
        }
        self.work.bytes += (len * size_of::<T>()) as f64;
        self.argument(address, kind)
    }

    /// A `T*`.
    pub fn write<T: Elem>(self, view: &CudaViewMut<'_, T>) -> Self {
        self.elements::<T>(view.pointer(), view.len(), Kind::Write(T::DTYPE))
    }

    /// A `T*` that may be null.
    pub fn write_if<T: Elem>(self, view: &Option<CudaViewMut<'_, T>>) -> Self {
        match view {
            Some(view) => self.write(view),
            None => self.argument(0, Kind::Write(T::DTYPE)),
        }
    }

    /// A `const T*`.
    pub fn read<T: Elem>(self, view: CudaView<'_, T>) -> Self {
        self.elements::<T>(view.pointer(), view.len(), Kind::Read(T::DTYPE))
    }

    /// A `const T*` that may be null.
    pub fn read_if<T: Elem>(self, view: Option<CudaView<'_, T>>) -> Self {
        match view {
            Some(view) => self.read(view),
            None => self.argument(0, Kind::Read(T::DTYPE)),
        }
    }

    /// A `T*` or `const T*` to memory without a view: scratch memory, or what the caller has checked. 0 is null.
    pub fn address<T: Elem>(self, address: u64) -> Self {
        self.argument(address, Kind::Address(T::DTYPE))
    }

    /// The `u32*` where a kernel reports a number that it refuses.
    pub fn fault(self) -> Self {
        let word = self.cuda.fault_pointer();
        self.argument(word, Kind::Write(u32::DTYPE))
    }

    /// A `u64`.
    pub fn long(self, n: usize) -> Self {
        self.argument(n as u64, Kind::U64)
    }

    /// A `u32`.
    pub fn int(mut self, n: usize) -> Self {
        if u32::try_from(n).is_err() {
            self.too_large = Some(n);
        }
        self.argument(n as u64, Kind::U32)
    }

    /// A `float`.
    pub fn float(self, x: f64) -> Self {
        self.argument((x as f32).to_bits().into(), Kind::F32)
    }

    /// What it has to do at least, for a profile, in the place of the bytes of all its views.
    pub fn work(mut self, work: Work) -> Self {
        self.work = work;
        self
    }

    /// Operations beside the bytes of its views.
    pub fn flops(mut self, flops: f64) -> Self {
        self.work.flops = flops;
        self
    }

    /// Bytes in the place of those of its views, of which it does not need all.
    pub fn moves(mut self, bytes: usize) -> Self {
        self.work.bytes = bytes as f64;
        self
    }

    /// Queues the kernel with `grid` blocks (in three dimensions) of `threads`, and `shared` bytes
    /// of dynamic shared memory. An empty grid does nothing.
    ///
    /// # Safety
    /// Memory at pointers must hold what the kernel touches for these arguments. (Their number and kinds are checked.)
    pub unsafe fn run(mut self, grid: [usize; 3], threads: usize, shared: usize) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let unsupported = |why: String| Err(Error::Unsupported { op: self.name, why });
        if let Some(n) = self.too_large {
            return unsupported(format!("a dimension of {n} does not fit 32 bits"));
        }
        if let Some(address) = self.misaligned {
            return unsupported(format!("the address {address:#x} is not aligned to its elements"));
        }
        let (cuda, limits) = (self.cuda, &self.cuda.inner.limits);
        let stream = cuda.queue()?;
        let function = cuda.inner.functions.get(self.module, self.name, self.suffix, limits)?;
        function.signature.check(self.arguments.iter().map(|argument| argument.kind))?;
        if let Some(why) = limits.refusal(&function.needs, grid, threads, shared) {
            return unsupported(why);
        }
        cuda.inner.functions.permit(self.name, self.suffix, &function, shared)?;
        let mut pointers: Vec<*mut c_void> =
            self.arguments.iter_mut().map(|a| std::ptr::from_mut(&mut a.bits).cast()).collect();
        let [x, y, z] = grid.map(|n| n as u32);
        let (name, block) = (self.name, (threads as u32, 1, 1));
        // SAFETY: the arguments are of the kernel's kinds, and the caller vouches for memory; each has a slot of 8
        // bytes, of which the driver reads the parameter's size: lower bytes come first on every host of CUDA.
        let mut queue = || unsafe {
            result::launch_kernel(function.raw, (x, y, z), block, shared as u32, stream, &mut pointers)
        };
        cuda.measured(|| name.into(), self.work, || queue().map_err(failed(format!("launch `{name}`"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::CublasLt;
    use crate::cuda::cubin::Cubins;
    use crate::{Buffer, Device};

    /// `y = 2 x + y` by `axpby_f32`, on the emulator; with one planted fault each nothing is launched.
    #[test]
    fn wrong_launches_do_not_reach_the_driver() {
        let cubins = Cubins::directory(&gradtx_emulator::kernel_objects());
        let cuda = Cuda::with_parts(0, cubins, &CublasLt::Off).expect("the stand-in shows a device");
        let x = cuda.buffer_from(&[1.0f32, 2.0, 3.0]).expect("there is memory");
        let mut y = cuda.buffer_from(&[10.0f32; 3]).expect("there is memory");
        let other = cuda.zeros::<crate::bf16>(3).expect("there is memory");
        let axpby = || cuda.kernel_of::<f32>("elementwise", "axpby");
        // SAFETY: three elements of both buffers; what is wrong about the arguments is refused.
        let run = |launch: Launch<'_>| unsafe { launch.run([1, 1, 1], 256, 0) };
        let (to, from) = (y.all_mut(), x.all());
        let planted = [
            ("an argument missing", axpby().write(&to).float(2.0).read(from).float(1.0)),
            ("one too many", axpby().write(&to).float(2.0).read(from).float(1.0).long(3).long(3)),
            ("another kind", axpby().write(&to).float(2.0).read(from).float(1.0).int(3)),
            ("another type", axpby().write(&to).float(2.0).read(other.all()).float(1.0).long(3)),
            ("another order", axpby().read(from).float(2.0).write(&to).float(1.0).long(3)),
        ];
        let says = [
            "it takes 5 arguments, found 4",
            "it takes 5 arguments, found 6",
            "argument 4 should be `u64 n`, found `u32`",
            "argument 2 should be `const float* src`, found `const bf16*`",
            "argument 0 should be `float* y`, found `const float*`",
        ];
        for ((fault, launch), why) in planted.into_iter().zip(says) {
            let refused = run(launch).expect_err(fault).to_string();
            assert_eq!(
                refused,
                format!("launch of `axpby_f32`: {why} (kernels/cu/elementwise.cu)"),
                "{fault}"
            );
        }
        run(axpby().write(&to).float(2.0).read(from).float(1.0).long(3)).expect("nothing is wrong");
        assert_eq!(cuda.to_host(y.all()).expect("it can be read"), [12.0, 14.0, 16.0], "once");
    }
}
