//! What part of a device's best our work reaches.
//!
//! In: hardware, and measurements where there are any. Out: [`Rates`], which turn a [`Cost`]
//! into seconds, and say of each rate whether it was measured or is assumed. A piece of work
//! takes as long as its operations or its bytes, whichever take longer.

use super::calibrate::Calibration;
use super::device::{Cluster, Gpu, Hardware, Link};
use super::work::Cost;
use serde::Serialize;

/// Kinds of work with a rate of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Fine-tuning of adapters on a frozen base, and reading of prompts: operations.
    Lora,
    /// Forward and backward of the translator: operations.
    Translator,
    /// Passes over memory, such as an optimizer step: bytes.
    Memory,
    /// Decoding token by token: bytes.
    Generate,
    /// Plain matrix products: operations. What a CPU's peak is taken from.
    Gemm,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Lora, Self::Translator, Self::Memory, Self::Generate, Self::Gemm];

    /// The name in benchmark results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Translator => "translator",
            Self::Memory => "memory",
            Self::Generate => "generate",
            Self::Gemm => "gemm",
        }
    }

    /// Whether its rate is in operations, and not in bytes.
    pub fn computes(self) -> bool {
        matches!(self, Self::Lora | Self::Translator | Self::Gemm)
    }

    /// The share that is assumed where nothing was measured.
    fn assumed(self, gpu: Gpu) -> f64 {
        let hopper = matches!(gpu, Gpu::H100 | Gpu::H200);
        match (self, gpu) {
            (Self::Lora, Gpu::Cpu) => 0.9,
            (Self::Lora, _) => {
                if hopper {
                    0.40
                } else {
                    0.45
                }
            }
            (Self::Translator, Gpu::Cpu) => 0.8,
            (Self::Translator, _) => {
                if hopper {
                    0.25
                } else {
                    0.30
                }
            }
            (Self::Memory, _) => 0.75,
            (Self::Generate, _) => 0.6,
            (Self::Gemm, _) => 1.0,
        }
    }
}

/// Where a number is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// A benchmark's result.
    Measured,
    /// A guess from published figures.
    Assumed,
}

impl Basis {
    /// The word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Assumed => "assumed",
        }
    }
}

/// One kind's share of the device's best.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Which kind.
    pub kind: Kind,
    /// Part of the peak, or of the memory's bandwidth.
    pub share: f64,
    /// Operations or bytes per second of one rank.
    pub per_second: f64,
    /// Where it is from.
    pub basis: Basis,
    /// The file, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

/// The rates of a rank's device.
#[derive(Clone, Debug)]
pub struct Rates {
    /// What the device could reach.
    pub hardware: Hardware,
    /// One of each kind, in the order of [`Kind::ALL`].
    pub all: Vec<Rate>,
}

impl Rates {
    /// Rates of a cluster's ranks, measured where the calibration knows them.
    pub fn new(cluster: &Cluster, calibration: &Calibration) -> Self {
        let mut hardware = Hardware::of(cluster);
        let found = |kind| calibration.per_second(cluster, kind);
        // A GPU's peak is its data sheet's, so that shares can be compared with published ones.
        if let (Gpu::Cpu, Some((peak, _))) = (cluster.gpu, found(Kind::Gemm)) {
            hardware.peak = peak;
        }
        let rate = |kind: Kind| {
            let best = if kind.computes() { hardware.peak } else { hardware.bandwidth };
            match found(kind) {
                Some((per_second, from)) => {
                    let share = per_second / best;
                    Rate { kind, share, per_second, basis: Basis::Measured, from: Some(from) }
                }
                None => {
                    let share = kind.assumed(cluster.gpu);
                    Rate { kind, share, per_second: share * best, basis: Basis::Assumed, from: None }
                }
            }
        };
        Self { all: Kind::ALL.map(rate).into(), hardware }
    }

    /// The rate of a kind.
    pub fn of(&self, kind: Kind) -> &Rate {
        &self.all[kind as usize]
    }

    /// Seconds that work of a kind takes.
    pub fn seconds(&self, kind: Kind, cost: Cost) -> f64 {
        let (operations, bytes) = match kind.computes() {
            true => (self.of(kind), self.of(Kind::Memory)),
            // What is bound by memory still multiplies, as fast as fine-tuning does.
            false => (self.of(Kind::Lora), self.of(kind)),
        };
        (cost.flops / operations.per_second).max(cost.bytes / bytes.per_second)
    }

    /// Seconds to load a base model of so many bytes.
    pub fn load(&self, bytes: f64) -> f64 {
        bytes / self.hardware.load
    }

    /// The link that collectives over the whole cluster are bound by.
    pub fn link(&self, cluster: &Cluster) -> Link {
        self.hardware.link(cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(gpu: Gpu) -> Cluster {
        Cluster { nodes: 1, gpus_per_node: 1, gpu, threads: 4 }
    }

    #[test]
    fn work_takes_the_longer_of_flops_and_bytes() {
        let rates = Rates::new(&cluster(Gpu::A100x80), &Calibration::default());
        assert!(Kind::ALL.iter().all(|&kind| rates.of(kind).kind == kind));
        let close = |found: f64, wanted: f64| assert!((found - wanted).abs() <= 1e-9 * wanted, "{found}");
        close(rates.seconds(Kind::Lora, Cost { flops: 312e12, bytes: 1.0 }), 1.0 / 0.45);
        close(rates.seconds(Kind::Lora, Cost { flops: 1.0, bytes: 2.039e12 }), 1.0 / 0.75);
        close(rates.seconds(Kind::Generate, Cost { flops: 1.0, bytes: 2.039e12 }), 1.0 / 0.6);
    }

    #[test]
    fn measured_rates_replace_assumed_ones() {
        let lines = [
            r#"{"work": "lora", "device": "NVIDIA H100 80GB HBM3", "tflops": 500}"#,
            r#"{"work": "gemm", "device": "cpu", "threads": 2, "tflops": 0.2}"#,
            r#"{"work": "lora", "device": "cpu", "threads": 2, "tflops": 0.15}"#,
        ];
        let mut calibration = Calibration::default();
        calibration.read_text(&lines.join("\n"), "bench.jsonl").unwrap();
        let rates = Rates::new(&cluster(Gpu::H100), &calibration);
        let lora = rates.of(Kind::Lora);
        assert_eq!((lora.per_second, lora.basis), (500e12, Basis::Measured));
        assert_eq!(lora.from.as_deref(), Some("bench.jsonl"));
        assert_eq!(rates.of(Kind::Translator).basis, Basis::Assumed);
        assert_eq!(Rates::new(&cluster(Gpu::H200), &calibration).of(Kind::Lora).basis, Basis::Assumed);
        // Four threads do twice what two did.
        let rates = Rates::new(&cluster(Gpu::Cpu), &calibration);
        assert!((rates.hardware.peak - 0.4e12).abs() < 1.0);
        assert!((rates.of(Kind::Lora).share - 0.75).abs() < 1e-12);
        assert!((rates.of(Kind::Translator).per_second - 0.8 * 0.4e12).abs() < 1e3);
    }
}
