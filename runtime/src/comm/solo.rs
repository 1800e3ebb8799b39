//! One rank: every operation is already done, or a copy.

use super::{Comm, expect_root, expect_shares};
use crate::Result;

/// The only rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Comm for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter_sum(&self, values: &[f32], out: &mut [f32]) -> Result<()> {
        expect_shares("reduce-scatter", values.len(), out.len(), 1)?;
        out.copy_from_slice(values);
        Ok(())
    }

    fn all_gather(&self, part: &[f32], out: &mut [f32]) -> Result<()> {
        expect_shares("all-gather", out.len(), part.len(), 1)?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn broadcast(&self, root: usize, _values: &mut [f32]) -> Result<()> {
        expect_root("broadcast", root, 1)
    }

    fn broadcast_bytes(&self, root: usize, _bytes: &mut Vec<u8>) -> Result<()> {
        expect_root("broadcast", root, 1)
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        expect_root("gather", root, 1)?;
        Ok(Some(vec![bytes.to_vec()]))
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
