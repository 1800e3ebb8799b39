//! Tables of the rotary position embedding: cos and sin per position and frequency,
//! with whatever scaling of the frequencies the model's file asks for.
//!
//! Pair i of D/2 turns by `position · θ^(−2i/D)`. Scalings stretch this for contexts
//! longer than a model was first trained on. Everything is computed in f64.

use super::DecoderConfig;
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
use serde_json::{Map, Value, json};
use std::f64::consts::PI;

/// Change of the rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None ("default").
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Positions of the original training.
        original: f64,
    },
    /// YaRN (Peng et al. 2023): a ramp over dimensions, and a factor on cos and sin.
    Yarn {
        /// `factor` as the file has it.
        factor: f64,
        /// Positions of the original training, where the file has them.
        original: Option<usize>,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// Factor on cos and sin; `0.1 ln(stretch) + 1` where the file has none.
        attention_factor: Option<f64>,
        /// Stretch: positions now over positions of the original training, or `factor`.
        stretch: f64,
        /// Positions that the ramp is computed for.
        positions: f64,
    },
}

impl RopeScaling {
    /// Reads `rope_scaling`; says why it cannot be honoured.
    pub(super) fn parse(value: &Value, max_positions: usize) -> std::result::Result<Self, String> {
        let mut map = value.as_object().cloned().ok_or_else(|| format!("{value} is not an object"))?;
        let (new, old) = (map.remove("rope_type"), map.remove("type"));
        let kind = new.or(old).unwrap_or(Value::Null);
        let scaling = match kind.as_str() {
            Some("default") => Self::None,
            Some("linear") => Self::Linear { factor: required(&mut map, "factor")? },
            Some("llama3") => Self::Llama3 {
                factor: required(&mut map, "factor")?,
                low: required(&mut map, "low_freq_factor")?,
                high: required(&mut map, "high_freq_factor")?,
                original: required(&mut map, "original_max_position_embeddings")?,
            },
            Some("yarn") => Self::parse_yarn(&mut map, max_positions)?,
            _ => return Err(format!("type {kind} is not supported (default, linear, llama3 and yarn are)")),
        };
        match map.into_iter().find(|(_, v)| !v.is_null()) {
            None => Ok(scaling),
            Some((field, value)) => Err(format!("unknown entry `{field}` = {value}")),
        }
    }

    fn parse_yarn(map: &mut Map<String, Value>, max_positions: usize) -> std::result::Result<Self, String> {
        let factor = required(map, "factor")?;
        let original = optional(map, "original_max_position_embeddings")?.map(|n| n as usize);
        Ok(Self::Yarn {
            factor,
            original,
            beta_fast: optional(map, "beta_fast")?.unwrap_or(32.0),
            beta_slow: optional(map, "beta_slow")?.unwrap_or(1.0),
            attention_factor: optional(map, "attention_factor")?,
            stretch: original.map_or(factor, |n| max_positions as f64 / n as f64),
            positions: original.unwrap_or(max_positions) as f64,
        })
    }

    /// The value of `rope_scaling` in config.json.
    pub(super) fn to_json(self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": original as u64,
            }),
            Self::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor,
            }),
        }
    }

    /// Scales the frequencies of `dim / 2` pairs in place; returns the factor on cos and sin.
    fn apply(self, frequencies: &mut [f64], theta: f64) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear { factor } => {
                frequencies.iter_mut().for_each(|f| *f /= factor);
                1.0
            }
            Self::Llama3 { factor, low, high, original } => {
                for f in frequencies {
                    let turns = original * *f / (2.0 * PI);
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    *f = (1.0 - keep) * *f / factor + keep * *f;
                }
                1.0
            }
            Self::Yarn { beta_fast, beta_slow, attention_factor, stretch, positions, .. } => {
                let dim = 2.0 * frequencies.len() as f64;
                let dimension_of =
                    |turns: f64| dim * (positions / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let start = dimension_of(beta_fast).floor().max(0.0);
                let end = dimension_of(beta_slow).ceil().min(dim - 1.0);
                let length = if start == end { 0.001 } else { end - start };
                for (i, f) in frequencies.iter_mut().enumerate() {
                    let ramp = ((i as f64 - start) / length).clamp(0.0, 1.0);
                    *f = ramp * *f / stretch + (1.0 - ramp) * *f;
                }
                let natural = if stretch <= 1.0 { 1.0 } else { 0.1 * stretch.ln() + 1.0 };
                attention_factor.unwrap_or(natural)
            }
        }
    }
}

