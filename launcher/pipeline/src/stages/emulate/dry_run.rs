//! `--dry-run`: what an emulator will be and take. No weights are read, nothing is written.

use super::Emulate;
use super::collect::share;
use super::statistics::Statistics;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::text::counted;
use gradtx_runtime::artifact::TensorSource;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{Room, human_bytes};
use gradtx_train::emulator::{Emulation, pass_memory, passes};
use serde_json::json;

impl Emulate<'_> {
    /// Prints sizes, passes and memory.
    pub(super) fn dry_run(&self, context: &Context) -> Result<()> {
        let Self { config, llm, layers, comm, .. } = self;
        let support = self.support(context)?;
        let emulation = Emulation { model: &llm.model, settings: &config.emulator };
        let [whole, kept] = emulation.parameters();
        let size = TensorSource::open(&llm.dir)?.files().iter().map(|file| file.size() as u64).sum::<u64>();
        let written = if self.is_dense { size } else { (size as f64 * kept as f64 / whole as f64) as u64 };
        let inputs = self.statistics_of()?;
        let statistics = Statistics { dir: &self.own, side: llm, layers, of: &inputs };
        let there = layers.iter().filter(|layer| statistics.intact(**layer).is_some()).count();
        let own = share(layers, 0, comm.size());
        let passing = Passing { emulate: self, context, layers: own, capacity: support.capacity() };
        let Passes { layers: of_passes, bytes, room } = dispatch(&config.device, context, passing)?;
        let streams = support.streams().count();
        if context.ui.is_json() {
            let fields = json!({
                "parameters": { "llm": whole, "emulator": kept },
                "bytes": { "emulator": written, "statistics": emulation.statistics_bytes() },
                "support": {
                    "examples": support.examples, "tokens": support.tokens, "streams": streams,
                    "held_out": support.held_out_examples,
                },
                "layers": { "middle": layers.len(), "statistics_are_there": there },
                "passes": of_passes, "memory": bytes, "room": room.available(), "ranks": comm.size(),
            });
            context.ui.result_object("emulate", fields);
            return Ok(());
        }
        let [first, last] = config.emulator.edge;
        let of_each: Vec<String> = of_passes.iter().map(usize::to_string).collect();
        let each = if comm.size() > 1 { " on rank 0" } else { "" };
        let lines = [
            format!(
                "LLM: {} parameters, {} layers, edge {first} + {last}",
                millions(whole),
                llm.model.layers
            ),
            format!(
                "emulator: about {} parameters ({:.1} %), {}, in {}",
                millions(if self.is_dense { whole } else { kept }),
                100.0 * kept as f64 / whole as f64,
                human_bytes(written),
                self.dir.display()
            ),
            format!(
                "support: {}, {} tokens in {}; {} held out",
                counted(support.examples, "example"),
                support.tokens,
                counted(streams, "stream"),
                support.held_out_examples
            ),
            format!(
                "statistics: {}, {there} of {} layers are there, in {}",
                human_bytes(emulation.statistics_bytes()),
                layers.len(),
                self.own.display()
            ),
            format!(
                "memory: {} of {}{each}, {} over the data, of {} layers",
                human_bytes(bytes),
                human_bytes(room.available()),
                counted(of_passes.len(), "pass").replace("passs", "passes"),
                of_each.join(", ")
            ),
        ];
        context.ui.result(lines.join("\n"));
        Ok(())
    }
}

fn millions(parameters: u64) -> String {
    format!("{:.1} M", parameters as f64 / 1e6)
}

/// What the passes of a rank will take.
struct Passing<'a> {
    emulate: &'a Emulate<'a>,
    context: &'a Context,
    layers: &'a [usize],
    capacity: BatchCapacity,
}

struct Passes {
    /// Layers of each pass.
    layers: Vec<usize>,
    /// Bytes that the largest takes.
    bytes: u64,
    room: Room,
}

impl Work for Passing<'_> {
    type Output = Passes;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Passes> {
        let (model, capacity) = (&self.emulate.llm.model, self.capacity);
        let room = memory_for(device, &self.context.place)?;
        let passes = passes::<X, D>(model, self.layers, capacity, room)?;
        let bytes =
            passes.iter().map(|layers| room.taken(&pass_memory::<X, D>(model, layers, capacity))).max();
        Ok(Passes { layers: passes.iter().map(Vec::len).collect(), bytes: bytes.unwrap_or(0), room })
    }
}
