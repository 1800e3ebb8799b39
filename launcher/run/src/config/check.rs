//! Which values of settings no stage can use.
//!
//! Every number has bounds, wide enough for anything that may run, and narrow enough that
//! sums, products and durations made of them stay numbers. What is outside is a slip of the
//! keyboard, and is refused before anything is read, planned or made.

use super::{
    Config, DeviceKind, DtypeKind, PenaltyChoice, RANDOM_SUBSETS, Recipe, TrainConfig, TranslatorConfig,
};
use crate::failure::unusable;
use anyhow::Result;
use gradtx_models::grad_transformer::{NormalizationMode, StartToken};
use gradtx_runtime::optim::Decay;
use std::fmt::{Display, Write as _};
use std::ops::RangeInclusive;

/// Steps of a training; at a millisecond each, more than eleven days.
const MAX_STEPS: u64 = 1_000_000_000;
/// Examples, subsets, tuples: of anything that is counted one by one.
const MAX_ITEMS: u64 = 1_000_000_000;
/// Tokens of a stream, of an example, of an answer.
const MAX_TOKENS: u64 = 16 << 20;
/// Shadow subsets; each is a pair of files.
const MAX_SUBSETS: u64 = 100_000;
/// Tuples of a step, in which some hundred thousand values each are held at once.
const MAX_TUPLES: u64 = 1_000_000;
/// Minutes of a year.
const MAX_MINUTES: f64 = 525_600.0;
/// Above this nothing is learned from a step.
const MAX_RATE: f64 = 1000.0;
/// Real numbers beyond this overflow f32 once they are squared.
const MAX_REAL: f64 = 1e18;

/// Collects what is wrong, a line each.
#[derive(Default)]
struct Findings {
    wrong: String,
}

impl Findings {
    fn expect(&mut self, ok: bool, what: impl Display) {
        if !ok {
            let _ = writeln!(self.wrong, "  {what}");
        }
    }

    fn whole(
        &mut self,
        key: impl Display,
        value: impl TryInto<u64> + Display + Copy,
        range: RangeInclusive<u64>,
    ) {
        let (low, high) = (range.start(), range.end());
        let fine = value.try_into().is_ok_and(|value| range.contains(&value));
        self.expect(fine, format_args!("{key} = {value}: expected a whole number from {low} to {high}"));
    }

    /// A number of a closed range; never NaN or infinite.
    fn real(&mut self, key: impl Display, value: f64, range: RangeInclusive<f64>) {
        let (low, high) = (range.start(), range.end());
        self.expect(
            range.contains(&value),
            format_args!("{key} = {value}: expected a number from {low} to {high}"),
        );
    }

    /// A number above 0.
    fn positive(&mut self, key: impl Display, value: f64, highest: f64) {
        let what = format_args!("{key} = {value}: expected a number above 0, at most {highest}");
        self.expect(value > 0.0 && value <= highest, what);
    }

    /// A number from 0 to below 1.
    fn part(&mut self, key: impl Display, value: f64) {
        let what = format_args!("{key} = {value}: expected a number from 0 to below 1");
        self.expect((0.0..1.0).contains(&value), what);
    }
}

impl Config {
    /// Refuses values that no stage can use.
    ///
    /// # Errors
    /// One error that names every key, its value, and what is allowed.
    pub fn check(&self) -> Result<()> {
        let mut findings = Findings::default();
        findings.whole("seed", self.seed, 0..=i64::MAX as u64);
        self.check_places(&mut findings);
        self.check_curation(&mut findings);
        check_recipe(&mut findings, "finetune.tiny", &self.finetune.tiny);
        check_recipe(&mut findings, "finetune.llm", &self.finetune.llm);
        check_translator(&mut findings, &self.translator);
        check_training(&mut findings, &self.train);
        findings.whole("translate.lora_r", self.translate.lora_r, 1..=1024);
        if let PenaltyChoice::Fixed(penalty) = self.translate.penalty {
            findings.positive("translate.penalty", penalty, 1e6);
        }
        findings.whole("translate.penalty_examples", self.translate.penalty_examples, 1..=MAX_ITEMS);
        self.check_refinement(&mut findings);
        findings.whole(
            "evaluate.per_device_eval_batch_size",
            self.evaluate.per_device_eval_batch_size,
            1..=MAX_ITEMS,
        );
        findings.whole("evaluate.max_new_tokens", self.evaluate.max_new_tokens, 1..=MAX_TOKENS);
        match findings.wrong.trim_end() {
            "" => Ok(()),
            wrong => Err(unusable(format!("the configuration:\n{wrong}"))),
        }
    }

