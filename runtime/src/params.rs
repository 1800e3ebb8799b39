//! [`ParamLayout`]: names, shapes and places of parameters in one flat buffer.
//!
//! All parameters of a model lie in one buffer, in an order that the model chooses,
//! so that optimizers, norms, all-reduce and checkpoints are one pass over
//! contiguous memory. Tensors of one *group* follow each other without a gap: the
//! weights of q, k and v then are one fused matrix as well as three named ones.

use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;

/// Groups start at multiples of this many elements (256 bytes of f32), for vector loads.
const GROUP_ALIGN: usize = 64;

/// One named tensor in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in the model's safetensors files.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its first element.
    pub offset: usize,
}

impl Param {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a tensor without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Where every parameter of a model lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParamLayout {
    params: Vec<Param>,
    by_name: HashMap<String, usize>,
    total: usize,
}

impl ParamLayout {
    /// A layout without parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a group of tensors, contiguous in this order; returns the group's range.
    ///
    /// # Panics
    /// When a name is there already: a model defines its names once.
    pub fn push<S: Into<String>>(
        &mut self,
        group: impl IntoIterator<Item = (S, Vec<usize>)>,
    ) -> Range<usize> {
        let start = self.total.next_multiple_of(GROUP_ALIGN);
        self.total = start;
        for (name, shape) in group {
            let param = Param { name: name.into(), shape, offset: self.total };
            self.total += param.len();
            let before = self.by_name.insert(param.name.clone(), self.params.len());
            assert!(before.is_none(), "parameter `{}` is defined twice", param.name);
            self.params.push(param);
        }
        start..self.total
    }

    /// All parameters in buffer order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// A parameter by its name.
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.by_name.get(name).map(|&i| &self.params[i])
    }

    /// A parameter's elements.
    pub fn range(&self, name: &str) -> Result<Range<usize>> {
        let found = self.get(name).map(Param::range);
        found.ok_or_else(|| Error::invalid(format!("parameter `{name}`"), "this model has none of that name"))
    }

    /// Elements of the flat buffer, gaps between groups included.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Parameters in all, without gaps.
    pub fn count(&self) -> usize {
        self.params.iter().map(Param::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_contiguous_and_aligned() {
        let mut layout = ParamLayout::new();
        let first = layout.push([("a", vec![3, 5])]);
        let qkv = layout.push([("q", vec![4, 3]), ("k", vec![2, 3])]);
        assert_eq!(first, 0..15);
        assert_eq!(qkv, 64..82);
        assert_eq!(layout.range("k").unwrap(), 76..82);
        assert_eq!((layout.total(), layout.count()), (82, 33));
        assert!(layout.range("v").is_err());
    }

    #[test]
    #[should_panic(expected = "defined twice")]
    fn a_name_is_defined_once() {
        ParamLayout::new().push([("a", vec![1]), ("a", vec![1])]);
    }
}
