//! Which values of settings no stage can use.

use super::{Config, DeviceKind, DtypeKind, RANDOM_SUBSETS};
use crate::failure::unusable;
use anyhow::Result;
use gradtx_models::grad_transformer::{NormalizationMode, StartToken};
use std::fmt::Write as _;

impl Config {
    /// Refuses values that no stage can use.
    pub fn check(&self) -> Result<()> {
        let mut wrong = String::new();
        let mut expect = |ok: bool, what: &str| {
            if !ok {
                let _ = writeln!(wrong, "  {what}");
            }
        };
        expect(self.adapter.rank > 0, "adapter.rank: expected at least 1");
        expect(!self.adapter.targets.is_empty(), "adapter.targets: expected at least one module");
        expect((0.0..1.0).contains(&self.adapter.dropout), "adapter.dropout: expected 0 ≤ p < 1");
        expect((0.0..1.0).contains(&self.translator.dropout), "translator.dropout: expected 0 ≤ p < 1");
        expect(
            self.device.kind != DeviceKind::Cpu || self.device.dtype == DtypeKind::F32,
            "device.dtype: the CPU computes in f32; bf16 is for device.kind = \"cuda\"",
        );
        expect(self.device.stream_tokens > 0, "device.stream_tokens: expected at least 1");
        expect(self.data.max_length >= 2, "data.max_length: expected at least 2");
        expect(
            self.data.date.is_empty()
                || chrono::NaiveDate::parse_from_str(&self.data.date, "%Y-%m-%d").is_ok(),
            "data.date: expected a date such as 2026-11-27, or nothing for the day on which the run is made",
        );
        if let Err(why) = self.data.columns.check() {
            expect(false, &format!("data.columns: {why}"));
        }
        expect(self.curate.subsets > 0, "curate.subsets: expected at least 1");
        expect(self.curate.examples > 0, "curate.examples: expected at least 1");
        expect(self.curate.checkpoint_minutes >= 0.0, "curate.checkpoint_minutes: expected 0 or more");
        expect(self.curate.snapshots > 0, "curate.snapshots: expected at least 1");
        expect(self.curate.every > 0, "curate.every: expected at least 1");
        expect(
            self.curate.mixture >= 0.0 && self.curate.mixture.is_finite(),
            "curate.mixture: expected a positive number, or 0 for none",
        );
        expect(
            self.curate.mixture == 0.0 || self.curate.group_by != RANDOM_SUBSETS,
            "curate.mixture: needs groups to mix; set curate.group_by to a column, such as task",
        );
        let collected = (self.curate.snapshots.saturating_sub(1)) as u64 * self.curate.every as u64 + 1;
        for (name, recipe) in [("curate.tiny", &self.curate.tiny), ("curate.llm", &self.curate.llm)] {
            let what = format!("{name}.steps: the snapshots reach {collected} steps back");
            expect(recipe.steps as u64 >= collected, &what);
        }
        for (name, recipe) in [
            ("curate.tiny", &self.curate.tiny),
            ("curate.llm", &self.curate.llm),
            ("finetune.tiny", &self.finetune.tiny),
            ("finetune.llm", &self.finetune.llm),
        ] {
            expect(recipe.steps > 0, &format!("{name}.steps: expected at least 1"));
            expect(recipe.batch > 0, &format!("{name}.batch: expected at least 1"));
            expect(
                recipe.lr > 0.0 && recipe.lr.is_finite(),
                &format!("{name}.lr: expected a positive number"),
            );
            expect(
                recipe.max_norm >= 0.0,
                &format!("{name}.max_norm: expected a positive number, or 0 for none"),
            );
        }
        let translator = &self.translator;
        expect(
            StartToken::parse(&translator.start).is_some(),
            "translator.start: expected embedded, released or zero",
        );
        expect(
            NormalizationMode::parse(&translator.normalization).is_some(),
            "translator.normalization: expected none, scalar, scalar_centred, block or coordinate",
        );
        let train = &self.train;
        expect(train.steps > 0 && train.batch > 0, "train.steps, train.batch: expected at least 1");
        expect(
            train.micro_batch > 0 && train.batch.is_multiple_of(train.micro_batch.max(1)),
            "train.micro_batch: expected a divisor of train.batch",
        );
        expect(train.lr > 0.0 && train.lr.is_finite(), "train.lr: expected a positive number");
        expect((0.0..1.0).contains(&train.validation), "train.validation: expected 0 ≤ part < 1");
        expect(train.validate_every > 0, "train.validate_every: expected at least 1");
        expect(train.checkpoint_minutes >= 0.0, "train.checkpoint_minutes: expected 0 or more");
        expect((0.0..=1.0).contains(&train.augment), "train.augment: expected 0 ≤ share ≤ 1");
        expect(train.augment_spread >= 0.0, "train.augment_spread: expected 0 or more");
        expect(train.student_noise >= 0.0, "train.student_noise: expected 0 or more");
        expect(self.evaluate.batch > 0, "evaluate.batch: expected at least 1");
        expect(self.evaluate.max_new_tokens > 0, "evaluate.max_new_tokens: expected at least 1");
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(unusable(format!("the configuration:\n{}", wrong.trim_end())))
        }
    }
}
