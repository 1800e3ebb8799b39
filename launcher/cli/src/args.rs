//! The command line as typed, before anything is checked against files.
//!
//! In: the words after `gradtx`. Out: [`Args`], and with [`Command::run`] what the command does.
//! A new command is a variant here, with its arm in `run`.

use crate::{
    audit, cancel, compare, config, cross_validate, doctor, help, init, init_clients, inspect, logs, manual,
    status, submit, sweep,
};
use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use clap::{Parser, Subcommand};
use gradtx_pipeline::aggregate::{Aggregation, Allow};
use gradtx_pipeline::default_out;
use gradtx_pipeline::stages::{
    curate, emulate, evaluate, finetune, merge, plugin, refine, split, train, translate,
};
use gradtx_plan::plan;
use gradtx_run::cluster::World as Ranks;
use gradtx_run::config::{DeviceKind, DtypeKind, Preset, PrivacyArgs, RunArgs};
use gradtx_run::context::Context;
use gradtx_run::role::Role;
use gradtx_run::stage::Stage;
use gradtx_train::baselines::Method;
use gradtx_world::{World, demo};
use std::num::NonZeroUsize;
use std::path::PathBuf;

/// Trains Grad-Transformers: from fine-tuned shadow pairs of a small and a large
/// language model to a translator of the small one's updates into the large one's.
#[derive(Debug, Parser)]
#[command(name = "gradtx", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Threads of the CPU (default: as many as this process may run on).
    #[arg(long, global = true, value_name = "N", value_parser = threads())]
    pub threads: Option<usize>,
    /// Print results and errors only.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Print details too: memory tables, packing statistics, log messages; -vv for debug messages.
    #[arg(long, short, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Print one JSON object per line: messages, progress, a result per stage; errors on stderr.
    #[arg(long, global = true)]
    pub json: bool,
}

