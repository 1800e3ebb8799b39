//! `[curate]`: fine-tuning on shadow subsets.

use super::bounds::{Findings, MAX_ITEMS, MAX_MINUTES, MAX_STEPS};
use super::recipe::Recipe;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Shadow subsets; each is a pair of files.
const MAX_SUBSETS: u64 = 100_000;
/// More jobs than this share no batch, unless the settings say so.
const MAX_AT_ONCE: usize = 8;

/// Fine-tuning of both models on shadow subsets of the public data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CurateConfig {
    /// Shadow subsets, K. Both models are fine-tuned on each of them; more make a better translator.
    pub num_subsets: usize,
    /// Examples of one subset, drawn without repetition; subsets may overlap.
    pub examples_per_subset: usize,
    /// Which examples a subset may hold: `random`, any of the public data; or the name of
    /// a column of the data: rows with one value of it, each value in turn. `task` also
    /// distinguishes data sets without such a column.
    pub group_by: GroupBy,
    /// 0: a subset holds one group only. α > 0: it holds all groups, in proportions drawn
    /// for each subset from Dirichlet(α).
    pub dirichlet_alpha: f64,
    /// Snapshots of each job's update, that is, tuples of one subset.
    pub num_snapshots: usize,
    /// Optimizer steps from one snapshot to the next; the last is of the last step.
    pub snapshot_steps: u32,
    /// Jobs of one model that are trained in one batch, over one copy of the base model. 0: as many as
    /// fit into memory and into one micro-batch, decided when the first process starts, and kept from
    /// then on. Changes memory and speed, no result.
    pub jobs_per_batch: usize,
    /// Minutes between two checkpoints of jobs on their way; 0: after every step.
    pub save_minutes: f64,
    /// Fine-tuning of the TinyLM on a subset.
    pub tiny: Recipe,
    /// Fine-tuning of the LLM on a subset.
    pub llm: Recipe,
}

impl Default for CurateConfig {
    fn default() -> Self {
        Self {
            num_subsets: 300,
            examples_per_subset: 1024,
            group_by: GroupBy::Random,
            dirichlet_alpha: 0.0,
            num_snapshots: 13,
            snapshot_steps: 1,
            jobs_per_batch: 8,
            save_minutes: 10.0,
            tiny: Recipe::default(),
            llm: Recipe { max_steps: 87, ..Recipe::default() },
        }
    }
}

impl CurateConfig {
    /// Jobs of one batch, at most: as set, or what may be decided where it is not.
    pub fn most_at_once(&self) -> usize {
        let set = if self.jobs_per_batch == 0 { MAX_AT_ONCE } else { self.jobs_per_batch };
        set.min(self.num_subsets)
    }

    /// With steps in the place of epochs and ratios.
    pub fn resolved(&self) -> Self {
        let recipe = |recipe: &Recipe| recipe.resolved(self.examples_per_subset);
        Self { tiny: recipe(&self.tiny), llm: recipe(&self.llm), ..self.clone() }
    }

    pub(super) fn check(&self, findings: &mut Findings) {
        findings.whole("curate.num_subsets", self.num_subsets, 1..=MAX_SUBSETS);
        findings.whole("curate.examples_per_subset", self.examples_per_subset, 1..=MAX_ITEMS);
        findings.whole("curate.num_snapshots", self.num_snapshots, 1..=MAX_STEPS);
        findings.whole("curate.snapshot_steps", self.snapshot_steps, 1..=MAX_STEPS);
        findings.whole("curate.jobs_per_batch", self.jobs_per_batch, 0..=4096);
        findings.real("curate.save_minutes", self.save_minutes, 0.0..=MAX_MINUTES);
        findings.real("curate.dirichlet_alpha", self.dirichlet_alpha, 0.0..=1e9);
        findings.expect(
            self.dirichlet_alpha == 0.0 || self.group_by != GroupBy::Random,
            "curate.dirichlet_alpha: needs groups to mix; set curate.group_by to a column, such as task",
        );
        let back = (self.num_snapshots as u64).saturating_sub(1).saturating_mul(self.snapshot_steps.into());
        let collected = back.saturating_add(1);
        for (name, recipe) in [("curate.tiny", &self.tiny), ("curate.llm", &self.llm)] {
            let steps = recipe.resolved(self.examples_per_subset).max_steps;
            let what = format!("{name}.max_steps = {steps}: the snapshots reach {collected} steps back");
            findings.expect(u64::from(steps) >= collected, what);
            recipe.check(name, findings);
        }
    }
}

/// Which examples a shadow subset may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "String", into = "String")]
pub enum GroupBy {
    /// Any.
    #[default]
    Random,
    /// Those with one value in the column of this name.
    Column(String),
}

/// The value that groups nothing.
const RANDOM: &str = "random";

impl From<String> for GroupBy {
    fn from(name: String) -> Self {
        if name == RANDOM { Self::Random } else { Self::Column(name) }
    }
}

impl From<GroupBy> for String {
    fn from(group_by: GroupBy) -> Self {
        group_by.to_string()
    }
}

impl fmt::Display for GroupBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.write_str(RANDOM),
            Self::Column(name) => f.write_str(name),
        }
    }
}
