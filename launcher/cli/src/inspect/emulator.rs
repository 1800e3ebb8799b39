//! What `emulate` made: the emulator's configuration, statistics, and the report beside them.

use super::report::Report;
use anyhow::{Result, ensure};
use gradtx_models::decoder::{DecoderConfig, Emulator};
use gradtx_runtime::artifact::{TensorFile, checksum, read_json};
use serde_json::Value;
use std::path::Path;

/// The report in the directory of `emulate`.
const REPORT: &str = "report.json";

impl Report {
    /// Facts about an emulator's configuration.
    pub(super) fn look_at_emulator(&mut self, model: &DecoderConfig, emulator: &Emulator) {
        self.kind = "emulator (GradOT)".into();
        let [first, last] = emulator.edge;
        self.fact("edge", format!("first {first} and last {last} of {} layers", model.layers));
        self.fact("of the LLM with fingerprint", &emulator.base_fingerprint);
        self.fact("ratio that was asked for", emulator.ratio);
        for layer in emulator.middle_layers() {
            let shape = &emulator.layers[layer];
            let rank = |rank: usize| if rank == 0 { "whole".into() } else { rank.to_string() };
            let [q, k, v, o] = [shape.ranks.q, shape.ranks.k, shape.ranks.v, shape.ranks.o].map(rank);
            let widths = format!("{} of {}", shape.intermediate, model.intermediate);
            self.fact(
                &format!("layer {layer}"),
                format!("ranks q {q}, k {k}, v {v}, o {o}; {widths} channels"),
            );
        }
    }

    /// Whether a file is of statistics; if so, compares its values with their checksum.
    pub(super) fn look_at_statistics(&mut self, file: &TensorFile) -> Result<bool> {
        let (Some(_), Some(want)) = (file.metadata("of"), file.metadata("values_xxh3")) else {
            return Ok(false);
        };
        self.kind = "statistics for emulators".into();
        let found = checksum(&file.bytes()[file.header().len()..]);
        ensure!(found == want, "its values have the checksum {found}, written was {want}");
        Ok(true)
    }

    /// Facts of the report of `emulate`, if there is one in a directory.
    pub(super) fn look_at_emulation(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(REPORT);
        let Some(report) = path.is_file().then(|| read_json(&path)).transpose()? else { return Ok(()) };
        if report.get("edge_gradient_cosine").is_none() {
            return Ok(());
        }
        self.kind = "emulator with statistics (for the provider)".into();
        let names =
            ["kept", "llm_loss", "emulator_loss", "edge_gradient_cosine", "edge_gradient_relative_error"];
        for name in names {
            self.fact(name, report.get(name).unwrap_or(&Value::Null));
        }
        Ok(())
    }
}
