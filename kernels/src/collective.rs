//! [`Collective`]: devices of several ranks that exchange values without their hosts.
//!
//! In: a buffer on every rank's device, cut into one share per rank. Out: the sums of all
//! ranks' values, each share on the device of the rank that owns it; or the shares of all, on
//! every device. Both continue beside what the device computes meanwhile.
//!
//! A group is made once: every rank's device says whether it can be in one ([`Candidate`]),
//! the ranks come to the same answer, one makes an id, all join with it. Devices without such
//! means (the CPU) say so, and the ranks exchange values through the host.

use crate::{Device, Elem, Result};
use std::ops::Range;

/// What a device says about being in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// Devices of this kind exchange values through the host, always.
    HostOnly,
    /// It can.
    Able {
        /// Which device it is, among all of all machines. Two ranks of one device cannot be in a group.
        device: String,
        /// The library that does it, and its version: the same on all ranks of a group.
        library: String,
    },
    /// It could, but for this.
    Unable(String),
}

/// Devices that may be in a group. All ranks of a group do the same operations in the same
/// order, with the same shares.
///
/// What was started continues until [`Collective::finish_group`]: up to then the values that it
/// was started with are nobody's to read or write, and buffers with them are not given back.
///
/// No operation waits for another rank without end: after a time limit of the library's it fails.
pub trait Collective: Device {
    /// One rank's place in a group. Dropped instead of closed ([`Collective::close_group`]), as after an
    /// error, it aborts what was started and waits for nobody.
    type Group: Send + 'static;

    /// Whether this device can be in a group.
    fn candidate(&self) -> Candidate;

    /// The id of a new group, which one rank makes and gives all.
    fn new_group(&self) -> Result<Vec<u8>>;

    /// Joins a group as `rank` of `size`; returns when all have.
    ///
    /// # Errors
    /// Also on some ranks only: before anybody uses the group, all must know that all have joined.
    fn join_group(&self, id: &[u8], rank: usize, size: usize) -> Result<Self::Group>;

    /// Starts sums: `values[shares[r]]` on rank r becomes the sum over all ranks' values there,
    /// once everything asked of the device so far is done. Shares follow each other from 0 and
    /// make up all of `values`. Other ranks' shares stay as they were. The order of additions is
    /// that of the library: the same in every run of the same library on as many ranks that are
    /// connected in the same way, and another one elsewhere.
    fn start_sums(
        &self,
        group: &mut Self::Group,
        values: Self::ViewMut<'_, f32>,
        shares: &[Range<usize>],
    ) -> Result<()>;

    /// Starts to gather: `values[shares[r]]` becomes what it is on rank r, for every r, once
    /// everything asked of the device so far is done. Shares as for sums.
    fn start_gather<T: Elem>(
        &self,
        group: &mut Self::Group,
        values: Self::ViewMut<'_, T>,
        shares: &[Range<usize>],
    ) -> Result<()>;

    /// Returns when everything that was started is done.
    ///
    /// # Errors
    /// When another rank has left the group or does not come within the time limit, or the way to it
    /// is broken. The group is aborted then, and of no use for any rank.
    fn finish_group(&self, group: &mut Self::Group) -> Result<()>;

    /// Leaves a group after everything was finished on all ranks, which all leave it.
    ///
    /// # Errors
    /// As of [`Self::finish_group`]; nothing that was finished before is lost.
    fn close_group(&self, group: Self::Group) -> Result<()>;
}
