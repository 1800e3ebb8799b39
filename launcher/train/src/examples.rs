//! From files of examples to the packed streams of optimizer steps.
//!
//! In: files of examples (see docs/data.md), and a model's tokenizer. Out: [`Data`] with its examples
//! for one model, and for every optimizer step of a job the segments of packed streams.

use crate::describe::{self, Facts};
use crate::model_spec::ModelSpec;
use crate::prompts::{PromptInputs, Prompts};
use anyhow::Result;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_run::config::{Config, DataConfig, LossNormalization, Recipe};
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::checksum_files;
use gradtx_runtime::data::{
    self, Dataset, Example, Format, Instruction, PackedBatch, Purpose, Record, SegmentInfo, choose,
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;

/// The examples of one or several files, as they were read.
pub struct Data {
    /// Checksum of the files' bytes, one after the other.
    pub checksum: String,
    /// The examples.
    pub records: Vec<Record>,
    /// What the files were taken for.
    pub facts: Facts,
}

/// Examples and their form as text, as the records of stages have it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataInputs {
    /// Checksum of the files' bytes, one after the other.
    pub data: String,
    /// What the columns are.
    pub format: Format,
    /// What is put before the prompt.
    pub instruction: Instruction,
    /// How a prompt is rendered.
    pub prompt: PromptInputs,
}

impl DataInputs {
    /// The same files with these settings.
    pub fn with(&self, config: &DataConfig) -> Self {
        Self {
            data: self.data.clone(),
            format: config.format,
            instruction: config.instruction.clone(),
            prompt: self.prompt.with(config),
        }
    }
}

/// Rows that belong together.
pub struct Group {
    /// What they have in common.
    pub name: String,
    /// Their numbers, from 0, in order.
    pub rows: Vec<usize>,
}

impl Data {
    /// Reads files or directories, the train split where there are several. `setting` is where
    /// the paths are from.
    pub fn read(paths: &[PathBuf], config: &DataConfig, setting: &str) -> Result<Self> {
        Self::read_as(paths, config, setting, Purpose::Training)
    }

    /// The same with the test split.
    pub fn read_for_test(paths: &[PathBuf], config: &DataConfig, setting: &str) -> Result<Self> {
        Self::read_as(paths, config, setting, Purpose::Testing)
    }

    /// The same with the split for a purpose.
    pub fn read_as(paths: &[PathBuf], config: &DataConfig, setting: &str, purpose: Purpose) -> Result<Self> {
        if paths.iter().all(|path| path.as_os_str().is_empty()) {
            return Err(unusable(format!(
                "{setting}: not set; expected a file of examples, see docs/data.md"
            )));
        }
        let chosen = choose(paths, config.split, purpose)?;
        let loaded = data::load(&chosen.files, &config.reading(), false)?;
        let facts = Facts::of(&chosen, &loaded, config);
        Ok(Self { checksum: checksum_files(&chosen.files)?, records: loaded.records, facts })
    }

    /// Shows what the files were taken for, and which rows were left out.
    pub fn announce(&self, context: &Context) {
        self.facts.lines().iter().for_each(|line| context.ui.line(line));
    }

    /// Shows which rows were left out.
    pub fn announce_left_out(&self, context: &Context) {
        self.facts.left_out().for_each(|line| context.ui.line(line));
    }

    /// What is assumed about these examples and the models that are trained on them: what the files
    /// are taken for, how prompts are rendered, where examples are cut.
    pub fn assumed(&self, models: &[(Role, &Prompts)]) -> Vec<String> {
        let mut lines = vec![self.facts.line()];
        let of = models.iter().map(|(_, prompts)| prompts.assumed());
        let all: Vec<Vec<String>> = of.collect();
        match all.as_slice() {
            [one] => lines.extend(one.iter().cloned()),
            [first, others @ ..] if others.iter().all(|other| other == first) => {
                lines.extend(first.iter().cloned())
            }
            _ => {
                for ((role, _), own) in models.iter().zip(all) {
                    lines.extend(own.into_iter().map(|line| format!("{} {line}", role.name())));
                }
            }
        }
        lines
    }

