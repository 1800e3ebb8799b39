//! Bias and rotary position embedding on fused q, k, v rows; and the q/k norm of Qwen3.
//!
//! A row of `qkv` is `[heads · D | kv_heads · D | kv_heads · D]`. Rotation in the
//! half-split convention of Qwen and Llama: for pair i < D/2 at position p,
//! `x'[i] = x[i]·cos − x[i+D/2]·sin`, `x'[i+D/2] = x[i+D/2]·cos + x[i]·sin`, with
//! cos and sin from row p of the tables `[max_positions, D/2]` (whatever scaling
//! the model uses is already in the tables). v is not rotated.

use crate::error::expect_len;
use crate::{Device, Error, Real, Result, View, ViewMut};

/// Shapes of fused q, k, v rows.
#[derive(Clone, Copy, Debug)]
pub struct QkvDims {
    /// Rows.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values per head, D; even.
    pub head_dim: usize,
}

impl QkvDims {
    /// Elements of a row.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Fails unless heads can be rotated, and tables of angles and positions have these lengths.
    fn check_angles(&self, op: &'static str, cos: usize, sin: usize, positions: usize) -> Result<()> {
        let half = self.head_dim / 2;
        if half == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(Error::Unsupported { op, why: format!("head size {} is not even", self.head_dim) });
        }
        expect_len(op, "cos", cos, cos / half * half)?;
        expect_len(op, "sin", sin, cos)?;
        expect_len(op, "positions", positions, self.tokens)
    }

    /// Fails unless what forward and backward of a q/k norm share fits.
    fn check_norm(
        &self,
        op: &'static str,
        rows: [(&'static str, usize); 2],
        inv_rms: usize,
        [w_q, w_k]: [usize; 2],
    ) -> Result<()> {
        for (what, len) in rows {
            expect_len(op, what, len, self.tokens * self.row())?;
        }
        expect_len(op, "inv_rms", inv_rms, self.tokens * (self.heads + self.kv_heads))?;
        expect_len(op, "w_q", w_q, self.head_dim)?;
        expect_len(op, "w_k", w_k, self.head_dim)
    }
}

/// Arguments of [`Rope::rope_forward`].
pub struct RopeForward<'qkv, 'bias, 'cos, 'sin, 'positions, D: Device, X: Real> {
    /// `[tokens, row]` `= rope(qkv + bias)`, in place.
    pub qkv: D::ViewMut<'qkv, X>,
    /// `[row]`; absent it is zero.
    pub bias: Option<D::View<'bias, X>>,
    /// `[max_positions, D/2]`.
    pub cos: D::View<'cos, X::Acc>,
    /// As `cos`.
    pub sin: D::View<'sin, X::Acc>,
    /// `[tokens]`, below max_positions.
    pub positions: D::View<'positions, u32>,
    /// Shapes.
    pub dims: QkvDims,
}

impl<D: Device, X: Real> RopeForward<'_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rope_forward";
        expect_len(OP, "qkv", self.qkv.len(), self.dims.tokens * self.dims.row())?;
        if let Some(bias) = self.bias {
            expect_len(OP, "bias", bias.len(), self.dims.row())?;
        }
        self.dims.check_angles(OP, self.cos.len(), self.sin.len(), self.positions.len())
    }
}

/// Arguments of [`Rope::rope_backward`].
pub struct RopeBackward<'dqkv, 'dbias, 'cos, 'sin, 'positions, D: Device, X: Real> {
    /// `[tokens, row]`: on entry the gradient after rotation, then before it.
    pub dqkv: D::ViewMut<'dqkv, X>,
    /// `[row]` `+= Σ_tokens dqkv`, where asked for.
    pub dbias: Option<D::ViewMut<'dbias, X::Acc>>,
    /// `[max_positions, D/2]`.
    pub cos: D::View<'cos, X::Acc>,
    /// As `cos`.
    pub sin: D::View<'sin, X::Acc>,
    /// `[tokens]`, below max_positions.
    pub positions: D::View<'positions, u32>,
    /// Shapes.
    pub dims: QkvDims,
}

