//! Low-rank adapters beside the frozen product.
//!
//! The adapter input is planar here: rows of x `[T, in_dim]`, then s `[T, targets · r]`.
//! A rank of 2 or 16 is too thin for the matrix library to pay off, so the four rank-r
//! products have loops of their own (in [`super::lora_loops`]); this module checks
//! arguments, and cuts the work: by tokens where the result has a row per token, by
//! columns where it is a sum over tokens. A part never crosses a segment's adapter or
//! gradient row.

use super::linear;
use super::lora_loops::{DownBackward, DownForward, DownToRows, Span, UpBackward, UpForward, UpGradient};
use super::mask::{MASK_BLOCK, Mask};
use super::matrix::MatrixMut;
use super::scratch::with_scratch;
use super::simd::dispatch;
use super::{Cpu, CpuReal};
use crate::error::{expect_at_least, expect_len};
use crate::ops::{
    Gemm, GemmDims, LoraDims, LoraDownBackward, LoraLinear, LoraLinearBackward, LoraLinearForward,
    LoraTarget, Out, RmsNorm, RmsNormBackward, RmsNormDims, RmsNormForward, RmsNormLoraBackward,
    RmsNormLoraForward, Segments,
};
use crate::{Error, Result};
use std::ops::Range;

/// Tokens of segment `i`.
fn tokens_of(segments: &Segments<'_, Cpu>, i: usize) -> Range<usize> {
    segments.offsets[i] as usize..segments.offsets[i + 1] as usize
}

/// Fails unless the segments cut the stream, and adapters and gradients have the rows that they name.
fn check_segments<X>(
    op: &'static str,
    adapters: &[X],
    grads: Option<&[X]>,
    segments: &Segments<'_, Cpu>,
    dims: &LoraDims<'_>,
) -> Result<()> {
    check_offsets(op, segments.offsets, segments.count, dims.tokens)?;
    if dims.targets.is_empty() {
        return Ok(());
    }
    let grad_row = segments.grad_row.iter().max();
    let rows = [("adapters", Some(adapters), segments.adapter.iter().max()), ("grads", grads, grad_row)];
    for (what, matrix, last) in rows {
        if let (Some(matrix), Some(&last)) = (matrix, last) {
            expect_at_least(op, what, matrix.len(), (last as usize + 1) * dims.adapter_stride)?;
        }
    }
    Ok(())
}

/// Fails unless `offsets` are those of `count` non-empty segments of `tokens` tokens.
pub(super) fn check_offsets(op: &'static str, offsets: &[u32], count: usize, tokens: usize) -> Result<()> {
    expect_len(op, "offsets", offsets.len(), count + 1)?;
    let ordered = offsets.windows(2).all(|pair| pair[0] < pair[1]);
    if !ordered || offsets[0] != 0 || offsets[count] as usize != tokens {
        let why = format!("offsets must increase from 0 to {tokens}");
        return Err(Error::Unsupported { op, why });
    }
    Ok(())
}

/// Cuts `out`, rows of `cols` elements per token, into parts of at most `rows` tokens of one segment.
fn token_parts<'a, X: Send>(
    out: &'a mut [X],
    cols: usize,
    rows: usize,
    offsets: &'a [u32],
) -> impl Iterator<Item = (usize, Range<usize>, &'a mut [X])> + Send {
    let mut rest = out;
    let parts = offsets.windows(2).enumerate().flat_map(move |(i, pair)| {
        let end = pair[1] as usize;
        (pair[0] as usize..end).step_by(rows).map(move |first| (i, first..end.min(first + rows)))
    });
    parts.map(move |(i, tokens)| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(tokens.len() * cols);
        rest = after;
        (i, tokens, part)
    })
}

/// The adapter of segment `i`.
fn adapter_of<'a, X>(
    adapters: &'a [X],
    segments: &Segments<'_, Cpu>,
    i: usize,
    dims: &LoraDims<'_>,
) -> &'a [X] {
    &adapters[segments.adapter[i] as usize * dims.adapter_stride..][..dims.adapter_stride]
}

/// The mask of a target in segment `i`.
fn drop_of(segments: &Segments<'_, Cpu>, i: usize, target: &LoraTarget, dims: &LoraDims<'_>) -> Option<Mask> {
    (dims.dropout > 0.0).then(|| Mask::new(segments.keys[i], target.site, dims.dropout))
}

