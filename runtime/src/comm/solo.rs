//! One rank: every operation is already done, or a copy.

use super::{
    Collective, Comm, Kind, Message, RankInfo, Reduction, expect_length, expect_parts, expect_peer,
    expect_root,
};
use crate::Result;

/// The only rank.
#[derive(Clone, Debug)]
pub struct Solo {
    place: RankInfo,
}

impl Default for Solo {
    fn default() -> Self {
        Self { place: RankInfo::here(0, 1) }
    }
}

/// Its values are the sum.
pub(super) struct Copied(pub Vec<u8>);

impl Reduction for Copied {
    fn poll(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn wait(self: Box<Self>, out: &mut [u8]) -> Result<()> {
        expect_length("sum", out.len(), self.0.len())?;
        out.copy_from_slice(&self.0);
        Ok(())
    }
}

impl Comm for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn place(&self) -> &RankInfo {
        &self.place
    }

    fn start_sum<'c>(
        &'c self,
        collective: Collective,
        _kind: Kind,
        values: &[u8],
        lengths: &[usize],
    ) -> Result<Box<dyn Reduction + 'c>> {
        if collective == Collective::ReduceScatter {
            expect_parts("reduce-scatter", values.len(), lengths, 0, 1, values.len())?;
        }
        Ok(Box::new(Copied(values.to_vec())))
    }

    fn sum_all(&self, _kind: Kind, _values: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn gather_all(&self, part: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        expect_parts("all-gather", out.len(), lengths, 0, 1, part.len())?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn broadcast_exact(&self, root: usize, _bytes: &mut [u8]) -> Result<()> {
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

    fn send(&self, to: usize, _tag: u8, _bytes: &[u8]) -> Result<()> {
        expect_peer("send", to, 0, 1)
    }

    fn try_receive(&self, from: Option<usize>, _tag: u8) -> Result<Option<Message>> {
        from.map_or(Ok(()), |from| expect_peer("receive", from, 0, 1))?;
        Ok(None)
    }
}
