//! `refine`: a translation trained on public prompts that it and the client's TinyLM answer alike.
//!
//! In: a translation, the clients' updates of the TinyLM that it was made of, public prompts (their
//! answers are not used). Out: `update.safetensors` and `adapter/` of the LLM, of the translation's
//! rank plus the run's, and `refinement.json`.
//!
//! The TinyLM knows what its client prefers and makes mistakes; the translated LLM makes other ones.
//! So where both give the same answer, it is nearly always what the client wants. A fresh
//! adapter beside the frozen translation is trained on these answers, round after round.
//!
//! The TinyLM with a client's update answers here, and without differential privacy it may say private
//! texts. A client must have agreed to that (`finetune --allow-refinement`), and no answer is
//! written anywhere: killed and started again, the stage asks again from the last whole round.

mod answers;
mod rounds;

use crate::aggregate::{self, Aggregation, Combined};
use crate::artifacts::{expect_run_model, open_side, open_update};
use crate::card::{self, Made};
use crate::fold::Fold;
use crate::lineage::{Kind, Lineage, adapter_sums};
use crate::records::{RefineInputs, TranslateInputs};
use crate::stages::evaluate::metric;
use answers::{Asked, Tiny};
use anyhow::{Context as _, Result};
use gradtx_models::lora::{BlockLayout, read_peft};
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::failed;
use gradtx_run::paths::{ADAPTER_DIR, UPDATE_FILE};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::{UpdateVector, checksum_file, public_name, write_json};
use gradtx_runtime::text::shown;
use gradtx_train::examples::Data;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use rounds::Llm;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::{Path, PathBuf};

/// How a refinement went.
pub const REFINEMENT_FILE: &str = "refinement.json";
/// The adapter after the last whole round.
const CHECKPOINT: &str = "round.safetensors";

/// What to refine, to where.
pub struct Job {
    /// The update vector files that were translated.
    pub updates: Vec<PathBuf>,
    /// The translation's directory.
    pub translated: PathBuf,
    /// Directory of the results.
    pub out: PathBuf,
    /// Shadow pairs whose prompts are not asked.
    pub fold: Option<Fold>,
}

/// How a refinement went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refinement {
    /// Public prompts.
    pub prompts: usize,
    /// Those of which the TinyLM ended its answer.
    pub answered: usize,
    /// Mean probability of the half of these answers that the TinyLM is surest of.
    pub sure: f64,
    /// The rounds.
    pub rounds: Vec<Round>,
}

/// One round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Round {
    /// Answers that agree.
    pub agreed: usize,
    /// The same as a part of all prompts.
    pub share: f64,
    /// What was trained on.
    pub trained_on: TrainedOn,
    /// The mean loss of the last step; none without training.
    pub loss: Option<f64>,
}

/// What a round was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedOn {
    /// Answers that agree.
    Agreed,
    /// The TinyLM's surest answers.
    Surest,
    /// Nothing: too few answers agree.
    Nothing,
}

/// Refines, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    stage::run(context, &Refining::open(context, args, job)?).map(drop)
}

/// A refinement that is ready to begin.
pub struct Refining<'a> {
    job: &'a Job,
    settings: RunSettings,
    /// The settings on this device.
    config: Config,
    student: ModelSpec,
    teacher: ModelSpec,
    /// Checksums of the updates.
    sums: Vec<String>,
    translation: Translation,
    /// The updates as one, and the examples behind it.
    combined: (Vec<f32>, u64),
    public: Data,
    prompts: [Prompts; 2],
}

impl<'a> Refining<'a> {
    /// Opens what a job needs.
    pub fn open(context: &Context, args: &RunArgs, job: &'a Job) -> Result<Self> {
        let settings = RunSettings::open(args)?;
        let config = settings.config().clone().on_device(context, &job.out)?;
        let student = open_side(&config, Role::Tiny, context.threads)?;
        let teacher = open_side(&config, Role::Llm, context.threads)?;
        expect_run_model(&settings, Role::Tiny, &student.space.base_model)?;
        let updates: Vec<UpdateVector> =
            job.updates.iter().map(|path| open_update(&student, &teacher, path)).collect::<Result<_>>()?;
        let sums = job.updates.iter().map(|path| checksum_file(path)).collect::<Result<Vec<_>, _>>()?;
        let translation = Translation::open(&job.translated, &sums, &teacher)?;
        expect_consent(&job.updates, &updates)?;
        let Combined { values, examples, .. } =
            aggregate::combine(&job.updates, &updates, &translation.aggregation)?;
        let combined = (values, examples);
        let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
        let prompts = [public.prompts(&config, &student)?, public.prompts(&config, &teacher)?];
        Ok(Self { job, settings, config, student, teacher, sums, translation, combined, public, prompts })
    }
}

