//! Who runs which shadow jobs: the order in which groups of jobs are handed out.
//!
//! In: groups of shadow jobs, each of one model, with a cost. Out: for every rank that asks,
//! the group that it should do next. A group is what shares a packed stream; which jobs are
//! in it is decided by the configuration, so the order changes no result, only the time.
//!
//! Longest first: what is handed out last decides how long other ranks wait in the end, so
//! the last groups should be short ones. A rank stays with the base model that it holds while
//! that model has work, since loading another one takes time and does nothing. Whoever still
//! waits when one model's groups are all handed out goes over to the other model.
//!
//! With which model a rank begins is decided by playing the whole through beforehand: either
//! all begin with the one that has the longest group, or the models share the ranks in proportion
//! to their work, whichever ends first.
//!
//! Nothing here looks at a clock or at other ranks: the same questions in the same order
//! give the same answers.

use gradtx_run::role::Role;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;

/// A group of shadow jobs of one model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobGroup {
    /// The model.
    pub side: Role,
    /// Number of the group among those of its model.
    pub group: usize,
    /// How long it takes, in any unit that both models share.
    pub cost: f64,
}

/// Groups that nobody has been given yet.
#[derive(Clone, Debug, Default)]
pub struct Scheduler {
    /// Longest first.
    tiny: VecDeque<JobGroup>,
    /// Longest first.
    llm: VecDeque<JobGroup>,
    /// Of each model, if they share the ranks in proportion to their work.
    shares: Option<[Share; 2]>,
}

/// A model's claim to ranks that hold none yet.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// Costs of all of its groups.
    work: f64,
    /// Ranks that began with it.
    ranks: usize,
}

impl Scheduler {
    /// All of these are to be done. Groups of one cost go in the order of their numbers.
    pub fn new(work: impl IntoIterator<Item = JobGroup>) -> Self {
        let mut work: Vec<JobGroup> = work.into_iter().collect();
        work.sort_by(|a, b| b.cost.total_cmp(&a.cost).then(a.group.cmp(&b.group)));
        let (tiny, llm): (Vec<JobGroup>, Vec<JobGroup>) =
            work.into_iter().partition(|w| w.side == Role::Tiny);
        Self { tiny: tiny.into(), llm: llm.into(), shares: None }
    }

    /// The same for so many ranks, which begin as the whole ends first.
    pub fn for_ranks(work: impl IntoIterator<Item = JobGroup>, ranks: usize) -> Self {
        let together = Self::new(work);
        let share =
            |groups: &VecDeque<JobGroup>| Share { work: groups.iter().map(|w| w.cost).sum(), ranks: 0 };
        let shared = Self { shares: Some([share(&together.tiny), share(&together.llm)]), ..together.clone() };
        if shared.clone().end(ranks) < together.clone().end(ranks) { shared } else { together }
    }

    /// When the last of so many ranks is done, in the unit of the costs; loading is not counted.
    fn end(mut self, ranks: usize) -> f64 {
        // More ranks than groups have nothing to do.
        let ranks = ranks.clamp(1, self.waiting().max(1));
        // Bits of times, none of which is negative, are ordered like the times.
        let mut free: BinaryHeap<Reverse<(u64, usize)>> = (0..ranks).map(|rank| Reverse((0, rank))).collect();
        let mut holds = vec![None; ranks];
        let mut last = 0.0_f64;
        while let Some(Reverse((from, rank))) = free.pop() {
            let Some(work) = self.next(holds[rank]) else { break };
            let end = f64::from_bits(from) + work.cost;
            holds[rank] = Some(work.side);
            last = last.max(end);
            free.push(Reverse((end.to_bits(), rank)));
        }
        last
    }

    /// What a rank should do next that holds this base model, or none yet. `None` when
    /// everything has been handed out.
    pub fn next(&mut self, resident: Option<Role>) -> Option<JobGroup> {
        let stays = resident.filter(|&side| !self.of(side).is_empty());
        let side = match resident {
            None => self.most_in_need().or_else(|| self.longest()),
            Some(_) => stays.or_else(|| self.longest()),
        }?;
        if let (None, Some(shares)) = (resident, &mut self.shares) {
            shares[side as usize].ranks += 1;
        }
        self.of(side).pop_front()
    }

    /// The model whose ranks would have the most work each, with one more of them.
    fn most_in_need(&self) -> Option<Role> {
        let [tiny, llm] = self.shares?.map(|share| share.work / (share.ranks + 1) as f64);
        match (self.tiny.is_empty(), self.llm.is_empty()) {
            (false, false) => Some(if tiny > llm { Role::Tiny } else { Role::Llm }),
            _ => None,
        }
    }

    /// Groups that nobody has been given yet.
    pub fn waiting(&self) -> usize {
        self.tiny.len() + self.llm.len()
    }

    fn of(&mut self, side: Role) -> &mut VecDeque<JobGroup> {
        match side {
            Role::Tiny => &mut self.tiny,
            Role::Llm => &mut self.llm,
        }
    }