fn optional(map: &mut Map<String, Value>, field: &str) -> std::result::Result<Option<f64>, String> {
    match map.remove(field).filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
            _ => Err(format!("`{field}` = {value} is not a positive number")),
        },
    }
}

fn required(map: &mut Map<String, Value>, field: &str) -> std::result::Result<f64, String> {
    optional(map, field)?.ok_or_else(|| format!("`{field}` is missing"))
}

/// cos and sin on a device, `[positions, head_dim / 2]` each.
pub(super) struct RopeTables<D: Device, A: Real> {
    pub(super) cos: D::Buf<A>,
    pub(super) sin: D::Buf<A>,
}

impl<D: Device, A: Real> RopeTables<D, A> {
    /// Tables for positions `0..positions`.
    pub(super) fn new(device: &D, config: &DecoderConfig, positions: usize) -> Result<Self> {
        let half = config.head_dim / 2;
        let exponent = |i: usize| 2.0 * i as f64 / config.head_dim as f64;
        let mut frequencies: Vec<f64> = (0..half).map(|i| config.rope_theta.powf(-exponent(i))).collect();
        let factor = config.rope_scaling.apply(&mut frequencies, config.rope_theta);
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (cos, sin): (Vec<A>, Vec<A>) =
            angles.map(|a| (A::from_f64(factor * a.cos()), A::from_f64(factor * a.sin()))).unzip();
        Ok(Self { cos: device.buffer_from(&cos)?, sin: device.buffer_from(&sin)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: Value, max_positions: usize) -> (Vec<f64>, f64) {
        let scaling = RopeScaling::parse(&scaling, max_positions).unwrap();
        let again = match scaling.to_json() {
            Value::Null => RopeScaling::None,
            value => RopeScaling::parse(&value, max_positions).unwrap(),
        };
        assert_eq!(scaling, again);
        let mut f: Vec<f64> = (0..4).map(|i| 10_000f64.powf(-(i as f64) / 4.0)).collect();
        let factor = scaling.apply(&mut f, 10_000.0);
        (f, factor)
    }

    #[test]
    fn scalings_are_those_of_their_papers() {
        assert_eq!(frequencies(json!({"type": "default"}), 99).0, [1.0, 0.1, 0.01, 0.001]);
        let (linear, _) = frequencies(json!({"type": "linear", "factor": 4}), 99);
        assert_eq!(linear, [0.25, 0.025, 0.0025, 0.00025]);
        let llama = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128});
        let (f, _) = frequencies(llama, 1024);
        // 128 positions are 20.4, 2.04, 0.204 and 0.0204 turns of the four frequencies.
        let keep = (128.0 * 0.1 / (2.0 * PI) - 1.0) / 3.0;
        let want = [1.0, (1.0 - keep) * 0.1 / 8.0 + keep * 0.1, 0.01 / 8.0, 0.001 / 8.0];
        assert!(f.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-15), "{f:?} {want:?}");
    }

    #[test]
    fn yarn_keeps_fast_dimensions_and_scales_cos_and_sin() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
        let (f, factor) = frequencies(yarn, 1024);
        // One turn in 256 positions is dimension 1.6, 32 turns dimension 0.1: a ramp from 0 to 2.
        let want = [1.0, 0.1 / 8.0 + 0.05, 0.0025, 0.00025];
        assert!(f.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-15), "{f:?} {want:?}");
        assert!((factor - (0.1 * 4f64.ln() + 1.0)).abs() <= 1e-15);
    }
}