/// Stretches of tokens that are summed into gradient row `row`, in order.
fn spans_of(
    segments: &Segments<'_, Cpu>,
    row: usize,
    target: &LoraTarget,
    dims: &LoraDims<'_>,
) -> impl Iterator<Item = (usize, Span)> {
    (0..segments.count)
        .filter(move |&i| segments.grad_row[i] as usize == row)
        .map(move |i| (i, Span { tokens: tokens_of(segments, i), drop: drop_of(segments, i, target, dims) }))
}

/// Tokens that are summed into gradient row `row`.
fn tokens_into(segments: &Segments<'_, Cpu>, row: usize) -> usize {
    (0..segments.count)
        .filter(|&i| segments.grad_row[i] as usize == row)
        .map(|i| tokens_of(segments, i).len())
        .sum()
}

impl Cpu {
    /// `y[t] += s[t] Bᵀ` for every target.
    fn up_forward<X: CpuReal>(
        &self,
        y: &mut [X],
        s: &[X],
        adapters: &[X],
        segments: Segments<'_, Cpu>,
        dims: LoraDims<'_>,
    ) {
        let outs: usize = dims.targets.iter().map(|t| t.out_len).sum();
        let rows = self.rows_per_part(dims.tokens, outs * dims.rank);
        let parts = token_parts(y, dims.out_dim, rows, segments.offsets);
        self.for_parts(parts, |(i, tokens, y)| {
            let s = &s[tokens.start * dims.tail()..][..tokens.len() * dims.tail()];
            let adapter = adapter_of(adapters, &segments, i, &dims);
            with_scratch(dims.rank * dims.out_dim, |b_t| dispatch(UpForward { y, s, adapter, b_t, dims }));
        });
    }

    /// `ds[t] = dy[t] B` for every target.
    fn up_backward<X: CpuReal>(
        &self,
        ds: &mut [X],
        dy: &[X],
        adapters: &[X],
        segments: Segments<'_, Cpu>,
        dims: LoraDims<'_>,
    ) {
        let outs: usize = dims.targets.iter().map(|t| t.out_len).sum();
        let rows = self.rows_per_part(dims.tokens, outs * dims.rank);
        let parts = token_parts(ds, dims.tail(), rows, segments.offsets);
        self.for_parts(parts, |(i, tokens, ds)| {
            let dy = &dy[tokens.start * dims.out_dim..][..tokens.len() * dims.out_dim];
            let adapter = adapter_of(adapters, &segments, i, &dims);
            with_scratch(dims.rank * dims.out_dim, |b_t| dispatch(UpBackward { ds, dy, adapter, b_t, dims }));
        });
    }

    /// `dB += dyᵀ s` for every target, into the row of each segment.
    fn up_gradient<X: CpuReal>(
        &self,
        grads: &mut [X],
        dy: &[X],
        s: &[X],
        segments: Segments<'_, Cpu>,
        dims: LoraDims<'_>,
    ) {
        for (row, grad) in grads.chunks_exact_mut(dims.adapter_stride).enumerate() {
            let depth = tokens_into(&segments, row);
            if depth == 0 {
                continue;
            }
            for (n, target) in dims.targets.iter().enumerate() {
                let outs = self.rows_per_part(target.out_len, depth * dims.rank).next_multiple_of(16);
                let b = &mut grad[target.b_offset..][..target.out_len * dims.rank];
                let parts = b.chunks_mut(outs * dims.rank).enumerate();
                self.for_parts(parts, |(i, db)| {
                    let (out, len) = (target.out_start + i * outs, db.len());
                    with_scratch(len, |sums| {
                        for (_, span) in spans_of(&segments, row, target, &dims) {
                            let tokens = span.tokens;
                            let (dy, s) =
                                (&dy[tokens.start * dims.out_dim + out..], &s[tokens.start * dims.tail()..]);
                            let first = n * dims.rank;
                            dispatch(UpGradient { db, sums, dy, s, first, tokens: tokens.len(), dims });
                        }
                    });
                });
            }
        }
    }
}

