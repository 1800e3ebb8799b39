//! `[translator]`: the shape of the Grad-Transformer.

use super::bounds::Findings;
use gradtx_models::grad_transformer::{NormalizationMode, StartToken};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Shape of the Grad-Transformer, with T5's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TranslatorConfig {
    /// Directory of a T5 v1.1 checkpoint to start from, such as Flan-T5-Large; its shape replaces the
    /// one given here. Empty: random weights of this shape.
    pub pretrained_path: PathBuf,
    /// Width of the hidden states.
    pub d_model: usize,
    /// Width of the feed-forward layers.
    pub d_ff: usize,
    /// Width of an attention head.
    pub d_kv: usize,
    /// Heads of an attention layer.
    pub num_heads: usize,
    /// Layers of the encoder.
    pub num_layers: usize,
    /// Layers of the decoder.
    pub num_decoder_layers: usize,
    /// Dropout probability in training.
    pub dropout_rate: f64,
    /// What the decoder starts from. `released` is for comparison with the published code.
    pub decoder_start: StartToken,
    /// Units of the updates inside the translator; measured in docs/results.md.
    pub update_normalization: NormalizationMode,
}

impl Default for TranslatorConfig {
    fn default() -> Self {
        Self {
            pretrained_path: PathBuf::new(),
            d_model: 1024,
            d_ff: 2816,
            d_kv: 64,
            num_heads: 16,
            num_layers: 24,
            num_decoder_layers: 24,
            dropout_rate: 0.1,
            decoder_start: StartToken::Embedded,
            update_normalization: NormalizationMode::ScalarCentred,
        }
    }
}

impl TranslatorConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        for (name, value, most) in [
            ("d_model", self.d_model, 65_536),
            ("d_ff", self.d_ff, 1 << 20),
            ("d_kv", self.d_kv, 4096),
            ("num_heads", self.num_heads, 4096),
            ("num_layers", self.num_layers, 1000),
            ("num_decoder_layers", self.num_decoder_layers, 1000),
        ] {
            findings.whole(format_args!("translator.{name}"), value, 1..=most);
        }
        findings.part("translator.dropout_rate", self.dropout_rate);
    }
}
