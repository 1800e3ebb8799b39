//! [`Context`]: what every stage is given.

use crate::cluster::World;
use crate::ui::Ui;
use gradtx_runtime::comm::RankInfo;
use gradtx_runtime::plan::{MemoryPlan, human_bytes};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// What every stage is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where messages go.
    pub ui: Ui,
    /// Threads of the CPU.
    pub threads: usize,
    /// Where this process runs: which of a node's devices is its own.
    pub place: RankInfo,
    computed_on: Arc<Mutex<BTreeSet<String>>>,
}

impl Context {
    /// From the command line; by default as many threads as the world has for each rank.
    pub fn new(threads: Option<usize>, ui: Ui, world: &World) -> Self {
        let place = world.comm().place().clone();
        Self { ui, threads: threads.unwrap_or(world.threads()).max(1), place, computed_on: Arc::default() }
    }

    /// The same with no device noted yet: each stage of a command notes its own.
    pub(crate) fn without_devices(&self) -> Self {
        Self { computed_on: Arc::default(), ..self.clone() }
    }

    /// The same with other messages.
    pub fn with_ui(&self, ui: Ui) -> Self {
        Self { ui, ..self.clone() }
    }

    /// Notes a device or library, other than this program on a CPU, on which the bits of results depend.
    pub fn note_device(&self, what: String) {
        self.computed_on.lock().unwrap_or_else(PoisonError::into_inner).insert(what);
    }

    /// What was noted so far.
    pub fn computed_on(&self) -> BTreeSet<String> {
        self.computed_on.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Context {
    /// Shows what a memory plan takes, in one line; with `--verbose` by purpose.
    pub fn show_plan(&self, what: &str, plan: &MemoryPlan) {
        self.ui.line(format!("{what}: {} of memory", human_bytes(plan.total())));
        self.ui.detail(totals(what, plan));
    }
}

/// A memory plan without its single buffers: a line per purpose, and the sum.
fn totals(what: &str, plan: &MemoryPlan) -> String {
    let table = plan.to_string();
    let lines: Vec<&str> = table.lines().skip(plan.entries().len()).collect();
    format!("{what}: memory of {} buffers\n{}", plan.entries().len(), lines.join("\n"))
}