    /// Rows by their value in a column, in the order in which the values first appear.
    pub fn groups(&self, column: &str) -> Result<Vec<Group>> {
        groups(&self.records, column)
    }

    /// How one model is asked for these examples.
    pub fn prompts(&self, config: &Config, side: &ModelSpec) -> Result<Prompts> {
        Prompts::new(&config.data, &side.dir, &side.model, self.records.first())
    }

    /// What a stage's results depend on.
    pub fn inputs(&self, config: &DataConfig, prompts: &[&Prompts]) -> DataInputs {
        DataInputs {
            data: self.checksum.clone(),
            format: config.format,
            instruction: config.instruction.clone(),
            prompt: Prompts::inputs(config, prompts),
        }
    }

    /// The examples as one model sees them; says what they are like, for `stage`.
    pub fn examples(
        &self,
        prompts: &Prompts,
        side: &ModelSpec,
        context: &Context,
        stage: &str,
    ) -> Result<Dataset> {
        let (examples, warnings) = prompts.examples(&self.records, context.threads)?;
        prompts.expect_labels(&examples.summary)?;
        let name = side.role.name();
        context.ui.line(format!("{stage} {name}: {}", examples.summary));
        for warning in warnings {
            context.ui.notice(&format!("{stage} {name}: warning: {warning}"));
        }
        Ok(examples)
    }
}

/// Whether a file is one of data by its name. Files named `*.json` may be settings as well,
/// and what stages note while they work is no data.
pub fn is_data(path: &std::path::Path) -> bool {
    const NOTES: [&str; 3] = ["metrics", "predictions", "throughput"];
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    let is_table =
        ["jsonl", "ndjson", "csv", "tsv", "parquet"].iter().any(|end| name.ends_with(&format!(".{end}")));
    let is_note = NOTES.iter().any(|note| name.starts_with(note))
        || path.parent().is_some_and(|dir| dir.ends_with("metrics"));
    is_table && !is_note
}

/// Facts about a file of data for `inspect`, and what is wrong with it. No text of an example
/// is among them.
pub fn describe(path: &std::path::Path) -> (Vec<(String, String)>, Vec<String>) {
    describe::file(path)
}

/// The column whose place the name of a data set takes where there is none.
const TASK: &str = "task";

/// Records by their value in a column, in the order in which the values first appear.
pub fn groups(records: &[Record], column: &str) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = vec![];
    let mut known: HashMap<String, usize> = HashMap::new();
    for (row, record) in records.iter().enumerate() {
        let name = match record.extra.get(column) {
            Some(serde_json::Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None if column == TASK => record.schema.name().to_string(),
            None => return Err(record.origin.error(format!("there is no column `{column}`")).into()),
        };
        let group = *known.entry(name.clone()).or_insert_with(|| {
            groups.push(Group { name, rows: vec![] });
            groups.len() - 1
        });
        groups[group].rows.push(row);
    }
    Ok(groups)
}

/// The packed streams of one optimizer step, each of at most so many tokens.
///
/// Where a stream ends is decided by the examples alone, never by the device.
pub struct Streams {
    limit: usize,
    done: Vec<PackedBatch>,
    open: PackedBatch,
}

impl Streams {
    /// Empty; a stream holds at most `limit` tokens, or one longer example.
    pub fn new(limit: usize) -> Self {
        Self { limit, done: vec![], open: PackedBatch::default() }
    }

