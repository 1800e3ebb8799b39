//! [`Baseline`]: a translator that a Grad-Transformer is compared with.

use anyhow::{Result, ensure};

/// A translator that a Grad-Transformer is compared with.
pub trait Baseline: Sync {
    /// What it is called, and what a comparison with it means.
    fn about(&self) -> &'static About;

    /// The last so many snapshots of each shadow pair are used; all of them by default.
    fn snapshots(&self) -> Option<usize> {
        None
    }

    /// The teacher update for a client's student update.
    fn translate(&self, pairs: &dyn Pairs, client: &[f32]) -> Result<Vec<f32>>;
}

/// What a baseline is called, and what a comparison with it means.
#[derive(Debug)]
pub struct About {
    /// Name on the command line and in files.
    pub name: &'static str,
    /// What `--help` says of it.
    pub help: &'static str,
    /// Its name in tables.
    pub label: &'static str,
    /// What it is to the Grad-Transformer.
    pub kind: Kind,
    /// Its name in a sentence.
    pub called: &'static str,
    /// The beginning of a sentence about its score.
    pub what: &'static str,
    /// A sentence about what follows when it is as good as the Grad-Transformer.
    pub as_good: &'static str,
    /// What follows when it is worse, as a part of a sentence.
    pub worse: &'static str,
}

/// What a baseline is to the Grad-Transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Knows nothing of the client: as good as that means that nothing was translated.
    Control,
    /// Translates the client's update too.
    Rival,
}

/// Pairs of updates, read one at a time: a store may be larger than memory.
pub trait Pairs: Sync {
    /// Number of pairs.
    fn count(&self) -> usize;
    /// The shadow subset of a pair.
    fn subset(&self, pair: usize) -> usize;
    /// A pair's student update.
    fn student(&self, pair: usize) -> Result<Vec<f32>>;
    /// A pair's teacher update.
    fn teacher(&self, pair: usize) -> Result<Vec<f32>>;
}

/// The mean of what is read for every item.
pub fn mean_of(items: &[usize], read: impl Fn(usize) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
    ensure!(!items.is_empty(), "there is no shadow pair");
    let mut sum: Vec<f64> = vec![];
    for &item in items {
        let row = read(item)?;
        sum.resize(row.len(), 0.0);
        sum.iter_mut().zip(&row).for_each(|(s, &x)| *s += x as f64);
    }
    Ok(sum.into_iter().map(|s| (s / items.len() as f64) as f32).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    pub(crate) struct InMemory(pub(crate) Vec<(Vec<f32>, Vec<f32>)>);

    impl Pairs for InMemory {
        fn count(&self) -> usize {
            self.0.len()
        }
        fn subset(&self, pair: usize) -> usize {
            pair / 2
        }
        fn student(&self, pair: usize) -> Result<Vec<f32>> {
            Ok(self.0[pair].0.clone())
        }
        fn teacher(&self, pair: usize) -> Result<Vec<f32>> {
            Ok(self.0[pair].1.clone())
        }
    }

    /// Teachers are an affine function of students with 3 values each: 40 pairs.
    pub(crate) fn linear_world() -> (InMemory, impl Fn(&[f32]) -> Vec<f32>) {
        let rule = |s: &[f32]| vec![2.0 * s[0] - s[2] + 1.0, s[1] + s[2], 0.5, s[0] - 3.0, s[2]];
        let mut random = Stream::new(4);
        let pair = |_| {
            let student: Vec<f32> = (0..3).map(|_| random.normal() as f32).collect();
            let teacher = rule(&student);
            (student, teacher)
        };
        (InMemory((0..40).map(pair).collect()), rule)
    }
}
