//! The [`Projection`] that a [`Module`] is computed in, and what a block and its family make of it.

use crate::decoder::{BlockConfig, Family, Module, Ranks};
use std::ops::Range;

/// The product that a module is computed in: q, k and v are one, and so are gate and up. In an MLP without a gate
/// `GateUp` is up alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Projection {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Projection {
    /// All of them, in the order of a forward pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// The modules that are computed in it in such a block, in order.
    pub fn modules(self, block: &BlockConfig) -> impl Iterator<Item = Module> {
        Module::ALL.into_iter().filter(move |module| module.fused() == self && block.has(*module))
    }

    /// Columns of the input and of the output, in such a block.
    pub fn dims(self, block: &BlockConfig) -> (usize, usize) {
        let &BlockConfig { hidden, attention, mlp, .. } = block;
        match self {
            Self::Qkv => (hidden, attention.qkv_dim()),
            Self::O => (attention.q_dim(), hidden),
            Self::GateUp => (hidden, mlp.first_dim()),
            Self::Down => (mlp.intermediate, hidden),
        }
    }
}

impl Module {
    /// Its rank where it is a product of two thin matrices; 0 for a whole matrix.
    pub fn rank(self, ranks: &Ranks) -> usize {
        match self {
            Self::Q => ranks.q,
            Self::K => ranks.k,
            Self::V => ranks.v,
            Self::O => ranks.o,
            Self::Gate | Self::Up | Self::Down => 0,
        }
    }

    /// The module of a name, in whatever family it is called so.
    pub fn from_name(name: &str) -> Option<Self> {
        let is_called = |module: &Self| Family::ALL.into_iter().any(|f| f.module_name(*module) == name);
        Self::ALL.into_iter().find(is_called).filter(|_| !name.is_empty())
    }

    /// All names that modules have in some family.
    pub fn known_names() -> Vec<&'static str> {
        let of_module = |module: Self| Family::ALL.into_iter().map(move |family| family.module_name(module));
        let mut names: Vec<&'static str> = vec![];
        for name in Self::ALL.into_iter().flat_map(of_module).filter(|name| !name.is_empty()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// The module of a path below a layer, such as `self_attn.q_proj` or `fc1`, in whatever family it is there.
    pub fn from_path(path: &str) -> Option<Self> {
        let is_there = |module: &Self| Family::ALL.into_iter().any(|f| f.module_path(*module) == path);
        Self::ALL.into_iter().find(is_there).filter(|_| !path.is_empty())
    }

    /// The product that it is part of.
    pub fn fused(self) -> Projection {
        match self {
            Self::Q | Self::K | Self::V => Projection::Qkv,
            Self::O => Projection::O,
            Self::Gate | Self::Up => Projection::GateUp,
            Self::Down => Projection::Down,
        }
    }

    /// Its columns in the output of the fused product, in such a block.
    pub fn outputs(self, block: &BlockConfig) -> Range<usize> {
        let (q, kv, ff) = (block.attention.q_dim(), block.attention.kv_dim(), block.mlp.intermediate);
        match self {
            Self::Q => 0..q,
            Self::K => q..q + kv,
            Self::V => q + kv..q + 2 * kv,
            Self::O | Self::Down => 0..block.hidden,
            Self::Gate => 0..ff,
            Self::Up => block.mlp.first_dim() - ff..block.mlp.first_dim(),
        }
    }
}
