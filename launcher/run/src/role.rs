//! [`Role`]: which of the two language models.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// One of the two language models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The client's small model, whose updates are translated.
    Tiny,
    /// The provider's large model, which receives them.
    Llm,
}

impl Role {
    /// The name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Llm => "llm",
        }
    }

    /// The model's part in a tuple.
    pub fn side(self) -> gradtx_runtime::artifact::Role {
        match self {
            Self::Tiny => gradtx_runtime::artifact::Role::Student,
            Self::Llm => gradtx_runtime::artifact::Role::Teacher,
        }
    }
}