/// A stage, or a tool around the stages.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a miniature world: tokenizer, pretrained TinyLM and LLM, task files, run file.
    World {
        /// Directory to make.
        dir: PathBuf,
        /// Which tasks public data and clients have.
        #[arg(long, value_enum, default_value_t)]
        world: World,
        /// Seed of everything in it.
        #[arg(long, default_value_t = 1, value_parser = seeds())]
        seed: u64,
        /// Where to pretrain.
        #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
        device: DeviceKind,
    },
    /// Divide a data set into public data, and training and test data of clients.
    Split(gradtx_pipeline::stages::split::Job),
    /// Fine-tune both models on every shadow subset and collect their update vectors.
    Curate(gradtx_pipeline::stages::curate::Job),
    /// Train the Grad-Transformer on the collected tuples.
    Train(RunArgs),
    /// Fine-tune one model on private data: a client's update vector.
    Finetune {
        /// The run and its configuration.
        #[command(flatten)]
        run: RunArgs,
        /// File of examples (JSONL, JSON, CSV, TSV or Parquet), or a directory of them.
        #[arg(long, value_name = "FILE")]
        data: PathBuf,
        /// Directory for update.safetensors (with finetune.use_peft=false, layers.safetensors), metrics and, with
        /// --save-adapter, adapter/
        /// (default: RUN/clients/NAME/finetuned/MODEL, with NAME from the data's path).
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Which of the two models.
        #[arg(long, value_enum, default_value_t = Role::Tiny)]
        model: Role,
        /// Model directory in the place of the run's, e.g. an emulator; the same as `--set models.tiny=…`.
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// Also write the adapter in PEFT form.
        #[arg(long)]
        save_adapter: bool,
        /// Agree that the provider asks the fine-tuned TinyLM for answers to public prompts, to refine a
        /// translation with them. Without differential privacy, private texts may come out.
        #[arg(long)]
        allow_refinement: bool,
        /// Differential privacy.
        #[command(flatten)]
        privacy: PrivacyArgs,
    },
    /// Show what examples become: text, tokens, which of them are trained on, and statistics.
    Preview(crate::preview::Job),
    /// Generate from a prompt, for a file of examples, or in a chat.
    Generate(crate::generate::Job),
    /// Write what clients start from: the TinyLM's initial adapter, fingerprints and settings.
    InitClients(init_clients::Job),
    /// Turn a PEFT adapter into an update vector, or an update vector into a PEFT adapter.
    Convert(crate::convert::Job),
    /// Measure what an update reveals about its training examples, with canaries or known members.
    Audit(audit::Job),
    /// Compare two update vectors or two adapters.
    Diff(crate::diff::Job),
    /// Turn clients' updates of the TinyLM into an update and an adapter of the LLM.
    Translate {
        /// The run and its configuration.
        #[command(flatten)]
        run: RunArgs,
        /// Update vector files; several are combined first.
        #[arg(required = true, value_name = "UPDATE")]
        updates: Vec<PathBuf>,
        /// Directory for update.safetensors and adapter/
        /// (default: RUN/clients/NAME/translated/METHOD, with NAME from the update's path).
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// The translator.
        #[arg(long, value_enum, default_value_t = Method::GradTransformer)]
        method: Method,
        /// How several updates become one.
        #[command(flatten)]
        aggregation: Aggregation,
        /// Put noise of the same size in the place of the update: the control that shows
        /// whether a translator looks at its input at all.
        #[arg(long)]
        random_update: bool,
        /// What of unusual updates is accepted.
        #[command(flatten)]
        allow: Allow,
    },
    /// Train a translation on public prompts that it and the client's TinyLM answer alike.
    Refine {
        /// The run and its configuration.
        #[command(flatten)]
        run: RunArgs,
        /// The update vector files that were translated.
        #[arg(required = true, value_name = "UPDATE")]
        updates: Vec<PathBuf>,
        /// Directory of the translation, as `translate --out` made it.
        #[arg(long, value_name = "DIR")]
        translated: PathBuf,
        /// Directory for update.safetensors and adapter/ (default: that of --translated with
        /// `-refined` after its name).
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Compare translators on held-out groups of shadows, before the first client comes.
    CrossValidate(cross_validate::Job),
    /// Compress the middle layers of the LLM into an emulator that clients fine-tune the edge layers through (GradOT).
    Emulate(gradtx_pipeline::stages::emulate::Job),
    /// Put what clients trained through an emulator into the LLM: a Hugging Face directory.
    Plugin(gradtx_pipeline::stages::plugin::Job),
    /// Put an adapter, or fine-tuned layers, into the weights of its model: a Hugging Face directory.
    Merge {
        /// The run and its configuration.
        #[command(flatten)]
        run: RunArgs,
        /// PEFT adapter directory, or layers.safetensors as `finetune` with finetune.use_peft=false wrote it.
        #[arg(long, value_name = "PATH")]
        adapter: PathBuf,
        /// Directory of the merged model.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Which of the two models.
        #[arg(long, value_enum, default_value_t = Role::Llm)]
        model: Role,
    },
    /// Generate greedily for every example of a file and score the answers.
    Evaluate {
        /// The run and its configuration.
        #[command(flatten)]
        run: RunArgs,
        /// File of examples (JSONL, JSON, CSV, TSV or Parquet), or a directory of them.
        #[arg(long, value_name = "FILE")]
        data: PathBuf,
        /// Directory for predictions.jsonl and score.json
        /// (default: RUN/clients/NAME/evaluated/WHAT, with NAME from the data's path).
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Which of the two models.
        #[arg(long, value_enum, default_value_t = Role::Llm)]
        model: Role,
        /// Model directory in the place of the run's, e.g. a merged one.
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// PEFT adapter directory; without it, the base model.
        #[arg(long, value_name = "DIR")]
        adapter: Option<PathBuf>,
    },
    /// Write one page about a run, finished or not: scores, losses, tuples, throughput.
    Report {
        /// Run directory.
        #[arg(long, value_name = "DIR")]
        run: PathBuf,
        /// Another directory with results of `evaluate` and `finetune`; repeatable.
        #[arg(long, value_name = "DIR")]
        scores: Vec<PathBuf>,
        /// The page (default: report.html in the run directory); report.json goes beside it.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Also write the tables and curves as CSV files to this directory.
        #[arg(long, value_name = "DIR")]
        csv: Option<PathBuf>,
        /// Also write a page of examples with all models' answers, at most N of each file of test
        /// data. It holds private texts.
        #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "100")]
        predictions: Option<NonZeroUsize>,
    },
    /// Submit stages to SLURM as batch jobs, after a look at everything that they need.
    Submit(crate::submit::Job),
    /// Show the last lines of the logs of a run's batch jobs, or follow them.
    Logs(crate::logs::Job),
    /// Cancel the batch jobs of a run or a sweep that are in SLURM's queue.
    Cancel(crate::cancel::Job),
    /// Show what a file or directory is: shapes, types, sizes, hashes, provenance, damage.
    Inspect {
        /// Model directory, adapter, update vector, tuple store, translator, checkpoint or run directory.
        path: PathBuf,
    },
    /// Show how far a run is: what is finished, what runs where and how long it will take,
    /// what stopped and why. Reads only, and can be asked at any time.
    Status {
        /// Run directory, or any directory above or below it.
        path: PathBuf,
        /// Compare every finished file with its checksum, not only with its size.
        #[arg(long)]
        verify: bool,
    },
    /// Show what this machine has and lacks, and whether a run or a model fits on it.
    Doctor {
        /// Run directory, or run file: memory that its stages will take.
        #[arg(long, value_name = "RUN")]
        run: Vec<PathBuf>,
        /// Model directory: memory that it takes with the default settings.
        #[arg(long, value_name = "DIR")]
        model: Vec<PathBuf>,
    },
    /// Write a commented run file to start from, by a recipe for a pair of models.
    Init(crate::init::Job),
    /// Print what settings there are, what they mean, and what they are by default.
    Config(crate::config::Job),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one per command.
    Man {
        /// Directory to write to; made when it is not there.
        dir: PathBuf,
    },
    /// Show what a run will take on given machines: memory, time and GPU hours of every stage.
    Plan(gradtx_plan::plan::Job),
    /// Write run directories for every combination of listed settings.
    Sweep(sweep::Job),
    /// Compare runs: the settings that differ, scores, and what the runs took.
    Compare(compare::Job),
    /// Measure what this device reaches: operations, steps, generation, communication.
    Bench(gradtx_bench::Job),
    /// The whole job on a miniature world, ending with a table of scores.
    Demo {
        /// Directory for the world and the run.
        #[arg(default_value = "demo")]
        dir: PathBuf,
        /// Which tasks public data and clients have.
        #[arg(long, value_enum, default_value_t)]
        world: World,
        /// Seed of the world and of the run.
        #[arg(long, default_value_t = 1, value_parser = seeds())]
        seed: u64,
        /// Settings to take from elsewhere.
        #[arg(long, value_enum)]
        preset: Option<Preset>,
        /// Where to compute.
        #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
        device: DeviceKind,
        /// Type of activations and frozen weights.
        #[arg(long, value_enum, default_value_t = DtypeKind::F32)]
        dtype: DtypeKind,
        /// So many seeds, from --seed on, each in a directory of its own.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<u64>::new().range(1..=1000))]
        seeds: u64,
        /// In worlds held-out and interacting: fewer shadows, one fold of tasks, no Grad-Transformer. In world
        /// offsite: two emulators, no attack.
        #[arg(long)]
        quick: bool,
    },
}

