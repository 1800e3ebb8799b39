//! [`TupleSource`]: where the values of tuples are read.

use crate::products::coordinates::Coordinates;
use gradtx_runtime::Result;
use gradtx_runtime::artifact::{Role, TupleStore};

/// The students of a tuple store, and its teachers, or their coordinates.
#[derive(Clone, Copy)]
pub struct TupleSource<'a> {
    store: &'a TupleStore,
    coordinates: Option<&'a Coordinates>,
}

impl<'a> From<&'a TupleStore> for TupleSource<'a> {
    fn from(store: &'a TupleStore) -> Self {
        Self { store, coordinates: None }
    }
}

impl<'a> TupleSource<'a> {
    /// Of a store, with coordinates in the place of its teachers' updates, if there are any.
    pub fn new(store: &'a TupleStore, coordinates: Option<&'a Coordinates>) -> Self {
        Self { store, coordinates }
    }

    /// Blocks and width of one side.
    pub fn shape(&self, role: Role) -> [usize; 2] {
        match (role, self.coordinates) {
            (Role::Teacher, Some(coordinates)) => coordinates.shape(),
            _ => [self.store.space(role).blocks, self.store.space(role).width],
        }
    }

    /// Values of an update of one side.
    pub fn values(&self, role: Role) -> usize {
        self.shape(role).iter().product()
    }

    /// Values of one update of a pair and a snapshot, from value `from` on.
    pub fn read_part(
        &self,
        role: Role,
        (pair, step): (usize, usize),
        from: usize,
        out: &mut [f32],
    ) -> Result<()> {
        match (role, self.coordinates) {
            (Role::Teacher, Some(coordinates)) => {
                out.copy_from_slice(&coordinates.of(pair, step)[from..from + out.len()]);
                Ok(())
            }
            _ => self.store.read_part(role, pair, step, from, out),
        }
    }

    /// One update.
    pub fn read(&self, role: Role, tuple: (usize, usize), out: &mut [f32]) -> Result<()> {
        self.read_part(role, tuple, 0, out)
    }
}
