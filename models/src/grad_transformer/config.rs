//! [`GradTransformerConfig`]: sizes and settings of a Grad-Transformer, as in its `config.json`.

use super::{NormalizationMode, Targets};
use crate::fields::Fields;
use crate::t5::MAX_PARAMETERS;
use crate::t5::T5Config;
use gradtx_runtime::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// What the decoder reads before the first block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartToken {
    /// A block of zeros through `embed_proj`, in training and in generation.
    #[default]
    Embedded,
    /// As the first published code does: a block of zeros through `embed_proj` in training, a
    /// zero vector of the model's width in generation.
    Released,
    /// A zero vector of the model's width, in training and in generation.
    Zero,
}

impl StartToken {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Embedded, "embedded"), (Self::Released, "released"), (Self::Zero, "zero")];

    /// Its name in files and settings.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(token, _)| *token == self).expect("ALL holds every variant").1
    }

    /// The start token of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(token, _)| *token)
    }

    /// True if a forward pass over known blocks starts with a plain zero vector.
    pub(super) fn zero_in_training(self) -> bool {
        self == Self::Zero
    }

    /// True if generation starts with a plain zero vector.
    pub(super) fn zero_in_generation(self) -> bool {
        self != Self::Embedded
    }
}

/// Blocks of a model, and values of a block's update, at most.
const MAX_BLOCKS: usize = 4096;
const MAX_WIDTH: usize = 1 << 31;

/// Sizes and settings of a Grad-Transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct GradTransformerConfig {
    /// Values of a student's block, d_S.
    pub student_width: usize,
    /// Blocks of the student, L_S.
    pub student_blocks: usize,
    /// Values of a teacher's block, d_T.
    pub teacher_width: usize,
    /// Blocks of the teacher, L_T.
    pub teacher_blocks: usize,
    /// What the decoder starts with.
    pub start_token: StartToken,
    /// What the teacher's blocks mean.
    pub targets: Targets,
    /// The T5 between the projections.
    pub t5: T5Config,
}

impl GradTransformerConfig {
    /// Reads a translator's `config.json`; also says how its updates are normalised.
    ///
    /// # Errors
    /// Names the field that is missing, unknown, or has a value that is not supported.
    pub fn open(path: &Path) -> Result<(Self, NormalizationMode)> {
        let mut fields = Fields::open(path, "translator")?;
        fields.only("model_type", &json!("grad_transformer"))?;
        let start_token = match fields.text("start_token")? {
            None => StartToken::default(),
            Some(name) => StartToken::parse(&name).ok_or_else(|| {
                fields.error("start_token", &format!("expected embedded, released or zero, found {name}"))
            })?,
        };
        let normalization = match fields.text("normalization")? {
            None => NormalizationMode::None,
            Some(name) => NormalizationMode::parse(&name).ok_or_else(|| {
                let why = format!("expected none, scalar, scalar_centred, block or coordinate, found {name}");
                fields.error("normalization", &why)
            })?,
        };
        let targets = match fields.text("targets")? {
            None => Targets::default(),
            Some(name) => Targets::parse(&name).ok_or_else(|| {
                fields.error("targets", &format!("expected factors, products or residual, found {name}"))
            })?,
        };
        let t5 = fields.object("t5")?.ok_or_else(|| fields.missing("t5"))?;
        let config = Self {
            student_width: fields.size("student_width")?,
            student_blocks: fields.size("student_blocks")?,
            teacher_width: fields.size("teacher_width")?,
            teacher_blocks: fields.size("teacher_blocks")?,
            start_token,
            targets,
            t5: T5Config::from_fields(t5)?,
        };
        fields.finish(&[])?;
        config.check_sizes().map_err(|(name, why)| Error::file(path, format!("field `{name}`: {why}")))?;
        Ok((config, normalization))
    }

    /// Whether a model of these sizes can be; otherwise the field that is too large, and why.
    pub(super) fn check_sizes(&self) -> std::result::Result<(), (&'static str, String)> {
        self.t5.check_sizes()?;
        let sides = [
            ("student_blocks", self.student_blocks, MAX_BLOCKS),
            ("teacher_blocks", self.teacher_blocks, MAX_BLOCKS),
            ("student_width", self.student_width, MAX_WIDTH),
            ("teacher_width", self.teacher_width, MAX_WIDTH),
        ];
        if let Some((name, found, limit)) = sides.into_iter().find(|(_, found, limit)| found > limit) {
            return Err((name, format!("{found}; at most {limit} are possible")));
        }
        let projections = (self.student_width + 2 * self.teacher_width) as u128 * self.t5.d_model as u128;
        if projections > MAX_PARAMETERS {
            let why = format!("{}: with t5.d_model, {projections} parameters", self.teacher_width);
            return Err(("teacher_width", why));
        }
        Ok(())
    }

    /// The content of `config.json`.
    pub fn to_json(&self, normalization: NormalizationMode) -> Value {
        let mut json = json!({
            "model_type": "grad_transformer",
            "student_width": self.student_width,
            "student_blocks": self.student_blocks,
            "teacher_width": self.teacher_width,
            "teacher_blocks": self.teacher_blocks,
            "start_token": self.start_token.name(),
            "normalization": normalization.name(),
            "t5": self.t5.to_json(),
        });
        // The published form has no such field.
        if self.targets != Targets::Factors {
            json["targets"] = self.targets.name().into();
        }
        json
    }

    /// Values of a student's update, L_S · d_S.
    pub fn student_len(&self) -> usize {
        self.student_blocks * self.student_width
    }

    /// Values of a teacher's update, L_T · d_T.
    pub fn teacher_len(&self) -> usize {
        self.teacher_blocks * self.teacher_width
    }
}
