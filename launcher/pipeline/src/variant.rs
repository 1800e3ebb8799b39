//! [`Variant`]: how the clients of a cross-validation differ from the shadows.

use clap::ValueEnum;
use gradtx_run::role::Role;
use serde::{Deserialize, Serialize};

/// How the clients of a cross-validation differ from the shadows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Its updates are those of its shadow pair.
    #[default]
    AsCurated,
    /// The TinyLM is trained for three times as many steps.
    Longer,
    /// The TinyLM is trained for 0.4 times as many steps.
    Shorter,
    /// Half of the examples are of another held-out group.
    Mixture,
    /// Normal noise on the TinyLM's update, of half a standard deviation of the shadows' updates.
    HalfNoise,
    /// Normal noise on the TinyLM's update, of one standard deviation of the shadows' updates.
    Noise,
    /// A refinement asks no public prompt that contains one of the texts of --without-prompts.
    FewerPrompts,
    /// Its updates are those of its shadow pair, and all groups whose name contains one text of
    /// --leave-out are held out together.
    UnseenValue,
}

impl Variant {
    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsCurated => "as-curated",
            Self::Longer => "longer",
            Self::Shorter => "shorter",
            Self::Mixture => "mixture",
            Self::HalfNoise => "half-noise",
            Self::Noise => "noise",
            Self::FewerPrompts => "fewer-prompts",
            Self::UnseenValue => "unseen-value",
        }
    }

    /// Steps of the TinyLM's training, as a multiple of the shadows'.
    pub(crate) fn steps(self) -> f64 {
        match self {
            Self::Longer => 3.0,
            Self::Shorter => 0.4,
            _ => 1.0,
        }
    }

    /// Standard deviation of the noise on the TinyLM's update, in those of the shadows' updates.
    pub(crate) fn noise(self) -> Option<f64> {
        match self {
            Self::HalfNoise => Some(0.5),
            Self::Noise => Some(1.0),
            _ => None,
        }
    }

    /// Whether a model's update is another than its shadow's.
    pub(crate) fn changes(self, role: Role) -> bool {
        match self {
            Self::AsCurated | Self::FewerPrompts | Self::UnseenValue => false,
            Self::Longer | Self::Shorter | Self::HalfNoise | Self::Noise => role == Role::Tiny,
            Self::Mixture => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_files() {
        for variant in Variant::value_variants() {
            assert_eq!(serde_json::json!(variant), variant.name());
            assert_eq!(variant.to_possible_value().unwrap().get_name(), variant.name());
        }
    }

    #[test]
    fn only_a_mixture_changes_the_llm() {
        let of = |role| -> Vec<&str> {
            let all = Variant::value_variants().iter();
            all.filter(|variant| variant.changes(role)).map(|variant| variant.name()).collect()
        };
        assert_eq!(of(Role::Tiny), ["longer", "shorter", "mixture", "half-noise", "noise"]);
        assert_eq!(of(Role::Llm), ["mixture"]);
    }
}