/// Threads that a process can have.
fn threads() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=4096)
}

/// Seeds that a run file (TOML) can hold.
fn seeds() -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(0..=i64::MAX as u64)
}

impl Command {
    /// Does it.
    pub fn run(self, context: &Context, world: &Ranks) -> Result<()> {
        match self {
            Self::World { dir, world, seed, device } => {
                gradtx_world::stage::run(context, &dir, world, seed, device)
            }
            Self::Split(job) => split::run(context, &job),
            Self::Curate(job) => curate::run(context, world, &job),
            Self::Train(run) => train::run(context, world, &run),
            Self::Finetune { mut run, data, out, model, base, save_adapter, allow_refinement, privacy } => {
                run.set.splice(0..0, privacy.settings());
                if let Some(base) = base {
                    run.set.insert(0, format!("models.{}={}", model.name(), base.display()));
                }
                let out = out.unwrap_or_else(|| default_out::finetuned(&run.run, &data, model));
                let job = finetune::Job { data, out, role: model, peft: save_adapter, allow_refinement };
                finetune::run(context, &run, &job)
            }
            Self::Refine { run, updates, translated, out } => {
                let out = out.unwrap_or_else(|| default_out::refined(&translated));
                let job = refine::Job { updates, translated, out, fold: None };
                refine::run_on_ranks(context, world, &run, &job)
            }
            Self::Translate { run, updates, out, method, aggregation, random_update, allow } => {
                let random_student = random_update;
                let translated = || default_out::translated(&run.run, &updates, method, random_student);
                let out = out.unwrap_or_else(translated);
                let job =
                    translate::Job { updates, out, method, aggregation, random_student, allow, fold: None };
                translate::run(context, &run, &job)
            }
            Self::CrossValidate(job) => cross_validate::run(context, &job),
            Self::Emulate(job) => emulate::run_on_ranks(context, world, &job),
            Self::Plugin(job) => plugin::run(context, &job),
            Self::Merge { run, adapter, out, model } => {
                merge::run(context, &run, &merge::Job { adapter, out, role: model })
            }
            Self::Evaluate { run, data, out, model, base, adapter } => {
                let (base_dir, adapter_dir) = (base.as_deref(), adapter.as_deref());
                let evaluated = || default_out::evaluated(&run.run, &data, model, base_dir, adapter_dir);
                let out = out.unwrap_or_else(evaluated);
                let job = evaluate::Job { data: vec![data], out, role: model, base, adapter, part: None };
                evaluate::run(context, &run, &job).map(drop)
            }
            Self::Report { run, scores, out, csv, predictions } => {
                let job = gradtx_report::stage::Job { run, evaluations: scores, out, csv, predictions };
                gradtx_report::stage::run(context, &job)
            }
            Self::Preview(job) => crate::preview::run(context, &job),
            Self::Generate(job) => crate::generate::run(context, &job),
            Self::InitClients(job) => init_clients::run(context, &job),
            Self::Convert(job) => crate::convert::run(context, &job),
            Self::Audit(job) => audit::run(context, &job),
            Self::Diff(job) => crate::diff::run(context, &job),
            Self::Submit(job) => submit::run(context, &job),
            Self::Logs(job) => logs::run(context, &job),
            Self::Cancel(job) => cancel::run(context, &job),
            Self::Inspect { path } => inspect::run(context, &path),
            Self::Status { path, verify } => status::run(context, &path, verify),
            Self::Doctor { run, model } => doctor::run(context, &run, &model),
            Self::Plan(job) => plan::run(context, &job),
            Self::Sweep(job) => sweep::run(context, &job),
            Self::Compare(job) => compare::run(context, &job),
            Self::Init(job) => init::run(context, &job),
            Self::Config(job) => config::run(context, &job),
            Self::Completions { shell } => manual::completions(help::command(), shell),
            Self::Man { dir } => manual::pages(help::command(), &dir),
            Self::Bench(job) => gradtx_bench::run(context, world, &job),
            Self::Demo { dir, world, seed, preset, device, dtype, seeds, quick } => {
                demo::run(context, &demo::Job { dir, world, seed, preset, device, dtype, seeds, quick })
            }
        }
    }

