//! `refine`: a translation trained on public prompts that it and the client's TinyLM answer alike.
//!
//! In: a translation, the clients' updates of the TinyLM that it was made of, public prompts (their
//! answers are not used), and perhaps prompts that the LLM writes in their style. Out: `update.safetensors` and `adapter/` of the LLM, of the translation's
//! rank plus the run's, and `refinement.json`.
//!
//! The TinyLM knows what its client prefers and makes mistakes; the translated LLM makes other ones.
//! So where both give the same answer, it is nearly always what the client wants. A fresh
//! adapter beside the frozen translation is trained on these answers, round after round.
//!
//! The TinyLM with a client's update answers here, and without differential privacy it may say private
//! texts. A client must have agreed to that (`finetune --allow-refinement`), and no answer is
//! written anywhere: killed and started again, the stage asks again from the last whole round. Several
//! ranks share the answering (`shares`), with the bytes of one.

mod agreement;
mod answers;
mod rounds;
mod shares;
mod synthetic;
mod training;

use crate::aggregate::{self, Aggregation, Combined};
use crate::artifacts::{expect_run_model, open_pair, open_update};
use crate::card::{self, Made};
use crate::fold::Fold;
use crate::lineage::{Kind, Lineage, adapter_sums};
use crate::records::{RefineInputs, TranslateInputs};
use crate::stages::evaluate::metric;
use answers::{Asked, Tiny};
use anyhow::{Context as _, Result};
use gradtx_models::lora::{BlockLayout, read_peft};
use gradtx_run::cluster::World;
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::failed;
use gradtx_run::paths::{ADAPTER_DIR, UPDATE_FILE};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::{UpdateVector, checksum_file, public_name, write_json};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::text::shown;
use gradtx_train::examples::Data;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use rounds::Llm;
use serde::{Deserialize, Serialize};
use serde_json::json;
use shares::Shares;
use std::path::{Path, PathBuf};
pub use synthetic::Synthetic;
use synthetic::{Writing, Written};

/// How a refinement went.
pub const REFINEMENT_FILE: &str = "refinement.json";
/// The prompts that the LLM wrote.
const SYNTHETIC_FILE: &str = "synthetic_prompts.json";
/// Below this share of answers that agree in the first round, the translation is doubtful. Chosen on held-out shadows of
/// the miniature worlds, where it finds 87 of 100 bad translations and 4 of 100 good ones (docs/translators.md).
pub const DOUBTFUL_SHARE: f64 = 0.2;
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
    /// Prompts that were asked.
    pub prompts: usize,
    /// Those of them that the LLM wrote, where it was to write some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<Synthetic>,
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
    /// Mean ROUGE-1 between the two models' answers, where they are summaries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rouge1: Option<f64>,
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
    run_on_ranks(context, &World::alone(), args, job)
}

/// The same by all ranks of a world together.
pub fn run_on_ranks(context: &Context, world: &World, args: &RunArgs, job: &Job) -> Result<()> {
    let stage = Refining::open(context, world, args, job)?;
    stage::run_on_ranks(context, world.comm(), &stage).map(drop)
}

/// A refinement that is ready to begin, on one of the ranks that share it.
pub struct Refining<'a> {
    comm: &'a dyn Comm,
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
    pub fn open(context: &Context, world: &'a World, args: &RunArgs, job: &'a Job) -> Result<Self> {
        let settings = RunSettings::open_on_ranks(args, world)?;
        let config = settings.config().clone().on_device_of_ranks(context, world, &job.out)?;
        let comm = world.comm();
        let [student, teacher] = open_pair(&config, context.threads)?;
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
        Ok(Self {
            comm,
            job,
            settings,
            config,
            student,
            teacher,
            sums,
            translation,
            combined,
            public,
            prompts,
        })
    }
}

