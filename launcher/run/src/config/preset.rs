//! Settings with a name: `--preset`.

use super::{Config, Recipe, ValidationSplit};
use clap::ValueEnum;
use gradtx_models::grad_transformer::{NormalizationMode, StartToken, Targets};

/// ε of AdamW in the published scripts: the library's default.
const USUAL_EPSILON: f64 = 1e-8;

/// Settings with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// What the method's paper and published code do where gradtx does otherwise: updates in
    /// their own units, factors as the translator's targets, the published decoder start, no
    /// augmentation, AdamW's usual epsilon, validation on tuples rather than shadow subsets.
    Paper,
}

impl Config {
    /// With a preset's settings in the place of its own.
    pub(super) fn with_preset(mut self, preset: Preset) -> Self {
        match preset {
            Preset::Paper => self.as_in_the_paper(),
        }
        self
    }

    /// Sizes, rates and steps stay: their defaults are the paper's already.
    fn as_in_the_paper(&mut self) {
        self.translator.update_normalization = NormalizationMode::None;
        self.translator.decoder_start = StartToken::Released;
        self.train.targets = Targets::Factors;
        self.train.mixup_prob = 0.0;
        self.train.input_noise_std = 0.0;
        self.train.val_split_by = ValidationSplit::Tuple;
        let recipes: [&mut Recipe; 4] =
            [&mut self.curate.tiny, &mut self.curate.llm, &mut self.finetune.tiny, &mut self.finetune.llm];
        recipes.into_iter().for_each(|recipe| recipe.adam_epsilon = USUAL_EPSILON);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_paper_s_or_measured_better() {
        let ours = Config::default();
        let paper = ours.clone().with_preset(Preset::Paper);
        let differs = super::super::diff(&ours.table(), &paper.table());
        let keys: Vec<&str> = differs.lines().filter_map(|l| l.trim().strip_prefix("- ")).collect();
        let names: Vec<&str> = keys.iter().filter_map(|k| k.split(" = ").next()).collect();
        assert_eq!(
            names,
            ["train.val_split_by", "translator.decoder_start", "translator.update_normalization"]
        );
        paper.check().unwrap();
    }
}
