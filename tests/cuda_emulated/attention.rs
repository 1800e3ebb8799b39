//! Packed attention, its backward pass, and decoding on a cache.

use crate::common::*;
use gradtx_kernels::ops::{AttentionDims, DecodeDims, QkvDims};
use gradtx_kernels::{Backend, Real, Result};

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

impl Case for Packed {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Self { heads, kv_heads, head_dim, gap, .. } = *self;
        let offsets = self.offsets();
        let tokens = offsets[offsets.len() - 1] as usize;
        let qkv_dims = QkvDims { tokens, heads, kv_heads, head_dim };
        let (width, n) = (heads * head_dim, tokens * qkv_dims.row());
        let o_stride = width + gap;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let dims = AttentionDims { qkv: qkv_dims, segments: self.lengths.len(), scale, o_stride };
        let offsets = put(d, &offsets)?;
        let qkv = put(d, &inputs.values::<X>("qkv", n + gap))?;
        let qkv_view = || D::view(&qkv, gap..n + gap);
        let mut o = put(d, &spread(&nan::<X>(tokens * width), width, o_stride))?;
        let mut lse = put(d, &nan::<X::Acc>(heads * tokens))?;
        d.attention_forward(D::all_mut(&mut o), D::all_mut(&mut lse), qkv_view(), D::all(&offsets), dims)?;
        let d_o = put(d, &spread(&inputs.values::<X>("d_o", tokens * width), width, o_stride))?;
        let (mut dqkv, mut delta) = (put(d, &nan::<X>(n))?, put(d, &nan::<X::Acc>(heads * tokens))?);
        let (to, scratch) = (D::all_mut(&mut dqkv), D::all_mut(&mut delta));
        let (o_view, lse_view) = (D::all(&o), D::all(&lse));
        d.attention_backward(
            to,
            scratch,
            D::all(&d_o),
            o_view,
            lse_view,
            qkv_view(),
            D::all(&offsets),
            dims,
        )?;
        let mut results = Results::default();
        results.take_rows(d, "o", &o, width, o_stride)?;
        results.take(d, "lse", &lse)?;
        results.take(d, "dqkv", &dqkv)?;
        Ok(results)
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
    for (lengths, heads, kv_heads) in [(&[1u32, 66][..], 2, 1), (&[97], 1, 1)] {
        check_packed(Packed { lengths, heads, kv_heads, head_dim: 128, gap: 0 });
    }
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
        let (k_to, v_to) = (D::all_mut(&mut k), D::all_mut(&mut v));
        d.cache_store(k_to, v_to, D::all(&prompts), D::all(&offsets), D::all(&slot), dims)?;
        let rows = QkvDims { tokens: lengths.len(), ..qkv };
        let position = put(d, lengths)?;
        let next = put(d, &inputs.values::<X>("next", rows.tokens * rows.row()))?;
        let mut o = put(d, &nan::<X>(rows.tokens * heads * head_dim))?;
        let (k_to, v_to) = (D::all_mut(&mut k), D::all_mut(&mut v));
        let dims = DecodeDims { qkv: rows, ..dims };
        let (slot, position) = (D::all(&slot), D::all(&position));
        d.attention_decode(D::all_mut(&mut o), k_to, v_to, D::all(&next), slot, position, dims)?;
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
