//! What a plan recommends: nodes for each stage, and how many shadow jobs share a stream.
//!
//! In: a [`Planner`] whose cluster is the most that there is. Out: a [`Recommendation`] with the
//! shortest time to the end, and warnings about what was asked for instead. More nodes than are
//! of use are not recommended.

use super::device::Cluster;
use super::memory::{self, Memory, Streams};
use super::predict::{GroupedWork, Planner};
use super::prediction::{Curation, Recommendation, Stage, Training};
use super::work::TranslatorWork;
use anyhow::Result;
use gradtx_run::role::Role;
use gradtx_run::text::counted;
use std::fmt::Write as _;

/// Idle shares above this are worth a word.
const IDLE: f64 = 0.1;
/// Shadow jobs that are played through, in all that is tried.
const MAX_PLAYED: usize = 200_000;
/// What is slower than the fastest by at most this share is as good, and may need fewer nodes.
const AS_GOOD: f64 = 0.02;
/// Jobs that share a stream, where the settings leave it open.
const MAX_AT_ONCE: usize = 8;

impl Planner<'_> {
    /// The shortest way to the end on at most the question's nodes.
    pub(super) fn recommend(
        &self,
        given: &Curation,
        train: &Stage,
        step: &Training,
    ) -> Result<Recommendation> {
        let cluster = self.question.cluster;
        let (curate_nodes, curate_concurrent, curation) =
            self.fastest_curation().unwrap_or((cluster.nodes, self.at_once(), given.clone()));
        let shape = self.translator()?;
        let work = self.translator_work(&shape, step.parameters);
        let (fastest, seconds) = self.fastest_training(&work).unwrap_or((cluster, step.seconds()));
        Ok(Recommendation {
            curate_nodes,
            curate_concurrent,
            curate_seconds: curation.seconds,
            curate_idle_share: curation.idle_share,
            train_nodes: fastest.nodes,
            train_gpus_per_node: fastest.gpus_per_node,
            train_seconds: train.seconds - train.steps * (step.seconds() - seconds),
        })
    }

    fn at_once(&self) -> usize {
        self.question.config.curate.most_at_once()
    }

    /// Nodes, jobs that share a stream, and how curation then goes.
    fn fastest_curation(&self) -> Option<(usize, usize, Curation)> {
        let Cluster { nodes, gpus_per_node, .. } = self.question.cluster;
        let subsets = self.question.config.curate.num_subsets;
        let most = MAX_AT_ONCE.max(self.at_once()).min(subsets);
        let sizes: Vec<GroupedWork> = steps_down(most, MAX_PLAYED / subsets.max(1))
            .into_iter()
            .filter(|&concurrent| self.fits(concurrent))
            .map(|concurrent| self.work(concurrent))
            .collect();
        let tries = MAX_PLAYED / (subsets * sizes.len()).max(1);
        let mut found: Vec<(usize, usize, Curation)> = vec![];
        for nodes in steps_down(nodes, tries) {
            for grouped in &sizes {
                let curation = self.curation(nodes * gpus_per_node, grouped);
                found.push((nodes, grouped.concurrent, curation));
            }
        }
        let best = found.iter().map(|found| found.2.seconds).min_by(f64::total_cmp)?;
        found.retain(|found| found.2.seconds <= best * (1.0 + AS_GOOD));
        // The base model is read once for all jobs of a group.
        found.into_iter().min_by_key(|&(nodes, concurrent, _)| (nodes, usize::MAX - concurrent))
    }

    /// Whether so many jobs of each model fit into a rank's memory together.
    fn fits(&self, jobs: usize) -> bool {
        let config = self.question.config;
        [Role::Tiny, Role::Llm].into_iter().all(|side| {
            let streams = Streams {
                jobs,
                batch: self.recipe(side).global_batch_size,
                stream_tokens: config.device.max_tokens_per_microbatch,
                longest: self.lengths(side).longest().min(config.data.max_length),
            };
            let plan = memory::finetuning(self.model(side), streams, self.gpu());
            Memory::of(&plan, self.question.memory).fits()
        })
    }

    /// Where an optimizer step is fastest, and its seconds; of several as fast, the smallest.
    fn fastest_training(&self, work: &TranslatorWork<'_>) -> Option<(Cluster, f64)> {
        let given = self.question.cluster;
        let gpus =
            (1..=given.gpus_per_node).map(|gpus_per_node| Cluster { nodes: 1, gpus_per_node, ..given });
        let nodes = (2..=given.nodes).map(|nodes| Cluster { nodes, ..given });
        let seconds = |cluster| (cluster, self.training_step(work, cluster).seconds());
        gpus.chain(nodes).map(seconds).min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Advice to train on fewer ranks, where that is faster.
    pub(super) fn fewer_ranks(&self, work: &TranslatorWork<'_>, step: &Training) -> Option<String> {
        let given = self.question.cluster;
        let (cluster, fastest) =
            self.fastest_training(work).filter(|(_, seconds)| *seconds < step.seconds())?;
        Some(format!(
            "train: a step takes {:.1} ms on {} and {:.1} ms on {} ({} of {}): train on fewer",
            1e3 * step.seconds(),
            counted(given.ranks(), "rank"),
            1e3 * fastest,
            cluster.ranks(),
            counted(cluster.nodes, "node"),
            counted(cluster.gpus_per_node, "rank"),
        ))
    }

    /// A warning if ranks wait for long, with a number of jobs per stream that would help.
    pub(super) fn idle_ranks(&self, curation: &Curation) -> Option<String> {
        let ranks = self.question.cluster.ranks();
        if curation.idle_share <= IDLE || ranks < 2 {
            return None;
        }
        let mut said = format!(
            "curate: ranks wait {:.0} % of their time, {} groups on {ranks} ranks",
            100.0 * curation.idle_share,
            curation.groups,
        );
        let subsets = self.question.config.curate.num_subsets;
        let better = steps_down(self.at_once(), MAX_PLAYED / subsets.max(1))
            .into_iter()
            .skip(1)
            .map(|concurrent| (concurrent, self.curation(ranks, &self.work(concurrent))))
            .find(|(_, c)| c.idle_share <= IDLE);
        let _ = match better {
            Some((concurrent, c)) => {
                write!(said, "; with curate.jobs_per_batch = {concurrent} {:.0} %", 100.0 * c.idle_share)
            }
            None => write!(said, "; fewer ranks would do"),
        };
        Some(said)
    }
}

/// Numbers from `most` down to 1: all of them if that is few enough, else each half of the one before.
fn steps_down(most: usize, tries: usize) -> Vec<usize> {
    let next = |n: &usize| (*n > 1).then(|| if most <= tries { n - 1 } else { n / 2 });
    std::iter::successors(Some(most.max(1)), next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_tried_by_halves() {
        assert_eq!(steps_down(4, 4), [4, 3, 2, 1]);
        assert_eq!(steps_down(9, 8), [9, 4, 2, 1]);
        assert_eq!(steps_down(0, 0), [1]);
    }
}
