//! Whether the ranks' devices form a group, which all ranks must agree on.

use crate::comm::{Collectives, Comm};
use crate::{Error, Result};
use gradtx_kernels::collective::Candidate;
use gradtx_kernels::{Buffer, Collective};
use std::ops::Range;

/// What a rank says of its device: its name among all devices, and the library; or why not.
type Said = std::result::Result<(String, String), String>;

/// A group of all ranks' devices. If they can be in none, on every rank nothing; rank 0 logs why,
/// unless devices of this kind never can. A collective operation.
pub(super) fn form<D: Collective>(comm: &dyn Comm, device: &D) -> Result<Option<D::Group>> {
    let own: Said = match device.candidate() {
        Candidate::HostOnly => return Ok(None),
        Candidate::Able { device, library } => Ok((device, library)),
        Candidate::Unable(why) => Err(why),
    };
    let all = comm.all_gather_bytes(&serde_json::to_vec(&own).expect("strings are always JSON"))?;
    let all = all.iter().map(|bytes| read(bytes)).collect::<Result<Vec<Said>>>()?;
    if let Some(why) = obstacle(&all) {
        return Ok(through_hosts(comm, &why));
    }
    // One rank makes the id; if it cannot, the others must hear of it.
    let mut id = vec![];
    if comm.rank() == 0 {
        let made = device.new_group().map_err(|e| e.to_string());
        id = serde_json::to_vec(&made).expect("bytes and strings are always JSON");
    }
    comm.broadcast_bytes(0, &mut id)?;
    let id = match read::<std::result::Result<Vec<u8>, String>>(&id)? {
        Ok(id) => id,
        Err(why) => return Ok(through_hosts(comm, &why)),
    };
    // The hosts have nothing more to exchange while the devices meet.
    comm.barrier()?;
    let joined = join(device, &id, comm.rank(), comm.size());
    // What some ranks cannot do none does: a rank that went on alone would wait for ever.
    let failure = joined.as_ref().err().map(|e| e.to_string());
    let all = comm.all_gather_bytes(&serde_json::to_vec(&failure).expect("strings are always JSON"))?;
    let all = all.iter().map(|bytes| read(bytes)).collect::<Result<Vec<Option<String>>>>()?;
    let failed = all.into_iter().enumerate().find_map(|(rank, failure)| Some((rank, failure?)));
    let group = match (joined, failed) {
        (Ok(group), None) => group,
        (_, Some((rank, why))) => return Ok(through_hosts(comm, &format!("rank {rank}: {why}"))),
        (Err(e), None) => return Err(e),
    };
    if let (0, Ok((_, library))) = (comm.rank(), &own) {
        tracing::info!("gradients are summed between the devices of {} ranks by {library}", comm.size());
    }
    Ok(Some(group))
}

/// Joins a group and sums one value a rank: only then all ways between the devices are known to work, and
/// sums of gradients cannot be the first to find out.
fn join<D: Collective>(device: &D, id: &[u8], rank: usize, size: usize) -> Result<D::Group> {
    let mut group = device.join_group(id, rank, size)?;
    let mut values = device.buffer_from(&vec![(rank + 1) as f32; size])?;
    let shares: Vec<Range<usize>> = (0..size).map(|rank| rank..rank + 1).collect();
    device.start_sums(&mut group, values.all_mut(), &shares)?;
    device.finish_group(&mut group)?;
    let (sum, want) = (device.to_host(values.view(rank..rank + 1))?, (size * (size + 1) / 2) as f32);
    match sum == [want] {
        true => Ok(group),
        false => Err(Error::invalid("sums between devices", format!("found {sum:?}, expected {want}"))),
    }
}

fn through_hosts<G>(comm: &dyn Comm, why: &str) -> Option<G> {
    if comm.rank() == 0 {
        tracing::warn!("gradients are summed through the hosts, not between devices: {why}");
    }
    None
}

fn read<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::invalid("devices of ranks", format!("malformed message: {e}")))
}

/// Why the devices cannot be in one group: by rank, one that cannot be in any, libraries that
/// differ, or two ranks with one device.
fn obstacle(all: &[Said]) -> Option<String> {
    for (rank, said) in all.iter().enumerate() {
        let (device, library) = match said {
            Ok(said) => said,
            Err(why) => return Some(format!("rank {rank}: {why}")),
        };
        for (other, before) in all[..rank].iter().enumerate() {
            if before.as_ref().is_ok_and(|(_, l)| l != library) {
                let theirs = before.as_ref().map_or("", |(_, l)| l);
                return Some(format!("rank {other} has {theirs}, rank {rank} {library}"));
            }
            if before.as_ref().is_ok_and(|(d, _)| d == device) {
                return Some(format!("ranks {other} and {rank} share one device"));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(device: &str, library: &str) -> Said {
        Ok((device.into(), library.into()))
    }

    #[test]
    fn what_keeps_devices_from_a_group() {
        assert_eq!(obstacle(&[said("a", "N 2"), said("b", "N 2"), said("c", "N 2")]), None);
        let found = |all: &[Said]| obstacle(all).expect("an obstacle");
        let lacking = [said("a", "N 2"), Err("no library".into()), said("a", "N 2")];
        assert_eq!(found(&lacking), "rank 1: no library");
        let shared = [said("a", "N 2"), said("b", "N 2"), said("a", "N 2")];
        assert_eq!(found(&shared), "ranks 0 and 2 share one device");
        assert_eq!(found(&[said("a", "N 2"), said("b", "N 3")]), "rank 0 has N 2, rank 1 N 3");
    }
}