    fn check_refinement(&self, findings: &mut Findings) {
        let refine = &self.refine;
        findings.whole("refine.num_rounds", refine.num_rounds, 1..=100);
        findings.whole("refine.num_prompts", refine.num_prompts, 2..=MAX_ITEMS);
        findings.whole("refine.steps_per_round", refine.steps_per_round, 1..=1_000_000);
        findings.whole("refine.global_batch_size", refine.global_batch_size, 1..=MAX_ITEMS);
        findings.whole("refine.min_agreements", refine.min_agreements, 1..=MAX_ITEMS);
        findings.real("refine.min_confidence", refine.min_confidence, 0.0..=1.0);
    }

    /// Device, data and adapter.
    fn check_places(&self, findings: &mut Findings) {
        let Self { device, lora: adapter, .. } = self;
        findings.expect(
            device.kind != DeviceKind::Cpu || device.dtype != DtypeKind::Bf16,
            "device.dtype: the CPU computes in f32; bf16 is for device.kind = \"cuda\"",
        );
        findings.whole("device.max_tokens_per_microbatch", device.max_tokens_per_microbatch, 1..=MAX_TOKENS);
        findings.whole("data.max_length", self.data.max_length, 2..=MAX_TOKENS);
        findings.real("data.max_lost_labels", self.data.max_lost_labels, 0.0..=1.0);
        findings.expect(
            self.data.date.is_empty()
                || chrono::NaiveDate::parse_from_str(&self.data.date, "%Y-%m-%d").is_ok(),
            "data.date: expected a date such as 2026-11-27, or nothing for the day on which the run is made",
        );
        if let Err(why) = self.data.columns.check() {
            findings.expect(false, format_args!("data.columns: {why}"));
        }
        findings.whole("lora.r", adapter.r, 1..=65_536);
        findings.positive("lora.lora_alpha", adapter.lora_alpha, 1e6);
        findings.part("lora.lora_dropout", adapter.lora_dropout);
        findings
            .expect(!adapter.target_modules.is_empty(), "lora.target_modules: expected at least one module");
    }

    fn check_curation(&self, findings: &mut Findings) {
        let curate = &self.curate;
        findings.whole("curate.num_subsets", curate.num_subsets, 1..=MAX_SUBSETS);
        findings.whole("curate.examples_per_subset", curate.examples_per_subset, 1..=MAX_ITEMS);
        findings.whole("curate.num_snapshots", curate.num_snapshots, 1..=MAX_STEPS);
        findings.whole("curate.snapshot_steps", curate.snapshot_steps, 1..=MAX_STEPS);
        findings.whole("curate.jobs_per_batch", curate.jobs_per_batch, 0..=4096);
        findings.real("curate.save_minutes", curate.save_minutes, 0.0..=MAX_MINUTES);
        findings.real("curate.dirichlet_alpha", curate.dirichlet_alpha, 0.0..=1e9);
        findings.expect(
            curate.dirichlet_alpha == 0.0 || curate.group_by != RANDOM_SUBSETS,
            "curate.dirichlet_alpha: needs groups to mix; set curate.group_by to a column, such as task",
        );
        let back =
            (curate.num_snapshots as u64).saturating_sub(1).saturating_mul(curate.snapshot_steps.into());
        let collected = back.saturating_add(1);
        for (name, recipe) in [("curate.tiny", &curate.tiny), ("curate.llm", &curate.llm)] {
            let what = format!(
                "{name}.max_steps = {}: the snapshots reach {collected} steps back",
                recipe.max_steps
            );
            findings.expect(u64::from(recipe.max_steps) >= collected, what);
            check_recipe(findings, name, recipe);
        }
    }
}

