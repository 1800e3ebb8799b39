//! Packed attention, its backward pass, and decoding on a cache.

use crate::common::*;
use crate::lora::LittleShared;
use gradtx_emulator::{Order, Schedule, Variant, configure, device, on_device};
use gradtx_kernels::ops::{
    Attention, AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, CacheStore, DecodeDims,
    QkvDims,
};
use gradtx_kernels::{Backend, Buffer, Device, Real, Result, bf16};
use std::ops::Range;

/// Probabilities and score gradients are rounded to bf16 before they are multiplied, and
/// gradients of scores are differences, so more than one rounding shows.
const ATTENTION: Tolerance = Tolerance { f32: 5e-6, bf16: 1e-2 };

pub struct Packed {
    pub lengths: &'static [u32],
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Elements that rows of o are further apart than they are long, and by which qkv is shifted.
    pub gap: usize,
}

impl Packed {
    fn offsets(&self) -> Vec<u32> {
        let mut offsets = vec![0];
        for len in self.lengths {
            offsets.push(offsets.last().expect("not empty") + len);
        }
        offsets
    }
}

impl Packed {
    fn run_scaled<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs, scale: f64) -> Result<Results> {
        let Self { heads, kv_heads, head_dim, gap, .. } = *self;
        let offsets = self.offsets();
        let tokens = offsets[offsets.len() - 1] as usize;
        let qkv_dims = QkvDims { tokens, heads, kv_heads, head_dim };
        let (width, n) = (heads * head_dim, tokens * qkv_dims.row());
        let o_stride = width + gap;
        let dims = AttentionDims { qkv: qkv_dims, segments: self.lengths.len(), scale, o_stride };
        let offsets = put(d, &offsets)?;
        let qkv = put(d, &inputs.values::<X>("qkv", n + gap))?;
        let qkv_view = || qkv.view(gap..n + gap);
        let mut o = put(d, &spread(&nan::<X>(tokens * width), width, o_stride))?;
        let mut lse = put(d, &nan::<X::Acc>(heads * tokens))?;
        d.attention_forward(AttentionForward {
            o: o.all_mut(),
            lse: lse.all_mut(),
            qkv: qkv_view(),
            offsets: offsets.all(),
            dims,
        })?;
        let d_o = put(d, &spread(&inputs.values::<X>("d_o", tokens * width), width, o_stride))?;
        let (mut dqkv, mut delta) = (put(d, &nan::<X>(n))?, put(d, &nan::<X::Acc>(heads * tokens))?);
        let (to, scratch) = (dqkv.all_mut(), delta.all_mut());
        let (o_view, lse_view) = (o.all(), lse.all());
        d.attention_backward(AttentionBackward {
            dqkv: to,
            delta: scratch,
            d_o: d_o.all(),
            o: o_view,
            lse: lse_view,
            qkv: qkv_view(),
            offsets: offsets.all(),
            dims,
        })?;
        let mut results = Results::default();
        results.take_rows(d, "o", &o, width, o_stride)?;
        results.take(d, "lse", &lse)?;
        results.take(d, "dqkv", &dqkv)?;
        Ok(results)
    }
}

impl Case for Packed {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        self.run_scaled(d, inputs, 1.0 / (self.head_dim as f64).sqrt())
    }
}

/// Scores that are turned around, or all the same.
struct Scaled(Packed, f64);

impl Case for Scaled {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        self.0.run_scaled(d, inputs, self.1)
    }
}

fn check_packed(case: Packed) {
    let Packed { lengths, heads, kv_heads, head_dim, gap } = case;
    check(
        &format!("attention {lengths:?}, {heads}/{kv_heads} heads of {head_dim}, gap {gap}"),
        &case,
        ATTENTION,
    );
}

#[test]
fn any_head_size() {
    for (lengths, heads, kv_heads, head_dim, gap) in
        [(&[1u32][..], 1, 1, 2, 0), (&[3, 1, 40], 2, 1, 10, 3), (&[7, 33], 4, 2, 64, 1), (&[5], 1, 1, 160, 0)]
    {
        check_packed(Packed { lengths, heads, kv_heads, head_dim, gap });
    }
}

#[test]
fn head_size_64() {
    for (lengths, heads, kv_heads) in [(&[1u32, 70, 5][..], 2, 1), (&[64, 129], 1, 1), (&[33; 3], 4, 2)] {
        check_packed(Packed { lengths, heads, kv_heads, head_dim: 64, gap: 8 });
    }
}

#[test]
fn head_size_128() {
    for (lengths, heads, kv_heads) in [(&[1u32, 66][..], 2, 1), (&[97], 1, 1), (&[3, 150, 64], 2, 1)] {
        check_packed(Packed { lengths, heads, kv_heads, head_dim: 128, gap: 0 });
    }
}

