//! Packed attention and decoding on CUDA.
//!
//! bf16 with head sizes 64 and 128 goes through the tensor cores (`cu/flash.cu`, `cu/decode.cu`; heads of 128 on
//! devices of capability 9.0 through `cu/flash_hopper.cu`), everything else through plain kernels (`cu/attention.cu`). How many tiles the segments of a stream
//! have is known to the device alone, so grids have as many blocks as there could be tiles,
//! and a block without a tile has nothing to do.

use super::launch::Launch;
use super::{Cuda, CudaReal, decode};
use crate::error::{Error, Result};
use crate::ops::{
    Attention, AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, CacheStore, QkvDims,
};
use crate::{View, ViewMut};

const PLAIN: &str = "attention";
const FLASH: &str = "flash";
/// As in `cu/attention.cu`.
const PLAIN_THREADS: usize = 128;
const MAX_DIM: usize = 256;
const DECODE_THREADS: usize = 256;
/// Query heads that a block decodes.
const DECODE_GROUP: usize = 8;
/// As in `cu/flash.cu`: threads, rows of a tile forwards and of what comes in at a time, and the padding of
/// its rows.
const FLASH_THREADS: usize = 128;
const FORWARD_TILE: usize = 128;
const STEP: usize = 64;
const PAD: usize = 8;

/// Fails unless the kernels have room for a head.
fn check_head(op: &'static str, dims: &QkvDims) -> Result<()> {
    if dims.head_dim <= MAX_DIM {
        return Ok(());
    }
    let why = format!("heads of {}, at most {MAX_DIM} are possible", dims.head_dim);
    Err(Error::Unsupported { op, why })
}

/// Bytes that storing keys and values in a cache moves.
fn moved<X>(dims: &QkvDims) -> usize {
    2 * 2 * dims.tokens * dims.kv_heads * dims.head_dim * size_of::<X>()
}

/// A kernel of attention through the tensor cores, and what a launch of it is.
struct Flash {
    module: &'static str,
    name: &'static str,
    /// Rows of a tile.
    rows: usize,
    /// Bytes of shared memory of a block.
    shared: usize,
}

/// Bytes of a multiprocessor's shared memory that every block takes beside its own; a multiprocessor has as many
/// more than a block may have.
const RESERVED: usize = 1024;

/// As in `cu/flash_hopper.cu`: a tile of 64 rows, and what is lost where tiles begin at multiples of 1,024 bytes.
const HOPPER: &str = "flash_hopper";
const HOPPER_TILE: usize = 64 * 128 * size_of::<u16>();
const ALIGNMENT: usize = 1024;

impl Flash {
    /// The forward kernel of heads of this size, if there is one.
    fn forward(device: &Cuda, head_dim: usize) -> Option<Self> {
        let two_stages = shared_rows(FORWARD_TILE + 4 * STEP, head_dim);
        let two_fit = 2 * (two_stages + RESERVED) <= device.inner.limits.most_shared + RESERVED;
        let (module, name, shared) = match head_dim {
            128 if device.is_hopper() => (HOPPER, "flash_hopper_forward", 6 * HOPPER_TILE + ALIGNMENT),
            // Keys and values come in a step ahead where a multiprocessor has the room for two such blocks.
            128 if two_fit => (FLASH, "flash_forward_128_ahead", two_stages),
            128 => (FLASH, "flash_forward_128", shared_rows(FORWARD_TILE + 2 * STEP, head_dim)),
            64 => (FLASH, "flash_forward_64", two_stages),
            _ => return None,
        };
        Some(Self { module, name, rows: FORWARD_TILE, shared })
    }

    /// The backward kernel of heads of this size, if there is one.
    fn backward(device: &Cuda, head_dim: usize) -> Option<Self> {
        let (rows, shared) = backward_tile(head_dim);
        let (module, name, rows, shared) = match head_dim {
            128 if device.is_hopper() => {
                // A stage is two tiles, lse and delta.
                let stages = 2 * (2 * HOPPER_TILE + ALIGNMENT);
                (HOPPER, "flash_hopper_backward", STEP, 2 * HOPPER_TILE + stages + ALIGNMENT)
            }
            128 => (FLASH, "flash_backward_128", rows, shared),
            64 => (FLASH, "flash_backward_64", rows, shared),
            _ => return None,
        };
        Some(Self { module, name, rows, shared })
    }
}

/// The decoding kernel of a head size.
fn decode_name(head_dim: usize) -> &'static str {
    match head_dim {
        ..=64 => "attention_decode_64",
        65..=128 => "attention_decode_128",
        _ => "attention_decode_256",
    }
}

