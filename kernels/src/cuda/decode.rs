//! Decoding on the tensor cores (`cu/decode.cu`): which shapes have a kernel there, and its launch.

use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::Result;
use crate::ops::DecodeDims;

/// As in `cu/decode.cu`: threads, warps among them, heads of a block, keys of a part, the padding of rows
/// in shared memory, and floats of a part's results beside a head's.
const MODULE: &str = "decode";
const THREADS: usize = 128;
const WARPS: usize = 4;
const TILE: usize = 16;
const PART: usize = 512;
const PAD: usize = 8;
const PARTIAL: usize = 4;

/// The kernels of a head size: of parts, and of rows of several parts.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    parts: &'static str,
    combine: &'static str,
}

/// Bytes of shared memory for keys and values in two stages.
fn shared(head_dim: usize) -> usize {
    WARPS * 4 * TILE * (head_dim + PAD) * size_of::<u16>()
}

/// Those for these dimensions and memory at these addresses, if there are any.
pub(super) fn kernels<X: CudaReal>(cuda: &Cuda, dims: &DecodeDims, addresses: &[u64]) -> Option<Kernels> {
    let head_dim = dims.qkv.head_dim;
    let fits = shared(head_dim) <= cuda.inner.limits.most_shared;
    match head_dim {
        _ if X::SUFFIX != "bf16" || !fits || addresses.iter().any(|a| !a.is_multiple_of(16)) => None,
        64 => Some(Kernels { parts: "attention_decode_tiles_64", combine: "attention_decode_combine_64" }),
        128 => Some(Kernels { parts: "attention_decode_tiles_128", combine: "attention_decode_combine_128" }),
        _ => None,
    }
}

impl Cuda {
    /// Stores the new keys and values, and attends to all up to them.
    ///
    /// # Safety
    /// Lengths must be those that `dims` asks for, and the kernels those for them.
    pub(super) unsafe fn decode_tiles<X: CudaReal>(
        &self,
        kernels: Kernels,
        o: &CudaViewMut<'_, X>,
        (k_cache, v_cache): (&CudaViewMut<'_, X>, &CudaViewMut<'_, X>),
        qkv: CudaView<'_, X>,
        (slot, position): (CudaView<'_, u32>, CudaView<'_, u32>),
        dims: &DecodeDims,
    ) -> Result<()> {
        let (rows, heads, head_dim) = (dims.qkv.tokens, dims.qkv.heads, dims.qkv.head_dim);
        // Only the device knows how many parts a row has.
        let parts = dims.capacity.div_ceil(PART);
        let floats = if parts > 1 { rows * heads * parts * (head_dim + PARTIAL) } else { 0 };
        let scratch = self.workspace(floats * size_of::<f32>())?;
        let kernel = self.kernel(MODULE, kernels.parts).write(o).address::<f32>(scratch.pointer);
        let kernel = kernel.write(k_cache).write(v_cache).read(qkv).read(slot).read(position);
        let kernel = kernel.fault().heads(&dims.qkv).int(dims.capacity);
        let kernel = kernel.int(dims.slots).float(dims.scale).moves(0);
        let pieces = (heads / dims.qkv.kv_heads).div_ceil(TILE);
        let grid = [rows, dims.qkv.kv_heads * pieces, parts];
        // SAFETY: the caller's, and the scratch memory is as large as all parts; slots and positions out
        // of range are refused.
        unsafe { kernel.run(grid, THREADS, shared(head_dim)) }?;
        if parts <= 1 {
            return Ok(());
        }
        let kernel = self.kernel(MODULE, kernels.combine).write(o).address::<f32>(scratch.pointer);
        let kernel = kernel.read(slot).read(position).int(rows).int(heads).int(parts);
        let kernel = kernel.int(dims.capacity).int(dims.slots).moves(0);
        // SAFETY: as above.
        unsafe { kernel.run([(rows * heads).div_ceil(WARPS), 1, 1], THREADS, 0) }
    }
}
