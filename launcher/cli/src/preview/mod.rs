//! `preview`: what examples become before anything is trained on them.
//!
//! In: a file of examples and a model. Out: one example as the text that the model sees, its tokens,
//! and which of them are trained on; and what all examples are like, with everything that would be
//! lost or unknown. On a terminal with colours, elsewhere with marks, as JSON, or as a page. Examples
//! may be private: they are shown to whoever runs this, and written only into the page that was
//! asked for.

mod page;
mod statistics;
mod view;

use crate::model_args::ModelArgs;
use anyhow::{Result, bail};
use gradtx_kernels::rng::Stream;
use gradtx_run::config::Config;
use gradtx_run::context::Context;
use gradtx_run::failure::unusable_with;
use gradtx_run::role::Role;
use gradtx_run::ui::say;
use gradtx_runtime::data::{Content, Record};
use gradtx_runtime::text::shown;
use gradtx_train::examples::Data;
use gradtx_train::prompts::Prompts;
use serde_json::json;
use statistics::Statistics;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use view::View;

/// Show what examples become: text, tokens, which of them are trained on, and statistics of all.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// File of examples (JSONL, JSON, CSV, TSV or Parquet), or a directory of them (default: the
    /// run's public data).
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// The model whose tokenizer and chat template are used; without it only the rows are shown.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Number of the example to show, from 1.
    #[arg(long, value_name = "N", conflicts_with = "random")]
    pub index: Option<usize>,
    /// Show a random example; with a number, the same one again.
    #[arg(long, value_name = "SEED", num_args = 0..=1)]
    pub random: Option<Option<u64>>,
    /// Write a page (HTML) with the example and the statistics.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Shows an example and the statistics.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let args = &job.model;
    let names_model = args.run.is_some() || args.config.is_some() || args.model.is_some();
    let (config, model) = match names_model {
        true => {
            let model = args.resolve(Role::Tiny)?;
            (model.config.clone(), Some(model))
        }
        false => (Config::for_data(None, &args.set)?, None),
    };
    let data = match &job.data {
        Some(path) => Data::read(std::slice::from_ref(path), &config.data, "--data")?,
        None if !config.data.public.as_slice().iter().all(|path| path.as_os_str().is_empty()) => {
            Data::read(config.data.public.as_slice(), &config.data, "data.public")?
        }
        None => {
            let hint = "give --data FILE, or --run with a run whose data.public is set";
            return Err(unusable_with(
                "preview: there is nothing to show: no data is named",
                Some(hint.into()),
            ));
        }
    };
    let index = job.choose(data.records.len())?;
    let record = &data.records[index];
    let Some(model) = model else { return rows_only(context, job, &data, record) };
    let prompts = Prompts::new(&config.data, &model.dir, &model.decoder, Some(record))?;
    let mut assumed = data.assumed(&[(model.role.unwrap_or(Role::Tiny), &prompts)]);
    assumed.extend(data.facts.left_out());
    let statistics = Statistics::of(&data.records, &prompts, config.data.max_lost_labels, context.threads)?;
    let view = View::new(&prompts, record, index, data.records.len())?;
    if let Some(out) = &job.out {
        page::write(out, &assumed, &view, &statistics)?;
    }
    if context.ui.is_json() {
        let page = job.out.as_ref().map(|out| shown(out));
        let result = json!({ "assumed": assumed, "example": view, "statistics": statistics, "page": page });
        context.ui.result_object("preview", result);
        return Ok(());
    }
    assumed.iter().for_each(|line| say(line));
    view.print(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()));
    say(statistics.to_string().trim_end());
    if let Some(out) = &job.out {
        context.ui.status(format!("preview: {}", shown(out)));
    }
    Ok(())
}

impl Job {
    /// The number of the example, from 0.
    fn choose(&self, count: usize) -> Result<usize> {
        match (self.index, self.random) {
            (Some(n), _) if n == 0 || n > count => {
                bail!("--index {n}: there are {count} examples; expected a number from 1 to {count}")
            }
            (Some(n), _) => Ok(n - 1),
            (None, Some(seed)) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Ok(Stream::new(seed.unwrap_or(now.as_nanos() as u64)).below(count))
            }
            (None, None) => Ok(0),
        }
    }
}

/// Without a model: the example as its row says it.
fn rows_only(context: &Context, job: &Job, data: &Data, record: &Record) -> Result<()> {
    let hint =
        "give --model DIR with a model directory, or --run: then text, tokens and statistics are shown";
    if let Some(out) = &job.out {
        let what = format!("--out {}: a page needs a model's tokenizer, and no model is named", shown(out));
        return Err(unusable_with(what, Some(hint.into())));
    }
    let messages: Vec<(String, String)> = match &record.content {
        Content::Pair { prompt, response } => {
            vec![("prompt".into(), prompt.clone()), ("response".into(), response.clone())]
        }
        Content::Chat(messages) => messages.iter().map(|m| (m.role.clone(), m.content.clone())).collect(),
    };
    let assumed = data.facts.lines();
    if context.ui.is_json() {
        let messages: Vec<_> =
            messages.iter().map(|(role, text)| json!({ "role": role, "content": text })).collect();
        let example = json!({ "origin": record.origin.to_string(), "messages": messages });
        context.ui.result_object("preview", json!({ "assumed": assumed, "example": example }));
        return Ok(());
    }
    assumed.iter().for_each(|line| say(line));
    say(&format!("\nexample at {}", record.origin));
    messages.iter().for_each(|(role, text)| say(&format!("\n{role}:\n{text}")));
    context.ui.status(format!("\nno model is named: {hint}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_the_one_that_was_asked_for() {
        let job = |index, random| Job { data: None, model: ModelArgs::default(), index, random, out: None };
        assert_eq!(job(None, None).choose(3).unwrap(), 0);
        assert_eq!(job(Some(3), None).choose(3).unwrap(), 2);
        for n in [0, 4] {
            let message = job(Some(n), None).choose(3).unwrap_err().to_string();
            assert!(message.contains("from 1 to 3"), "{message}");
        }
        let random = |seed| job(None, Some(Some(seed))).choose(1000).unwrap();
        assert_eq!(random(7), random(7));
        assert_ne!(random(7), random(8));
    }
}