/// Whether 16 bytes at a time can be read and written at all these addresses, rows this far apart.
fn aligned(addresses: &[u64], strides: &[usize]) -> bool {
    addresses.iter().all(|a| a.is_multiple_of(16)) && strides.iter().all(|s| s.is_multiple_of(8))
}

/// Lanes of a warp that share a row of a head in `attention_delta`: 16 bytes each if that comes out even.
fn delta_lanes<X>(head_dim: usize) -> usize {
    let bytes = head_dim * size_of::<X>();
    let lanes = bytes / 16;
    if bytes.is_multiple_of(16) && lanes.is_power_of_two() && lanes <= 32 { lanes } else { 32 }
}

/// Bytes of shared memory for this many rows of a head.
fn shared_rows(rows: usize, head_dim: usize) -> usize {
    rows * (head_dim + PAD) * size_of::<u16>()
}

/// Rows of a tile backwards, and bytes of shared memory: two stages of two tiles, lse and delta, and the
/// block's own two tiles where they do not fit into a stage.
fn backward_tile(head_dim: usize) -> (usize, usize) {
    let rows = STEP * 128 / head_dim;
    let stages = 2 * (shared_rows(2 * STEP, head_dim) + 2 * STEP * size_of::<f32>());
    (rows, stages + if rows > STEP { shared_rows(2 * rows, head_dim) } else { 0 })
}

/// Pairs of queries and keys, times heads and their size, where all segments are equally long: the host
/// does not know their lengths. `products` of them are two operations per pair and element.
fn flops(products: usize, dims: &AttentionDims) -> f64 {
    let QkvDims { tokens, heads, head_dim, .. } = dims.qkv;
    let each = tokens as f64 / dims.segments.max(1) as f64;
    2.0 * (products * heads * head_dim) as f64 * tokens as f64 * (each + 1.0) / 2.0
}

/// Most tiles of so many rows that the segments can have: every segment begins one of its own.
fn most_tiles(rows: usize, dims: &AttentionDims) -> usize {
    if dims.qkv.tokens == 0 { 0 } else { dims.qkv.tokens.div_ceil(rows) + dims.segments }
}

impl Launch<'_> {
    /// Heads and their size, as kernels take them.
    pub(super) fn heads(self, dims: &QkvDims) -> Self {
        self.int(dims.heads).int(dims.kv_heads).int(dims.head_dim)
    }

    /// Everything of [`AttentionDims`], after the pointers.
    fn attention(self, dims: &AttentionDims) -> Self {
        let launch = self.fault().int(dims.qkv.tokens).int(dims.segments);
        launch.heads(&dims.qkv).long(dims.o_stride).float(dims.scale)
    }
}

impl<X: CudaReal> Attention<X> for Cuda {
    fn attention_forward(&self, args: AttentionForward<Self, X>) -> Result<()> {
        args.check()?;
        let AttentionForward { o, lse, qkv, offsets, dims } = args;
        const OP: &str = "attention_forward";
        check_head(OP, &dims.qkv)?;
        let QkvDims { tokens, heads, head_dim, .. } = dims.qkv;
        let flash = Flash::forward(self, head_dim).filter(|_| X::SUFFIX == "bf16");
        let wide = aligned(&[o.pointer(), qkv.pointer()], &[dims.o_stride]);
        // The kernel takes the largest of the scores before they are scaled.
        if let Some(Flash { module, name, rows, shared }) = flash.filter(|_| wide && dims.scale > 0.0) {
            let kernel = self.kernel(module, name).write(&o).write(&lse).read(qkv).read(offsets);
            let grid = [most_tiles(rows, &dims) * heads, 1, 1];
            let kernel = kernel.flops(flops(2, &dims));
            // SAFETY: the lengths checked above; segments beyond the stream are refused.
            return unsafe { kernel.attention(&dims).run(grid, FLASH_THREADS, shared) };
        }
        let kernel = self.kernel_of::<X>(PLAIN, OP).write(&o).write(&lse).read(qkv).read(offsets);
        // SAFETY: as above.
        unsafe { kernel.attention(&dims).run([tokens, heads, 1], PLAIN_THREADS, 0) }
    }

