//! [`Aggregation`]: which combination of updates is asked for, and what speaks against it.

use anyhow::Result;
use clap::ValueEnum;
use gradtx_run::failure::{failed, unusable, unusable_with};
use gradtx_runtime::artifact::UpdateVector;
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How several updates become one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum.
    Sum,
    /// Their mean, each weighted by the examples that it was trained on, or by --weights.
    Weighted,
    /// The median of every value.
    Median,
    /// The mean of every value without its smallest and largest (--trim).
    TrimmedMean,
    /// The point whose distances to all updates have the smallest sum.
    GeometricMedian,
}

impl Combine {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// How several updates become one, with what the choice needs.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct Aggregation {
    /// How several updates become one.
    #[arg(long, value_enum, default_value_t = Combine::Mean)]
    pub combine: Combine,
    /// Weights of the updates, in their order, for --combine weighted.
    #[arg(long, value_name = "W,W,...", value_delimiter = ',')]
    pub weights: Vec<f64>,
    /// Scale updates of a larger norm down to this one before they are combined: a number, or
    /// `median` for the median norm of the updates that are given.
    #[arg(long, value_name = "NORM|median")]
    pub clip_norm: Option<ClipNorm>,
    /// Share of the updates that --combine trimmed-mean leaves out on each side of every value (default: 0.2).
    #[arg(long, value_name = "SHARE")]
    pub trim: Option<f64>,
}

/// The largest norm of an update that is combined with others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipNorm {
    /// The median norm of the updates.
    Median,
    /// This one.
    #[serde(untagged)]
    Norm(f64),
}

impl std::str::FromStr for ClipNorm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "median" => Ok(Self::Median),
            Ok(norm) if norm > 0.0 && f64::is_finite(norm) => Ok(Self::Norm(norm)),
            _ => Err("expected a number above 0, or median".into()),
        }
    }
}

/// Where `--trim` is not given.
const TRIM: f64 = 0.2;

/// What of an [`Aggregation`] is not as by default, apart from [`Combine`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AggregationInputs {
    /// Weights of the updates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// The largest norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<ClipNorm>,
    /// Share of the updates that a trimmed mean leaves out on each side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trim: Option<f64>,
}

impl Aggregation {
    /// As records have it.
    pub fn inputs(&self) -> Option<AggregationInputs> {
        let Self { weights, clip_norm, trim, combine } = self.clone();
        let trim = trim.or(Some(TRIM)).filter(|_| combine == Combine::TrimmedMean);
        let inputs = AggregationInputs { weights, clip_norm, trim };
        Some(inputs).filter(|inputs| *inputs != AggregationInputs::default())
    }

    /// From a record.
    pub fn recorded(combine: Combine, inputs: Option<AggregationInputs>) -> Self {
        let AggregationInputs { weights, clip_norm, trim } = inputs.unwrap_or_default();
        Self { combine, weights, clip_norm, trim }
    }

    /// Fails unless the options fit together and so many updates.
    pub(super) fn check(&self, updates: usize) -> Result<()> {
        let Self { combine, weights, trim, .. } = self;
        if !weights.is_empty() && *combine != Combine::Weighted {
            return Err(unusable("--weights: has an effect with --combine weighted only"));
        }
        if !weights.is_empty() && weights.len() != updates {
            let what = format!("--weights: {} weights of {updates} updates", weights.len());
            return Err(unusable_with(what, Some("give one for each update, in their order".into())));
        }
        let is_weight = |w: &f64| w.is_finite() && *w >= 0.0;
        let sum: f64 = weights.iter().sum();
        let are_weights = weights.iter().all(is_weight) && sum > 0.0 && sum.is_finite();
        if !weights.is_empty() && !are_weights {
            return Err(unusable("--weights: expected numbers from 0, of which one at least is above 0"));
        }
        if trim.is_some() && *combine != Combine::TrimmedMean {
            return Err(unusable("--trim: has an effect with --combine trimmed-mean only"));
        }
        if trim.is_some_and(|trim| !(trim > 0.0 && trim < 0.5)) {
            return Err(unusable("--trim: expected a share above 0 and below 0.5"));
        }
        Ok(())
    }

    /// Updates that a trimmed mean leaves out on each side.
    pub(super) fn left_out(&self, updates: usize) -> Result<usize> {
        let trim = self.trim.unwrap_or(TRIM);
        // A share such as 0.1 is a little more or less than the number that it stands for.
        let left_out = (trim * updates as f64 + 1e-9) as usize;
        if left_out > 0 && 2 * left_out < updates {
            return Ok(left_out);
        }
        let what = format!("--trim {trim}: leaves none of {updates} updates out: it would be the mean");
        let hint = match updates {
            0..3 => "a trimmed mean needs three updates at least".into(),
            _ => format!("give --trim {:.3} or more, or --combine mean", 1.0 / updates as f64 + 5e-4),
        };
        Err(unusable_with(what, Some(hint)))
    }

    /// The weights that are given, or the examples of every update.
    pub(super) fn weights_of(&self, files: &[PathBuf], updates: &[UpdateVector]) -> Result<Vec<f64>> {
        if !self.weights.is_empty() {
            return Ok(self.weights.clone());
        }
        for (path, update) in files.iter().zip(updates) {
            if update.meta.examples == 0 {
                let what = format!("{}: does not state its number of examples", shown(path));
                return Err(failed(what, "give --weights, one for each update, in their order"));
            }
        }
        Ok(updates.iter().map(|update| update.meta.examples as f64).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_keep_what_is_not_as_by_default() {
        assert_eq!(Aggregation { combine: Combine::Median, ..Aggregation::default() }.inputs(), None);
        let all = Aggregation {
            clip_norm: Some(ClipNorm::Norm(2.0)),
            combine: Combine::TrimmedMean,
            ..Aggregation::default()
        };
        let inputs = all.inputs();
        let text = serde_json::to_string(&inputs).unwrap();
        assert_eq!(text, r#"{"clip_norm":2.0,"trim":0.2}"#);
        let back = Aggregation::recorded(Combine::TrimmedMean, serde_json::from_str(&text).unwrap());
        assert_eq!(back, Aggregation { trim: Some(0.2), ..all });
        let median = AggregationInputs { clip_norm: Some(ClipNorm::Median), ..AggregationInputs::default() };
        let text = serde_json::to_string(&median).unwrap();
        assert_eq!(serde_json::from_str::<AggregationInputs>(&text).unwrap(), median, "{text}");
    }
}