/// On devices with more shared memory than the emulator's, where keys and values come in a step ahead, and with less.
#[test]
fn head_size_128_with_other_shared_memory() {
    if on_device() {
        return;
    }
    for kib in [227, 99] {
        let _limit = LittleShared::new(kib << 10);
        let case = Packed { lengths: &[3, 150], heads: 2, kv_heads: 1, head_dim: 128, gap: 0 };
        check(&format!("attention in {kib} KiB"), &case, ATTENTION);
    }
}

/// A device that takes the kernels of Hopper, on this thread.
pub struct Hopper {
    /// As much shared memory as Hopper has, as long as this lives.
    _shared: LittleShared,
}

impl Hopper {
    pub fn new() -> Self {
        gradtx_emulator::pretend_hopper(true);
        Self { _shared: LittleShared::new(227 << 10) }
    }
}

impl Drop for Hopper {
    fn drop(&mut self) {
        gradtx_emulator::pretend_hopper(false);
    }
}

/// Through Hopper's own instructions, as the emulator understands them; on a GPU that has them, all heads of 128 go there.
#[test]
fn hopper_heads_of_128() {
    if on_device() {
        return;
    }
    let _hopper = Hopper::new();
    for (lengths, heads, kv_heads, gap) in
        [(&[1u32, 66][..], 2, 1, 8), (&[97], 1, 1, 0), (&[3, 150, 64], 2, 1, 0), (&[257, 128], 3, 1, 0)]
    {
        let case = Packed { lengths, heads, kv_heads, head_dim: 128, gap };
        check(&format!("attention on Hopper {lengths:?}, {heads}/{kv_heads} heads"), &case, ATTENTION);
    }
}

/// The largest score is not the largest before it is scaled.
#[test]
fn scales_that_are_not_positive() {
    for scale in [-0.5, 0.0] {
        let packed = Packed { lengths: &[70], heads: 1, kv_heads: 1, head_dim: 64, gap: 0 };
        check(&format!("attention scaled by {scale}"), &Scaled(packed, scale), ATTENTION);
    }
}

/// More segments than a warp has lanes, of one tile and of two.
#[test]
fn many_segments() {
    const LENGTHS: [u32; 40] = {
        let mut lengths = [1; 40];
        (lengths[3], lengths[35], lengths[39]) = (65, 70, 66);
        lengths
    };
    check_packed(Packed { lengths: &LENGTHS, heads: 1, kv_heads: 1, head_dim: 64, gap: 0 });
}

/// A segment has the same bits alone as between others, which change the order of all tiles.
#[test]
fn segments_do_not_depend_on_their_neighbours() {
    configure(Schedule { order: Order::Forward, race: false });
    let cuda = device(Variant::PLAIN);
    let (heads, kv_heads, head_dim) = (2, 1, 64);
    let (width, row) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
    let (before, len, after) = (70, 130, 200);
    let all = before + len + after;
    let inputs = Inputs::new(Precision::Bf16);
    let (qkv, d_o) = (inputs.values::<bf16>("qkv", all * row), inputs.values::<bf16>("d_o", all * width));
    // o, lse and dqkv of the segment's tokens, when these tokens are the stream.
    let run = |stream: Range<usize>, lengths: &[usize]| -> Result<(Vec<bf16>, Vec<f32>, Vec<bf16>)> {
        let tokens = stream.len();
        let ends = lengths.iter().scan(0, |end, n| {
            *end += *n as u32;
            Some(*end)
        });
        let offsets = put(&cuda, &std::iter::once(0).chain(ends).collect::<Vec<u32>>())?;
        let dims = AttentionDims {
            qkv: QkvDims { tokens, heads, kv_heads, head_dim },
            segments: lengths.len(),
            scale: 0.125,
            o_stride: width,
        };
        let qkv = put(&cuda, &qkv[stream.start * row..stream.end * row])?;
        let d_o = put(&cuda, &d_o[stream.start * width..stream.end * width])?;
        let (mut o, mut dqkv) = (cuda.zeros::<bf16>(tokens * width)?, cuda.zeros::<bf16>(tokens * row)?);
        let [mut lse, mut delta] = [cuda.zeros::<f32>(heads * tokens)?, cuda.zeros::<f32>(heads * tokens)?];
        let (qkv, offsets) = (qkv.all(), offsets.all());
        cuda.attention_forward(AttentionForward { o: o.all_mut(), lse: lse.all_mut(), qkv, offsets, dims })?;
        let (to, scratch) = (dqkv.all_mut(), delta.all_mut());
        let (o_view, lse_view) = (o.all(), lse.all());
        cuda.attention_backward(AttentionBackward {
            dqkv: to,
            delta: scratch,
            d_o: d_o.all(),
            o: o_view,
            lse: lse_view,
            qkv,
            offsets,
            dims,
        })?;
        let first = before - stream.start;
        let part = |values: Vec<bf16>, each: usize| values[first * each..(first + len) * each].to_vec();
        let lse = cuda.to_host(lse.all())?;
        let lse = lse.chunks(tokens).flat_map(|head| &head[first..first + len]).copied().collect();
        let (o, dqkv) = (cuda.to_host(o.all())?, cuda.to_host(dqkv.all())?);
        Ok((part(o, width), lse, part(dqkv, row)))
    };
    let alone = run(before..before + len, &[len]).unwrap();
    assert!(run(0..all, &[before, len, after]).unwrap() == alone, "other bits between other segments");
    // The comparison sees a token that is missing.
    assert!(run(before..all, &[len - 1, after + 1]).unwrap() != alone);
}