    fn attention_backward(&self, args: AttentionBackward<Self, X>) -> Result<()> {
        args.check()?;
        let AttentionBackward { dqkv, delta, d_o, o, lse, qkv, offsets, dims } = args;
        check_head("attention_backward", &dims.qkv)?;
        let QkvDims { tokens, heads, kv_heads, head_dim } = dims.qkv;
        let kernel = self.kernel_of::<X>(PLAIN, "attention_delta").write(&delta).read(d_o).read(o);
        let kernel = kernel.int(tokens).int(heads).int(head_dim).long(dims.o_stride);
        let lanes = delta_lanes::<X>(head_dim);
        let blocks = (tokens * heads * lanes).div_ceil(PLAIN_THREADS);
        // SAFETY: the lengths checked above.
        unsafe { kernel.int(lanes).run([blocks, 1, 1], PLAIN_THREADS, 0) }?;

        let kernel_of = |module: &'static str, name: &'static str, suffix: &'static str| {
            let kernel =
                self.kernel_typed(module, name, suffix).write(&dqkv).read(delta.freeze()).read(d_o).read(lse);
            kernel.read(qkv).read(offsets).attention(&dims)
        };
        let flash = Flash::backward(self, head_dim).filter(|_| X::SUFFIX == "bf16");
        let wide = aligned(&[d_o.pointer(), qkv.pointer(), dqkv.pointer()], &[dims.o_stride]);
        if let Some(Flash { module, name, rows, shared }) = flash.filter(|_| wide) {
            let grid = [most_tiles(rows, &dims) * (heads + kv_heads), 1, 1];
            // Blocks of keys and of queries compute the scores and their gradients; then dk and dv, or dq.
            let kernel = kernel_of(module, name, "").flops(flops(7, &dims));
            // SAFETY: the lengths checked above; segments beyond the stream are refused.
            return unsafe { kernel.run(grid, FLASH_THREADS, shared) };
        }
        let kernel = kernel_of(PLAIN, "attention_backward_q", X::SUFFIX);
        // SAFETY: as above.
        unsafe { kernel.run([tokens, heads, 1], 32, 0) }?;
        let kernel = kernel_of(PLAIN, "attention_backward_kv", X::SUFFIX);
        // SAFETY: as above.
        unsafe { kernel.run([tokens, kv_heads, 1], 32, 0) }
    }

    fn cache_store(&self, args: CacheStore<Self, X>) -> Result<()> {
        args.check()?;
        let CacheStore { k_cache, v_cache, qkv, offsets, slot, dims } = args;
        const OP: &str = "cache_store";
        check_head(OP, &dims.qkv)?;
        let kernel = self.kernel_of::<X>(PLAIN, OP).write(&k_cache).write(&v_cache).read(qkv);
        let kernel = kernel.read(offsets).read(slot).fault();
        let kernel = kernel.int(dims.qkv.tokens).int(slot.len()).heads(&dims.qkv);
        let kernel = kernel.int(dims.capacity).int(dims.slots);
        let kernel = kernel.moves(moved::<X>(&dims.qkv));
        // SAFETY: the lengths checked above; segments, slots and positions out of range are refused.
        unsafe { kernel.run([dims.qkv.tokens, 1, 1], 256, 0) }
    }

    fn attention_decode(&self, args: AttentionDecode<Self, X>) -> Result<()> {
        args.check()?;
        let AttentionDecode { o, k_cache, v_cache, qkv, slot, position, dims } = args;
        check_head("attention_decode", &dims.qkv)?;
        let QkvDims { tokens: rows, heads, kv_heads, head_dim } = dims.qkv;
        let addresses = [o.pointer(), k_cache.pointer(), v_cache.pointer(), qkv.pointer()];
        if let Some(kernels) = decode::kernels::<X>(self, &dims, &addresses) {
            let caches = (&k_cache, &v_cache);
            // SAFETY: the lengths checked above.
            return unsafe { self.decode_tiles(kernels, &o, caches, qkv, (slot, position), &dims) };
        }
        let kernel = self.kernel_of::<X>(PLAIN, "cache_append").write(&k_cache).write(&v_cache).read(qkv);
        let kernel = kernel.read(slot).read(position).fault().heads(&dims.qkv);
        let kernel = kernel.int(dims.capacity).int(dims.slots);
        let kernel = kernel.moves(moved::<X>(&dims.qkv));
        // SAFETY: the lengths checked above; slots and positions out of range are refused.
        unsafe { kernel.run([rows, 1, 1], 256, 0) }?;
        let kernel = self.kernel_of::<X>(PLAIN, decode_name(head_dim)).write(&o);
        let kernel = kernel.read(k_cache.freeze()).read(v_cache.freeze());
        let kernel = kernel.read(qkv).read(slot).read(position).heads(&dims.qkv);
        let kernel = kernel.int(dims.capacity).int(dims.slots).float(dims.scale);
        // Only the device knows how much of the cache is in use.
        let kernel = kernel.moves(0);
        let groups = (heads / kv_heads).div_ceil(DECODE_GROUP);
        // SAFETY: as above.
        unsafe { kernel.run([rows, kv_heads, groups], DECODE_THREADS, 0) }
    }
}
