//! [`Components`]: what the coordinates mean that a Grad-Transformer predicts in the place of updates.
//!
//! `components.safetensors` in a translator's directory holds one tensor `components` `[L_T, C, K]`: component j
//! of block l is the sum of the shadow pairs' products B·A in that block with the weights `[l, j]`.
//! The metadata say which tuples these shadow pairs are of.

use gradtx_runtime::artifact::{TensorFile, little_endian, write_tensors};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

/// The file in a translator's directory.
const FILE: &str = "components.safetensors";
/// Its tensor.
const TENSOR: &str = "components";

/// Components of the products of every block of the LLM, as weights of shadow pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Components {
    /// Blocks, and components of each: `[L_T, C]`.
    shape: [usize; 2],
    /// Shadow pairs, K.
    pairs: usize,
    /// `[L_T, C, K]`
    values: Vec<f32>,
    /// Penalty of the regression whose weights coordinates are counted from; none where they are
    /// counted from the mean.
    penalty: Option<f64>,
}

impl Components {
    /// Name of the file in a translator's directory.
    pub const FILE: &str = FILE;

    /// From weights `[L_T, C, K]`.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn new(shape: [usize; 2], pairs: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), shape[0] * shape[1] * pairs, "{shape:?} components of {pairs} pairs");
        Self { shape, pairs, values, penalty: None }
    }

    /// The same, with coordinates counted from what a regression with this penalty gives.
    pub fn with_penalty(self, penalty: Option<f64>) -> Self {
        Self { penalty, ..self }
    }

    /// `[L_T, C]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Penalty of the regression whose weights coordinates are counted from.
    pub fn penalty(&self) -> Option<f64> {
        self.penalty
    }

    /// Weights of shadow pairs in every block, `[L_T][K]`: `base` `[K]`, which coordinates are counted
    /// from, and the components with these coordinates `[L_T, C]`.
    pub fn weights(&self, base: &[f64], coordinates: &[f32]) -> Result<Vec<Vec<f64>>> {
        let [blocks, count] = self.shape;
        if coordinates.len() != blocks * count || base.len() != self.pairs {
            let why = format!(
                "expected {blocks} x {count} coordinates and {} shadow pairs, found {} and {}",
                self.pairs,
                coordinates.len(),
                base.len()
            );
            return Err(Error::invalid("components of products", why));
        }
        let of_block = |(coordinates, components): (&[f32], &[f32])| {
            let mut weights = base.to_vec();
            for (&c, component) in coordinates.iter().zip(components.chunks(self.pairs)) {
                weights.iter_mut().zip(component).for_each(|(w, &u)| *w += f64::from(c) * f64::from(u));
            }
            weights
        };
        let components = self.values.chunks(count * self.pairs);
        Ok(coordinates.chunks(count).zip(components).map(of_block).collect())
    }

    /// Writes the file into a translator's directory; `tuples` is the checksum of the tuple store.
    pub fn save(&self, dir: &Path, tuples: &str) -> Result<()> {
        let bytes = little_endian(&self.values);
        let shape = vec![self.shape[0], self.shape[1], self.pairs];
        let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        metadata.insert("tuples".into(), tuples.into());
        if let Some(penalty) = self.penalty {
            metadata.insert("penalty".into(), penalty.to_string());
        }
        write_tensors(&dir.join(FILE), &[(TENSOR.into(), Dtype::F32, shape, &bytes[..])], &metadata)
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// When the file is of other tuples or another shape, or holds what is no number.
    pub fn load(dir: &Path, tuples: &str, shape: [usize; 2], pairs: usize) -> Result<Self> {
        let path = dir.join(FILE);
        let file = TensorFile::open(&path)?;
        let found = file.metadata("tuples").unwrap_or("none");
        if found != tuples {
            let why = format!("its components are of the tuples {found}, expected {tuples}");
            return Err(Error::file(&path, why));
        }
        let tensor = file.tensor(TENSOR)?;
        tensor.expect_shape(&[shape[0], shape[1], pairs])?;
        let values = tensor.to_f32()?;
        let mut penalty = None;
        if let Some(text) = file.metadata("penalty") {
            let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
            let why = || format!("penalty: expected a positive number, found {text}");
            penalty = Some(number.ok_or_else(|| Error::file(&path, why()))?);
        }
        Ok(Self { shape, pairs, values, penalty })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn components() -> Components {
        Components::new([2, 2], 3, (0..12).map(|i| i as f32 - 5.5).collect())
    }

    #[test]
    fn weights_are_the_base_and_components() {
        let found = components().weights(&[1.0, 2.0, 3.0], &[0.5, 2.0, -1.0, 0.0]).unwrap();
        let [first, second] = [0, 1].map(|i| [[-5.5, -4.5, -3.5], [-2.5, -1.5, -0.5]][i]);
        let want = (0..3).map(|k| k as f64 + 1.0 + 0.5 * first[k] + 2.0 * second[k]).collect::<Vec<_>>();
        assert_eq!(found, [want, vec![0.5, 0.5, 0.5]]);
        assert!(components().weights(&[1.0, 2.0, 3.0], &[0.5]).is_err());
        assert!(components().weights(&[1.0], &[0.0; 4]).is_err());
    }

    #[test]
    fn files_are_of_their_tuples_and_shapes() {
        let dir = tempfile::tempdir().unwrap();
        for penalty in [None, Some(0.003)] {
            let saved = components().with_penalty(penalty);
            saved.save(dir.path(), "aa").unwrap();
            assert_eq!(Components::load(dir.path(), "aa", [2, 2], 3).unwrap(), saved);
        }
        let error = |tuples, shape, pairs| {
            Components::load(dir.path(), tuples, shape, pairs).unwrap_err().to_string()
        };
        assert!(error("bb", [2, 2], 3).contains("of the tuples aa, expected bb"));
        assert!(error("aa", [2, 3], 2).contains("components"));
        components().with_penalty(Some(-1.0)).save(dir.path(), "aa").unwrap();
        assert!(error("aa", [2, 2], 3).contains("positive number, found -1"));
    }
}
