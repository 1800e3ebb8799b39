//! Curation on many ranks, played through without doing any work.
//!
//! In: groups of shadow jobs whose cost is in seconds, ranks, and the time that it takes to
//! load each model. Out: when every rank is done. The order is [`Scheduler`]'s, as in a real
//! run: a rank that is free asks for the next group.

use gradtx_run::role::Role;
use gradtx_train::lora::schedule::{JobGroup, Scheduler};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What a rank did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rank {
    /// Seconds after which it had nothing more to do.
    pub end: f64,
    /// Seconds of these in which it loaded models.
    pub loading: f64,
    /// The groups that it did, in order.
    pub done: Vec<JobGroup>,
    resident: Option<Role>,
}

/// What all ranks did.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// One for each rank.
    pub ranks: Vec<Rank>,
}

impl Outcome {
    /// Seconds until the last rank is done.
    pub(crate) fn makespan(&self) -> f64 {
        self.ranks.iter().map(|rank| rank.end).fold(0.0, f64::max)
    }

    /// The part of all ranks' time in which they waited for the last one.
    pub fn idle_share(&self) -> f64 {
        let all = self.makespan() * self.ranks.len() as f64;
        let used: f64 = self.ranks.iter().map(|rank| rank.end).sum();
        if all > 0.0 { 1.0 - used / all } else { 0.0 }
    }

    /// Seconds of all ranks together in which models were loaded.
    pub fn loading(&self) -> f64 {
        self.ranks.iter().map(|rank| rank.loading).sum()
    }
}

/// Plays the groups through; at least one rank. `load` is a model's loading time in seconds.
pub(crate) fn simulate(work: &[JobGroup], ranks: usize, load: impl Fn(Role) -> f64) -> Outcome {
    let mut scheduler = Scheduler::for_ranks(work.iter().copied(), ranks);
    let mut ranks = vec![Rank::default(); ranks.max(1)];
    // Of several that are free at once, the first one asks first. Bits of times, none of which is
    // negative, are ordered like the times.
    let mut free_from: BinaryHeap<Reverse<(u64, usize)>> =
        (0..ranks.len()).map(|i| Reverse((0, i))).collect();
    while scheduler.waiting() > 0 {
        let Reverse((_, first)) = free_from.pop().expect("there is a rank");
        let free = &mut ranks[first];
        let work = scheduler.next(free.resident).expect("groups are waiting");
        if free.resident != Some(work.side) {
            free.resident = Some(work.side);
            free.loading += load(work.side);
            free.end += load(work.side);
        }
        free.end += work.cost;
        free.done.push(work);
        free_from.push(Reverse((free.end.to_bits(), first)));
    }
    Outcome { ranks }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(side: Role, costs: &[f64]) -> Vec<JobGroup> {
        costs.iter().enumerate().map(|(group, &cost)| JobGroup { side, group, cost }).collect()
    }

    #[test]
    fn one_rank_does_everything_and_loads_each_model_once() {
        let all = [work(Role::Tiny, &[1.0, 2.0]), work(Role::Llm, &[3.0, 4.0])].concat();
        let outcome = simulate(&all, 1, |side| if side == Role::Tiny { 0.5 } else { 1.5 });
        assert_eq!((outcome.makespan(), outcome.loading(), outcome.idle_share()), (12.0, 2.0, 0.0));
        assert_eq!(outcome.ranks[0].done.len(), 4);
    }

    #[test]
    fn more_ranks_than_groups_leave_ranks_idle() {
        let outcome = simulate(&work(Role::Llm, &[2.0, 2.0]), 4, |_| 1.0);
        assert_eq!((outcome.makespan(), outcome.idle_share()), (3.0, 0.5));
        assert_eq!(outcome.ranks.iter().map(|r| r.done.len()).collect::<Vec<_>>(), [1, 1, 0, 0]);
        assert_eq!(simulate(&[], 3, |_| 1.0).idle_share(), 0.0);
    }

    #[test]
    fn no_rank_waits_longer_than_one_group_and_one_load() {
        // Costs without a pattern, from a multiplicative sequence.
        let costs: Vec<f64> = (1..60u64).map(|i| 1.0 + (i * 7919 % 97) as f64 / 10.0).collect();
        let all = [work(Role::Tiny, &costs), work(Role::Llm, &costs)].concat();
        for ranks in [2, 5, 16] {
            let outcome = simulate(&all, ranks, |_| 2.0);
            let first = outcome.ranks.iter().map(|r| r.end).fold(f64::INFINITY, f64::min);
            assert!(outcome.makespan() - first <= 10.7 + 2.0, "{ranks}: {outcome:?}");
            let floor = 2.0 * costs.iter().sum::<f64>() / ranks as f64;
            assert!(outcome.makespan() >= floor && outcome.makespan() <= floor + 10.7 + 4.0);
            assert_eq!(outcome.ranks.iter().map(|r| r.done.len()).sum::<usize>(), all.len());
        }
    }
}
