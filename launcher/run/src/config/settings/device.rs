//! `[device]`: where to compute, and in what.

use super::bounds::{Findings, MAX_TOKENS};
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where to compute, and in what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceConfig {
    /// The device that stages compute on.
    pub kind: DeviceKind,
    /// Type of activations and frozen weights.
    pub dtype: DtypeKind,
    /// Tokens of one micro-batch of packed examples; an optimizer step of more is computed in several,
    /// with the same result. Smaller takes less memory, larger uses a GPU better.
    pub max_tokens_per_microbatch: usize,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self { kind: DeviceKind::Auto, dtype: DtypeKind::Auto, max_tokens_per_microbatch: 8192 }
    }
}

impl DeviceConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        findings.expect(
            self.kind != DeviceKind::Cpu || self.dtype != DtypeKind::Bf16,
            "device.dtype: the CPU computes in f32; bf16 is for device.kind = \"cuda\"",
        );
        findings.whole("device.max_tokens_per_microbatch", self.max_tokens_per_microbatch, 1..=MAX_TOKENS);
    }
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A GPU where this rank can use one, else the processor; the stage says what it takes, and
    /// continues with it later.
    #[default]
    Auto,
    /// The host's processor.
    Cpu,
    /// NVIDIA GPUs, one per rank.
    Cuda,
}

impl DeviceKind {
    /// The name in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Types of activations and frozen weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DtypeKind {
    /// bfloat16 on GPUs, 32-bit floating point on the processor.
    #[default]
    Auto,
    /// 32-bit floating point.
    F32,
    /// bfloat16, on GPUs. Sums, losses, gradients and moments are 32 bits wide; values that are trained
    /// have masters of 32 bits.
    Bf16,
}

impl DtypeKind {
    /// The name in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}