fn check_recipe(findings: &mut Findings, name: &str, recipe: &Recipe) {
    findings.whole(format_args!("{name}.max_steps"), recipe.max_steps, 1..=MAX_STEPS);
    findings.whole(format_args!("{name}.global_batch_size"), recipe.global_batch_size, 1..=MAX_ITEMS);
    findings.part(format_args!("{name}.adam_beta1"), recipe.adam_beta1);
    findings.part(format_args!("{name}.adam_beta2"), recipe.adam_beta2);
    let Recipe {
        learning_rate: lr,
        adam_epsilon: eps,
        weight_decay,
        max_grad_norm: max_norm,
        min_lr_rate: final_fraction,
        ..
    } = *recipe;
    check_optimizer(findings, name, [lr, eps, weight_decay, max_norm]);
    check_schedule(
        findings,
        name,
        recipe.lr_scheduler_type,
        [recipe.max_steps, recipe.warmup_steps],
        final_fraction,
    );
}

fn check_optimizer(findings: &mut Findings, name: &str, [lr, eps, weight_decay, max_norm]: [f64; 4]) {
    findings.positive(format_args!("{name}.learning_rate"), lr, MAX_RATE);
    // ε divides where a gradient is zero.
    findings.positive(format_args!("{name}.adam_epsilon"), eps, 1.0);
    findings.real(format_args!("{name}.weight_decay"), weight_decay, 0.0..=MAX_RATE);
    findings.real(format_args!("{name}.max_grad_norm"), max_norm, 0.0..=MAX_REAL);
}

fn check_schedule(findings: &mut Findings, name: &str, decay: Decay, [steps, warmup]: [u32; 2], end: f64) {
    let what = format_args!(
        "{name}.warmup_steps = {warmup}: expected at most the {steps} steps of {name}.max_steps"
    );
    findings.expect(warmup <= steps, what);
    if decay != Decay::Constant {
        findings.real(format_args!("{name}.min_lr_rate"), end, 0.0..=1.0);
    }
}

fn check_translator(findings: &mut Findings, translator: &TranslatorConfig) {
    for (name, value, most) in [
        ("d_model", translator.d_model, 65_536),
        ("d_ff", translator.d_ff, 1 << 20),
        ("d_kv", translator.d_kv, 4096),
        ("num_heads", translator.num_heads, 4096),
        ("num_layers", translator.num_layers, 1000),
        ("num_decoder_layers", translator.num_decoder_layers, 1000),
    ] {
        findings.whole(format_args!("translator.{name}"), value, 1..=most);
    }
    findings.part("translator.dropout_rate", translator.dropout_rate);
    findings.expect(
        StartToken::parse(&translator.decoder_start).is_some(),
        "translator.decoder_start: expected embedded, released or zero",
    );
    findings.expect(
        NormalizationMode::parse(&translator.update_normalization).is_some(),
        "translator.update_normalization: expected none, scalar, scalar_centred, block or coordinate",
    );
}

