//! Throughput and dates: all that differs between two runs of the same settings.
//!
//! In: the `throughput` files of the stages, and when their records were last written.
//! Out: [`Times`].

use super::curves::{Series, thin};
use super::source::{Source, short_path};
use gradtx_pipeline::records::FinetuneInputs;
use gradtx_run::command_log::{COMMANDS_FILE, LoggedCommand};
use gradtx_run::record::RECORD_FILE;
use gradtx_run::role::Role;
use gradtx_run::text::utc;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

/// All that was timed or dated.
#[derive(Debug, Serialize)]
pub struct Times {
    /// Tokens per second of each stage and model.
    pub tokens: Vec<TokenRate>,
    /// Training of the translator.
    pub translator: Option<TupleRate>,
    /// Throughput while the stages worked.
    pub rates: Vec<RateSeries>,
    /// When the directories of each stage were finished.
    pub stages: Vec<StageDates>,
    /// The commands that worked on the run; of absolute paths only the last part.
    pub commands: Vec<LoggedCommand>,
}

/// Throughput while a stage worked.
#[derive(Debug, PartialEq, Serialize)]
pub struct RateSeries {
    /// The stage.
    pub stage: String,
    /// The model; none for the translator.
    pub model: Option<Role>,
    /// What is counted: `tokens` or `tuples`.
    pub unit: String,
    /// What the numbers of `per_s` are of: `group` of shadow jobs, or optimizer `step`.
    pub of: String,
    /// Units per second.
    pub per_s: Series,
}

/// Tokens per second.
#[derive(Debug, PartialEq, Serialize)]
pub struct TokenRate {
    /// The stage.
    pub stage: String,
    /// The model.
    pub model: Option<Role>,
    /// Measurements: groups of shadow jobs, or clients.
    pub runs: usize,
    /// Tokens of all.
    pub tokens: u64,
    /// Time of all, one after the other.
    pub seconds: f64,
    /// Tokens over seconds.
    pub tokens_per_s: Option<f64>,
}

/// Tuples per second.
#[derive(Debug, PartialEq, Serialize)]
pub struct TupleRate {
    /// The last measurement.
    pub tuples_per_s: f64,
    /// Time of all steps at that rate.
    pub seconds: Option<f64>,
}

/// When a stage was finished.
#[derive(Debug, PartialEq, Serialize)]
pub struct StageDates {
    /// The stage.
    pub stage: String,
    /// Directories that it has finished.
    pub finished: usize,
    /// The earliest of them, UTC.
    pub first: String,
    /// The latest of them, UTC.
    pub last: String,
}

/// From the run's files.
pub fn of(source: &mut Source) -> Times {
    let mut places: Vec<(String, Option<Role>, PathBuf)> = [Role::Tiny, Role::Llm]
        .map(|role| {
            let name = format!("throughput-{}.jsonl", role.name());
            ("curate".to_string(), Some(role), source.tuples.join(name))
        })
        .into();
    for (stage, inputs) in source.inputs::<FinetuneInputs>() {
        let model = source.role_of(&inputs.model);
        places.push((stage.record.stage.clone(), model, stage.dir.join("throughput.jsonl")));
    }
    let mut rates: Vec<TokenRate> = vec![];
    for (stage, model, path) in places {
        let lines = source.lines(&path);
        let (runs, tokens, seconds) = total(&lines);
        if runs == 0 {
            continue;
        }
        match rates.iter_mut().find(|rate| rate.stage == stage && rate.model == model) {
            Some(rate) => {
                rate.runs += runs;
                rate.tokens += tokens;
                rate.seconds += seconds;
            }
            None => rates.push(TokenRate { stage, model, runs, tokens, seconds, tokens_per_s: None }),
        }
    }
    rates.iter_mut().for_each(|r| r.tokens_per_s = (r.seconds > 0.0).then(|| r.tokens as f64 / r.seconds));
    Times {
        tokens: rates,
        translator: tuple_rate(source),
        rates: rate_series(source),
        stages: dates(source),
        commands: commands(source),
    }
}

