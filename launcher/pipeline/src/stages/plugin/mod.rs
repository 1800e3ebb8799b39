//! `plugin`: what clients trained through an emulator, put into the LLM that the emulator was made of.
//!
//! In: the run's LLM, and what clients gave back: PEFT adapters of the edge of its emulator, or the edge's full weights.
//! Out: a directory in the Hugging Face layout. What several clients trained is averaged, weighted by their examples:
//! `W ← W + Σ w_i (α/r) B_i A_i`, or `W ← Σ w_i W_i`. What comes from clients is checked, and no tensor but those of
//! the edge is taken.

mod client;

use crate::artifacts::open_side;
use crate::card;
use crate::lineage::Lineage;
use crate::records::PluginInputs;
use crate::trained::{self, Change, Trained};
use anyhow::Result;
use client::{Client, Origin};
use gradtx_models::LayerFile;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{Factor, PeftAdapter, Stacked, merge};
use gradtx_run::config::{RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::ModelSpec;
use serde_json::json;
use std::path::{Path, PathBuf};

/// What to plug in, to where.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    pub run: RunArgs,
    /// What clients trained through the emulator: PEFT adapter directories (`finetune --save-adapter`, or PEFT), or
    /// layers.safetensors with the full weights of the edge. All of one kind.
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    pub adapter: Vec<PathBuf>,
    /// The emulator that the clients had, as `emulate` wrote it. Needed for what other programs than gradtx wrote,
    /// which does not say what it was trained through.
    #[arg(long, value_name = "DIR")]
    pub emulator: Option<PathBuf>,
    /// Examples that each client trained on, in the order of --adapter: their weights in the average (default: as
    /// they say; equal where none says).
    #[arg(long, num_args = 1.., value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub examples: Vec<u32>,
    /// Directory of the LLM with the trained edge.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Plugs in, unless that is done.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let plugin = Plugin::open(context, job)?;
    stage::run(context, &plugin).map(drop)
}

/// What clients trained, ready to be plugged in.
pub struct Plugin<'a> {
    job: &'a Job,
    settings: RunSettings,
    llm: ModelSpec,
    clients: Clients,
    /// Share of each client.
    weights: Vec<f64>,
    sums: Vec<Vec<String>>,
}

/// What clients trained: all the same kind.
enum Clients {
    Adapters(Vec<(PeftAdapter, f64)>),
    Layers(Vec<(LayerFile, f64)>),
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
        let origin =
            job.emulator.as_deref().map(|dir| Origin::read(dir, &llm, context.threads)).transpose()?;
        let open = |path: &PathBuf| Client::open(path, &llm, origin.as_ref());
        let clients = job.adapter.iter().map(open).collect::<Result<Vec<_>>>()?;
        let examples = examples(job, &clients)?;
        let all: f64 = examples.iter().sum();
        let weights: Vec<f64> = examples.into_iter().map(|own| own / all).collect();
        let sums = job.adapter.iter().map(|path| trained::sums(path)).collect::<Result<_>>()?;
        let clients = Clients::of_one_kind(job, clients, &weights)?;
        Ok(Self { job, settings, llm, clients, weights, sums })
    }
}

/// The number of examples of every client.
fn examples(job: &Job, clients: &[Client]) -> Result<Vec<f64>> {
    if !job.examples.is_empty() {
        let (given, expected) = (job.examples.len(), clients.len());
        if given != expected {
            let what =
                format!("--examples: expected a number for each of {expected} --adapter, found {given}");
            return Err(unusable(what));
        }
        return Ok(job.examples.iter().map(|&count| f64::from(count)).collect());
    }
    let says = |client: &Client| client.examples.is_some();
    if !clients.iter().any(says) {
        return Ok(vec![1.0; clients.len()]);
    }
    if let Some(silent) = clients.iter().position(|client| !says(client)) {
        let what = format!(
            "{}: it does not say how many examples it was trained on, and others do",
            shown(&job.adapter[silent])
        );
        return Err(failed(what, "give the numbers of all of them: --examples N…"));
    }
    Ok(clients.iter().filter_map(|client| client.examples).map(f64::from).collect())
}

impl Clients {
    fn of_one_kind(job: &Job, clients: Vec<Client>, weights: &[f64]) -> Result<Self> {
        let (mut adapters, mut layers) = (vec![], vec![]);
        let kinds: Vec<&str> = clients.iter().map(|client| client.trained.kind()).collect();
        if let Some(other) = kinds.iter().position(|kind| *kind != kinds[0]) {
            let what = format!(
                "{} is {}, {} is {}: expected one kind",
                shown(&job.adapter[0]),
                kinds[0],
                shown(&job.adapter[other]),
                kinds[other]
            );
            let hint = "plug in those of one kind together, and the others into an LLM of their own";
            return Err(failed(what, hint));
        }
        for (client, &weight) in clients.into_iter().zip(weights) {
            match client.trained {
                Trained::Adapter(adapter) => adapters.push((adapter, weight)),
                Trained::Layers(file) => layers.push((file, weight)),
            }
        }
        Ok(if adapters.is_empty() { Self::Layers(layers) } else { Self::Adapters(adapters) })
    }

    /// The layers that the first one changes.
    fn layers(&self) -> &[usize] {
        match self {
            Self::Adapters(all) => all.first().map_or(&[], |(adapter, _)| adapter.layout.layers()),
            Self::Layers(all) => all.first().map_or(&[], |(file, _)| file.layers()),
        }
    }
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
            weights: self.weights.clone(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { job, llm, clients, .. } = self;
        let lineage = Lineage::plugged_in();
        let files = match clients {
            Clients::Adapters(adapters) => {
                let adapter = averaged(&llm.model, adapters)?;
                let mut files = merge(&llm.dir, &adapter, &job.out, context.threads)?;
                let change = Change::Adapter(&adapter.layout);
                files.push(card::write(&llm.dir, change, &lineage, &job.out)?);
                files
            }
            Clients::Layers(layers) => {
                let mut files = LayerFile::put_into(&llm.dir, layers, &job.out)?;
                files.push(card::write(&llm.dir, Change::Layers(clients.layers()), &lineage, &job.out)?);
                files
            }
        };
        Ok((files, ()))
    }

    fn report(&self, context: &Context, (): &()) -> Result<()> {
        let (clients, layers, out) = (self.weights.len(), self.clients.layers(), self.job.out.display());
        let text = format!("plugin: layers {layers:?} of {clients} clients, {out}");
        context.ui.done("plugin", &self.job.out, json!({ "clients": clients, "layers": layers }), text);
        Ok(())
    }
}
