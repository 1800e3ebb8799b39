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
        findings.whole("translate.rank", self.translate.rank, 1..=1024);
        if let PenaltyChoice::Fixed(penalty) = self.translate.penalty {
            findings.positive("translate.penalty", penalty, 1e6);
        }
        findings.whole("translate.penalty_examples", self.translate.penalty_examples, 1..=MAX_ITEMS);
        self.check_refinement(&mut findings);
        findings.whole("evaluate.batch", self.evaluate.batch, 1..=MAX_ITEMS);
        findings.whole("evaluate.max_new_tokens", self.evaluate.max_new_tokens, 1..=MAX_TOKENS);
        match findings.wrong.trim_end() {
            "" => Ok(()),
            wrong => Err(unusable(format!("the configuration:\n{wrong}"))),
        }
    }

    fn check_refinement(&self, findings: &mut Findings) {
        let refine = &self.refine;
        findings.whole("refine.rounds", refine.rounds, 1..=100);
        findings.whole("refine.prompts", refine.prompts, 2..=MAX_ITEMS);
        findings.whole("refine.steps", refine.steps, 1..=1_000_000);
        findings.whole("refine.batch", refine.batch, 1..=MAX_ITEMS);
        findings.whole("refine.least", refine.least, 1..=MAX_ITEMS);
        findings.real("refine.sure", refine.sure, 0.0..=1.0);
    }

    /// Device, data and adapter.
    fn check_places(&self, findings: &mut Findings) {
        let Self { device, adapter, .. } = self;
        findings.expect(
            device.kind != DeviceKind::Cpu || device.dtype != DtypeKind::Bf16,
            "device.dtype: the CPU computes in f32; bf16 is for device.kind = \"cuda\"",
        );
        findings.whole("device.stream_tokens", device.stream_tokens, 1..=MAX_TOKENS);
        findings.whole("data.max_length", self.data.max_length, 2..=MAX_TOKENS);
        findings.expect(
            self.data.date.is_empty()
                || chrono::NaiveDate::parse_from_str(&self.data.date, "%Y-%m-%d").is_ok(),
            "data.date: expected a date such as 2026-11-27, or nothing for the day on which the run is made",
        );
        if let Err(why) = self.data.columns.check() {
            findings.expect(false, format_args!("data.columns: {why}"));
        }
        findings.whole("adapter.rank", adapter.rank, 1..=65_536);
        findings.positive("adapter.alpha", adapter.alpha, 1e6);
        findings.part("adapter.dropout", adapter.dropout);
        findings.expect(!adapter.targets.is_empty(), "adapter.targets: expected at least one module");
    }

    fn check_curation(&self, findings: &mut Findings) {
        let curate = &self.curate;
        findings.whole("curate.subsets", curate.subsets, 1..=MAX_SUBSETS);
        findings.whole("curate.examples", curate.examples, 1..=MAX_ITEMS);
        findings.whole("curate.snapshots", curate.snapshots, 1..=MAX_STEPS);
        findings.whole("curate.every", curate.every, 1..=MAX_STEPS);
        findings.whole("curate.concurrent", curate.concurrent, 0..=4096);
        findings.real("curate.checkpoint_minutes", curate.checkpoint_minutes, 0.0..=MAX_MINUTES);
        findings.real("curate.mixture", curate.mixture, 0.0..=1e9);
        findings.expect(
            curate.mixture == 0.0 || curate.group_by != RANDOM_SUBSETS,
            "curate.mixture: needs groups to mix; set curate.group_by to a column, such as task",
        );
        let back = (curate.snapshots as u64).saturating_sub(1).saturating_mul(curate.every.into());
        let collected = back.saturating_add(1);
        for (name, recipe) in [("curate.tiny", &curate.tiny), ("curate.llm", &curate.llm)] {
            let what = format!("{name}.steps = {}: the snapshots reach {collected} steps back", recipe.steps);
            findings.expect(u64::from(recipe.steps) >= collected, what);
            check_recipe(findings, name, recipe);
        }
    }
}

fn check_recipe(findings: &mut Findings, name: &str, recipe: &Recipe) {
    findings.whole(format_args!("{name}.steps"), recipe.steps, 1..=MAX_STEPS);
    findings.whole(format_args!("{name}.batch"), recipe.batch, 1..=MAX_ITEMS);
    findings.part(format_args!("{name}.beta1"), recipe.beta1);
    findings.part(format_args!("{name}.beta2"), recipe.beta2);
    let Recipe { lr, eps, weight_decay, max_norm, final_fraction, .. } = *recipe;
    check_optimizer(findings, name, [lr, eps, weight_decay, max_norm]);
    check_schedule(findings, name, recipe.decay, [recipe.steps, recipe.warmup], final_fraction);
}

fn check_optimizer(findings: &mut Findings, name: &str, [lr, eps, weight_decay, max_norm]: [f64; 4]) {
    findings.positive(format_args!("{name}.lr"), lr, MAX_RATE);
    // ε divides where a gradient is zero.
    findings.positive(format_args!("{name}.eps"), eps, 1.0);
    findings.real(format_args!("{name}.weight_decay"), weight_decay, 0.0..=MAX_RATE);
    findings.real(format_args!("{name}.max_norm"), max_norm, 0.0..=MAX_REAL);
}

