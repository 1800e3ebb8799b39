//! `--try-lambda`: what an emulator would be with several values of λ.

use super::choose::choose;
use super::measure::Measured;
use super::{Emulate, REPORT_FILE};
use anyhow::{Context as _, Result};
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_run::progress::DirLock;
use gradtx_run::record::make_dir;
use gradtx_train::emulator::Emulation;
use serde_json::{Value, json};
use std::path::Path;

/// Where emulators are written that are measured and removed.
const TRIED_DIR: &str = "tried";

/// An emulator with one value of λ.
struct Tried {
    lambda: f64,
    /// λ of attention and of MLPs.
    lambdas: [f64; 2],
    /// Share of the middle's parameters.
    kept: f64,
    measured: Measured,
}

impl Emulate<'_> {
    /// Prints a line for each value.
    pub(super) fn try_lambda(&self, context: &Context, values: &[f64]) -> Result<()> {
        if let Some(value) = values.iter().find(|value| !(**value >= 0.0 && value.is_finite())) {
            return Err(unusable(format!("--try-lambda {value}: expected numbers from 0")));
        }
        let support = self.support(context)?;
        let dir = self.dir.join(TRIED_DIR);
        let tried = self.with_statistics(context, &support, |statistics, parts| {
            make_dir(&dir)?;
            let place = DirLock::open(&dir, "emulate")?;
            let llm = self.measure(context, &support, &self.llm.dir)?;
            let mut tried = vec![];
            for &lambda in values {
                let settings = self.config.emulator.with_lambda(lambda);
                let chosen = choose(&settings, self.config.seed, &self.layers, parts);
                self.write(statistics, &chosen, &dir)?;
                let measured = Measured::new(&llm, &self.measure(context, &support, &dir)?);
                let emulation = Emulation { model: &self.llm.model, settings: &settings };
                let kept = emulation.kept(&chosen.shapes);
                tried.push(Tried { lambda, lambdas: chosen.lambdas, kept, measured });
            }
            place.finish();
            std::fs::remove_dir_all(&dir).with_context(|| format!("{}: cannot remove", dir.display()))?;
            Ok(tried)
        })?;
        if let Some(tried) = tried {
            match context.ui.is_json() {
                true => context.ui.result_object(
                    "emulate",
                    json!({ "tried": tried.iter().map(Tried::json).collect::<Vec<_>>() }),
                ),
                false => context.ui.result(table(&tried, &self.dir)),
            }
        }
        Ok(())
    }
}

impl Tried {
    fn json(&self) -> Value {
        let Measured { llm_loss, emulator_loss, cosine, relative_error } = self.measured;
        json!({
            "lambda": self.lambda,
            "absolute": { "attention": self.lambdas[0], "mlp": self.lambdas[1] },
            "kept": self.kept,
            "llm_loss": llm_loss,
            "emulator_loss": emulator_loss,
            "edge_gradient_cosine": cosine,
            "edge_gradient_relative_error": relative_error,
        })
    }
}

fn table(tried: &[Tried], dir: &Path) -> String {
    let mut lines = vec![format!(
        "{:>8}  {:>7}  {:>11}  {:>7}  {:>14}",
        "lambda", "kept", "public loss", "cosine", "relative error"
    )];
    for Tried { lambda, kept, measured, .. } in tried {
        lines.push(format!(
            "{lambda:>8}  {:>5.1} %  {:>11.4}  {:>7.4}  {:>14.4}",
            100.0 * kept,
            measured.emulator_loss,
            measured.cosine,
            measured.relative_error
        ));
    }
    let llm = tried.first().map_or(f64::NAN, |tried| tried.measured.llm_loss);
    lines.push(format!(
        "the LLM's public loss is {llm:.4}; nothing was written but statistics: choose with emulator.lambda, and {} \
         has the numbers",
        dir.join(REPORT_FILE).display()
    ));
    lines.join("\n")
}