impl Cpu {
    /// `dx += (α/r) mask ⊙ (ds A)` for every target, without the gradient of A.
    fn down_backward_to_rows<X: CpuReal>(
        &self,
        dx: &mut [X],
        ds: &[X],
        adapters: &[X],
        segments: Segments<'_, Cpu>,
        dims: LoraDims<'_>,
    ) {
        let rows = self.rows_per_part(dims.tokens, dims.in_dim * dims.tail());
        let parts = token_parts(dx, dims.in_dim, rows, segments.offsets);
        self.for_parts(parts, |(i, tokens, dx)| {
            let adapter = adapter_of(adapters, &segments, i, &dims);
            let position = tokens.start - segments.offsets[i] as usize;
            let ds = &ds[tokens.start * dims.tail()..][..tokens.len() * dims.tail()];
            for (n, target) in dims.targets.iter().enumerate() {
                let drop = drop_of(&segments, i, target, &dims);
                let a = &adapter[target.a_offset..][..dims.rank * dims.in_dim];
                dispatch(DownToRows { dx, ds, a, drop, position, first: n * dims.rank, dims });
            }
        });
    }
}

impl<X: CpuReal> LoraLinear<X> for Cpu {
    fn lora_input_len(dims: &LoraDims<'_>) -> usize {
        dims.tokens * (dims.in_dim + dims.tail())
    }

    fn lora_row_stride(dims: &LoraDims<'_>) -> usize {
        dims.in_dim
    }

    fn lora_weight_stride(in_dim: usize) -> usize {
        in_dim
    }

    fn lora_rows<'a>(input: Self::View<'a, X>, dims: &LoraDims<'_>) -> Self::View<'a, X> {
        &input[..dims.tokens * dims.in_dim]
    }

    fn lora_rows_mut<'a>(input: Self::ViewMut<'a, X>, dims: &LoraDims<'_>) -> Self::ViewMut<'a, X> {
        &mut input[..dims.tokens * dims.in_dim]
    }

    fn lora_down_forward(
        &self,
        input: &mut [X],
        adapters: &[X],
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        let _timed = self.timed("lora_down_forward");
        dims.check_input::<Self, X>("lora_down_forward", input.len(), &segments)?;
        check_segments("lora_down_forward", adapters, None, &segments, &dims)?;
        if dims.tail() == 0 {
            return Ok(());
        }
        let (x, s) = input.split_at_mut(dims.tokens * dims.in_dim);
        let x: &[X] = x;
        let rows = self.rows_per_part(dims.tokens, dims.in_dim * dims.tail());
        let parts = token_parts(s, dims.tail(), rows, segments.offsets);
        self.for_parts(parts, |(i, tokens, s)| {
            let adapter = adapter_of(adapters, &segments, i, &dims);
            let first = tokens.start - segments.offsets[i] as usize;
            let x = &x[tokens.start * dims.in_dim..][..tokens.len() * dims.in_dim];
            with_scratch(dims.in_dim, |masked| {
                for (n, target) in dims.targets.iter().enumerate() {
                    let drop = drop_of(&segments, i, target, &dims);
                    let a = &adapter[target.a_offset..][..dims.rank * dims.in_dim];
                    dispatch(DownForward {
                        s,
                        x,
                        a,
                        masked,
                        drop,
                        position: first,
                        column: n * dims.rank,
                        dims,
                    });
                }
            });
        });
        Ok(())
    }

    fn rmsnorm_lora_forward(&self, args: RmsNormLoraForward<Self, X>) -> Result<()> {
        let _timed = self.timed("rmsnorm_lora_forward");
        args.check()?;
        let RmsNormLoraForward { input, inv_rms, x, w_norm, adapters, segments, norm, dims } = args;
        const OP: &str = "rmsnorm_lora_forward";
        check_segments(OP, adapters, None, &segments, &dims)?;
        let rows = &mut input[..dims.tokens * dims.in_dim];
        self.rmsnorm_forward(RmsNormForward {
            y: rows,
            inv_rms,
            x,
            w: w_norm,
            dims: RmsNormDims { y_stride: dims.in_dim, ..norm },
        })?;
        self.lora_down_forward(input, adapters, segments, dims)
    }

    fn lora_linear_forward(&self, args: LoraLinearForward<Self, X>) -> Result<()> {
        let _timed = self.timed("lora_linear_forward");
        args.check()?;
        let LoraLinearForward { y, input, w, bias, residual, adapters, segments, dims } = args;
        const OP: &str = "lora_linear_forward";
        check_segments(OP, adapters, None, &segments, &dims)?;
        let (x, s) = input.split_at(dims.tokens * dims.in_dim);
        let mut product = GemmDims::new(dims.tokens, dims.out_dim, dims.in_dim, false, true);
        if bias.is_some() || residual.is_some() {
            linear::start(self, y, bias, residual, dims.out_dim);
            product = product.add();
        }
        self.gemm(y, x, w, product)?;
        if dims.tail() > 0 {
            self.up_forward(y, s, adapters, segments, dims);
        }
        Ok(())
    }