    /// The model of the longest group; of two as long, the LLM, which takes longer to load.
    fn longest(&self) -> Option<Role> {
        match (self.llm.front(), self.tiny.front()) {
            (Some(llm), Some(tiny)) if tiny.cost > llm.cost => Some(Role::Tiny),
            (Some(_), _) => Some(Role::Llm),
            (None, tiny) => tiny.map(|work| work.side),
        }
    }
}

/// Jobs `0..jobs` in groups of `concurrent`, the last one perhaps smaller.
pub fn groups(jobs: usize, concurrent: usize) -> Vec<Range<usize>> {
    let concurrent = concurrent.max(1);
    (0..jobs).step_by(concurrent).map(|from| from..(from + concurrent).min(jobs)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Role::{Llm, Tiny};

    fn work(side: Role, costs: &[f64]) -> Vec<JobGroup> {
        costs.iter().enumerate().map(|(group, &cost)| JobGroup { side, group, cost }).collect()
    }

    fn scheduler(tiny: &[f64], llm: &[f64]) -> Scheduler {
        Scheduler::new(work(Tiny, tiny).into_iter().chain(work(Llm, llm)))
    }

    fn named(work: Option<JobGroup>) -> Option<(Role, usize)> {
        work.map(|w| (w.side, w.group))
    }

    #[test]
    fn ranks_without_a_model_get_the_longest_group() {
        let mut s = scheduler(&[1.0, 7.0, 3.0], &[2.0, 5.0]);
        let order: Vec<_> = std::iter::from_fn(|| named(s.next(None))).collect();
        assert_eq!(order, [(Tiny, 1), (Llm, 1), (Tiny, 2), (Llm, 0), (Tiny, 0)]);
        assert_eq!((s.waiting(), s.next(Some(Tiny))), (0, None));
    }

    #[test]
    fn a_rank_stays_with_its_model_until_that_has_no_work() {
        let mut s = scheduler(&[1.0, 2.0], &[9.0, 8.0]);
        let order: Vec<_> = std::iter::from_fn(|| named(s.next(Some(Tiny)))).collect();
        assert_eq!(order, [(Tiny, 1), (Tiny, 0), (Llm, 0), (Llm, 1)]);
    }

    #[test]
    fn equal_costs_go_by_number_and_the_llm_goes_first() {
        let mut s = scheduler(&[4.0; 2], &[4.0; 2]);
        assert_eq!(s.waiting(), 4);
        let order: Vec<_> = std::iter::from_fn(|| named(s.next(None))).collect();
        assert_eq!(order, [(Llm, 0), (Llm, 1), (Tiny, 0), (Tiny, 1)]);
    }

    #[test]
    fn groups_are_handed_out_once_in_any_order() {
        let costs = [3.5, 0.0, 2.0, 2.0, 8.25];
        let forward = work(Tiny, &costs).into_iter().chain(work(Llm, &costs));
        let mut backward: Vec<JobGroup> = forward.clone().collect();
        backward.reverse();
        let (mut a, mut b) = (Scheduler::new(forward), Scheduler::new(backward));
        let mut seen = vec![];
        // Ranks that hold one model, the other, or none, in turn.
        for resident in [Some(Llm), None, Some(Tiny)].into_iter().cycle().take(10) {
            let next = a.next(resident);
            assert_eq!(next, b.next(resident));
            seen.push(named(next).unwrap());
        }
        seen.sort_by_key(|&(side, group)| (side == Llm, group));
        seen.dedup();
        assert_eq!((seen.len(), a.waiting()), (10, 0));
    }

    /// 300 jobs of each model in groups of four on 64 ranks, as measured for two sizes of models.
    #[test]
    fn ranks_begin_as_the_whole_ends_first() {
        let jobs = |cost: f64| vec![4.0 * cost; 75];
        let (tiny, llm) = (jobs(0.73), jobs(1.08));
        let all = || work(Tiny, &tiny).into_iter().chain(work(Llm, &llm));
        let floor = (tiny.iter().sum::<f64>() + llm.iter().sum::<f64>()) / 64.0;
        let (together, best) = (Scheduler::new(all()).end(64), Scheduler::for_ranks(all(), 64));
        assert!(best.clone().end(64) < 1.05 * floor, "{} of {floor}", best.clone().end(64));
        assert!(together > 1.15 * floor, "the other order leaves ranks waiting: {together}");
        // Shared in proportion: 38 of 64 ranks begin with the LLM.
        let mut first = best;
        let llm_first = (0..64).filter(|_| first.next(None).unwrap().side == Llm).count();
        assert_eq!(llm_first, 38);
        // Where beginning together ends first, it stays as it was.
        let even = || work(Tiny, &[1.0; 4]).into_iter().chain(work(Llm, &[3.0; 4]));
        let order = |mut s: Scheduler| -> Vec<_> { std::iter::from_fn(|| named(s.next(None))).collect() };
        assert_eq!(order(Scheduler::for_ranks(even(), 4)), order(Scheduler::new(even())));
        assert_eq!(Scheduler::for_ranks([], 3).end(3), 0.0);
    }

    #[test]
    fn groups_cover_all_jobs() {
        assert_eq!(groups(7, 3), [0..3, 3..6, 6..7]);
        assert_eq!(groups(2, 5).into_iter().flatten().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(groups(3, 0).len(), 3);
        assert!(groups(0, 4).is_empty());
    }
}