    /// Puts in the examples of one job's optimizer step. `row` is the job's row of the
    /// adapter and gradient matrices, `key` its own key.
    pub fn push_step(&mut self, examples: &[&Example], recipe: &Recipe, row: usize, key: u64, step: u32) {
        let key = derive(derive_named(key, "dropout"), step as u64);
        let all: usize = examples.iter().map(|e| e.labels()).sum();
        for (i, example) in examples.iter().enumerate() {
            let weight = match recipe.loss_reduction {
                LossNormalization::Sequence => 1.0 / (example.labels().max(1) * examples.len()) as f64,
                LossNormalization::Token => 1.0 / all.max(1) as f64,
            };
            if !self.open.is_empty() && self.open.len() + example.tokens.len() > self.limit {
                self.done.push(std::mem::take(&mut self.open));
            }
            let info = SegmentInfo { adapter: row as u32, grad_row: row as u32, key: derive(key, i as u64) };
            self.open.push(example, info, weight);
        }
    }

    /// The streams.
    pub fn finish(mut self) -> Vec<PackedBatch> {
        if !self.open.is_empty() {
            self.done.push(self.open);
        }
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn example(tokens: usize, trained: usize) -> Example {
        let trained = (0..tokens).map(|i| i >= tokens - trained).collect();
        Example { tokens: vec![1; tokens], trained }
    }

    fn written(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn several_files_are_one_data_set_with_tasks() {
        let dir = tempfile::tempdir().unwrap();
        let math = "{\"question\": \"q\", \"answer\": \"#### 1\"}\n";
        let chat = "{\"dialogue\": \"d\", \"summary\": \"s\", \"task\": \"chat\", \"n\": 3}\n";
        let paths = [
            written(dir.path(), "b.jsonl", &math.repeat(2)),
            written(dir.path(), "a.json", &format!("[{chat}, {chat}]")),
        ];
        let config = DataConfig::default();
        let data = Data::read(&paths, &config, "--data").unwrap();
        let groups = data.groups("task").unwrap();
        let found: Vec<_> = groups.iter().map(|g| (g.name.as_str(), g.rows.as_slice())).collect();
        assert_eq!(found, [("gsm8k", &[0, 1][..]), ("chat", &[2, 3])]);
        let message = data.groups("n").err().unwrap().to_string();
        assert!(message.contains("b.jsonl:1") && message.contains("no column `n`"), "{message}");
        assert_eq!(Data::read(&paths[1..], &config, "--data").unwrap().groups("n").unwrap()[0].name, "3");

        let one = Data::read(&paths[..1], &config, "--data").unwrap();
        assert_eq!(one.checksum, gradtx_runtime::artifact::checksum_file(&paths[0]).unwrap());
        assert_ne!(one.checksum, data.checksum);
        let all = Data::read(&[dir.path().to_owned()], &config, "--data").unwrap();
        assert_eq!(all.records.len(), 4);
        assert_ne!(all.checksum, data.checksum, "the directory's order is by name");
        let message = Data::read(&[PathBuf::new()], &config, "data.public").err().unwrap().to_string();
        assert!(message.contains("data.public: not set"), "{message}");
    }

    #[test]
    fn weights_of_a_step_sum_to_one_however_it_is_cut() {
        let examples = [example(5, 1), example(9, 4), example(3, 2)];
        let examples: Vec<&Example> = examples.iter().collect();
        for (normalization, first) in
            [(LossNormalization::Sequence, 1.0 / 3.0), (LossNormalization::Token, 1.0 / 7.0)]
        {
            let recipe = Recipe { loss_reduction: normalization, ..Recipe::default() };
            for (limit, count) in [(100, 1), (14, 2), (1, 3)] {
                let mut streams = Streams::new(limit);
                streams.push_step(&examples, &recipe, 0, 7, 0);
                let streams = streams.finish();
                assert_eq!(streams.len(), count);
                let sum: f64 = streams.iter().flat_map(|s| &s.weights).sum();
                assert!((sum - 1.0).abs() < 1e-12);
                assert!((streams[0].weights[0] - first).abs() < 1e-12);
            }
        }
    }
}