impl Stage for Refining<'_> {
    type Inputs = RefineInputs;
    type Output = Refinement;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn inputs(&self) -> Result<RefineInputs> {
        let Self { config, student, teacher, translation, .. } = self;
        Ok(RefineInputs {
            seed: config.seed,
            data: self.public.inputs(&config.data, &self.prompts.each_ref()),
            max_length: config.data.max_length,
            refine: config.refine.clone(),
            recipe: config.curate.llm.clone(),
            evaluate: config.evaluate.clone(),
            updates: self.sums.clone(),
            translated: translation.sums.clone(),
            held_out: Fold::held_out(self.job.fold.as_ref()),
            method: translation.lineage.method,
            tiny: student.space.base_model.clone(),
            llm: teacher.space.base_model.clone(),
            adapter: ModelSpec::adapter_inputs(&config.lora, &[student, teacher]),
            device: config.device.clone(),
            reading: config.data.reading_inputs(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Refinement)> {
        let Self { job, config, student, teacher, prompts, combined: (combined, examples), .. } = self;
        let tiny: Vec<f32> =
            student.init.iter().zip(combined).map(|(start, change)| start + change).collect();
        let asked = Asked::choose(config, &self.public, prompts, job.fold.as_ref())?;
        let given =
            Tiny { context, config, side: student, prompts: &prompts[0], asked: &asked, adapter: &tiny };
        let given = dispatch(&config.device, context, given)?;
        let llm = Llm {
            context,
            config,
            side: teacher,
            prompts: &prompts[1],
            asked: &asked,
            given: &given,
            translation: &self.translation,
            metric: metric(config.evaluate.metric, &asked.records)?,
            checkpoint: job.out.join(CHECKPOINT),
            of: self.inputs()?.value()?,
        };
        let (refinement, values, rank) = dispatch(&config.device, context, llm)?;
        let side = teacher.of_rank(rank)?;
        let update = side.update(values, *examples);
        update.check().context("refine: what the training gives")?;
        let mut files = side.write_peft(&job.out, &update.values)?;
        let made = Made {
            how: format!(
                "was translated from updates of `{}`, then trained on answers to public prompts on which both \
                 models agree",
                public_name(&student.dir)
            ),
            settings: vec![
                ("rounds of refinement", refinement.rounds.len().to_string()),
                ("public prompts", refinement.prompts.to_string()),
                ("examples of all clients", examples.to_string()),
            ],
            privacy: gradtx_runtime::artifact::Privacy::None,
        };
        files.push(card::write_beside_adapter(&side.dir, side.layout.lora(), &made, &job.out)?);
        update.write(&job.out.join(UPDATE_FILE))?;
        write_json(&job.out.join(REFINEMENT_FILE), &refinement)?;
        files.extend([UPDATE_FILE.into(), REFINEMENT_FILE.into()]);
        Ok((files, refinement))
    }

    fn report(&self, context: &Context, refinement: &Refinement) -> Result<()> {
        let out = &self.job.out;
        let _ = std::fs::remove_file(out.join(CHECKPOINT));
        let share = refinement.rounds.first().map_or(0.0, |round| round.share);
        let text = format!("refine: {:.0} % of the answers agree, {}", 100.0 * share, out.display());
        context.ui.done("refine", out, json!(refinement), text);
        Ok(())
    }
}

/// Fails, naming the file, unless every client has agreed.
fn expect_consent(files: &[PathBuf], updates: &[UpdateVector]) -> Result<()> {
    match files.iter().zip(updates).find(|(_, update)| !update.meta.refinement) {
        None => Ok(()),
        Some((path, _)) => Err(failed(
            format!("{}: its client has not agreed to refinement", shown(path)),
            "the client agrees with `gradtx finetune --allow-refinement`; docs/translators.md says to what",
        )),
    }
}

/// A translation that is intact, of this run's LLM and of these updates.
struct Translation {
    lineage: Lineage,
    aggregation: Aggregation,
    sums: Vec<String>,
    layout: BlockLayout,
    /// Factors, `[L, d]`.
    values: Vec<f32>,
}

impl Translation {
    fn open(dir: &Path, updates: &[String], teacher: &ModelSpec) -> Result<Self> {
        let adapter = dir.join(ADAPTER_DIR);
        let sums = adapter_sums(&adapter)?;
        let lineage = Lineage::of_adapter(&adapter, &sums, &teacher.space.base_model)?;
        let refuse = |why: &str| {
            let hint = "give the directory of `gradtx translate --out`, and the updates that it was given";
            Err(failed(format!("{}: {why}", shown(dir)), hint))
        };
        if lineage.kind != Kind::Translated || lineage.refined {
            return refuse("is no translation that could be refined");
        }
        if lineage.random_student {
            return refuse("noise was translated here: there is no client whose answers could agree");
        }
        let Some(made) = record::read(&dir.join(RECORD_FILE))?.inputs::<TranslateInputs>(dir)? else {
            return refuse("is no translation that could be refined");
        };
        if made.updates != updates {
            return refuse("was made of other updates than these");
        }
        let aggregation = Aggregation::recorded(made.combine, made.aggregation);
        let adapter = read_peft(&adapter, &teacher.model)?;
        Ok(Self { lineage, aggregation, sums, layout: adapter.layout, values: adapter.values })
    }
}
