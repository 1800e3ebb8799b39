//! [`LayerParams`]: which parameters are trained where the full weights of some layers are.
//!
//! All of a layer's are: matrices, biases and norms. They lie one layer after the other in a flat buffer of their own,
//! for gradients, masters and moments; in the decoder's buffer they lie between those of other layers.

use super::names::layer_of;
use gradtx_runtime::params::{Param, ParamLayout};
use std::ops::Range;

/// Elements that a layer's part is aligned to, as groups of parameters are.
const ALIGN: usize = 64;

/// Where the parameters of some layers lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerParams {
    layers: Vec<usize>,
    /// In the own buffer.
    params: Vec<Param>,
    /// Of each layer: its part of the decoder's buffer, and where that begins in the own one.
    parts: Vec<(Range<usize>, usize)>,
    total: usize,
}

impl LayerParams {
    /// Those of these layers, which are some of the model with this layout, in increasing order.
    pub(super) fn of_layout(layout: &ParamLayout, layers: &[usize]) -> Self {
        let mut own = Self { layers: layers.to_vec(), params: vec![], parts: vec![], total: 0 };
        for layer in layers {
            let of_layer = || layout.params().iter().filter(|param| layer_of(&param.name) == Some(*layer));
            let (first, last) = (of_layer().next(), of_layer().next_back());
            let Some((first, last)) = first.zip(last) else { continue };
            let (in_decoder, start) = (first.offset..last.range().end, own.total.next_multiple_of(ALIGN));
            own.params.extend(
                of_layer().map(|p| Param { offset: start + p.offset - in_decoder.start, ..p.clone() }),
            );
            own.total = start + in_decoder.len();
            own.parts.push((in_decoder, start));
        }
        own
    }

    /// The layers, in increasing order.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Names and shapes, with places in the own buffer.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Elements of the own buffer, gaps included.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Of each layer: its part of the decoder's buffer, and of the own one.
    pub(super) fn parts(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        self.parts.iter().map(|(part, start)| (part.clone(), *start..*start + part.len()))
    }

    /// Where the parameters of this range of the decoder's buffer lie in the own one, if they are trained.
    pub(super) fn place(&self, range: &Range<usize>) -> Option<Range<usize>> {
        let within = |part: &Range<usize>| part.start <= range.start && range.end <= part.end;
        let (part, start) = self.parts.iter().find(|(part, _)| within(part))?;
        let offset = start + range.start - part.start;
        Some(offset..offset + range.len())
    }
}
