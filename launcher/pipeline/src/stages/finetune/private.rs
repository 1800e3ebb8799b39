//! Differentially private fine-tuning: what [`super::Finetune`] does where `[privacy]` is set.
//!
//! Beside the usual files the directory has `privacy-ledger.jsonl`, the steps that were spent, and
//! `checkpoint.safetensors`, from which a run that was stopped continues. Both stay: the ledger is the
//! memory of what these examples have cost, and a damaged update is made again from the checkpoint at no cost.

use super::Finetune;
use anyhow::Result;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_run::config::Recipe;
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::failure::failed;
use gradtx_run::stage::{Inputs, Stage};
use gradtx_run::ui::Progress;
use gradtx_runtime::artifact::Privacy;
use gradtx_runtime::data::Example;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::checkpoint::JobCheckpoint;
use gradtx_train::lora::private::{PrivateCallback, PrivateResult, PrivateTrainer};
use gradtx_train::lora::trainer::{JobResult, Step};
use gradtx_train::privacy::{Budget, Ledger, PrivateRandom};
use gradtx_train::step_log::StepLog;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// What is computed in this time may be lost in a crash; its cost is not.
const SAVE_EVERY: Duration = Duration::from_secs(2);
const CHECKPOINT_FILE: &str = "checkpoint.safetensors";

/// Trains, and states what it cost.
pub(super) fn train(
    stage: &Finetune<'_>,
    context: &Context,
    examples: &[Example],
    key: u64,
) -> Result<(JobResult, Rate, Privacy)> {
    let Finetune { job, config, side, recipe, data, .. } = stage;
    let settings = &config.privacy;
    let budget = Budget::new(settings, recipe, examples.len())?;
    announce(context, &budget, side.layout.trained().len());
    let of = json!({
        "mechanism": budget.mechanism(),
        "max_grad_norm": settings.max_grad_norm,
        "examples": examples.len(),
        "data": data.checksum,
    });
    let mut ledger = Ledger::open(&job.out, &of)?;
    let random = match settings.insecure_seed {
        0 => PrivateRandom::new()?,
        seed => PrivateRandom::insecure(derive(derive_named(seed, "privacy"), config.seed)),
    };
    let training = PrivateTrainer {
        side,
        recipe,
        stream_tokens: config.device.max_tokens_per_microbatch,
        mechanism: budget.mechanism(),
        max_grad_norm: settings.max_grad_norm,
        most_steps: budget.most_steps(),
        random,
        key,
    };
    let checkpoint = JobCheckpoint {
        path: job.out.join(CHECKPOINT_FILE),
        of: stage.inputs()?.value()?,
        every: SAVE_EVERY,
    };
    let (budget, training) = (&budget, &training);
    let work =
        PrivateJob { context, training, examples, budget, ledger: &mut ledger, checkpoint, out: &job.out };
    let PrivateResult { job: trained, rate, dropped } = dispatch(&config.device, context, work)?;
    report_losses(context, stage, trained.losses.len() as u32, dropped)?;
    let privacy = budget.statement(ledger.spent(), training.random.is_secure());
    context.ui.line(format!("finetune: privacy: {privacy}"));
    Ok((trained, rate, privacy))
}

/// Says what will be done, and what speaks against it.
fn announce(context: &Context, budget: &Budget, values: usize) {
    context.ui.line(format!("finetune: differentially private: {}", budget.shown()));
    let [one, all] = budget.signal_to_noise(values);
    context.ui.line(format!(
        "finetune: signal to noise at most {one:.3} in a step, {all:.3} over all; nothing is validated or stopped \
         early on private data"
    ));
    budget.warnings().iter().for_each(|warning| context.ui.notice(&format!("finetune: warning: {warning}")));
}

/// Says which steps and gradients are missing.
///
/// # Errors
/// If all steps are.
fn report_losses(context: &Context, stage: &Finetune<'_>, done: u32, dropped: usize) -> Result<()> {
    let (out, steps) = (&stage.job.out, stage.recipe.max_steps);
    if done == 0 {
        let what =
            format!("{}: its privacy budget is spent, and nothing of what it gave is left", out.display());
        return Err(failed(what, "give another directory with --out: the costs of both add up"));
    }
    if done < steps {
        context.ui.notice(&format!(
            "finetune: {done} of {steps} steps: those that were lost when it was stopped are paid for, and are not \
             repeated"
        ));
    }
    if dropped > 0 {
        let what = format!("finetune: {dropped} gradients were not finite numbers, and counted as zero");
        context.ui.notice(&what);
    }
    Ok(())
}

struct PrivateJob<'a> {
    context: &'a Context,
    training: &'a PrivateTrainer<'a>,
    examples: &'a [Example],
    budget: &'a Budget,
    ledger: &'a mut Ledger,
    checkpoint: JobCheckpoint,
    /// Directory of the metrics.
    out: &'a Path,
}

impl Work for PrivateJob<'_> {
    type Output = PrivateResult;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<PrivateResult> {
        let Self { context, training, examples, budget, ledger, checkpoint, out } = self;
        let plan = training.plan::<X, D>(examples);
        plan.check(memory_for(device, &context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &training.side.dir)?;
        context.show_plan(&format!("finetune {}", training.side.role.name()), &plan);
        let mut watched = ShowSteps {
            progress: context.ui.progress("finetune", training.recipe.max_steps as u64),
            log: None,
            out,
            device_bytes: plan.total(),
            recipe: training.recipe,
            examples: examples.len(),
            budget,
        };
        let trained = training.run(&decoder, examples, ledger, &checkpoint, &mut watched)?;
        if let Some(log) = &watched.log {
            log.sync()?;
        }
        Ok(trained)
    }
}

/// Shows every step and what was spent, and writes it down.
struct ShowSteps<'a> {
    progress: Progress,
    /// None before the first step, which says what is resumed.
    log: Option<StepLog>,
    out: &'a Path,
    device_bytes: u64,
    recipe: &'a Recipe,
    /// Examples of the job.
    examples: usize,
    budget: &'a Budget,
}

impl PrivateCallback for ShowSteps<'_> {
    fn private_step(&mut self, step: &Step<'_>, spent: u64) -> Result<()> {
        let job = &step.jobs[0];
        let epsilon = self.budget.bound(spent);
        let mut line = job.line(step.done as usize - 1, self.recipe, self.examples);
        line.insert("spent_steps".into(), json!(spent));
        line.insert("epsilon".into(), json!(epsilon));
        let log = match &mut self.log {
            Some(log) => log,
            none => none.insert(StepLog::resume(self.out, step.done as u64, "tokens", self.device_bytes)?),
        };
        log.write(&line, job.tokens.last().copied().unwrap_or_default())?;
        let message =
            format!("loss {:.4}, ε {epsilon:.3}, {:.0} tokens/s", step.loss(), step.rate.per_second());
        self.progress.set(step.done as u64, message);
        Ok(())
    }
}
