//! What devices and the links between them could reach at best.
//!
//! GPUs: dense bf16 rate and memory bandwidth from their data sheets, bus bandwidth of
//! collectives as published measurements have it. CPUs: per thread, a cautious guess that a
//! benchmark replaces.

use clap::ValueEnum;
use serde::Serialize;

/// Kinds of devices that can be planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub enum Gpu {
    /// NVIDIA A100 with 40 GB.
    #[value(name = "a100-40g")]
    #[serde(rename = "a100-40g")]
    A100x40,
    /// NVIDIA A100 with 80 GB.
    #[value(name = "a100-80g")]
    #[serde(rename = "a100-80g")]
    A100x80,
    /// NVIDIA H100 SXM.
    #[value(name = "h100")]
    #[serde(rename = "h100")]
    H100,
    /// NVIDIA H200 SXM.
    #[value(name = "h200")]
    #[serde(rename = "h200")]
    H200,
    /// The host's processor, shared by the ranks of a node.
    #[value(name = "cpu")]
    #[serde(rename = "cpu")]
    Cpu,
}

impl Gpu {
    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::A100x40 => "a100-40g",
            Self::A100x80 => "a100-80g",
            Self::H100 => "h100",
            Self::H200 => "h200",
            Self::Cpu => "cpu",
        }
    }

    /// The kind that a driver's or a person's name of a device means.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let has = |part: &str| name.contains(part);
        match () {
            () if has("h200") => Some(Self::H200),
            () if has("h100") => Some(Self::H100),
            () if has("a100") && has("40g") => Some(Self::A100x40),
            () if has("a100") => Some(Self::A100x80),
            () if name == "cpu" => Some(Self::Cpu),
            () => None,
        }
    }

    /// Bytes of an activation or a frozen value: bf16 on GPUs, f32 on the CPU.
    pub fn element(self) -> u64 {
        if self == Self::Cpu { 4 } else { 2 }
    }
}

/// Machines to plan for: one rank for every GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cluster {
    /// Nodes.
    pub nodes: usize,
    /// Devices of a node; for the CPU, ranks of a node.
    pub gpus_per_node: usize,
    /// What they are.
    pub gpu: Gpu,
    /// Threads of a rank, where the device is the CPU.
    pub threads: usize,
}

impl Cluster {
    /// Ranks in all.
    pub fn ranks(&self) -> usize {
        self.nodes * self.gpus_per_node
    }
}

/// How fast a collective is: `latency + bytes / bandwidth`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bus bandwidth, bytes per second.
    pub bandwidth: f64,
    /// Seconds before the first byte.
    pub latency: f64,
}

/// What a rank's device could reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// Operations per second of dense matrix products, in bf16 (GPU) or f32 (CPU).
    pub peak: f64,
    /// Bytes per second of memory.
    pub bandwidth: f64,
    /// Bytes of memory that plans may take, of a GPU; a CPU's memory is asked for elsewhere.
    pub memory: u64,
    /// Between devices of one node.
    pub within: Link,
    /// Between nodes.
    pub across: Link,
    /// Bytes per second of a base model on its way from files into the device.
    pub load: f64,
}

const GIB: u64 = 1 << 30;
/// What the driver's context, libraries' workspaces and communication buffers take.
const RESERVED: u64 = GIB;
/// Operations per second of one thread, where nothing was measured.
const CPU_THREAD: f64 = 50e9;
/// Bytes per second of one thread.
const CPU_THREAD_BYTES: f64 = 8e9;

impl Hardware {
    /// The hardware of a rank.
    pub fn of(cluster: &Cluster) -> Self {
        // 92 GB/s for 16 GiB and 17 GB/s for 1 MiB were measured: 50 µs, and the rest is bandwidth.
        let across = Link { bandwidth: 92e9, latency: 50e-6 };
        let gpu = |peak, bandwidth, memory_mib: u64, bus| Self {
            peak,
            bandwidth,
            memory: (memory_mib << 20) - RESERVED,
            within: Link { bandwidth: bus, latency: 15e-6 },
            across,
            load: 2e9,
        };
        match cluster.gpu {
            Gpu::A100x40 => gpu(312e12, 1.555e12, 40_536, 235e9),
            Gpu::A100x80 => gpu(312e12, 2.039e12, 81_251, 235e9),
            Gpu::H100 => gpu(989e12, 3.35e12, 81_559, 482e9),
            Gpu::H200 => gpu(989e12, 4.8e12, 143_771, 482e9),
            Gpu::Cpu => {
                let threads = cluster.threads.max(1) as f64;
                Self {
                    peak: CPU_THREAD * threads,
                    bandwidth: CPU_THREAD_BYTES * threads,
                    memory: 0,
                    within: Link { bandwidth: 4e9, latency: 20e-6 },
                    across: Link { bandwidth: 1.2e9, latency: 50e-6 },
                    load: 1e9,
                }
            }
        }
    }

    /// The link that a collective over all ranks is bound by.
    pub fn link(&self, cluster: &Cluster) -> Link {
        if cluster.nodes > 1 { self.across } else { self.within }
    }
}

impl Link {
    /// Seconds of a reduce-scatter or an all-gather of `bytes` over `ranks`, in `pieces` calls.
    /// An all-reduce is one of each.
    pub(crate) fn half_reduce(&self, bytes: f64, ranks: usize, pieces: f64) -> f64 {
        if ranks < 2 {
            return 0.0;
        }
        let share = (ranks - 1) as f64 / ranks as f64;
        pieces * self.latency + share * bytes / self.bandwidth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(gpu: Gpu, nodes: usize) -> Cluster {
        Cluster { nodes, gpus_per_node: 8, gpu, threads: 3 }
    }

    #[test]
    fn every_name_leads_back_and_drivers_names_are_known() {
        for gpu in Gpu::value_variants() {
            assert_eq!(Gpu::from_name(gpu.name()), Some(*gpu));
        }
        assert_eq!(Gpu::from_name("NVIDIA A100-SXM4-40GB"), Some(Gpu::A100x40));
        assert_eq!(Gpu::from_name("NVIDIA A100-SXM4-80GB"), Some(Gpu::A100x80));
        assert_eq!(Gpu::from_name("NVIDIA H100 80GB HBM3"), Some(Gpu::H100));
        assert_eq!(Gpu::from_name("Radeon"), None);
    }

    #[test]
    fn the_network_between_nodes_is_what_was_measured() {
        let link = Hardware::of(&cluster(Gpu::A100x80, 2)).across;
        let seen = |bytes: f64| bytes / (link.latency + bytes / link.bandwidth) / 1e9;
        assert!((seen(1048576.0) - 17.0).abs() < 0.5, "{}", seen(1048576.0));
        assert!((seen((16u64 << 30) as f64) - 92.0).abs() < 0.5);
    }

    #[test]
    fn one_rank_sends_nothing_and_nodes_are_slower() {
        let one = cluster(Gpu::H100, 1);
        let two = cluster(Gpu::H100, 2);
        let hardware = Hardware::of(&one);
        assert_eq!(hardware.link(&one).half_reduce(1e9, 1, 5.0), 0.0);
        let inside = hardware.link(&one).half_reduce(1e9, 8, 1.0);
        assert!(hardware.link(&two).half_reduce(1e9, 16, 1.0) > inside && inside > 0.0);
        assert_eq!(Hardware::of(&cluster(Gpu::Cpu, 1)).peak, 150e9);
    }
}
