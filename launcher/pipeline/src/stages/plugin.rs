//! `plugin`: what clients trained through an emulator, put into the LLM that the emulator was made of.
//!
//! In: the run's LLM, and PEFT adapters of the edge of its emulator. Out: a directory in the Hugging Face layout. What
//! several clients trained is averaged, weighted by their examples: `W ← W + Σ w_i (α/r) B_i A_i`. The adapters come
//! from clients: what they say is checked, and no tensor but those of the edge is taken.

use crate::artifacts::open_side;
use crate::card;
use crate::lineage::{Lineage, adapter_sums};
use crate::records::PluginInputs;
use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{Factor, PeftAdapter, Stacked, merge, peft_note, read_peft};
use gradtx_run::config::{RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::{ModelSpec, NOTE_BASE, NOTE_EDGE, NOTE_EXAMPLES};
use serde_json::json;
use std::path::{Path, PathBuf};

/// What to plug in, to where.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    pub run: RunArgs,
    /// PEFT adapter directories of clients, as `finetune --save-adapter` wrote them for an emulator.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Directory of the LLM with the trained edge.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Plugs in, unless that is done.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    stage::run(context, &Plugin::open(context, job)?).map(drop)
}

/// Adapters that are ready to be plugged in.
pub struct Plugin<'a> {
    job: &'a Job,
    settings: RunSettings,
    llm: ModelSpec,
    /// With their shares.
    adapters: Vec<(PeftAdapter, f64)>,
    sums: Vec<Vec<String>>,
}

impl<'a> Plugin<'a> {
    /// Opens what a job needs.
    pub fn open(context: &Context, job: &'a Job) -> Result<Self> {
        let settings = RunSettings::open(&job.run)?;
        let llm = open_side(settings.config(), Role::Llm, context.threads)?;
        llm.model.expect_whole(&format!("models.llm = {}", llm.dir.display()))?;
        if std::path::absolute(&job.out)? == std::path::absolute(&llm.dir)? {
            let why = "--out: this is the LLM's own directory; write to another one";
            return Err(unusable(format!("{}: {why}", job.out.display())));
        }
        let read = |dir: &PathBuf| client(dir, &llm.model, &llm.space.base_model);
        let clients = job.adapter.iter().map(read).collect::<Result<Vec<_>>>()?;
        let all: f64 = clients.iter().map(|(_, examples)| examples).sum();
        let adapters = clients.into_iter().map(|(adapter, examples)| (adapter, examples / all)).collect();
        let sums = job.adapter.iter().map(|dir| adapter_sums(dir)).collect::<Result<_>>()?;
        Ok(Self { job, settings, llm, adapters, sums })
    }
}

/// The adapter of a client, and the examples that it was trained on.
///
/// # Errors
/// When it is not one of the edge of an emulator of this LLM.
fn client(dir: &Path, model: &DecoderConfig, llm: &str) -> Result<(PeftAdapter, f64)> {
    let note = |key: &str| -> Result<String> {
        peft_note(dir, key)?.ok_or_else(|| {
            let what = format!("{}: the adapter does not say of which LLM's emulator it is", shown(dir));
            let hint = "plug in what `gradtx finetune --save-adapter` wrote for an emulator; `gradtx merge` takes any \
                        adapter";
            failed(what, hint)
        })
    };
    let wrong = |what: &str, found: &str| {
        let what = format!("{}: {what} `{found}` in its notes", shown(dir));
        failed(what, "it is damaged or was edited: ask the client for it again")
    };
    let of = note(NOTE_BASE)?;
    if of != llm {
        let what = format!(
            "{}: an adapter of another LLM's emulator: made for the fingerprint {of}, found {llm}",
            shown(dir)
        );
        return Err(failed(what, "use the LLM that the emulator was made of"));
    }
    let edge = note(NOTE_EDGE)?;
    let numbers: Option<Vec<usize>> = edge.split(' ').map(|n| n.parse().ok()).collect();
    let Some([first, last]) = numbers.and_then(|n| <[usize; 2]>::try_from(n).ok()) else {
        return Err(wrong("the edge is", &edge));
    };
    let examples = note(NOTE_EXAMPLES)?;
    let count = examples.parse::<u32>().ok().filter(|count| *count > 0);
    let count = count.ok_or_else(|| wrong("the number of examples is", &examples))?;
    let adapter = read_peft(dir, model)?;
    let middle = first..model.layers.saturating_sub(last);
    if let Some(layer) = adapter.layout.layers().iter().find(|layer| middle.contains(layer)) {
        let what = format!(
            "{}: it changes layer {layer}; expected the edge alone, the first {first} and the last {last} of {} layers",
            shown(dir),
            model.layers
        );
        return Err(failed(
            what,
            "train with `lora.layers_to_transform` unset, or naming layers of the edge",
        ));
    }
    Ok((adapter, f64::from(count)))
}

/// One adapter that does what these do with their shares: all factors behind each other.
fn averaged(model: &DecoderConfig, adapters: &[(PeftAdapter, f64)]) -> Result<PeftAdapter> {
    let scaled = |(adapter, weight): &(PeftAdapter, f64)| {
        let mut scaled = adapter.clone();
        let layout = adapter.layout.clone();
        let of_b = |block| layout.slices().iter().filter(|s| s.factor == Factor::B).map(move |s| (block, s));
        for (block, slice) in (0..layout.blocks()).flat_map(of_b) {
            for value in &mut scaled.values[layout.range(block, slice)] {
                *value = (f64::from(*value) * weight) as f32;
            }
        }
        scaled
    };
    let mut all = adapters.iter().map(scaled);
    let Some(mut sum) = all.next() else {
        return Err(unusable("--adapter: expected at least one"));
    };
    for next in all {
        let stacked = Stacked::new(model, [&sum.layout, &next.layout])?;
        let values = stacked.join([&sum.values, &next.values]);
        sum = PeftAdapter { layout: stacked.layout().clone(), values, base_model: None };
    }
    Ok(sum)
}

impl Stage for Plugin<'_> {
    type Inputs = PluginInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn inputs(&self) -> Result<PluginInputs> {
        Ok(PluginInputs {
            llm: self.llm.space.base_model.clone(),
            adapters: self.sums.clone(),
            weights: self.adapters.iter().map(|(_, weight)| *weight).collect(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { job, llm, adapters, .. } = self;
        let adapter = averaged(&llm.model, adapters)?;
        let mut files = merge(&llm.dir, &adapter, &job.out, context.threads)?;
        files.push(card::write(&llm.dir, &adapter, &Lineage::plugged_in(), &job.out)?);
        Ok((files, ()))
    }

    fn report(&self, context: &Context, (): &()) -> Result<()> {
        let Self { job, adapters, .. } = self;
        let layers = adapters.first().map_or(&[][..], |(adapter, _)| adapter.layout.layers());
        let (clients, out) = (adapters.len(), job.out.display());
        let text = format!("plugin: layers {layers:?} of {clients} clients, {out}");
        context.ui.done("plugin", &job.out, json!({ "clients": clients, "layers": layers }), text);
        Ok(())
    }
}