impl<D: Device, X: Real> RopeBackward<'_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rope_backward";
        expect_len(OP, "dqkv", self.dqkv.len(), self.dims.tokens * self.dims.row())?;
        if let Some(dbias) = &self.dbias {
            expect_len(OP, "dbias", dbias.len(), self.dims.row())?;
        }
        self.dims.check_angles(OP, self.cos.len(), self.sin.len(), self.positions.len())
    }
}

/// QKV bias and rotary embedding, in place.
pub trait Rope<X: Real>: Device {
    /// `qkv = rope(qkv + bias)`.
    fn rope_forward(&self, args: RopeForward<Self, X>) -> Result<()>;

    /// `dqkv` = gradient before rotation, in place; `dbias += Σ_tokens` of it where asked for.
    fn rope_backward(&self, args: RopeBackward<Self, X>) -> Result<()>;
}

/// Arguments of [`QkNorm::qk_norm_forward`].
pub struct QkNormForward<'y, 'inv_rms, 'qkv, 'w_q, 'w_k, D: Device, X: Real> {
    /// `[tokens, row]` `=`: q and k heads normalised, v copied.
    pub y: D::ViewMut<'y, X>,
    /// `[tokens, heads + kv_heads]` `=`.
    pub inv_rms: D::ViewMut<'inv_rms, X::Acc>,
    /// `[tokens, row]`.
    pub qkv: D::View<'qkv, X>,
    /// `[D]`.
    pub w_q: D::View<'w_q, X>,
    /// `[D]`.
    pub w_k: D::View<'w_k, X>,
    /// Shapes.
    pub dims: QkvDims,
    /// ε, added to the mean square.
    pub eps: f64,
}

impl<D: Device, X: Real> QkNormForward<'_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        let rows = [("y", self.y.len()), ("qkv", self.qkv.len())];
        self.dims.check_norm("qk_norm_forward", rows, self.inv_rms.len(), [self.w_q.len(), self.w_k.len()])
    }
}

/// Arguments of [`QkNorm::qk_norm_backward`].
pub struct QkNormBackward<'dqkv, 'dw, 'dy, 'qkv, 'inv_rms, 'w_q, 'w_k, D: Device, X: Real> {
    /// `[tokens, row]` `=`.
    pub dqkv: D::ViewMut<'dqkv, X>,
    /// `dw_q` and `dw_k`, `[D]` each, `+=`, where asked for.
    pub dw: Option<(D::ViewMut<'dw, X::Acc>, D::ViewMut<'dw, X::Acc>)>,
    /// `[tokens, row]`.
    pub dy: D::View<'dy, X>,
    /// `[tokens, row]`.
    pub qkv: D::View<'qkv, X>,
    /// `[tokens, heads + kv_heads]`, as the forward pass left it.
    pub inv_rms: D::View<'inv_rms, X::Acc>,
    /// `[D]`.
    pub w_q: D::View<'w_q, X>,
    /// `[D]`.
    pub w_k: D::View<'w_k, X>,
    /// Shapes.
    pub dims: QkvDims,
}

impl<D: Device, X: Real> QkNormBackward<'_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "qk_norm_backward";
        let rows = [("dy", self.dy.len()), ("qkv", self.qkv.len())];
        self.dims.check_norm(OP, rows, self.inv_rms.len(), [self.w_q.len(), self.w_k.len()])?;
        expect_len(OP, "dqkv", self.dqkv.len(), self.dims.tokens * self.dims.row())?;
        match &self.dw {
            Some((dw_q, dw_k)) => {
                expect_len(OP, "dw_q", dw_q.len(), self.dims.head_dim)?;
                expect_len(OP, "dw_k", dw_k.len(), self.dims.head_dim)
            }
            None => Ok(()),
        }
    }
}

/// RMS norm of every query and key head, before the rotation.
pub trait QkNorm<X: Real>: Device {
    /// Normalises q heads with `w_q` and k heads with `w_k`, and copies v.
    fn qk_norm_forward(&self, args: QkNormForward<Self, X>) -> Result<()>;

    /// Gradients before the norm, and of its weights where asked for.
    fn qk_norm_backward(&self, args: QkNormBackward<Self, X>) -> Result<()>;
}
