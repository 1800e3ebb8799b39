//! Embeddings of tokens and positions: rows of tables.

use crate::{Device, Real, Result};

/// Token embedding; `table` `[vocab, dim]`, `ids` `[rows]`, all below vocab.
pub trait Embedding<X: Real>: Device {
    /// `x[i] = table[ids[i]]` (`=`).
    fn embedding_forward(
        &self,
        x: Self::ViewMut<'_, X>,
        table: Self::View<'_, X>,
        ids: Self::View<'_, u32>,
        dim: usize,
    ) -> Result<()>;

    /// `x[i] += table[ids[i]]`: a second table, such as that of learned positions.
    fn embedding_add(
        &self,
        x: Self::ViewMut<'_, X>,
        table: Self::View<'_, X>,
        ids: Self::View<'_, u32>,
        dim: usize,
    ) -> Result<()>;

    /// `d_table[ids[i]] += dx[i]`, in the order of i.
    fn embedding_backward(
        &self,
        d_table: Self::ViewMut<'_, X::Acc>,
        dx: Self::View<'_, X>,
        ids: Self::View<'_, u32>,
        dim: usize,
    ) -> Result<()>;
}
