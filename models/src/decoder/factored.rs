//! [`Factored`]: a frozen linear layer of which some matrices are products of two thin ones, `y = up (down x)`.
//!
//! Shapes: T tokens, `in` and `out` columns of the layer, r the rank of a matrix, Σr that of all of the layer's.

use super::BlockConfig;
use super::names::LayerNames;
use super::pass::BlockPass;
use crate::lora::{Module, Projection};
use gradtx_kernels::ops::{Elementwise, Gemm, GemmDims, LoraDims};
use gradtx_kernels::{Backend, Real, View, ViewMut};
use gradtx_runtime::Result;
use gradtx_runtime::params::ParamLayout;
use std::ops::Range;

/// The matrices of a layer: one, or those of the modules that are computed in it, each whole or in factors.
#[derive(Clone, Debug)]
pub(super) struct Factored {
    /// `[Σr, in]`, `down` of all matrices in factors.
    down: Range<usize>,
    /// Σr
    ranks: usize,
    parts: Vec<Part>,
}

/// One matrix of the layer.
#[derive(Clone, Debug)]
struct Part {
    /// Its columns of the output.
    outputs: Range<usize>,
    matrix: Matrix,
}

#[derive(Clone, Debug)]
enum Matrix {
    /// `[out, in]`
    Whole(Range<usize>),
    /// `up` `[out, r]`, and its columns between the factors.
    Up { weight: Range<usize>, columns: Range<usize> },
}

impl Factored {
    /// Whether a layer of this block has a matrix in factors.
    pub(super) fn is_of(config: &BlockConfig, projection: Projection) -> bool {
        projection.modules(config).any(|module| module.rank(&config.attention.ranks) > 0)
    }

    /// Defines its matrices.
    pub(super) fn new(
        layout: &mut ParamLayout,
        config: &BlockConfig,
        projection: Projection,
        names: LayerNames,
    ) -> Self {
        let rank = |module: Module| module.rank(&config.attention.ranks);
        let (inputs, _) = projection.dims(config);
        let in_factors = || projection.modules(config).filter(|&module| rank(module) > 0);
        let of = |module: Module, which: &str| names.of(module, &format!("{which}.weight"));
        let down = layout.push(in_factors().map(|module| (of(module, ".down"), vec![rank(module), inputs])));
        let mut parts = vec![];
        let mut ranks = 0;
        for module in projection.modules(config) {
            let (outputs, rank) = (module.outputs(config), rank(module));
            let matrix = match rank {
                0 => Matrix::Whole(layout.push([(of(module, ""), vec![outputs.len(), inputs])])),
                _ => {
                    let weight = layout.push([(of(module, ".up"), vec![outputs.len(), rank])]);
                    let columns = ranks..ranks + rank;
                    ranks = columns.end;
                    Matrix::Up { weight, columns }
                }
            };
            parts.push(Part { outputs, matrix });
        }
        Self { down, ranks, parts }
    }

    /// `y = [residual +] [bias +] input Wᵀ`; `between` has room for `[T, Σr]`.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        mut y: D::ViewMut<'_, X>,
        input: D::View<'_, X>,
        (residual, bias): (Option<D::View<'_, X>>, Option<D::View<'_, X>>),
        between: D::ViewMut<'_, X>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        let (device, tokens, ranks) = (at.device, dims.tokens, self.ranks);
        let (x, x_stride) = (D::lora_rows(input, dims), D::lora_row_stride(dims));
        let mut between = between.slice(0..tokens * ranks);
        let product = GemmDims::new(tokens, ranks, dims.in_dim, false, true);
        let product = GemmDims { a_stride: x_stride, ..product };
        Gemm::<X>::gemm(device, between.reborrow(), x, at.weight(&self.down), product)?;
        if let Some(residual) = residual {
            device.copy(y.reborrow(), residual)?;
        }
        for Part { outputs, matrix } in &self.parts {
            let y_len = y.len();
            let y = y.reborrow().slice(outputs.start..y_len);
            let product = |depth, a_stride| {
                let product = GemmDims::new(tokens, outputs.len(), depth, false, true);
                let product = GemmDims { a_stride, c_stride: dims.out_dim, ..product };
                if residual.is_some() { product.add() } else { product }
            };
            match matrix {
                Matrix::Whole(weight) => {
                    let product = product(dims.in_dim, x_stride);
                    Gemm::<X>::gemm(device, y, x, at.weight(weight), product)?;
                }
                Matrix::Up { weight, columns } => {
                    let product = product(columns.len(), ranks);
                    let rows = between.freeze();
                    let rows = rows.slice(columns.start..rows.len());
                    Gemm::<X>::gemm(device, y, rows, at.weight(weight), product)?;
                }
            }
        }
        if let Some(bias) = bias {
            Elementwise::<X>::add_row(device, y, bias)?;
        }
        Ok(())
    }

    /// `d_input = dy W`; `between` has room for `[T, Σr]`.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        d_input: D::ViewMut<'_, X>,
        dy: D::View<'_, X>,
        between: D::ViewMut<'_, X>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        let (device, tokens, ranks) = (at.device, dims.tokens, self.ranks);
        let mut between = between.slice(0..tokens * ranks);
        let of_outputs = |outputs: &Range<usize>| dy.slice(outputs.start..dy.len());
        for Part { outputs, matrix } in &self.parts {
            let Matrix::Up { weight, columns } = matrix else { continue };
            let product = GemmDims::new(tokens, columns.len(), outputs.len(), false, false);
            let product = GemmDims { a_stride: dims.out_dim, c_stride: ranks, ..product };
            let len = between.len();
            let columns = between.reborrow().slice(columns.start..len);
            Gemm::<X>::gemm(device, columns, of_outputs(outputs), at.weight(weight), product)?;
        }
        let (mut rows, stride) = (D::lora_rows_mut(d_input, dims), D::lora_row_stride(dims));
        let product = GemmDims::new(tokens, dims.in_dim, ranks, false, false);
        let product = GemmDims { c_stride: stride, ..product };
        Gemm::<X>::gemm(device, rows.reborrow(), between.freeze(), at.weight(&self.down), product)?;
        for Part { outputs, matrix } in &self.parts {
            let Matrix::Whole(weight) = matrix else { continue };
            let product = GemmDims::new(tokens, dims.in_dim, outputs.len(), false, false).add();
            let product = GemmDims { a_stride: dims.out_dim, c_stride: stride, ..product };
            Gemm::<X>::gemm(device, rows.reborrow(), of_outputs(outputs), at.weight(weight), product)?;
        }
        Ok(())
    }
}
