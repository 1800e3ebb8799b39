//! Intervals of PGR: percentiles of a bootstrap over the held-out groups. A resampled group keeps the scores of all
//! models, so differences are paired.

use gradtx_kernels::rng::{Stream, derive_named};

/// Draws of the bootstrap.
const DRAWS: usize = 10_000;

/// The bootstrap's draws of groups, the same for everything that is compared.
pub(super) struct Draws<'a> {
    pub(super) ends: &'a [Vec<f64>; 2],
    draws: Vec<Vec<u32>>,
}

impl<'a> Draws<'a> {
    pub(super) fn new(ends: &'a [Vec<f64>; 2]) -> Self {
        let count = ends[0].len();
        let mut stream = Stream::new(derive_named(0, "bootstrap over groups"));
        let draw = |_| (0..count).map(|_| stream.below(count) as u32).collect();
        Self { ends, draws: (0..DRAWS).map(draw).collect() }
    }

    /// The 95 % interval of a statistic of PGR.
    pub(super) fn interval(&self, of: impl Fn(&dyn Fn(&[f64]) -> f64) -> f64) -> [f64; 2] {
        let mut found: Vec<f64> = self
            .draws
            .iter()
            .map(|draw| {
                let sum = |values: &[f64]| draw.iter().map(|&i| values[i as usize]).sum::<f64>();
                let [student, teacher] = self.ends.each_ref().map(|values| sum(values));
                of(&|scores| 100.0 * (sum(scores) - student) / (teacher - student))
            })
            .collect();
        found.sort_by(f64::total_cmp);
        let at = |part: f64| found[((found.len() - 1) as f64 * part).round() as usize];
        [at(0.025), at(0.975)]
    }
}

/// PGR of means.
pub(super) fn pgr(scores: &[f64], [student, teacher]: &[Vec<f64>; 2]) -> f64 {
    let sum = |values: &[f64]| values.iter().sum::<f64>();
    100.0 * (sum(scores) - sum(student)) / (sum(teacher) - sum(student))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_paired() {
        let ends = [vec![20.0, 60.0, 40.0, 50.0], vec![100.0; 4]];
        let draws = Draws::new(&ends);
        // The same part of the gap everywhere: no draw of groups changes it.
        let half: Vec<f64> = ends[0].iter().map(|student| (student + 100.0) / 2.0).collect();
        assert!((pgr(&half, &ends) - 50.0).abs() < 1e-9);
        assert!(draws.interval(|pgr| pgr(&half)).iter().all(|x| (x - 50.0).abs() < 1e-9));
        // Two translators that vary alike differ by the same in every draw.
        let uneven = [100.0, 60.0, 100.0, 50.0];
        let [low, high] = draws.interval(|pgr| pgr(&uneven));
        assert!(low < 40.0 && high > 80.0, "{low} {high}");
        let [low, high] = draws.interval(|pgr| pgr(&uneven) - pgr(&uneven));
        assert_eq!((low, high), (0.0, 0.0));
    }
}