impl Stage for Refining<'_> {
    type Inputs = RefineInputs;
    /// On rank 0.
    type Output = Option<Refinement>;
    const HAS_RANKS: bool = true;
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

    fn make(&self, context: &Context) -> Result<(Vec<String>, Option<Refinement>)> {
        let Self { comm, job, config, student, teacher, prompts, combined: (combined, _), .. } = self;
        let tiny = student.adapter_of(combined);
        // The adapter of a refinement is trained whole, whatever the shadows' are.
        let fresh = teacher.with_trained_a()?;
        let mut asked = Asked::choose(config, &self.public, prompts, job.fold.as_ref())?;
        let shares = Shares { comm: *comm, batch: config.evaluate.per_device_eval_batch_size };
        let written = self.write_prompts(context, shares, &mut asked)?;
        let [of_tiny, of_llm] = prompts;
        let tiny =
            Tiny { context, shares, config, side: student, prompts: of_tiny, asked: &asked, adapter: &tiny };
        let given = dispatch(&config.device, context, tiny)?;
        let llm = Llm {
            context,
            shares,
            config,
            side: &fresh,
            prompts: of_llm,
            asked: &asked,
            synthetic: written.as_ref().map(|written| written.counts.clone()),
            given: given.as_ref(),
            translation: &self.translation,
            metric: metric(config.evaluate.metric, &asked.records)?,
            checkpoint: job.out.join(CHECKPOINT),
            of: self.inputs()?.value()?,
        };
        match dispatch(&config.device, context, llm)? {
            Some((refinement, values, rank)) => {
                let mut files = self.write(&refinement, values, rank)?;
                if let Some(written) = written {
                    write_json(&job.out.join(SYNTHETIC_FILE), &written.prompts)?;
                    files.push(SYNTHETIC_FILE.into());
                }
                Ok((files, Some(refinement)))
            }
            None => Ok((vec![], None)),
        }
    }

    fn report(&self, context: &Context, refinement: &Self::Output) -> Result<()> {
        let Some(refinement) = refinement else { return Ok(()) };
        let out = &self.job.out;
        let _ = std::fs::remove_file(out.join(CHECKPOINT));
        let share = refinement.rounds.first().map_or(0.0, |round| round.share);
        let text = format!("refine: {:.0} % of the answers agree, {}", 100.0 * share, out.display());
        context.ui.done("refine", out, json!(refinement), text);
        Ok(())
    }
}

impl Refining<'_> {
    /// Has the LLM write prompts where the settings ask for some, which are then asked as well.
    fn write_prompts(
        &self,
        context: &Context,
        shares: Shares<'_>,
        asked: &mut Asked,
    ) -> Result<Option<Written>> {
        let Self { config, teacher, prompts, public, .. } = self;
        let wanted = config.refine.synthetic_prompts;
        if wanted == 0 {
            return Ok(None);
        }
        let writing = Writing {
            context,
            shares,
            config,
            side: teacher,
            prompts,
            public: &asked.records,
            known: &public.records,
        };
        let written = dispatch(&config.device, context, writing)?;
        let Synthetic { written: texts, kept, empty, too_long, malformed, duplicates } = written.counts;
        context.ui.line(format!(
            "refine: the LLM wrote {texts} prompts, {kept} are asked; left out: {empty} empty, {too_long} too long, \
             {malformed} malformed, {duplicates} known"
        ));
        if 2 * kept < wanted {
            context.ui.notice(&format!(
                "refine: warning: {kept} of refine.synthetic_prompts = {wanted} prompts are of use: the LLM does not \
                 write prompts like the public ones"
            ));
        }
        asked.add(prompts, &written.prompts)?;
        Ok(Some(written))
    }

    /// Writes the adapter of this rank and how it came to be; returns the files.
    fn write(&self, refinement: &Refinement, values: Vec<f32>, rank: usize) -> Result<Vec<String>> {
        let Self { job, student, teacher, combined: (_, examples), .. } = self;
        let written = refinement.synthetic.as_ref().map_or(0, |synthetic| synthetic.kept);
        let side = teacher.of_rank(rank)?;
        let update = side.update(values, *examples);
        update.check().context("refine: what the training gives")?;
        let mut files = side.write_peft(&job.out, &update.values)?;
        let mut settings = vec![
            ("rounds of refinement", refinement.rounds.len().to_string()),
            ("public prompts", (refinement.prompts - written).to_string()),
            ("examples of all clients", examples.to_string()),
        ];
        if written > 0 {
            settings.push(("prompts written by the LLM", written.to_string()));
        }
        let made = Made {
            how: format!(
                "was translated from updates of `{}`, then trained on answers to public prompts on which both \
                 models agree",
                public_name(&student.dir)
            ),
            settings,
            privacy: gradtx_runtime::artifact::Privacy::None,
        };
        files.push(card::write_beside_adapter(&side.dir, &side.layout, &made, &job.out)?);
        update.write(&job.out.join(UPDATE_FILE))?;
        write_json(&job.out.join(REFINEMENT_FILE), refinement)?;
        files.extend([UPDATE_FILE.into(), REFINEMENT_FILE.into()]);
        Ok(files)
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