/// Throughput of every group of shadow jobs, and of the translator's steps.
fn rate_series(source: &mut Source) -> Vec<RateSeries> {
    let mut all = vec![];
    for role in [Role::Tiny, Role::Llm] {
        let name = format!("throughput-{}.jsonl", role.name());
        let lines = source.lines(&source.tuples.join(name));
        let rates = lines.iter().filter_map(|line| line["tokens_per_s"].as_f64());
        let rates: Vec<(u64, f64)> = (1..).zip(rates).collect();
        all.extend(RateSeries::of("curate", Some(role), "tokens", "group", &rates));
    }
    let dir = source.translator.clone();
    // Where the time of every step was written, that is more than a measurement now and then.
    let steps = source.lines(&dir.join("throughput-steps.jsonl"));
    let lines = if steps.is_empty() { source.lines(&dir.join("throughput.jsonl")) } else { steps };
    let rate = |line: &Value| Some((line["step"].as_u64()?, line["tuples_per_s"].as_f64()?));
    let rates: Vec<(u64, f64)> = lines.iter().filter_map(rate).collect();
    all.extend(RateSeries::of("train", None, "tuples", "step", &rates));
    all
}

impl RateSeries {
    fn of(stage: &str, model: Option<Role>, unit: &str, of: &str, rates: &[(u64, f64)]) -> Option<Self> {
        let last = rates.iter().map(|(at, _)| *at).max()?;
        let per_s = thin(rates, last);
        Some(Self { stage: stage.into(), model, unit: unit.into(), of: of.into(), per_s })
    }
}

fn commands(source: &mut Source) -> Vec<LoggedCommand> {
    let path = source.run.join(COMMANDS_FILE);
    let lines = source.lines(&path);
    match lines.into_iter().map(serde_json::from_value).collect::<Result<Vec<LoggedCommand>, _>>() {
        Ok(mut commands) => {
            for word in commands.iter_mut().flat_map(|command| &mut command.command) {
                *word = short_path(word);
            }
            commands
        }
        Err(error) => {
            source.note(&path, error.to_string());
            vec![]
        }
    }
}

/// Measurements with tokens and seconds: their number and sums.
fn total(lines: &[Value]) -> (usize, u64, f64) {
    let pair = |line: &Value| Some((line["tokens"].as_u64()?, line["seconds"].as_f64()?));
    lines
        .iter()
        .filter_map(pair)
        .fold((0, 0, 0.0), |(n, tokens, seconds), (t, s)| (n + 1, tokens + t, seconds + s))
}

fn tuple_rate(source: &mut Source) -> Option<TupleRate> {
    let lines = source.lines(&source.translator.join("throughput.jsonl"));
    let last = lines.last()?;
    let rate = last["tuples_per_s"].as_f64().filter(|rate| *rate > 0.0)?;
    let batch = source.config.as_ref().map(|config| config.train.global_batch_size as f64);
    let seconds = last["step"].as_f64().zip(batch).map(|(steps, batch)| steps * batch / rate);
    Some(TupleRate { tuples_per_s: rate, seconds })
}

fn dates(source: &Source) -> Vec<StageDates> {
    let mut stages: BTreeMap<&str, Vec<SystemTime>> = BTreeMap::new();
    for stage in source.stages.iter().filter(|s| !s.record.outputs.is_empty()) {
        let written = std::fs::metadata(stage.dir.join(RECORD_FILE)).and_then(|m| m.modified());
        if let Ok(written) = written {
            stages.entry(&stage.record.stage).or_default().push(written);
        }
    }
    let mut rows: Vec<(SystemTime, StageDates)> = stages
        .into_iter()
        .filter_map(|(stage, times)| {
            let (first, last) = (*times.iter().min()?, *times.iter().max()?);
            let row =
                StageDates { stage: stage.into(), finished: times.len(), first: utc(first), last: utc(last) };
            Some((first, row))
        })
        .collect();
    rows.sort_by_key(|(first, _)| *first);
    rows.into_iter().map(|(_, row)| row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn measurements_add_up_and_others_are_passed_over() {
        let lines = [
            json!({"tokens": 10, "seconds": 2.0}),
            json!({"tokens": 5}),
            json!({"tokens": 6, "seconds": 1.0}),
        ];
        assert_eq!(total(&lines), (2, 16, 3.0));
    }
}