    fn lora_linear_backward(&self, args: LoraLinearBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("lora_linear_backward");
        args.check()?;
        let LoraLinearBackward { d_input, grads, dy, input, w, adapters, segments, dims } = args;
        const OP: &str = "lora_linear_backward";
        check_segments(OP, adapters, Some(grads), &segments, &dims)?;
        let (dx, ds) = d_input.split_at_mut(dims.tokens * dims.in_dim);
        self.gemm(dx, dy, w, GemmDims::new(dims.tokens, dims.in_dim, dims.out_dim, false, false))?;
        if dims.tail() > 0 {
            self.up_backward(ds, dy, adapters, segments, dims);
            self.up_gradient(grads, dy, &input[dims.tokens * dims.in_dim..], segments, dims);
        }
        Ok(())
    }

    fn lora_down_backward(&self, args: LoraDownBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("lora_down_backward");
        args.check()?;
        let LoraDownBackward { d_input, grads, input, adapters, segments, dims } = args;
        const OP: &str = "lora_down_backward";
        let is_frozen = grads.is_empty();
        check_segments(OP, adapters, Some(&*grads).filter(|_| !is_frozen), &segments, &dims)?;
        if dims.tail() == 0 {
            return Ok(());
        }
        let (dx, ds) = d_input.split_at_mut(dims.tokens * dims.in_dim);
        let (x, ds) = (&input[..dims.tokens * dims.in_dim], &ds[..]);
        if is_frozen {
            self.down_backward_to_rows(dx, ds, adapters, segments, dims);
            return Ok(());
        }
        for (row, grad) in grads.chunks_exact_mut(dims.adapter_stride).enumerate() {
            let depth = tokens_into(&segments, row);
            if depth == 0 {
                continue;
            }
            for (n, target) in dims.targets.iter().enumerate() {
                // Whole blocks of the mask, so that no part draws what another needs.
                let blocks = dims.in_dim.div_ceil(MASK_BLOCK);
                let width = MASK_BLOCK * self.rows_per_part(blocks, MASK_BLOCK * depth * dims.rank);
                let da = &mut grad[target.a_offset..][..dims.rank * dims.in_dim];
                let da = MatrixMut::new(da, dims.rank, dims.in_dim, dims.in_dim).column_blocks(width);
                let dx = MatrixMut::new(dx, dims.tokens, dims.in_dim, dims.in_dim).column_blocks(width);
                let parts = da.zip(dx).enumerate();
                self.for_parts(parts, |(i, (mut da, mut dx))| {
                    with_scratch(dims.rank * width, |sums| {
                        for (segment, span) in spans_of(&segments, row, target, &dims) {
                            let adapter = adapter_of(adapters, &segments, segment, &dims);
                            let a = &adapter[target.a_offset..][..dims.rank * dims.in_dim];
                            let (column, first) = (i * width, n * dims.rank);
                            let (da, dx, sums) = (&mut da, &mut dx, &mut *sums);
                            dispatch(DownBackward { da, dx, sums, x, ds, a, span, column, first, dims });
                        }
                    });
                });
            }
        }
        Ok(())
    }

    fn rmsnorm_lora_backward(&self, args: RmsNormLoraBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("rmsnorm_lora_backward");
        args.check()?;
        let RmsNormLoraBackward {
            dx,
            d_input,
            grads,
            x,
            input,
            inv_rms,
            w_norm,
            adapters,
            segments,
            norm,
            dims,
        } = args;
        self.lora_down_backward(LoraDownBackward { d_input, grads, input, adapters, segments, dims })?;
        let dy = &d_input[..dims.tokens * dims.in_dim];
        let norm = RmsNormDims { y_stride: dims.in_dim, ..norm };
        self.rmsnorm_backward(RmsNormBackward {
            dx,
            dw: None,
            dy,
            x,
            inv_rms,
            w: w_norm,
            dims: norm,
            out: Out::Add,
        })
    }
}
