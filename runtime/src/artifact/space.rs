//! [`UpdateSpace`]: which models and adapters an update vector fits.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which models and adapters an update vector fits: equal for all updates that may
/// be averaged, and for both an update and the translator that reads it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateSpace {
    /// L, blocks.
    pub blocks: usize,
    /// d, values per block.
    pub width: usize,
    /// Hash of the block layout.
    pub layout: String,
    /// Fingerprint of the base model.
    pub base_model: String,
    /// Adapted modules, e.g. `q_proj`, `v_proj`.
    pub targets: Vec<String>,
    /// Adapter rank r.
    pub rank: usize,
    /// Adapter scale α; the adapter's output is multiplied by α/r.
    pub alpha: f64,
    /// A is frozen: the values are of B alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_a: bool,
    /// Checksum of the initial adapter's f32 bytes.
    pub init: String,
}

impl UpdateSpace {
    /// Values of an update, L · d.
    pub fn values(&self) -> usize {
        self.blocks.saturating_mul(self.width)
    }

    /// Fails, with what differs, unless `other` is the same space. `what` names who
    /// is looked at, e.g. "update of client 3".
    pub fn expect_same(&self, other: &UpdateSpace, what: &str) -> Result<()> {
        if self.freeze_a != other.freeze_a {
            // All else but the model differs because of it.
            let trained = |space: &Self| match space.freeze_a {
                true => "B alone (lora.freeze_a = true)",
                false => "A and B (lora.freeze_a = false)",
            };
            let why = format!("trained matrices: expected {}, found {}", trained(self), trained(other));
            return Err(Error::invalid(what, why));
        }
        let mut different = vec![];
        let mut compare = |name: &str, want: String, found: String| {
            if want != found {
                different.push(format!("{name}: expected {want}, found {found}"));
            }
        };
        compare("blocks L", self.blocks.to_string(), other.blocks.to_string());
        compare("width d", self.width.to_string(), other.width.to_string());
        compare("base model", self.base_model.clone(), other.base_model.clone());
        compare("targets", self.targets.join(","), other.targets.join(","));
        compare("rank", self.rank.to_string(), other.rank.to_string());
        compare("alpha", self.alpha.to_string(), other.alpha.to_string());
        compare("initial adapter", self.init.clone(), other.init.clone());
        compare("block layout", self.layout.clone(), other.layout.clone());
        if different.is_empty() { Ok(()) } else { Err(Error::invalid(what, different.join("; "))) }
    }
}

#[cfg(test)]
pub(in crate::artifact) mod tests {
    use super::*;

    pub(in crate::artifact) fn space(blocks: usize, width: usize) -> UpdateSpace {
        UpdateSpace {
            blocks,
            width,
            layout: "aa".into(),
            base_model: "bb".into(),
            targets: vec!["q_proj".into(), "v_proj".into()],
            rank: 2,
            alpha: 32.0,
            freeze_a: false,
            init: "cc".into(),
        }
    }

    #[test]
    fn differing_spaces_say_what_differs() {
        let (a, mut b) = (space(3, 5), space(3, 5));
        a.expect_same(&b, "u").unwrap();
        b.rank = 4;
        b.base_model = "dd".into();
        let message = a.expect_same(&b, "update of client 3").unwrap_err().to_string();
        assert!(
            message.contains("client 3") && message.contains("rank") && message.contains("dd"),
            "{message}"
        );
        assert!(!message.contains("layout"), "{message}");
    }
}
