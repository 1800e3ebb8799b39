//! [`Targets`]: what the decoder's blocks mean.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a Grad-Transformer predicts for every block of the LLM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Targets {
    /// The LLM's update, that is, changes of LoRA factors, as published.
    #[default]
    Factors,
    /// Coordinates of the products B·A of the block, in the principal components of the mean products
    /// of shadow groups. The adapter is read out as `translate --method products` does.
    Products,
    /// The same coordinates, less those that `translate --method products` gives: the Grad-Transformer
    /// predicts what the linear translation leaves over, and both are added up.
    Residual,
}

impl Targets {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Factors, Self::Products, Self::Residual];

    /// Its name in files and settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Factors => "factors",
            Self::Products => "products",
            Self::Residual => "residual",
        }
    }

    /// The one of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|targets| targets.name() == name)
    }
}
