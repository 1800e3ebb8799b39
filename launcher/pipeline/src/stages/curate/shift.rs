//! [`Shift`]: what one process does: takes groups from its office and trains them, one after
//! the other, with one base model loaded at a time.

use super::collection::{ASIDE, Collection, Finished};
use super::office::{Now, Office, Spent, Task};
use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_run::context::{Context, totals};
use gradtx_run::dispatch::{self, memory_for};
use gradtx_run::record::make_dir;
use gradtx_run::role::Role;
use gradtx_runtime::data::Dataset;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::trainer::{Step, Training, Watcher};
use std::time::Instant;

/// One process's part of the work.
pub struct Shift<'a> {
    /// Where messages go.
    pub context: &'a Context,
    /// What is collected.
    pub collection: &'a Collection,
    /// The examples as each model sees them, where that model has work.
    pub examples: &'a [Option<Dataset>; 2],
    /// Whether this process sees the store, and can put work aside there.
    pub sees_store: bool,
    /// Where the work comes from.
    pub office: Box<dyn Office + 'a>,
}

impl dispatch::Work for Shift<'_> {
    /// The exit code, if it was asked to stop before everything was done.
    type Output = Option<u8>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(mut self, device: &D) -> Result<Option<u8>> {
        if self.sees_store {
            make_dir(&self.collection.dir.join(ASIDE))?;
        }
        let mut resident: Option<(Role, Decoder<D, X>)> = None;
        let (mut spent, mut unfinished) = (Spent::default(), false);
        loop {
            let at = Instant::now();
            let task = self.office.next(resident.as_ref().map(|(role, _)| *role))?;
            spent.waiting += at.elapsed();
            let Some(task) = task else { break };
            let role = task.work.side;
            let at = Instant::now();
            let decoder = match resident.take() {
                Some((held, decoder)) if held == role => decoder,
                other => {
                    // Before the next one is loaded: both may not fit.
                    drop(other);
                    self.check::<X, D>(device, &task)?;
                    Decoder::load(device, &self.collection.side(role).dir)?
                }
            };
            spent.loading += at.elapsed();
            unfinished = !self.train(&decoder, task, &mut spent)?;
            if unfinished {
                break;
            }
            spent.groups += 1;
            resident = Some((role, decoder));
        }
        drop(resident);
        self.office.end(unfinished, spent)
    }
}

impl Shift<'_> {
    fn training(&self, role: Role) -> (Training<'_>, &Dataset) {
        let examples = self.examples[role as usize].as_ref();
        (self.collection.training(role), examples.expect("a model with work has examples"))
    }

    /// Fails if there is not enough memory to train a group of this model.
    fn check<X: Real<Acc = f32>, D: Backend<X>>(&self, device: &D, task: &Task) -> Result<()> {
        let (training, examples) = self.training(task.work.side);
        let name = task.work.side.name();
        let group = self.collection.groups()[task.work.group].clone();
        let (plan, packing) = training.plan::<X, D>(&self.collection.jobs(examples, &group))?;
        plan.check(memory_for(device, &self.context.place)?)?;
        self.context.ui.line(format!("curate {name}: subsets {group:?} in {packing}"));
        self.context.ui.line(totals(&format!("curate {name}"), &plan));
        Ok(())
    }

    /// Trains a group; false when it was stopped on its way.
    fn train<X: Real<Acc = f32>, D: Backend<X>>(
        &mut self,
        decoder: &Decoder<D, X>,
        task: Task,
        spent: &mut Spent,
    ) -> Result<bool> {
        let begin = Instant::now();
        let Task { work, claim } = task;
        let collection = self.collection;
        let group = collection.groups()[work.group].clone();
        let examples = self.examples[work.side as usize].as_ref();
        let jobs = collection.jobs(examples.expect("a model with work has examples"), &group);
        let training = collection.training(work.side);
        let rate = Rate { tokens: 0, time: Default::default() };
        let now = Now { work, jobs: jobs.len(), done: 0, steps: training.recipe.steps, rate, loss: None };
        let mut told = Telling { office: &mut *self.office, now };
        let aside = self.sees_store.then(|| collection.aside(work.side, &group));
        let trained = training
            .run(decoder, &jobs, aside.as_ref(), &mut told)
            .with_context(|| format!("curate {}: subsets {group:?}", work.side.name()))?;
        spent.training += begin.elapsed();
        let Some((jobs, rate)) = trained else { return Ok(false) };
        let now = Now { done: now.steps, rate, ..now };
        let begin = Instant::now();
        self.office.deliver(Finished { work, jobs, claim }, &now)?;
        spent.delivering += begin.elapsed();
        Ok(true)
    }
}

/// Passes on how far a group is.
struct Telling<'o> {
    office: &'o mut dyn Office,
    now: Now,
}

impl Watcher for Telling<'_> {
    fn between(&mut self) -> Result<()> {
        self.office.between()
    }

    fn step(&mut self, step: &Step<'_>) -> Result<bool> {
        self.now = Now { done: step.done, rate: step.rate, loss: Some(step.loss()), ..self.now };
        self.office.step(&self.now)
    }
}