pub struct Decode {
    pub lengths: &'static [u32],
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub capacity: usize,
}

impl Case for Decode {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Self { lengths, heads, kv_heads, head_dim, capacity } = *self;
        let slots = lengths.len() + 2;
        let packed = Packed { lengths, heads, kv_heads, head_dim, gap: 0 };
        let offsets = packed.offsets();
        let qkv = QkvDims { tokens: offsets[offsets.len() - 1] as usize, heads, kv_heads, head_dim };
        let scale = 1.0 / (head_dim as f64).sqrt();
        let dims = DecodeDims { qkv, capacity, slots, scale };
        let size = slots * capacity * kv_heads * head_dim;
        let [mut k, mut v] =
            [put(d, &inputs.values::<X>("k", size))?, put(d, &inputs.values::<X>("v", size))?];
        // Slots in another order than segments.
        let slot: Vec<u32> = (0..lengths.len()).map(|i| (slots - 1 - i) as u32).collect();
        let (offsets, slot) = (put(d, &offsets)?, put(d, &slot)?);
        let prompts = put(d, &inputs.values::<X>("prompts", qkv.tokens * qkv.row()))?;
        let (k_to, v_to) = (k.all_mut(), v.all_mut());
        d.cache_store(CacheStore {
            k_cache: k_to,
            v_cache: v_to,
            qkv: prompts.all(),
            offsets: offsets.all(),
            slot: slot.all(),
            dims,
        })?;
        let rows = QkvDims { tokens: lengths.len(), ..qkv };
        let position = put(d, lengths)?;
        let next = put(d, &inputs.values::<X>("next", rows.tokens * rows.row()))?;
        let mut o = put(d, &nan::<X>(rows.tokens * heads * head_dim))?;
        let (k_to, v_to) = (k.all_mut(), v.all_mut());
        let dims = DecodeDims { qkv: rows, ..dims };
        let (slot, position) = (slot.all(), position.all());
        d.attention_decode(AttentionDecode {
            o: o.all_mut(),
            k_cache: k_to,
            v_cache: v_to,
            qkv: next.all(),
            slot,
            position,
            dims,
        })?;
        let mut results = Results::default();
        for (name, buf) in [("k", &k), ("v", &v), ("o", &o)] {
            results.take(d, name, buf)?;
        }
        Ok(results)
    }
}

#[test]
fn decoding() {
    for (lengths, heads, kv_heads, head_dim) in [
        (&[1u32][..], 1, 1, 2),
        (&[3, 40, 1], 4, 2, 10),
        (&[44, 7], 11, 1, 64),
        (&[2, 38], 6, 2, 100),
        (&[9], 3, 1, 160),
    ] {
        let case = Decode { lengths, heads, kv_heads, head_dim, capacity: 45 };
        check(&format!("decode {lengths:?}"), &case, ATTENTION);
    }
}

/// Groups that fill a tile of heads, or more; rows of one part of keys, of two, and of three.
#[test]
fn decoding_in_parts() {
    for (lengths, heads, kv_heads, head_dim, capacity) in [
        (&[17u32, 1, 44][..], 14, 2, 128, 45),
        (&[33, 8], 18, 1, 64, 45),
        (&[1050, 511, 512], 2, 1, 64, 1060),
        (&[600], 3, 1, 128, 700),
    ] {
        let case = Decode { lengths, heads, kv_heads, head_dim, capacity };
        check(&format!("decode {lengths:?} of {capacity}, {heads}/{kv_heads} heads"), &case, ATTENTION);
    }
}
