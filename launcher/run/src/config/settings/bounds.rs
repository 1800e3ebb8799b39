//! Bounds of numbers, and what is found outside of them.
//!
//! Every number has bounds, wide enough for anything that may run, and narrow enough that
//! sums, products and durations made of them stay numbers. What is outside is a slip of the
//! keyboard, and is refused before anything is read, planned or made.

use std::fmt::{Display, Write as _};
use std::ops::RangeInclusive;

/// Steps of a training; at a millisecond each, more than eleven days.
pub(super) const MAX_STEPS: u64 = 1_000_000_000;
/// Passes over the data.
pub(super) const MAX_EPOCHS: f64 = 1e6;
/// Examples, subsets, tuples: of anything that is counted one by one.
pub(super) const MAX_ITEMS: u64 = 1_000_000_000;
/// Tokens of a micro-batch, of an example, of an answer.
pub(super) const MAX_TOKENS: u64 = 16 << 20;
/// Minutes of a year.
pub(super) const MAX_MINUTES: f64 = 525_600.0;
/// Above this nothing is learned from a step.
pub(super) const MAX_RATE: f64 = 1000.0;
/// Real numbers beyond this overflow f32 once they are squared.
pub(super) const MAX_REAL: f64 = 1e18;

/// Collects what is wrong, a line each.
#[derive(Default)]
pub(super) struct Findings {
    wrong: String,
}

impl Findings {
    /// All lines; empty if nothing is wrong.
    pub(super) fn wrong(&self) -> &str {
        self.wrong.trim_end()
    }

    /// Anything that must hold.
    pub(super) fn expect(&mut self, ok: bool, what: impl Display) {
        if !ok {
            let _ = writeln!(self.wrong, "  {what}");
        }
    }

    /// A whole number of a closed range.
    pub(super) fn whole(
        &mut self,
        key: impl Display,
        value: impl TryInto<u64> + Display + Copy,
        range: RangeInclusive<u64>,
    ) {
        let (low, high) = (range.start(), range.end());
        let fine = value.try_into().is_ok_and(|value| range.contains(&value));
        self.expect(fine, format_args!("{key} = {value}: expected a whole number from {low} to {high}"));
    }

    /// A number of a closed range; never NaN or infinite.
    pub(super) fn real(&mut self, key: impl Display, value: f64, range: RangeInclusive<f64>) {
        let (low, high) = (range.start(), range.end());
        self.expect(
            range.contains(&value),
            format_args!("{key} = {value}: expected a number from {low} to {high}"),
        );
    }

    /// A number above 0.
    pub(super) fn positive(&mut self, key: impl Display, value: f64, highest: f64) {
        let what = format_args!("{key} = {value}: expected a number above 0, at most {highest}");
        self.expect(value > 0.0 && value <= highest, what);
    }

    /// A number from 0 to below 1.
    pub(super) fn part(&mut self, key: impl Display, value: f64) {
        let what = format_args!("{key} = {value}: expected a number from 0 to below 1");
        self.expect((0.0..1.0).contains(&value), what);
    }
}
