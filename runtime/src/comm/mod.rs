//! [`Comm`]: what ranks tell each other.
//!
//! Sums are taken in the order of ranks, element by element, so every rank gets the
//! same bits, and gets them again when the run is repeated. All ranks call the same
//! operations in the same order. Implementations: [`Solo`], one rank; [`local`],
//! several in the threads of one process; `Mpi` (feature `mpi`), several processes.

mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod solo;

pub use local::{Local, local};
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, library_version};
pub use solo::Solo;

use crate::{Error, Result};

/// Collective operations of one rank among `size`.
pub trait Comm {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// `values = Σ_r values of rank r`, on every rank.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()>;

    /// `out = Σ_r (values of rank r)[own share]`. `values` is `size` equal shares, in
    /// the order of ranks; `out` is one.
    fn reduce_scatter_sum(&self, values: &[f32], out: &mut [f32]) -> Result<()>;

    /// `out` = the parts of all ranks, in their order; parts are equally long.
    fn all_gather(&self, part: &[f32], out: &mut [f32]) -> Result<()>;

    /// `values` = those of rank `root`, on every rank.
    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()>;

    /// `bytes` = those of rank `root`, of any length, on every rank.
    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()>;

    /// On rank `root` the bytes of all ranks, in their order; on the others nothing.
    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>>;

    /// Returns when every rank has come here.
    fn barrier(&self) -> Result<()>;
}

fn expect_shares(op: &str, whole: usize, share: usize, size: usize) -> Result<()> {
    if whole == share * size {
        return Ok(());
    }
    let why = format!("{whole} values are not {size} shares (one per rank) of {share}");
    Err(Error::invalid(op, why))
}

fn expect_root(op: &str, root: usize, size: usize) -> Result<()> {
    if root < size {
        return Ok(());
    }
    Err(Error::invalid(op, format!("there is no rank {root} among {size}")))
}

/// `out = parts[0] + parts[1] + …`, element by element in this order.
fn sum_in_order<'a>(out: &mut [f32], mut parts: impl Iterator<Item = &'a [f32]>) {
    if let Some(first) = parts.next() {
        out.copy_from_slice(first);
    }
    for part in parts {
        out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
    }
}
