//! [`RunArgs`]: where a stage's run directory and configuration are, as typed.

use super::{DeviceKind, DtypeKind, Preset};
use std::path::{Path, PathBuf};

impl RunArgs {
    /// A run with the settings that it has.
    pub fn stored(run: &Path) -> Self {
        Self {
            run: run.to_owned(),
            config: None,
            preset: None,
            device: None,
            dtype: None,
            tuples: None,
            translator: None,
            set: vec![],
        }
    }
}

/// Where a stage's run directory and configuration are.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// Run directory; made when it is not there.
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// Run file (TOML); needed the first time, stored in the run directory as run.toml.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Settings that take the place of the run file's, before --set.
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Where to compute; the same as `--set device.kind=…`.
    #[arg(long, value_enum)]
    pub device: Option<DeviceKind>,
    /// Type of activations and frozen weights; the same as `--set device.dtype=…`.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeKind>,
    /// Use the tuples of another run, whose run directory this is, in the place of this run's own;
    /// the same as `--set reuse.tuples=…`.
    #[arg(long, value_name = "RUN")]
    pub tuples: Option<PathBuf>,
    /// Use the translator of another run, and where this run has no tuples also those; the same
    /// as `--set reuse.translator=…`.
    #[arg(long, value_name = "RUN")]
    pub translator: Option<PathBuf>,
    /// Override one setting, e.g. `--set train.learning_rate=0.002`; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Differentially private fine-tuning, as typed: settings of `[privacy]`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PrivacyArgs {
    /// Differential privacy: ε that all steps may cost; the same as `--set privacy.target_epsilon=…`.
    #[arg(long, value_name = "E", group = "dp")]
    pub dp_epsilon: Option<f64>,
    /// Differential privacy: noise as a multiple of the clipping norm, in the place of --dp-epsilon; the same as
    /// `--set privacy.noise_multiplier=…`.
    #[arg(long, value_name = "S", group = "dp")]
    pub dp_noise_multiplier: Option<f64>,
    /// δ of the guarantee; the same as `--set privacy.target_delta=…`.
    #[arg(long, value_name = "D", requires = "dp")]
    pub dp_delta: Option<f64>,
    /// Norm that every example's gradient is clipped to; the same as `--set privacy.max_grad_norm=…`.
    #[arg(long, value_name = "C", requires = "dp")]
    pub dp_max_grad_norm: Option<f64>,
}

impl PrivacyArgs {
    /// Whether any was typed.
    pub fn is_typed(&self) -> bool {
        self.dp_epsilon.is_some() || self.dp_noise_multiplier.is_some()
    }

    /// As overrides of settings, for `--set`.
    pub fn settings(&self) -> Vec<String> {
        let typed = [
            ("target_epsilon", self.dp_epsilon),
            ("noise_multiplier", self.dp_noise_multiplier),
            ("target_delta", self.dp_delta),
            ("max_grad_norm", self.dp_max_grad_norm),
        ];
        let set = typed.into_iter().filter_map(|(name, value)| Some(format!("privacy.{name}={:?}", value?)));
        set.collect()
    }
}
