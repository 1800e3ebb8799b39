//! Axes: from values to places, and round ticks.
//!
//! In: the values that an axis must hold. Out: [`Axis`]; what is not a finite number does
//! not count, and an axis without values still has ticks.

use super::fixed;

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Equal differences are equal distances.
    Linear,
    /// Equal ratios are equal distances.
    Log,
}

/// An axis: its range and where its ticks are.
#[derive(Clone, Debug)]
pub struct Axis {
    label: String,
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    digits: usize,
}

/// Ticks that an axis has about.
const TICKS: f64 = 5.0;

impl Axis {
    /// A linear axis that holds these values, from tick to tick.
    pub fn linear(label: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values).unwrap_or((0.0, 1.0));
        // One value gets room on both sides.
        let room = if high > low { 0.0 } else { low.abs().max(1.0) * 0.5 };
        Self::between(label, low - room, high + room, true)
    }

    /// A linear axis of exactly this range.
    pub fn exact(label: &str, low: f64, high: f64) -> Self {
        Self::between(label, low, high, false)
    }

    fn between(label: &str, low: f64, high: f64, widen: bool) -> Self {
        let step = nice((high - low) / TICKS);
        let (from, to) = match widen {
            true => ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil()),
            false => ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor()),
        };
        let count = (to - from).max(0.0) as usize;
        let ticks: Vec<f64> = (0..=count).map(|i| (from + i as f64) * step).collect();
        let (low, high) = if widen { (from * step, to * step) } else { (low, high) };
        let digits = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        Self { label: label.into(), scale: Scale::Linear, low, high, ticks, digits }
    }

    /// A logarithmic axis that holds these values (those above zero).
    pub fn log(label: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values.into_iter().filter(|x| *x > 0.0)).unwrap_or((0.1, 1.0));
        let (bottom, top) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let round = |parts: &'static [f64]| {
            (bottom..=top).flat_map(move |p| parts.iter().map(move |m| m * 10f64.powi(p)))
        };
        // The ends are at 1, 2, 5; and the ticks too, within few decades.
        let below = round(&[1.0, 2.0, 5.0]).rfind(|t| *t <= low * (1.0 + 1e-9));
        let above = round(&[1.0, 2.0, 5.0]).find(|t| *t >= high * (1.0 - 1e-9));
        let (from, mut to) = (below.unwrap_or(low), above.unwrap_or(high));
        if to <= from {
            to = from * 10.0;
        }
        let decades = (to / from).log10();
        let within = |t: &f64| *t >= from * (1.0 - 1e-9) && *t <= to * (1.0 + 1e-9);
        let ticks: Vec<f64> = match decades <= 2.5 {
            true => round(&[1.0, 2.0, 5.0]).filter(within).collect(),
            false => round(&[1.0]).filter(within).step_by(1 + (decades / 6.0) as usize).collect(),
        };
        Self { label: label.into(), scale: Scale::Log, low: from, high: to, ticks, digits: 0 }
    }

    /// A logarithmic axis where the values are positive and span much, else a linear one from zero.
    pub(crate) fn log_if_wide(label: &str, values: &[f64]) -> Self {
        match range(values.iter().copied()) {
            Some((low, high)) if low > 0.0 && high / low > 20.0 => Self::log(label, values.iter().copied()),
            _ => Self::linear(label, values.iter().copied().chain([0.0])),
        }
    }

    /// How this axis scales.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// What is counted or measured.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Where the ticks are.
    pub fn ticks(&self) -> &[f64] {
        &self.ticks
    }

    /// Lower end.
    pub fn low(&self) -> f64 {
        self.low
    }

    /// From the lower to the upper end.
    pub fn span(&self) -> f64 {
        self.high - self.low
    }

    /// Only ticks at whole numbers, for what is counted.
    pub(crate) fn whole_ticks(&mut self) {
        self.ticks.retain(|tick| (tick - tick.round()).abs() < 1e-9);
        self.digits = 0;
    }

    /// Place of a value, from 0 to 1; none for what is not a number or has no place.
    pub(super) fn place(&self, value: f64) -> Option<f64> {
        let part = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        part.is_finite().then(|| part.clamp(-0.02, 1.02))
    }

    pub(super) fn text(&self, tick: f64) -> String {
        match self.scale {
            Scale::Linear => fixed(tick, self.digits),
            Scale::Log if (1e-3..1e5).contains(&tick) => {
                fixed(tick, (-tick.log10().floor()).max(0.0) as usize)
            }
            Scale::Log => format!("{tick:.0e}").replace('-', "−"),
        }
    }
}

fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.into_iter().filter(|x| x.is_finite());
    finite.fold(None, |range, x| match range {
        None => Some((x, x)),
        Some((low, high)) => Some((f64::min(low, x), f64::max(high, x))),
    })
}

/// The next of 1, 2, 5, 10, 20, … that is not below.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let part = step / power;
    let round = [1.0, 2.0, 5.0].into_iter().find(|r| part <= r * (1.0 + 1e-9)).unwrap_or(10.0);
    round * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|t| axis.text(*t)).collect()
    }

    #[test]
    fn linear_ticks_are_round_and_hold_the_values() {
        assert_eq!(ticks(&Axis::linear("", [0.0, 97.3])), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(ticks(&Axis::linear("", [0.13, 0.31])), ["0.10", "0.15", "0.20", "0.25", "0.30", "0.35"]);
        assert_eq!(
            ticks(&Axis::linear("", [-1200.0, 700.0])),
            ["−1,500", "−1,000", "−500", "0", "500", "1,000"]
        );
        assert_eq!(ticks(&Axis::exact("", 1.0, 60.0)), ["20", "40", "60"]);
        for values in [vec![], vec![f64::NAN], vec![3.0], vec![0.0], vec![1e-12, 2e-12], vec![f64::INFINITY]]
        {
            let axis = Axis::linear("", values.clone());
            assert!(axis.high > axis.low && (2..12).contains(&axis.ticks.len()), "{values:?}: {axis:?}");
            assert!(values.iter().filter(|v| v.is_finite()).all(|v| axis.low <= *v && *v <= axis.high));
        }
    }

    #[test]
    fn log_ticks() {
        assert_eq!(ticks(&Axis::log("", [0.03, 1.7])), ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]);
        assert_eq!(ticks(&Axis::log("", [0.003, 1.7])), ["0.01", "0.1", "1"]);
        assert_eq!(ticks(&Axis::log("", [1e-6, 1e3])).len(), 5);
        assert_eq!(ticks(&Axis::log("", [0.0, -1.0, 20.0])), ["20", "50", "100", "200"]);
        assert_eq!(Axis::log_if_wide("", &[1.0, 19.0]).scale(), Scale::Linear);
        assert_eq!(Axis::log_if_wide("", &[1.0, 21.0]).scale(), Scale::Log);
        assert_eq!(Axis::log_if_wide("", &[0.0, 21.0]).scale(), Scale::Linear);
        assert!(Axis::log("", [0.03, 1.7]).place(-1.0).is_none());
    }
}
