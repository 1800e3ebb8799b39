//! The report: by layer what was kept, how close the emulator is, and whether that can be relied on.

use super::choose::{Chosen, agreement};
use super::measure::Measured;
use super::parts::{Parts, summary};
use super::statistics::Statistics;
use super::support::Support;
use anyhow::Result;
use gradtx_run::config::EmulatorConfig;
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use serde_json::{Value, json};

/// Below this correlation of two halves of the data, first-order terms are mostly noise.
const LOW_AGREEMENT: f64 = 0.3;
/// Below this cosine, an edge that is trained through the emulator goes another way than in the LLM.
const LOW_COSINE: f64 = 0.5;

/// What a report is made of.
pub(super) struct Report<'a> {
    pub statistics: &'a Statistics<'a>,
    pub chosen: &'a Chosen,
    pub parts: &'a [Parts],
    pub support: &'a Support,
    pub measured: Measured,
}

impl Report<'_> {
    /// As it is written.
    pub fn json(&self) -> Result<Value> {
        let Self { statistics, chosen, parts, support, measured } = self;
        let mut layers = vec![];
        let (mut kept, mut whole) = (0.0, 0.0);
        for ((&layer, choice), shape) in statistics.layers.iter().zip(&chosen.choices).zip(&chosen.shapes) {
            let summary = summary(statistics, layer, choice, shape)?;
            kept += summary.kept as f64;
            whole += summary.whole as f64;
            layers.push(summary.json);
        }
        if whole == 0.0 {
            return Err(failed("the middle has no parameters", "use another model"));
        }
        let [of_attention, of_mlp] = chosen.lambdas;
        let agreement = agreement(parts, support.labels());
        let Measured { llm_loss, emulator_loss, cosine, relative_error } = *measured;
        Ok(json!({
            "kept": kept / whole,
            "parameters": { "middle": whole, "kept": kept },
            "lambda": { "attention": of_attention, "mlp": of_mlp },
            "support": { "examples": support.examples, "tokens": support.tokens, "held_out": support.held_out_examples },
            "llm_loss": llm_loss,
            "emulator_loss": emulator_loss,
            "edge_gradient_cosine": cosine,
            "edge_gradient_relative_error": relative_error,
            "first_order_agreement": { "attention": agreement[0], "mlp": agreement[1] },
            "layers": layers,
        }))
    }

    /// Says what makes the emulator doubtful.
    pub fn warn(&self, context: &Context, settings: &EmulatorConfig) {
        let agreement = agreement(self.parts, self.support.labels());
        warnings(&self.measured, agreement, settings).iter().for_each(|text| context.ui.notice(text));
    }
}

fn warnings(measured: &Measured, agreement: [Option<f64>; 2], settings: &EmulatorConfig) -> Vec<String> {
    let Measured { llm_loss, emulator_loss, cosine, .. } = *measured;
    let mut found = vec![];
    if emulator_loss <= llm_loss {
        found.push(format!(
            "emulate: warning: the emulator's loss on public data, {emulator_loss:.4}, is not above the LLM's, \
             {llm_loss:.4}: clients get a model that is as able; lower emulator.ratio, or raise emulator.lambda"
        ));
    }
    if cosine < LOW_COSINE || cosine.is_nan() {
        found.push(format!(
            "emulate: warning: the edge's gradient in the emulator has a cosine of {cosine:.3} to that in the LLM: \
             what is trained through it may not fit the LLM; raise emulator.ratio, or lower emulator.lambda"
        ));
    }
    let kinds = ["attention", "mlp"].into_iter().zip(agreement).zip(settings.lambdas());
    for ((kind, agreement), lambda) in kinds {
        if let Some(agreement) = agreement.filter(|found| lambda > 0.0 && *found < LOW_AGREEMENT) {
            found.push(format!(
                "emulate: warning: first-order terms of the {kind} by two halves of the public data have a \
                 correlation of {agreement:.2}: they are mostly noise; raise emulator.num_tokens, or set \
                 emulator.{kind}.lambda = 0"
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_say_what_is_doubtful() {
        let fine = Measured { llm_loss: 2.0, emulator_loss: 3.0, cosine: 0.9, relative_error: 0.4 };
        let settings = EmulatorConfig::default();
        assert!(warnings(&fine, [Some(0.8), None], &settings).is_empty());
        let said = |measured: Measured, agreement| warnings(&measured, agreement, &settings).join("\n");
        assert!(said(Measured { emulator_loss: 2.0, ..fine }, [None; 2]).contains("as able"));
        for cosine in [0.2, f64::NAN] {
            assert!(said(Measured { cosine, ..fine }, [None; 2]).contains("cosine"));
        }
        let noisy = said(fine, [Some(0.9), Some(-0.1)]);
        assert!(noisy.contains("emulator.mlp.lambda") && !noisy.contains("attention"), "{noisy}");
        let off = EmulatorConfig { lambda: 0.0, ..settings.clone() };
        assert!(warnings(&fine, [Some(0.0); 2], &off).is_empty());
    }
}
