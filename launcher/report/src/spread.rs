//! [`Spread`]: many numbers in three.

use serde::Serialize;

/// The middle of some numbers, and between what most of them lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// 10 % are below.
    pub low: f64,
    /// Half are below.
    pub median: f64,
    /// 10 % are above.
    pub high: f64,
}

impl Spread {
    /// Of the finite ones among these numbers; none if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|x| x.is_finite()).collect();
        if values.is_empty() {
            return None;
        }
        values.sort_by(f64::total_cmp);
        // Between two values where the part falls between them.
        let at = |part: f64| {
            let place = part * (values.len() - 1) as f64;
            let below = values[place.floor() as usize];
            below + (values[place.ceil() as usize] - below) * place.fract()
        };
        Some(Self { low: at(0.1), median: at(0.5), high: at(0.9) })
    }
}
