//! [`Prediction`]: what a run will take, as it is printed and written as JSON.

use super::device::Cluster;
use super::memory::Memory;
use super::products::ByProducts;
use super::rates::{Basis, Rate};
use serde::Serialize;

/// A stage, or one model's part of it.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// Its name.
    pub name: String,
    /// Ranks that work at it.
    pub ranks: usize,
    /// Optimizer steps, or generated updates, or examples.
    pub steps: f64,
    /// Tokens, or blocks of updates.
    pub tokens: f64,
    /// Operations.
    pub flops: f64,
    /// Seconds from its begin to its end. Of a model's part of curation: of all ranks'
    /// work, divided by the ranks.
    pub seconds: f64,
    /// Hours of all its ranks together.
    pub gpu_hours: f64,
    /// Memory of a rank.
    pub memory: Memory,
    /// Where the rate behind it is from.
    pub basis: Basis,
    /// False for what only comparison needs: the LLM fine-tuned on a client's own data. It
    /// is not part of the sums.
    pub needed: bool,
}

/// How shadow jobs spread over ranks.
#[derive(Clone, Debug, Serialize)]
pub struct Curation {
    /// Groups of jobs, of both models.
    pub groups: usize,
    /// Seconds until the last rank is done.
    pub seconds: f64,
    /// Part of the ranks' time in which they wait for the last one.
    pub idle_share: f64,
    /// Part of the ranks' time in which they load models.
    pub loading_share: f64,
    /// Fewest and most jobs of a rank.
    pub jobs_per_rank: [usize; 2],
    /// Bytes of the tuple store.
    pub disk: u64,
    /// Files of the tuple store.
    pub files: usize,
}

/// What an optimizer step of the translator is made of.
#[derive(Clone, Debug, Serialize)]
pub struct Training {
    /// Parameters.
    pub parameters: usize,
    /// Tuples of a rank in a step.
    pub tuples_per_rank: usize,
    /// Seconds of forward and backward.
    pub compute: f64,
    /// Seconds of the optimizer.
    pub update: f64,
    /// Seconds of communication that nothing else hides.
    pub network: f64,
    /// Seconds of all communication.
    pub network_in_all: f64,
}

impl Training {
    /// Seconds of a step.
    pub fn seconds(&self) -> f64 {
        self.compute + self.update + self.network
    }
}

/// The shortest way to the end on at most the given nodes.
#[derive(Clone, Debug, Serialize)]
pub struct Recommendation {
    /// Nodes for curation.
    pub curate_nodes: usize,
    /// Shadow jobs that share a stream: `curate.jobs_per_batch`.
    pub curate_concurrent: usize,
    /// Seconds of curation.
    pub curate_seconds: f64,
    /// Part of the ranks' time in which they wait for the last one.
    pub curate_idle_share: f64,
    /// Nodes for training.
    pub train_nodes: usize,
    /// GPUs of each of them.
    pub train_gpus_per_node: usize,
    /// Seconds of training.
    pub train_seconds: f64,
}

/// Statistics for an emulator, by all ranks; decompositions and writing are not counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Emulating {
    /// Layers that are compressed.
    pub layers: usize,
    /// Passes of a rank over the data.
    pub passes: usize,
    /// Tokens of the data.
    pub tokens: usize,
    /// Operations of a rank.
    pub flops: f64,
    /// Seconds, with loading of the model.
    pub seconds: f64,
    /// Memory of a rank.
    pub memory: Memory,
    /// Bytes of the files of statistics.
    pub disk: u64,
    /// Parameters of the LLM and of its emulator.
    pub parameters: [u64; 2],
}

/// What a run will take.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// The machines.
    pub cluster: Cluster,
    /// Ranks in all.
    pub ranks: usize,
    /// What every stage takes; those named `client …` once for each client.
    pub stages: Vec<Stage>,
    /// How curation goes.
    pub curation: Curation,
    /// How training goes.
    pub training: Training,
    /// What translation by products and refinement take, which are not among the stages.
    pub by_products: ByProducts,
    /// What statistics for an emulator take, if the LLM has layers between those of the edge; not part of the sums.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emulation: Option<Emulating>,
    /// What would be faster.
    pub recommended: Recommendation,
    /// Seconds of the whole run: curation, training, all clients.
    pub seconds: f64,
    /// GPU hours of the whole run.
    pub gpu_hours: f64,
    /// Clients.
    pub clients: usize,
    /// What examples are taken to be like, for the TinyLM and the LLM.
    pub examples: [String; 2],
    /// Whether they were counted in the data.
    pub examples_counted: bool,
    /// The rates behind all of it.
    pub rates: Vec<Rate>,
    /// What will not work, or not well, and what would help.
    pub warnings: Vec<String>,
}
