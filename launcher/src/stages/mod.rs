//! The stages of the pipeline, a file each. What flows:
//!
//! | stage | in | out |
//! |---|---|---|
//! | [`world`] | a seed | two base models, JSONL task files, a run file |
//! | [`split`] | a data set, a seed | public and private JSONL files, and who got which rows |
//! | [`curate`] | public data, both models | `TupleStore`: `RUN/shadow` |
//! | [`train`] | `TupleStore` | translator: `RUN/translator` |
//! | [`finetune`] | private data, one model | `UpdateVector` and adapter |
//! | [`translate`] | `UpdateVector`s of the TinyLM, translator | `UpdateVector` and adapter of the LLM |
//! | [`refine`] | a translation, its `UpdateVector`s of the TinyLM, public prompts | `UpdateVector` and adapter of the LLM |
//! | [`merge`] | a model, an adapter | a model directory |
//! | [`evaluate`] | test data, a model, an adapter | predictions and score |
//! | [`report`] | a run directory | a page about it, and the same as JSON |
//! | [`submit`] | a run, what to ask a cluster for | batch jobs of these stages |
//! | [`inspect`] | any of these | what it is, and whether it is intact |
//! | [`status`] | a run | what is finished, what runs, what stopped and why |
//! | [`doctor`] | this machine, a run | what is here, and whether the run fits |
//! | [`manual`] | | completion scripts and manual pages |
//! | [`plan`] | settings, a cluster | memory, time and GPU hours of every stage |
//! | [`sweep`] | lists of settings | a run directory for each combination |
//! | [`demo`] | a seed | all of the above, and a table |
//! | [`bench`](mod@bench) | sizes of models | times of steps and operations on this device |
//!
//! Every stage can be run again: it opens its directory through [`crate::record`], does
//! what is missing, and leaves alone what is finished and intact. All randomness is
//! keyed by the seed, a purpose and an index, so the same settings give the same bytes.

pub mod aside;
pub mod bench;
pub mod card;
pub mod curate;
pub mod demo;
pub mod describe;
pub mod doctor;
pub mod evaluate;
pub mod examples;
pub mod finetune;
pub mod inspect;
pub mod jobs;
pub mod lineage;
pub mod logs;
pub mod manual;
pub mod merge;
pub mod plan;
pub mod products;
pub mod prompts;
pub mod refine;
pub mod report;
pub mod side;
pub mod split;
pub mod status;
pub mod submit;
pub mod sweep;
pub mod train;
pub mod translate;
pub mod world;

use crate::cluster::World;
use crate::ui::Ui;
use gradtx_runtime::comm::Place;
use gradtx_runtime::plan::MemoryPlan;

/// What every stage is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where messages go.
    pub ui: Ui,
    /// Threads of the CPU.
    pub threads: usize,
    /// Where this process runs: which of a node's devices is its own.
    pub place: Place,
}

impl Context {
    /// From the command line; by default as many threads as the world has for each rank.
    pub fn new(threads: Option<usize>, ui: Ui, world: &World) -> Self {
        let place = world.comm().place().clone();
        Self { ui, threads: threads.unwrap_or(world.threads()).max(1), place }
    }
}

/// Directory of the tuple store in a run directory.
pub const SHADOW_DIR: &str = "shadow";
/// Which rows each shadow subset has, in the directory of the tuple store.
pub const SUBSETS_FILE: &str = "subsets.json";
/// Which shadow subsets are of one group, beside it.
pub const GROUPS_FILE: &str = "groups.json";
/// Directory of what [`translate`] by products finds out about a run, in a run directory.
pub const PRODUCTS_DIR: &str = "products";
/// Directory of the translator in a run directory.
pub const TRANSLATOR_DIR: &str = "translator";
/// File name of an update vector in a stage's directory.
pub const UPDATE_FILE: &str = "update.safetensors";
/// Directory of the PEFT adapter in a stage's directory.
pub const ADAPTER_DIR: &str = "adapter";

/// A memory plan without its single buffers: a line per purpose, and the sum.
fn totals(what: &str, plan: &MemoryPlan) -> String {
    let table = plan.to_string();
    let lines: Vec<&str> = table.lines().skip(plan.entries().len()).collect();
    format!("{what}: memory of {} buffers\n{}", plan.entries().len(), lines.join("\n"))
}