    /// The run directory that it works on, if it makes results of a run.
    pub fn run_dir(&self) -> Option<PathBuf> {
        match self {
            Self::Curate(job) => Some(job.run.run.clone()),
            Self::Emulate(job) => Some(job.run.run.clone()),
            Self::Plugin(job) => Some(job.run.run.clone()),
            Self::Train(run)
            | Self::Finetune { run, .. }
            | Self::Translate { run, .. }
            | Self::Refine { run, .. }
            | Self::Merge { run, .. }
            | Self::Evaluate { run, .. } => Some(run.run.clone()),
            Self::Demo { dir, .. } => Some(dir.join(demo::RUN_DIR)),
            _ => None,
        }
    }

    /// Whether several processes, started by srun or mpirun, do it together.
    pub fn has_ranks(&self) -> bool {
        match self {
            Self::Curate(job) => curate::Curation::HAS_RANKS && !job.array,
            Self::Train(_) => train::Training::HAS_RANKS,
            Self::Refine { .. } => refine::Refining::HAS_RANKS,
            Self::Emulate(_) => emulate::Emulate::HAS_RANKS,
            Self::Bench(job) => matches!(job.what, gradtx_bench::What::Comm(_)),
            _ => false,
        }
    }

    /// Whether it is done by several processes that know nothing of each other.
    pub fn is_shared(&self) -> bool {
        match self {
            Self::Curate(job) => job.array,
            // What each of them sees may differ.
            other => matches!(other, Self::Doctor { .. }),
        }
    }

    /// Whether it makes something that takes time, and that it can continue with later.
    pub fn works(&self) -> bool {
        if let Self::Sweep(job) = self {
            return job.run;
        }
        !matches!(
            self,
            Self::Inspect { .. }
                | Self::Status { .. }
                | Self::Doctor { .. }
                | Self::Init(_)
                | Self::Config(_)
                | Self::Completions { .. }
                | Self::Man { .. }
                | Self::Plan(_)
                | Self::Compare(_)
                | Self::Submit(_)
                | Self::Logs(_)
                | Self::Cancel(_)
                | Self::Preview(_)
                | Self::Generate(_)
                | Self::Audit(_)
                | Self::InitClients(_)
                | Self::Convert(_)
                | Self::Diff(_)
                | Self::Bench(_)
        )
    }
}
