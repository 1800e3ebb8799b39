//! A sceptic's translators: what a Grad-Transformer must beat to be worth its cost.
//!
//! In: pairs of updates (student `[L_S · d_S]`, teacher `[L_T · d_T]`) of shadow subsets,
//! and a client's student update. Out: a teacher update.
//!
//! A new one is a file with its [`Baseline`], and a line in `BASELINES`: the command line,
//! the demo, tables and reports go through that list.

mod baseline;
pub mod mean;
pub mod nearest;
pub mod ridge;

pub use baseline::{About, Baseline, Kind, Pairs};

use clap::ValueEnum;
use clap::builder::PossibleValue;
use gradtx_models::grad_transformer::Targets;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// All of them, in the order of tables.
pub(crate) const BASELINES: [&dyn Baseline; 3] = [&mean::Mean, &nearest::Nearest, &ridge::Ridge];

/// A translator of updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The trained Grad-Transformer.
    GradTransformer,
    /// One of `BASELINES`, by its place among them.
    Baseline(usize),
    /// See [`crate::products`].
    Products,
    /// The Grad-Transformer that predicts coordinates of products, whatever the run's settings say.
    ProductsTransformer,
    /// The Grad-Transformer that predicts what [`Self::Products`] leaves over.
    ResidualTransformer,
}

/// Methods of which a run has one each.
const STANDARD: usize = BASELINES.len() + 2;

impl Method {
    /// All of them, in the order of tables.
    pub const ALL: [Self; STANDARD + 2] = {
        let mut all = [Self::GradTransformer; STANDARD + 2];
        let mut i = 0;
        while i < BASELINES.len() {
            all[i + 1] = Self::Baseline(i);
            i += 1;
        }
        all[i + 1] = Self::Products;
        all[i + 2] = Self::ProductsTransformer;
        all[i + 3] = Self::ResidualTransformer;
        all
    };

    /// Those that the demo compares: the run's Grad-Transformer, and what takes no training.
    pub fn standard() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().take(STANDARD)
    }

    /// The one with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }

    /// The baseline, if it is one.
    pub fn baseline(self) -> Option<&'static dyn Baseline> {
        match self {
            Self::Baseline(i) => Some(BASELINES[i]),
            _ => None,
        }
    }

    /// Whether `train` makes it.
    pub fn is_trained(self) -> bool {
        matches!(self, Self::GradTransformer | Self::ProductsTransformer | Self::ResidualTransformer)
    }

    /// What a trained one predicts; nothing where the run's settings say it.
    pub fn targets(self) -> Option<Targets> {
        match self {
            Self::ProductsTransformer => Some(Targets::Products),
            Self::ResidualTransformer => Some(Targets::Residual),
            _ => None,
        }
    }

    /// The name on the command line and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::GradTransformer => "grad-transformer",
            Self::Baseline(i) => BASELINES[i].about().name,
            Self::Products => "products",
            Self::ProductsTransformer => "grad-transformer-products",
            Self::ResidualTransformer => "grad-transformer-residual",
        }
    }

    /// The name in tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::GradTransformer => "Grad-Transformer",
            Self::Baseline(i) => BASELINES[i].about().label,
            Self::Products => "products",
            Self::ProductsTransformer => "Grad-Transformer of products",
            Self::ResidualTransformer => "products + Grad-Transformer",
        }
    }

    /// The place in tables.
    pub fn order(self) -> usize {
        match self {
            Self::GradTransformer => 0,
            Self::Baseline(i) => i + 1,
            Self::Products => BASELINES.len() + 1,
            Self::ProductsTransformer => STANDARD,
            Self::ResidualTransformer => STANDARD + 1,
        }
    }
}

impl ValueEnum for Method {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::GradTransformer => "The trained Grad-Transformer",
            Self::Baseline(i) => BASELINES[*i].about().help,
            Self::Products => {
                "The same regression, of groups of shadows, onto the products of the LLM's adapters"
            }
            Self::ProductsTransformer => "A Grad-Transformer trained with train.targets = products",
            Self::ResidualTransformer => "A Grad-Transformer trained with train.targets = residual",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        Self::named(&name).ok_or_else(|| D::Error::custom(format!("unknown translator `{name}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_known_by_their_names() {
        for method in Method::ALL {
            let text = serde_json::to_string(&method).unwrap();
            assert_eq!(text, format!("\"{}\"", method.name()));
            assert_eq!(serde_json::from_str::<Method>(&text).unwrap(), method);
            assert_eq!(Method::ALL[method.order()], method);
        }
        let mut names = Method::ALL.map(Method::name);
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        assert!(serde_json::from_str::<Method>("\"maan\"").is_err());
    }
}
