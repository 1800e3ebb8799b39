//! [`Context`]: what every stage is given.

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

/// A memory plan without its single buffers: a line per purpose, and the sum.
pub fn totals(what: &str, plan: &MemoryPlan) -> String {
    let table = plan.to_string();
    let lines: Vec<&str> = table.lines().skip(plan.entries().len()).collect();
    format!("{what}: memory of {} buffers\n{}", plan.entries().len(), lines.join("\n"))
}
