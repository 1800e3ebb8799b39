//! Two adapters as one: what both do is added up by the adapter that holds the factors of both,
//! `[B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2`.

use super::{BlockLayout, Factor, LoraConfig};
use crate::decoder::DecoderConfig;
use gradtx_runtime::{Error, Result};

/// An adapter made of a first one and of another beside it.
#[derive(Clone, Debug)]
pub struct Stacked {
    layout: BlockLayout,
    parts: [BlockLayout; 2],
}

impl Stacked {
    /// Of adapters of these layouts on one model. Its dropout is 0.
    ///
    /// # Errors
    /// When they are of other matrices, or their α/r differ.
    pub fn new(model: &DecoderConfig, parts: [&BlockLayout; 2]) -> Result<Self> {
        let [first, second] = parts.map(BlockLayout::lora);
        let same_scale = (first.scale() - second.scale()).abs() <= 1e-9 * first.scale();
        if first.targets != second.targets || !same_scale || parts[0].layers() != parts[1].layers() {
            let why =
                format!("α/r is {} and {}, or they are of other matrices", first.scale(), second.scale());
            return Err(Error::invalid("adapters that are to be one", why));
        }
        let rank = first.rank + second.rank;
        let alpha = first.scale() * rank as f64;
        let layout = BlockLayout::new(model, &LoraConfig { rank, alpha, dropout: 0.0, ..first.clone() })?;
        Ok(Self { layout, parts: parts.map(Clone::clone) })
    }

    /// Where the values of the whole lie.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// The whole `[L, d]` of the two parts' values.
    pub fn join(&self, values: [&[f32]; 2]) -> Vec<f32> {
        self.gather(|part, at| values[part][at])
    }

    /// Which values of the whole are the first part's.
    pub fn is_first(&self) -> Vec<bool> {
        self.gather(|part, _| part == 0)
    }

    /// Every value of the whole, from its part (0 or 1) and its place there.
    fn gather<T>(&self, value: impl Fn(usize, usize) -> T) -> Vec<T> {
        let mut out = Vec::with_capacity(self.layout.total());
        let first_rank = self.parts[0].lora().rank;
        for block in 0..self.layout.blocks() {
            for (i, slice) in self.layout.slices().iter().enumerate() {
                let starts =
                    [0, 1].map(|part| self.parts[part].range(block, &self.parts[part].slices()[i]).start);
                let [rows, columns] = slice.shape;
                for row in 0..rows {
                    for column in 0..columns {
                        // Of A a row belongs to a part, of B a column.
                        let along = if slice.factor == Factor::A { row } else { column };
                        let part = usize::from(along >= first_rank);
                        let rank = self.parts[part].lora().rank;
                        let along = along - part * first_rank;
                        let place = match slice.factor {
                            Factor::A => along * columns + column,
                            Factor::B => row * rank + along,
                        };
                        out.push(value(part, starts[part] + place));
                    }
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Module;
    use std::path::Path;

    #[test]
    fn the_whole_does_what_both_parts_do() {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let layout = |rank: usize, alpha: f64| {
            let targets = vec![Module::Q, Module::V, Module::Down];
            BlockLayout::new(&model, &LoraConfig { rank, alpha, targets, dropout: 0.1, layers: vec![] })
                .unwrap()
        };
        let (a, b) = (layout(3, 12.0), layout(2, 8.0));
        let values = |layout: &BlockLayout, seed: f32| -> Vec<f32> {
            (0..layout.total()).map(|i| (seed * i as f32).sin()).collect()
        };
        let (x, y) = (values(&a, 0.7), values(&b, 1.3));
        let stacked = Stacked::new(&model, [&a, &b]).unwrap();
        let whole = stacked.join([&x, &y]);
        assert_eq!((stacked.layout().lora().rank, whole.len()), (5, stacked.layout().total()));
        let product = |layout: &BlockLayout, values: &[f32], pair: usize, row: usize, column: usize| -> f32 {
            let [a, b] = [0, 1].map(|i| &layout.slices()[2 * pair + i]);
            let (a_values, b_values) = (&values[layout.range(1, a)], &values[layout.range(1, b)]);
            let [rank, inputs] = a.shape;
            (0..rank).map(|k| b_values[row * rank + k] * a_values[k * inputs + column]).sum()
        };
        for pair in 0..3 {
            for (row, column) in [(0, 0), (3, 11), (7, 15)] {
                let want = product(&a, &x, pair, row, column) + product(&b, &y, pair, row, column);
                assert!((product(stacked.layout(), &whole, pair, row, column) - want).abs() < 1e-5);
            }
        }
        let first = stacked.is_first();
        assert_eq!(first.iter().filter(|is| **is).count(), a.total());
        assert!(
            first
                .iter()
                .zip(&stacked.join([&vec![1.0; a.total()], &vec![0.0; b.total()]]))
                .all(|(is, x)| *is == (*x == 1.0))
        );
        assert!(Stacked::new(&model, [&a, &layout(2, 9.0)]).is_err());
    }
}
