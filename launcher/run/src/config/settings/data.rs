//! `[data]`: the public data, and how examples become tokens.

use super::bounds::{Findings, MAX_TOKENS};
use crate::text::today;
use gradtx_runtime::data::{
    Columns, Format, Instruction, OnError, PromptForm, PromptSettings, Reading, SplitChoice, TrainOn,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Examples and their form as tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// The provider's public data: a JSONL, JSON, CSV, TSV or Parquet file, a directory of
    /// them, or a list of such paths. docs/data.md shows all forms.
    pub public: DataPaths,
    /// What the columns are. Set it where `auto` takes the data for something else; every stage shows
    /// what it took.
    pub format: Format,
    /// What is put before the prompt: `published`, for published data sets the instruction of
    /// the method's authors; `none`, for models that know the task already; or a text of one's
    /// own, which stands on a line before every prompt.
    pub instruction: Instruction,
    /// Which files of a directory or a list that has train and test files.
    pub split: SplitChoice,
    /// Which answers of a conversation are learned. Prompts never are.
    pub train_on: TrainOn,
    /// What is done with rows that cannot be used.
    pub on_error: OnError,
    /// MiB that the rows of a data set may take in memory. 0: 1 GiB, or 200 times the size of
    /// its files if that is more, and at most three quarters of the memory that is free.
    pub read_limit_mib: u64,
    /// How a prompt is rendered, for each of the two models.
    pub prompt: PromptForm,
    /// System message of conversations that have none. Empty: what the form puts there
    /// itself (ChatML: `You are Qwen, …`); `none`: no message.
    pub system_prompt: String,
    /// The date that chat templates take for today, `2026-11-27`. Empty: the day on which the
    /// run is made (UTC), which is kept in its run.toml.
    pub date: String,
    /// Longest example in tokens; longer ones are cut at the end.
    pub max_length: usize,
    /// Share of the labels (tokens of answers) that may be lost by cutting, from 0 to 1; more is an
    /// error before anything is trained.
    pub max_lost_labels: f64,
    /// Names of columns, for data that is none of the known forms. Empty: columns that are known by
    /// their own names.
    pub columns: Columns,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            public: DataPaths::default(),
            format: Format::default(),
            instruction: Instruction::Published,
            prompt: PromptForm::Auto,
            system_prompt: String::new(),
            date: String::new(),
            split: SplitChoice::Auto,
            train_on: TrainOn::Last,
            on_error: OnError::Fail,
            read_limit_mib: 0,
            max_length: 4096,
            max_lost_labels: 0.1,
            columns: Columns::default(),
        }
    }
}

impl DataConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        findings.whole("data.max_length", self.max_length, 2..=MAX_TOKENS);
        findings.real("data.max_lost_labels", self.max_lost_labels, 0.0..=1.0);
        findings.expect(
            self.date.is_empty() || chrono::NaiveDate::parse_from_str(&self.date, "%Y-%m-%d").is_ok(),
            "data.date: expected a date such as 2026-11-27, or nothing for the day on which the run is made",
        );
        if let Err(why) = self.columns.check() {
            findings.expect(false, format_args!("data.columns: {why}"));
        }
    }

    /// How records become text. Where no run has been made yet, the date is this day's.
    pub fn prompting(&self) -> PromptSettings {
        let date = if self.date.is_empty() { today() } else { self.date.clone() };
        PromptSettings { form: self.prompt, system: self.system_prompt.clone(), date }
    }

    /// How rows become records.
    pub fn reading(&self) -> Reading {
        Reading {
            format: self.format,
            instruction: self.instruction.clone(),
            columns: self.columns.clone(),
            train_on: self.train_on,
            on_error: self.on_error,
            limit_mib: (self.read_limit_mib > 0).then_some(self.read_limit_mib),
        }
    }

    /// What of it decides which examples a file gives.
    pub fn reading_inputs(&self) -> ReadingInputs {
        let default = Self::default();
        ReadingInputs {
            columns: Some(&self.columns).filter(|columns| **columns != default.columns).cloned(),
            train_on: Some(self.train_on).filter(|train_on| *train_on != default.train_on),
            on_error: Some(self.on_error).filter(|on_error| *on_error != default.on_error),
        }
    }
}

/// Settings that decide which examples a file gives, as the records of stages have them. Only
/// what is not as by default: directories of versions that had fewer settings stay valid.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReadingInputs {
    /// Names of columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// Which answers of a conversation are learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_on: Option<TrainOn>,
    /// What is done with rows that cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
}

/// One path or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum DataPaths {
    /// One; empty when it is not set.
    One(PathBuf),
    /// Several, in this order.
    Many(Vec<PathBuf>),
}

impl Default for DataPaths {
    fn default() -> Self {
        Self::One(PathBuf::new())
    }
}

impl DataPaths {
    /// The paths.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }

    /// The paths, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [PathBuf] {
        match self {
            Self::One(path) => std::slice::from_mut(path),
            Self::Many(paths) => paths,
        }
    }
}

impl std::fmt::Display for DataPaths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<String> = self.as_slice().iter().map(|p| p.display().to_string()).collect();
        f.write_str(&paths.join(", "))
    }
}
