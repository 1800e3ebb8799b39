//! Whether all ranks were given the same: a program, a configuration, an input.

use super::{Collectives, Comm};
use crate::{Error, Result};
use std::collections::BTreeMap;

/// Fails, on every rank alike, unless all ranks have the same `value` of what `name` names.
/// For something large the value is a hash. A collective operation.
pub fn agree(comm: &dyn Comm, name: &str, value: &str) -> Result<()> {
    let own = serde_json::to_vec(&(&comm.place().node, value)).expect("strings are always JSON");
    let mut by_value: BTreeMap<String, Vec<(usize, String)>> = BTreeMap::new();
    for (rank, bytes) in comm.all_gather_bytes(&own)?.iter().enumerate() {
        let read = serde_json::from_slice::<(String, String)>(bytes);
        let (node, value) =
            read.map_err(|e| Error::invalid(name, format!("rank {rank} sent a malformed message: {e}")))?;
        by_value.entry(value).or_default().push((rank, node));
    }
    if by_value.len() <= 1 {
        tracing::debug!("{name}: all {} rank(s) have {value}", comm.size());
        return Ok(());
    }
    // Those who are few stand first: they are the odd ones.
    let mut groups: Vec<_> = by_value.into_iter().collect();
    groups.sort_by_key(|(_, ranks)| (ranks.len(), ranks[0].0));
    let told: Vec<String> = groups.iter().map(|(value, who)| format!("{} {value}", whose(who))).collect();
    Err(Error::invalid(name, format!("not the same on all ranks: {}", told.join("; "))))
}

/// "ranks 0-2, 5 (a, b): "
fn whose(ranks: &[(usize, String)]) -> String {
    let mut runs: Vec<(usize, usize)> = vec![];
    let mut nodes: Vec<&str> = vec![];
    for (rank, node) in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *rank => *last = *rank,
            _ => runs.push((*rank, *rank)),
        }
        if !nodes.contains(&node.as_str()) {
            nodes.push(node);
        }
    }
    let runs: Vec<String> = runs
        .iter()
        .map(|&(a, b)| match b - a {
            0 => a.to_string(),
            1 => format!("{a}, {b}"),
            _ => format!("{a}-{b}"),
        })
        .collect();
    let more = nodes.len().saturating_sub(MAX_NODES);
    let mut nodes = nodes[..nodes.len() - more].join(", ");
    if more > 0 {
        nodes += &format!(" and {more} more");
    }
    let ranks = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{ranks} {} (on {nodes}):", runs.join(", "))
}

/// Nodes that a message names.
const MAX_NODES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local;

    /// What every rank finds, given these values by rank.
    fn found(values: &[&str]) -> Vec<Result<()>> {
        let ask = |comm: &super::super::Local| agree(comm, "configuration", values[comm.rank()]);
        std::thread::scope(|scope| {
            let ranks: Vec<_> =
                local(values.len()).into_iter().map(|c| scope.spawn(move || ask(&c))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn different_values_are_named_on_every_rank() {
        assert!(found(&["x"; 4]).iter().all(Result::is_ok));
        let node = crate::comm::this_node();
        for result in found(&["x", "x", "y", "x", "x"]) {
            let message = result.unwrap_err().to_string();
            let want = format!(
                "configuration: not the same on all ranks: rank 2 (on {node}): y; ranks 0, 1, 3, 4 (on {node}): x"
            );
            assert_eq!(message, want);
        }
    }

    #[test]
    fn many_ranks_and_nodes_are_told_briefly() {
        let ranks: Vec<_> = (0..9).filter(|r| *r != 3).map(|r| (r, format!("n{r}"))).collect();
        assert_eq!(whose(&ranks), "ranks 0-2, 4-8 (on n0, n1, n2, n4 and 4 more):");
    }
}