fn check_schedule(findings: &mut Findings, name: &str, decay: Decay, [steps, warmup]: [u32; 2], end: f64) {
    let what = format_args!("{name}.warmup = {warmup}: expected at most the {steps} steps of {name}.steps");
    findings.expect(warmup <= steps, what);
    if decay != Decay::Constant {
        findings.real(format_args!("{name}.final_fraction"), end, 0.0..=1.0);
    }
}

fn check_translator(findings: &mut Findings, translator: &TranslatorConfig) {
    for (name, value, most) in [
        ("d_model", translator.d_model, 65_536),
        ("d_ff", translator.d_ff, 1 << 20),
        ("d_kv", translator.d_kv, 4096),
        ("heads", translator.heads, 4096),
        ("encoder_layers", translator.encoder_layers, 1000),
        ("decoder_layers", translator.decoder_layers, 1000),
    ] {
        findings.whole(format_args!("translator.{name}"), value, 1..=most);
    }
    findings.part("translator.dropout", translator.dropout);
    findings.expect(
        StartToken::parse(&translator.start).is_some(),
        "translator.start: expected embedded, released or zero",
    );
    findings.expect(
        NormalizationMode::parse(&translator.normalization).is_some(),
        "translator.normalization: expected none, scalar, scalar_centred, block or coordinate",
    );
}

fn check_training(findings: &mut Findings, train: &TrainConfig) {
    findings.whole("train.steps", train.steps, 1..=MAX_STEPS);
    findings.whole("train.batch", train.batch, 1..=MAX_TUPLES);
    findings.expect(
        train.micro_batch > 0 && train.batch.is_multiple_of(train.micro_batch.max(1)),
        format_args!("train.micro_batch = {}: expected a divisor of train.batch", train.micro_batch),
    );
    let TrainConfig { lr, eps, weight_decay, max_norm, final_fraction, .. } = *train;
    check_optimizer(findings, "train", [lr, eps, weight_decay, max_norm]);
    check_schedule(findings, "train", train.decay, [train.steps, train.warmup], final_fraction);
    findings.part("train.validation", train.validation);
    findings.whole("train.validate_every", train.validate_every, 1..=u32::MAX.into());
    findings.real("train.checkpoint_minutes", train.checkpoint_minutes, 0.0..=MAX_MINUTES);
    findings.real("train.augment", train.augment, 0.0..=1.0);
    findings.real("train.augment_spread", train.augment_spread, 0.0..=MAX_RATE);
    findings.real("train.student_noise", train.student_noise, 0.0..=MAX_RATE);
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
            ("translator.encoder_layers", &["0", "1000000000", "9223372036854775807"][..]),
            ("translator.d_ff", &["0", "1000000000000"]),
            ("curate.subsets", &["0", "1000000000000"]),
            ("curate.checkpoint_minutes", &["-1", "nan", "inf", "1e300"]),
            ("curate.tiny.lr", &["0", "-1e-4", "nan", "inf", "1e300"]),
            ("curate.llm.beta1", &["1", "-0.1", "nan"]),
            ("curate.llm.eps", &["0", "-1", "nan"]),
            ("curate.llm.warmup", &["88", "4294967295"]),
            ("finetune.llm.batch", &["0", "9223372036854775807"]),
            ("finetune.tiny.weight_decay", &["-1", "nan", "inf"]),
            ("adapter.rank", &["0", "9223372036854775807"]),
            ("adapter.alpha", &["0", "-16", "nan", "inf", "1e300"]),
            ("adapter.dropout", &["1", "-0.1", "nan"]),
            ("device.stream_tokens", &["0", "9223372036854775807"]),
            ("data.max_length", &["0", "1", "9223372036854775807"]),
            ("train.steps", &["0", "4000000000"]),
            ("train.validation", &["1", "nan", "-0.1"]),
            ("train.augment_spread", &["-1", "nan", "inf"]),
            ("train.max_norm", &["-1", "nan", "inf"]),
            ("translate.rank", &["0", "1025"]),
            ("translate.penalty", &["0", "-1", "nan", "inf"]),
            ("translate.penalty_examples", &["0"]),
            ("refine.rounds", &["0", "1000"]),
            ("refine.steps", &["0", "4000000000"]),
            ("refine.sure", &["-0.1", "1.1", "nan"]),
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
        for set in ["seed=-1", "seed=9223372036854775808", "curate.every=-1", "train.steps=5000000000"] {
            let said = said(set).unwrap_or_else(|| panic!("{set} is accepted"));
            assert!(said.contains(set.split('=').next().unwrap()), "{set}: {said}");
        }
    }

    #[test]
    fn what_may_run_is_accepted() {
        for set in [
            "seed=9223372036854775807",
            "translator.encoder_layers=48",
            "curate.subsets=10000",
            "data.max_length=1048576",
            "train.validation=0",
            "train.checkpoint_minutes=0",
            "curate.llm.warmup=87",
            "train.decay=\"constant\"",
            "adapter.dropout=0",
            "adapter.alpha=0.5",
            "curate.tiny.max_norm=0",
            "translate.penalty=0.02",
            "translate.penalty=\"mse\"",
        ] {
            assert_eq!(said(set), None, "{set}");
        }
    }
}
