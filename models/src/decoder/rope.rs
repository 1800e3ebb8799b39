//! Tables of the rotary position embedding: cos and sin per position and frequency,
//! with whatever scaling of the frequencies the model's file asks for.
//!
//! Pair i of D/2 turns by `position · θ^(−2i/D)`. Scalings stretch this for contexts
//! longer than a model was first trained on. Everything is computed in f64.

use crate::foreign::shown;
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;
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
    ///
    /// As in current transformers (5.x): frequencies are divided by `factor`. Versions before 5
    /// divided by `max_position_embeddings / original_max_position_embeddings` wherever a file
    /// stated the latter, so a model whose file states both alike was not scaled at all there.
    Yarn {
        /// Divisor of the slow dimensions.
        factor: f64,
        /// Positions of the original training, for which the ramp is computed.
        original: usize,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// Factor on cos and sin; from `factor` and `mscale` where the file has none.
        attention_factor: Option<f64>,
        /// `mscale` and `mscale_all_dim`.
        mscale: Option<[f64; 2]>,
        /// The ends of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
}

/// Entries of `rope_scaling` and `rope_parameters` without influence.
const UNUSED: [&str; 1] = ["finetuned"];

impl RopeScaling {
    /// Reads `rope_scaling`; says why it cannot be honoured.
    pub(super) fn parse(value: &Value, max_positions: usize) -> std::result::Result<Self, String> {
        let mut map =
            value.as_object().cloned().ok_or_else(|| format!("{} is not an object", shown(value)))?;
        map.retain(|entry, value| !value.is_null() && !UNUSED.contains(&entry.as_str()));
        let kind = match (map.remove("rope_type"), map.remove("type")) {
            (Some(new), Some(old)) if new != old => {
                return Err(format!("`rope_type` = {new} and `type` = {old} say different things"));
            }
            (new, old) => new.or(old).unwrap_or_else(|| json!("default")),
        };
        if map.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() == Some(1.0)) {
            map.remove("partial_rotary_factor");
        }
        let scaling = match kind.as_str() {
            Some("default") => Self::None,
            Some("linear") => Self::Linear { factor: stretch(&mut map)? },
            Some("llama3") => Self::parse_llama3(&mut map)?,
            Some("yarn") => Self::parse_yarn(&mut map, max_positions)?,
            Some("dynamic" | "longrope") => {
                return Err(format!(
                    "type {kind} is not supported: it depends on the length of each text \
                     (default, linear, llama3 and yarn are)"
                ));
            }
            _ => return Err(format!("type {kind} is not supported (default, linear, llama3 and yarn are)")),
        };
        match map.into_iter().next() {
            None => Ok(scaling),
            Some((field, value)) => {
                Err(format!("`{field}` = {} has no meaning for type {kind}; remove it", shown(&value)))
            }
        }
    }

    fn parse_llama3(map: &mut Map<String, Value>) -> std::result::Result<Self, String> {
        let factor = stretch(map)?;
        let (low, high) = (required(map, "low_freq_factor")?, required(map, "high_freq_factor")?);
        if low >= high {
            return Err(format!("`low_freq_factor` = {low} is not below `high_freq_factor` = {high}"));
        }
        let original = positions(map)?.ok_or("`original_max_position_embeddings` is missing")?;
        Ok(Self::Llama3 { factor, low, high, original: original as f64 })
    }

    fn parse_yarn(map: &mut Map<String, Value>, max_positions: usize) -> std::result::Result<Self, String> {
        let original = positions(map)?;
        let factor = match (map.contains_key("factor"), original) {
            (false, Some(original)) if original <= max_positions => max_positions as f64 / original as f64,
            _ => stretch(map)?,
        };
        let (beta_fast, beta_slow) =
            (optional(map, "beta_fast")?.unwrap_or(32.0), optional(map, "beta_slow")?.unwrap_or(1.0));
        if beta_fast < beta_slow {
            return Err(format!("`beta_fast` = {beta_fast} is below `beta_slow` = {beta_slow}"));
        }
        let mscale = match (optional(map, "mscale")?, optional(map, "mscale_all_dim")?) {
            (Some(one), Some(all)) => Some([one, all]),
            (None, None) => None,
            _ => return Err("`mscale` and `mscale_all_dim` have a meaning only together".into()),
        };
        let truncate = match map.remove("truncate") {
            None => true,
            Some(value) => {
                value.as_bool().ok_or_else(|| format!("`truncate` = {value} is not true or false"))?
            }
        };
        Ok(Self::Yarn {
            factor,
            original: original.unwrap_or(max_positions),
            beta_fast,
            beta_slow,
            attention_factor: optional(map, "attention_factor")?,
            mscale,
            truncate,
        })
    }

    /// Positions that a model of `max_positions` reaches with this scaling.
    pub(super) fn positions(self, max_positions: usize) -> usize {
        match self {
            Self::None | Self::Llama3 { .. } => max_positions,
            Self::Linear { factor } => (max_positions as f64 * factor) as usize,
            Self::Yarn { factor, original, .. } => max_positions.max((original as f64 * factor) as usize),
        }
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
            Self::Yarn { factor, original, beta_fast, beta_slow, attention_factor, mscale, truncate } => {
                let mut out = json!({
                    "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                    "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor,
                });
                if let Some([one, all]) = mscale {
                    (out["mscale"], out["mscale_all_dim"]) = (json!(one), json!(all));
                }
                if !truncate {
                    out["truncate"] = json!(false);
                }
                out
            }
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
            Self::Yarn { factor, original, beta_fast, beta_slow, attention_factor, mscale, truncate } => {
                let dim = 2.0 * frequencies.len() as f64;
                let dimension_of =
                    |turns: f64| dim * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut start, mut end) = (dimension_of(beta_fast), dimension_of(beta_slow));
                if truncate {
                    (start, end) = (start.floor(), end.ceil());
                }
                (start, end) = (start.max(0.0), end.min(dim - 1.0));
                let length = if start == end { 0.001 } else { end - start };
                for (i, f) in frequencies.iter_mut().enumerate() {
                    let ramp = ((i as f64 - start) / length).clamp(0.0, 1.0);
                    *f = ramp * *f / factor + (1.0 - ramp) * *f;
                }
                let natural = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                attention_factor.unwrap_or_else(|| match mscale {
                    Some([one, all]) => natural(one) / natural(all),
                    None => natural(1.0),
                })
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

/// `factor`: contexts become longer by it, never shorter.
fn stretch(map: &mut Map<String, Value>) -> std::result::Result<f64, String> {
    let factor = required(map, "factor")?;
    if !(1.0..=1e6).contains(&factor) {
        return Err(format!("`factor` = {factor}; expected at least 1"));
    }
    Ok(factor)
}

/// `original_max_position_embeddings`.
fn positions(map: &mut Map<String, Value>) -> std::result::Result<Option<usize>, String> {
    let field = "original_max_position_embeddings";
    match optional(map, field)? {
        Some(n) if n.fract() != 0.0 || n > 1e9 => {
            Err(format!("`{field}` = {n} is not a number of positions"))
        }
        found => Ok(found.map(|n| n as usize)),
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

/// How heads are rotated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rotation {
    pub(super) head_dim: usize,
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
}

impl<D: Device, A: Real> RopeTables<D, A> {
    /// Tables for positions `0..positions`; without elements where positions are not rotary.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        rotation: Option<Rotation>,
        positions: usize,
    ) -> Result<Self> {
        let Some(Rotation { head_dim, theta, scaling }) = rotation else {
            return Ok(Self { cos: D::Buf::default(), sin: D::Buf::default() });
        };
        let half = head_dim / 2;
        let exponent = |i: usize| 2.0 * i as f64 / head_dim as f64;
        let mut frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-exponent(i))).collect();
        let factor = scaling.apply(&mut frequencies, theta);
        let mut table = |name: &str, function: fn(f64) -> f64| {
            alloc.filled(name, &[positions, half], || {
                let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
                angles.map(|angle| A::from_f64(factor * function(angle))).collect()
            })
        };
        Ok(Self { cos: table("cos", f64::cos)?, sin: table("sin", f64::sin)? })
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
        let yarn = |extra: Value, max_positions| {
            let mut value =
                json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
            extra.as_object().unwrap().iter().for_each(|(k, v)| value[k] = v.clone());
            frequencies(value, max_positions)
        };
        let near = |f: &[f64], want: [f64; 4]| {
            assert!(f.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-15), "{f:?} {want:?}");
        };
        let (f, factor) = yarn(json!({}), 1024);
        // One turn in 256 positions is dimension 1.6, 32 turns dimension 0.1: a ramp from 0 to 2.
        near(&f, [1.0, 0.1 / 8.0 + 0.05, 0.0025, 0.00025]);
        assert!((factor - (0.1 * 4f64.ln() + 1.0)).abs() <= 1e-15);
        // The factor counts, not what max_position_embeddings says; where it is missing, their ratio.
        assert_eq!(yarn(json!({}), 256), yarn(json!({}), 1024));
        assert_eq!(yarn(json!({"factor": null}), 1024), yarn(json!({}), 1024));
        let no_original = json!({"rope_type": "yarn", "factor": 4.0});
        assert_eq!(frequencies(no_original, 256), yarn(json!({}), 256));
        let (_, factor) = yarn(json!({"attention_factor": 1.5}), 256);
        assert_eq!(factor, 1.5);
        let (_, factor) = yarn(json!({"mscale": 2.0, "mscale_all_dim": 0.5}), 256);
        assert!((factor - (0.2 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0)).abs() <= 1e-15);
        // Without rounding the ramp goes from 0.1 to 1.6.
        let dimension = |turns: f64| 8.0 * (256.0 / (turns * 2.0 * PI)).ln() / (2.0 * 10_000f64.ln());
        let (start, end) = (dimension(32.0), dimension(1.0));
        let ramp = (1.0 - start) / (end - start);
        near(
            &yarn(json!({"truncate": false}), 256).0,
            [1.0, ramp * 0.1 / 4.0 + (1.0 - ramp) * 0.1, 0.0025, 0.00025],
        );
    }
}
