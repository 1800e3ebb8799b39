//! Ranks on CPUs exchange values through the host, which is where they are.

use super::Cpu;
use crate::collective::{Candidate, Collective};
use crate::{Elem, Error, Result};
use std::convert::Infallible;
use std::ops::Range;

fn no_group<T>() -> Result<T> {
    Err(Error::Unavailable {
        what: "a group of devices",
        why: "CPUs exchange values through the host".into(),
    })
}

impl Collective for Cpu {
    /// There is none.
    type Group = Infallible;

    fn candidate(&self) -> Candidate {
        Candidate::HostOnly
    }

    fn new_group(&self) -> Result<Vec<u8>> {
        no_group()
    }

    fn join_group(&self, _id: &[u8], _rank: usize, _size: usize) -> Result<Infallible> {
        no_group()
    }

    fn start_sums(
        &self,
        group: &mut Infallible,
        _values: &mut [f32],
        _shares: &[Range<usize>],
    ) -> Result<()> {
        match *group {}
    }

    fn start_gather<T: Elem>(
        &self,
        group: &mut Infallible,
        _values: &mut [T],
        _shares: &[Range<usize>],
    ) -> Result<()> {
        match *group {}
    }

    fn finish_group(&self, group: &mut Infallible) -> Result<()> {
        match *group {}
    }

    fn close_group(&self, group: Infallible) -> Result<()> {
        match group {}
    }
}