fn check_training(findings: &mut Findings, train: &TrainConfig) {
    findings.whole("train.max_steps", train.max_steps, 1..=MAX_STEPS);
    findings.whole("train.global_batch_size", train.global_batch_size, 1..=MAX_TUPLES);
    findings.expect(
        train.per_device_train_batch_size > 0
            && train.global_batch_size.is_multiple_of(train.per_device_train_batch_size.max(1)),
        format_args!(
            "train.per_device_train_batch_size = {}: expected a divisor of train.global_batch_size",
            train.per_device_train_batch_size
        ),
    );
    let TrainConfig {
        learning_rate: lr,
        adam_epsilon: eps,
        weight_decay,
        max_grad_norm: max_norm,
        min_lr_rate: final_fraction,
        ..
    } = *train;
    check_optimizer(findings, "train", [lr, eps, weight_decay, max_norm]);
    check_schedule(
        findings,
        "train",
        train.lr_scheduler_type,
        [train.max_steps, train.warmup_steps],
        final_fraction,
    );
    findings.part("train.val_set_size", train.val_set_size);
    findings.whole("train.eval_steps", train.eval_steps, 1..=u32::MAX.into());
    findings.real("train.save_minutes", train.save_minutes, 0.0..=MAX_MINUTES);
    findings.real("train.mixup_prob", train.mixup_prob, 0.0..=1.0);
    findings.real("train.mixup_std", train.mixup_std, 0.0..=MAX_RATE);
    findings.real("train.input_noise_std", train.input_noise_std, 0.0..=MAX_RATE);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `check` says of the defaults with one setting changed; nothing where it is accepted.
    fn said(set: &str) -> Option<String> {
        let config = Config::default().with_overrides(&[set.to_string()]);
        config.and_then(|config| config.check()).err().map(|error| error.to_string())
    }

    #[test]
    fn absurd_values_are_refused_with_key_value_and_range() {
        for (key, values) in [
            ("translator.num_layers", &["0", "1000000000", "9223372036854775807"][..]),
            ("translator.d_ff", &["0", "1000000000000"]),
            ("curate.num_subsets", &["0", "1000000000000"]),
            ("curate.save_minutes", &["-1", "nan", "inf", "1e300"]),
            ("curate.tiny.learning_rate", &["0", "-1e-4", "nan", "inf", "1e300"]),
            ("curate.llm.adam_beta1", &["1", "-0.1", "nan"]),
            ("curate.llm.adam_epsilon", &["0", "-1", "nan"]),
            ("curate.llm.warmup_steps", &["88", "4294967295"]),
            ("finetune.llm.global_batch_size", &["0", "9223372036854775807"]),
            ("finetune.tiny.weight_decay", &["-1", "nan", "inf"]),
            ("lora.r", &["0", "9223372036854775807"]),
            ("lora.lora_alpha", &["0", "-16", "nan", "inf", "1e300"]),
            ("lora.lora_dropout", &["1", "-0.1", "nan"]),
            ("device.max_tokens_per_microbatch", &["0", "9223372036854775807"]),
            ("data.max_length", &["0", "1", "9223372036854775807"]),
            ("data.max_lost_labels", &["-0.1", "1.5", "nan"]),
            ("train.max_steps", &["0", "4000000000"]),
            ("train.val_set_size", &["1", "nan", "-0.1"]),
            ("train.mixup_std", &["-1", "nan", "inf"]),
            ("train.max_grad_norm", &["-1", "nan", "inf"]),
            ("translate.lora_r", &["0", "1025"]),
            ("translate.penalty", &["0", "-1", "nan", "inf"]),
            ("translate.penalty_examples", &["0"]),
            ("refine.num_rounds", &["0", "1000"]),
            ("refine.steps_per_round", &["0", "4000000000"]),
            ("refine.min_confidence", &["-0.1", "1.1", "nan"]),
            ("evaluate.max_new_tokens", &["0", "1000000000000"]),
        ] {
            for value in values {
                let said =
                    said(&format!("{key}={value}")).unwrap_or_else(|| panic!("{key}={value} is accepted"));
                assert!(said.contains(key) && said.contains("expected"), "{key}={value}: {said}");
            }
        }
    }

    #[test]
    fn numbers_that_toml_or_the_setting_cannot_hold_are_refused() {
        for set in
            ["seed=-1", "seed=9223372036854775808", "curate.snapshot_steps=-1", "train.max_steps=5000000000"]
        {
            let said = said(set).unwrap_or_else(|| panic!("{set} is accepted"));
            assert!(said.contains(set.split('=').next().unwrap()), "{set}: {said}");
        }
    }

    #[test]
    fn what_may_run_is_accepted() {
        for set in [
            "seed=9223372036854775807",
            "translator.num_layers=48",
            "curate.num_subsets=10000",
            "data.max_length=1048576",
            "train.val_set_size=0",
            "train.save_minutes=0",
            "curate.llm.warmup_steps=87",
            "train.lr_scheduler_type=\"constant\"",
            "lora.lora_dropout=0",
            "lora.lora_alpha=0.5",
            "curate.tiny.max_grad_norm=0",
            "translate.penalty=0.02",
            "translate.penalty=\"mse\"",
        ] {
            assert_eq!(said(set), None, "{set}");
        }
    }
}
