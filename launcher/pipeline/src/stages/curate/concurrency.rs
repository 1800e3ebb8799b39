//! How many jobs share a stream.

use crate::records::CurateInputs;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_models::lora::MultiLora;
use gradtx_run::cluster::World;
use gradtx_run::config::{Config, CurateConfig};
use gradtx_run::dispatch::{Question, answer, memory};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_runtime::comm::Collectives;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Room};
use gradtx_train::model_spec::ModelSpec;
use std::path::Path;

/// The settings of curation, with the number of jobs that share a stream: as set; or as it
/// was decided when the run began; or as rank 0 decides it now.
pub(super) fn decided(
    config: &Config,
    dir: &Path,
    world: &World,
    array: bool,
    sides: &[&ModelSpec; 2],
) -> Result<CurateConfig> {
    let mut curate = config.curate.resolved();
    if curate.jobs_per_batch == 0 {
        let mut found = [0u64];
        if world.comm().rank() == 0 {
            // A record that cannot be read is refused when the directory is opened.
            let before = record::read(&dir.join(RECORD_FILE)).ok();
            let before = before.and_then(|record| record.inputs::<CurateInputs>(dir).ok().flatten());
            // Processes of an array begin on nodes of their own, and must decide alike.
            let memory = match array {
                true => Room::Host(u64::MAX),
                false => memory(&config.device, world.comm().place())?,
            };
            let before = before.map(|inputs| inputs.curate.jobs_per_batch);
            found[0] = before.unwrap_or_else(|| concurrent(config, memory, sides)) as u64;
        }
        world.comm().broadcast(0, &mut found)?;
        curate.jobs_per_batch = found[0] as usize;
    }
    Ok(curate)
}

/// The most jobs of the larger model that fit into memory together, so that the base model's
/// weights are read once for all of them.
fn concurrent(config: &Config, room: Room, sides: &[&ModelSpec; 2]) -> usize {
    let tokens = config.device.max_tokens_per_microbatch.max(config.data.max_length);
    let fits = |jobs: &usize| {
        sides.iter().zip([&config.curate.tiny, &config.curate.llm]).all(|(side, recipe)| {
            let capacity =
                BatchCapacity { tokens, segments: jobs * recipe.global_batch_size, labels: tokens };
            room.holds(&answer(&config.device, Need { side, jobs: *jobs, capacity }))
        })
    };
    (1..=config.curate.most_at_once()).rev().find(fits).unwrap_or(1)
}

/// What a base model and the fine-tuning of so many jobs on it take.
struct Need<'a> {
    side: &'a ModelSpec,
    jobs: usize,
    capacity: BatchCapacity,
}

impl Question for Need<'_> {
    type Answer = MemoryPlan;

    fn answer<X: Real<Acc = f32>, D: Backend<X>>(self) -> MemoryPlan {
        let ModelSpec { model, layout, .. } = self.side;
        let mut plan = Decoder::<D, X>::plan(model, false);
        plan.extend(MultiLora::<D, X>::plan(model, layout, self.jobs, self.capacity));
        plan
    }
}
