//! Ranks that are processes under MPI.
//!
//! MPI may add in any order, so sums are made of what it moves faithfully: every rank
//! receives its share from all (all-to-all), adds in the order of ranks, and hands
//! its sum to all (all-gather). That moves as many bytes as a ring does.

use super::{Comm, expect_root, expect_shares, sum_in_order};
use crate::{Error, Result};
use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

/// Values per rank that one message round carries: bounds the scratch memory, and
/// keeps every count far below the limit of MPI's 32-bit counts.
const PIECE: usize = 1 << 20;

/// A place in memory for messages without content.
static NOTHING: [u8; 1] = [0];

/// All ranks of an MPI job. MPI is finalised when it is dropped.
pub struct Mpi {
    world: SimpleCommunicator,
    // Dropped last: fields are dropped in order.
    _universe: Universe,
}

impl Mpi {
    /// Starts MPI. From then on a panic in any rank ends the whole job: the others
    /// would otherwise wait for that rank without end.
    ///
    /// Fails if MPI is running already, or if SLURM started another number of tasks
    /// than MPI sees (a library built for another launcher).
    pub fn init() -> Result<Self> {
        let failed = |why: &str| Error::invalid("MPI", why);
        let (universe, _) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("it was already started in this process"))?;
        let world = universe.world();
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            before(info);
            SimpleCommunicator::world().abort(101);
        }));
        if let Ok(tasks) = std::env::var("SLURM_NTASKS")
            && std::env::var_os("SLURM_STEP_ID").is_some()
            && tasks.parse() != Ok(world.size())
        {
            return Err(failed(&format!(
                "SLURM started {tasks} tasks, but MPI sees {} rank(s); try another `srun --mpi=`",
                world.size()
            )));
        }
        Ok(Self { world, _universe: universe })
    }

    /// Brings every rank's piece of its share of `values`, adds, and returns the sum.
    /// `shares[r]` is the part of `values` that rank r adds up.
    fn sum_own(&self, values: &[f32], shares: &[std::ops::Range<usize>]) -> Vec<f32> {
        let size = self.size();
        let own = shares[self.rank()].len();
        let counts: Vec<i32> = shares.iter().map(|s| s.len() as i32).collect();
        let starts: Vec<i32> = shares.iter().map(|s| (s.start - shares[0].start) as i32).collect();
        let all = shares[0].start..shares[size - 1].end;
        let mut received = vec![0.0f32; own * size];
        let own_counts = vec![own as i32; size];
        let own_starts: Vec<i32> = (0..size).map(|r| (r * own) as i32).collect();
        self.world.all_to_all_varcount_into(
            &Partition::new(&values[all], counts, starts),
            &mut PartitionMut::new(&mut received[..], own_counts, own_starts),
        );
        let mut sum = vec![0.0; own];
        if own > 0 {
            sum_in_order(&mut sum, received.chunks_exact(own));
        }
        sum
    }
}

/// What the MPI library calls itself; may be asked before MPI is started.
pub fn library_version() -> String {
    // Libraries fill the end of their text with zero bytes or line ends.
    let text = mpi::environment::library_version().unwrap_or_else(|_| "unknown".into());
    text.trim_matches(['\0', '\n', ' ']).lines().next().unwrap_or("unknown").to_string()
}

/// `whole` in `parts` ranges one after the other, whose lengths differ by at most one.
fn even_shares(whole: std::ops::Range<usize>, parts: usize) -> Vec<std::ops::Range<usize>> {
    let (len, start) = (whole.len(), whole.start);
    (0..parts).map(|r| start + len * r / parts..start + len * (r + 1) / parts).collect()
}

impl Comm for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let size = self.size();
        for start in (0..values.len()).step_by(PIECE * size) {
            let end = values.len().min(start + PIECE * size);
            let shares = even_shares(start..end, size);
            let sum = self.sum_own(values, &shares);
            let counts: Vec<i32> = shares.iter().map(|s| s.len() as i32).collect();
            let starts: Vec<i32> = shares.iter().map(|s| (s.start - start) as i32).collect();
            let mut whole = PartitionMut::new(&mut values[start..end], counts, starts);
            self.world.all_gather_varcount_into(&sum[..], &mut whole);
        }
        Ok(())
    }

    fn reduce_scatter_sum(&self, values: &[f32], out: &mut [f32]) -> Result<()> {
        let (size, len) = (self.size(), out.len());
        expect_shares("reduce-scatter", values.len(), len, size)?;
        // Pieces of all shares lie apart, so they are first brought together.
        for start in (0..len).step_by(PIECE) {
            let end = len.min(start + PIECE);
            let pieces = (0..size).flat_map(|r| &values[r * len + start..r * len + end]);
            let pieces: Vec<f32> = pieces.copied().collect();
            let sum = self.sum_own(&pieces, &even_shares(0..pieces.len(), size));
            out[start..end].copy_from_slice(&sum);
        }
        Ok(())
    }

    fn all_gather(&self, part: &[f32], out: &mut [f32]) -> Result<()> {
        let (size, len) = (self.size(), part.len());
        expect_shares("all-gather", out.len(), len, size)?;
        let mut received = vec![0.0f32; PIECE.min(len) * size];
        for start in (0..len).step_by(PIECE) {
            let piece = len.min(start + PIECE) - start;
            let received = &mut received[..piece * size];
            self.world.all_gather_into(&part[start..start + piece], received);
            for (r, from) in received.chunks_exact(piece).enumerate() {
                out[r * len + start..][..piece].copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        expect_root("broadcast", root, self.size())?;
        let root = self.world.process_at_rank(root as i32);
        values.chunks_mut(PIECE).for_each(|piece| root.broadcast_into(piece));
        Ok(())
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        expect_root("broadcast", root, self.size())?;
        let process = self.world.process_at_rank(root as i32);
        let mut len = bytes.len() as u64;
        process.broadcast_into(&mut len);
        bytes.resize(len as usize, 0);
        bytes.chunks_mut(PIECE).for_each(|piece| process.broadcast_into(piece));
        Ok(())
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        expect_root("gather", root, self.size())?;
        let mut lengths = vec![0u64; self.size()];
        self.world.all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
        let total: u64 = lengths.iter().sum();
        if i32::try_from(total).is_err() {
            let why = format!("{total} bytes in all are more than one message can hold");
            return Err(Error::invalid("gather", why));
        }
        let process = self.world.process_at_rank(root as i32);
        // An empty slice of bytes may begin at address 1, which OpenMPI takes for MPI_IN_PLACE.
        let bytes = if bytes.is_empty() { &NOTHING[..0] } else { bytes };
        if self.rank() != root {
            process.gather_varcount_into(bytes);
            return Ok(None);
        }
        let counts: Vec<i32> = lengths.iter().map(|&l| l as i32).collect();
        let ends = counts.iter().scan(0, |end, &count| {
            *end += count;
            Some(*end)
        });
        let starts: Vec<i32> = ends.zip(&counts).map(|(end, count)| end - count).collect();
        let mut all = vec![0u8; total as usize + NOTHING.len()];
        let mut parts = PartitionMut::new(&mut all[..total as usize], counts.clone(), starts);
        process.gather_varcount_into_root(bytes, &mut parts);
        let mut rest = &all[..];
        let split = counts.iter().map(|&count| {
            let (part, after) = rest.split_at(count as usize);
            rest = after;
            part.to_vec()
        });
        Ok(Some(split.collect()))
    }

    fn barrier(&self) -> Result<()> {
        self.world.barrier();
        Ok(())
    }
}
