//! What all benchmarks can be asked for.

use anyhow::Result;
use gradtx_run::config::{DeviceKind, DtypeKind};
use gradtx_run::failure::unusable;
use std::path::PathBuf;

/// Device, repetitions, output.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Where to measure.
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceKind,
    /// Type of activations and frozen weights (default: f32 on a CPU, bf16 on a GPU).
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeKind>,
    /// Samples that are not counted.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup: usize,
    /// Samples that are counted.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub runs: usize,
    /// Add the lines to this file, one JSON object each.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Rows of the large matrix product (default: 2048 on a CPU, 8192 on a GPU); the large copy
    /// is of 16 N² bytes.
    #[arg(long, value_name = "N")]
    pub large: Option<usize>,
    /// Measure cuBLASLt's algorithms for every matrix product on a GPU, and add those that are faster than its first
    /// choice to this file (for GRADTX_CUBLASLT_ALGORITHMS). Everything else that is measured then is of no use.
    #[arg(long, value_name = "FILE")]
    pub tune: Option<PathBuf>,
    /// Run one more step on a GPU, and measure the device time of each of its operations.
    #[arg(long)]
    pub profile: bool,
}

impl Common {
    /// The element type.
    pub fn dtype(&self) -> DtypeKind {
        self.dtype.unwrap_or_default()
    }

    /// Fails on numbers that nothing can be measured with.
    pub fn check(&self) -> Result<()> {
        if self.device == DeviceKind::Cpu && self.dtype() == DtypeKind::Bf16 {
            return Err(unusable("--dtype bf16: the CPU computes in f32; bf16 is for --device cuda"));
        }
        at_least_one("--runs", self.runs)?;
        at_least_one("--large", self.large.unwrap_or(1))
    }
}

/// Fails on 0.
pub(crate) fn at_least_one(option: &str, value: usize) -> Result<()> {
    if value == 0 { Err(unusable(format!("{option}: expected at least 1"))) } else { Ok(()) }
}

/// Blocks and their width, `BLOCKSxWIDTH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Blocks of an update.
    pub blocks: usize,
    /// Values of a block.
    pub width: usize,
}

impl std::str::FromStr for Blocks {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("expected BLOCKSxWIDTH such as 36x12800, found `{text}`");
        let (blocks, width) = text.split_once('x').ok_or_else(wrong)?;
        let number = |text: &str| text.parse().ok().filter(|&n| n > 0).ok_or_else(wrong);
        Ok(Self { blocks: number(blocks)?, width: number(width)? })
    }
}

impl std::fmt::Display for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.blocks, self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_as_they_are_written() {
        let blocks: Blocks = "36x12800".parse().unwrap();
        assert_eq!((blocks.blocks, blocks.width), (36, 12_800));
        assert_eq!(blocks.to_string(), "36x12800");
        for wrong in ["", "36", "0x5", "5x0", "ax5", "5x5x5"] {
            assert!(wrong.parse::<Blocks>().is_err(), "{wrong}");
        }
    }
}
