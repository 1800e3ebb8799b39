//! From settings, sizes and rates to time, GPU hours and memory of every stage.
//!
//! In: a [`Question`] and [`Rates`]. Out: a [`Prediction`]. Curation is played through
//! group by group over all ranks; training is data-parallel over as many ranks as a batch
//! has tuples; what is done for a client runs on one rank, several clients side by side.

use super::device::{Cluster, Gpu};
use super::memory::{self, Memory, Model, Streams, largest};
use super::prediction::{Curation, Prediction, Stage, Training};
use super::rates::{Kind, Rates};
use super::simulate::simulate;
use super::tokens::{Lengths, Mean};
use super::work::{Cost, DecoderWork, TranslatorWork};
use anyhow::Result;
use gradtx_models::grad_transformer::GradTransformerConfig;
use gradtx_run::config::{Config, Recipe};
use gradtx_run::role::Role;
use gradtx_runtime::plan::human_bytes;
use gradtx_train::lora::schedule::{JobGroup, groups};
use gradtx_train::translator::validate::AT_ONCE;
use gradtx_train::translator::{model_config, target_shape};
use std::ops::Range;

/// What is to be predicted.
pub struct Question<'a> {
    /// The settings.
    pub config: &'a Config,
    /// TinyLM and LLM.
    pub models: &'a [Model; 2],
    /// Examples as the two models see them.
    pub lengths: [&'a Lengths; 2],
    /// Rows that shadow subsets are drawn from, in turn; empty where all are drawn from all.
    pub groups: &'a [Vec<usize>],
    /// The machines.
    pub cluster: Cluster,
    /// Bytes of memory that a rank has.
    pub memory: u64,
    /// Clients to be served.
    pub clients: usize,
    /// Test examples of each client.
    pub test_examples: usize,
}

/// Gradients are reduced in pieces of this many bytes.
const BUCKET: f64 = (16 << 20) as f64;

/// Predicts what a run takes.
pub fn predict(question: &Question<'_>, rates: &Rates) -> Result<Prediction> {
    let Question { config, cluster, clients, .. } = *question;
    let means = question.lengths.map(|lengths| {
        let of_group = |rows: &Vec<usize>| lengths.mean(Some(rows.as_slice()));
        question.groups.iter().map(of_group).collect()
    });
    let plan = Planner { question, rates, means };
    let mut warnings = vec![];
    let mut stages = vec![];
    for side in [Role::Tiny, Role::Llm] {
        stages.push(plan.curate_side(side, &mut warnings));
    }
    let curation = plan.curation(cluster.ranks(), &plan.work(config.curate.most_at_once()));
    warnings.extend(plan.idle_ranks(&curation));
    let (stage, training) = plan.training(&mut warnings)?;
    let recommended = plan.recommend(&curation, &stage, &training)?;
    stages.push(stage);
    for side in [Role::Tiny, Role::Llm] {
        stages.push(plan.client_finetune(side, &mut warnings));
    }
    stages.push(plan.client_translate(training.parameters)?);
    stages.push(plan.client_evaluate(&mut warnings));
    let ranks = cluster.ranks();
    let of_client = stages.iter().filter(|s| s.needed && s.name.starts_with("client"));
    let of_client: f64 = of_client.map(|s| s.seconds).sum();
    let trained = stages[2].seconds;
    let rounds = clients.div_ceil(ranks) as f64;
    let hours = ranks as f64 * (curation.seconds + trained) + clients as f64 * of_client;
    Ok(Prediction {
        cluster,
        ranks,
        seconds: curation.seconds + trained + rounds * of_client,
        gpu_hours: hours / 3600.0,
        stages,
        curation,
        training,
        by_products: plan.by_products(),
        emulation: plan.emulation(),
        recommended,
        clients,
        examples: question.lengths.map(|l| l.source.clone()),
        examples_counted: question.lengths.iter().all(|l| l.counted),
        rates: rates.all.clone(),
        warnings,
    })
}

pub(super) struct Planner<'a> {
    pub(super) question: &'a Question<'a>,
    pub(super) rates: &'a Rates,
    /// The mean example of every group of rows, for each model.
    means: [Vec<Mean>; 2],
}

/// Groups of shadow jobs with their costs in seconds.
pub(super) struct GroupedWork {
    work: Vec<JobGroup>,
    /// Jobs of a group.
    pub(super) concurrent: usize,
}

/// All tokens and operations of a model's shadow jobs, and the groups with their seconds.
struct SideWork {
    work: Vec<JobGroup>,
    tokens: f64,
    flops: f64,
}

impl Planner<'_> {
    pub(super) fn gpu(&self) -> Gpu {
        self.question.cluster.gpu
    }

    pub(super) fn model(&self, side: Role) -> &Model {
        &self.question.models[side as usize]
    }

    pub(super) fn lengths(&self, side: Role) -> &Lengths {
        self.question.lengths[side as usize]
    }

    pub(super) fn decoder(&self, side: Role) -> DecoderWork<'_> {
        let model = self.model(side);
        let element = self.gpu().element() as f64;
        DecoderWork { model: &model.config, layout: &model.layout, element }
    }

    pub(super) fn recipe(&self, side: Role) -> &Recipe {
        let curate = &self.question.config.curate;
        if side == Role::Tiny { &curate.tiny } else { &curate.llm }
    }

    /// A shadow subset's mean example: that of the rows it is drawn from.
    fn mean(&self, side: Role, jobs: Range<usize>) -> Mean {
        let (lengths, groups) = (self.lengths(side), self.question.groups);
        if groups.is_empty() {
            return lengths.mean(None);
        }
        let count = jobs.len() as f64;
        let means = &self.means[side as usize];
        jobs.map(|job| means[job % groups.len()]).fold(Mean::default(), |sum, mean| Mean {
            tokens: sum.tokens + mean.tokens / count,
            pairs: sum.pairs + mean.pairs / count,
            labels: sum.labels + mean.labels / count,
        })
    }

    /// Fine-tuning of several jobs together.
    fn finetuning(&self, side: Role, recipe: &Recipe, jobs: usize, mean: &Mean) -> Cost {
        let stream_tokens = self.question.config.device.max_tokens_per_microbatch;
        self.decoder(side).finetuning(mean, jobs as f64 * recipe.global_batch_size as f64, stream_tokens)
            * recipe.max_steps as f64
    }

    fn side_work(&self, side: Role, concurrent: usize) -> SideWork {
        let recipe = self.recipe(side);
        let mut found = SideWork { work: vec![], tokens: 0.0, flops: 0.0 };
        for (group, jobs) in
            groups(self.question.config.curate.num_subsets, concurrent).into_iter().enumerate()
        {
            let mean = self.mean(side, jobs.clone());
            let cost = self.finetuning(side, recipe, jobs.len(), &mean);
            found.tokens +=
                mean.tokens * jobs.len() as f64 * recipe.global_batch_size as f64 * recipe.max_steps as f64;
            found.flops += cost.flops;
            found.work.push(JobGroup { side, group, cost: self.rates.seconds(Kind::Lora, cost) });
        }
        found
    }

    fn curate_side(&self, side: Role, warnings: &mut Vec<String>) -> Stage {
        let Question { config, cluster, .. } = self.question;
        let recipe = self.recipe(side);
        let found = self.side_work(side, config.curate.most_at_once());
        let busy: f64 = found.work.iter().map(|w| w.cost).sum();
        let name = format!("curate {}", side.name());
        let jobs = config.curate.most_at_once();
        Stage {
            ranks: cluster.ranks(),
            steps: config.curate.num_subsets as f64 * recipe.max_steps as f64,
            tokens: found.tokens,
            flops: found.flops,
            seconds: busy / cluster.ranks() as f64,
            gpu_hours: busy / 3600.0,
            memory: self.streams_memory(&name, side, recipe, jobs, warnings),
            basis: self.rates.of(Kind::Lora).basis,
            needed: true,
            name,
        }
    }

    /// Memory of fine-tuning, and what would fit where it does not.
    fn streams_memory(
        &self,
        name: &str,
        side: Role,
        recipe: &Recipe,
        jobs: usize,
        warnings: &mut Vec<String>,
    ) -> Memory {
        let config = self.question.config;
        let given = Streams {
            jobs,
            batch: recipe.global_batch_size,
            stream_tokens: config.device.max_tokens_per_microbatch,
            longest: self.lengths(side).longest().min(config.data.max_length),
        };
        let need = |streams| {
            Memory::of(&memory::finetuning(self.model(side), streams, self.gpu()), self.question.memory)
        };
        let found = need(given);
        if !found.fits() {
            let shorter = largest(given.longest..given.stream_tokens, |stream_tokens| {
                need(Streams { stream_tokens, ..given }).fits()
            });
            let fewer = largest(1..jobs, |jobs| need(Streams { jobs, ..given }).fits());
            let mut help = vec![];
            help.extend(shorter.map(|n| format!("device.max_tokens_per_microbatch = {n}")));
            help.extend(fewer.map(|n| format!("curate.jobs_per_batch = {n}")));
            warnings.push(too_much(name, &found, &help));
        }
        found
    }

    /// The groups of both models, with so many jobs in each.
    pub(super) fn work(&self, concurrent: usize) -> GroupedWork {
        let work = [Role::Tiny, Role::Llm].map(|side| self.side_work(side, concurrent).work).concat();
        GroupedWork { work, concurrent }
    }

    pub(super) fn curation(&self, ranks: usize, grouped: &GroupedWork) -> Curation {
        let Question { config, models, .. } = self.question;
        let GroupedWork { work, concurrent } = grouped;
        let outcome = simulate(work, ranks, |side| self.rates.load(self.decoder(side).bytes()));
        let members = groups(config.curate.num_subsets, *concurrent);
        let jobs = outcome.ranks.iter().map(|r| r.done.iter().map(|w| members[w.group].len()).sum());
        let jobs: Vec<usize> = jobs.collect();
        let fewest_most = [jobs.iter().min(), jobs.iter().max()].map(|n| n.copied().unwrap_or(0));
        let seconds = outcome.makespan();
        let values: usize = models.iter().map(|m| m.layout.trained().len()).sum();
        Curation {
            groups: work.len(),
            seconds,
            idle_share: outcome.idle_share(),
            loading_share: outcome.loading() / (seconds * ranks as f64).max(f64::MIN_POSITIVE),
            jobs_per_rank: fewest_most,
            disk: [config.curate.num_snapshots, config.curate.num_subsets]
                .iter()
                .fold(4 * values as u64, |bytes, &n| bytes.saturating_mul(n as u64)),
            files: 2 * config.curate.num_subsets,
        }
    }

    fn training(&self, warnings: &mut Vec<String>) -> Result<(Stage, Training)> {
        let Question { config, cluster, .. } = self.question;
        let train = &config.train;
        let shape = self.translator()?;
        let ranks = cluster.ranks();
        let micro = train.per_device_train_batch_size.min(train.global_batch_size.div_ceil(ranks));
        let [_, held] = config.tuples();
        let (plan, parameters) = memory::training(&shape, micro, held.min(AT_ONCE), ranks, self.gpu())?;
        let memory = Memory::of(&plan, self.question.memory);
        if !memory.fits() {
            let fits = |micro| {
                let plan = memory::training(&shape, micro, held.min(AT_ONCE), ranks, self.gpu());
                plan.is_ok_and(|(plan, _)| Memory::of(&plan, self.question.memory).fits())
            };
            let help: Vec<String> = largest(1..micro, fits)
                .map(|n| format!("train.per_device_train_batch_size = {n}"))
                .into_iter()
                .collect();
            warnings.push(too_much("train", &memory, &help));
        }
        let work = self.translator_work(&shape, parameters);
        let step = self.training_step(&work, *cluster);
        warnings.extend(self.fewer_ranks(&work, &step));
        let at_once = held.clamp(1, AT_ONCE) as f64;
        let validation =
            self.rates.seconds(Kind::Translator, work.generating(at_once)) * (held as f64 / at_once).ceil();
        let validations = (train.max_steps as f64 / train.eval_steps as f64).ceil();
        let steps = train.max_steps as f64;
        let seconds = steps * step.seconds() + validations * validation;
        let blocks = (shape.student_blocks + shape.teacher_blocks) as f64;
        let stage = Stage {
            name: "train".into(),
            ranks,
            steps,
            tokens: steps * train.global_batch_size as f64 * blocks,
            flops: steps * work.training(train.global_batch_size as f64).flops,
            seconds,
            gpu_hours: seconds * ranks as f64 / 3600.0,
            memory,
            basis: self.rates.of(Kind::Translator).basis,
            needed: true,
        };
        Ok((stage, step))
    }

    /// The translator's shape.
    pub(super) fn translator(&self) -> Result<GradTransformerConfig> {
        let [student, teacher] =
            [0, 1].map(|i| &self.question.models[i].layout).map(|layout| [layout.blocks(), layout.width()]);
        let config = &self.question.config;
        // How many groups there are is known when the data is read: not more than subsets.
        let predicted = target_shape(&config.train, teacher, config.curate.num_subsets);
        model_config(&config.translator, student, predicted)
    }

    pub(super) fn translator_work<'c>(
        &self,
        shape: &'c GradTransformerConfig,
        parameters: usize,
    ) -> TranslatorWork<'c> {
        let element = self.gpu().element() as f64;
        TranslatorWork { config: shape, values: parameters as f64, element }
    }

    /// An optimizer step: gradients are reduced and scattered while backward continues, every
    /// rank updates its shard, and values are gathered.
    pub(super) fn training_step(&self, work: &TranslatorWork<'_>, cluster: Cluster) -> Training {
        let train = &self.question.config.train;
        let ranks = cluster.ranks();
        let local = train.global_batch_size.div_ceil(ranks);
        let micro = train.per_device_train_batch_size.min(local);
        let rate = |kind, cost| self.rates.seconds(kind, cost);
        let parts = local.div_ceil(micro);
        let compute = rate(Kind::Translator, work.training(local as f64 / parts as f64)) * parts as f64;
        let link = self.rates.link(&cluster);
        let gradients = 4.0 * work.values;
        let pieces = (gradients / BUCKET).ceil();
        let scatter = link.half_reduce(gradients, ranks, pieces);
        let gather = link.half_reduce(work.element * work.values, ranks, 1.0);
        // Backward is two thirds; only the last micro-batch's hides anything, and the last
        // bucket is ready when there is nothing left to hide behind.
        let hidden = (scatter - scatter / pieces.max(1.0)).min(2.0 / 3.0 * compute / parts as f64);
        Training {
            parameters: work.values as usize,
            tuples_per_rank: local,
            compute,
            update: rate(Kind::Memory, work.update(ranks as f64)),
            network: scatter - hidden + gather,
            network_in_all: scatter + gather,
        }
    }

    fn client_finetune(&self, side: Role, warnings: &mut Vec<String>) -> Stage {
        let config = self.question.config;
        let recipe = if side == Role::Tiny { &config.finetune.tiny } else { &config.finetune.llm };
        let mean = self.lengths(side).mean(None);
        let cost = self.finetuning(side, recipe, 1, &mean);
        let name = format!("client finetune {}", side.name());
        let memory = self.streams_memory(&name, side, recipe, 1, warnings);
        let seconds = self.rates.seconds(Kind::Lora, cost) + self.rates.load(self.decoder(side).bytes());
        let steps = recipe.max_steps as f64;
        let tokens = steps * recipe.global_batch_size as f64 * mean.tokens;
        let stage = self.client(name, Kind::Lora, steps, tokens, cost, seconds, memory);
        Stage { needed: side == Role::Tiny, ..stage }
    }

    fn client_translate(&self, parameters: usize) -> Result<Stage> {
        let shape = self.translator()?;
        let work = self.translator_work(&shape, parameters);
        let cost = work.generating(1.0);
        // The translator's file is float32.
        let seconds = self.rates.seconds(Kind::Translator, cost) + self.rates.load(4.0 * work.values);
        let plan = memory::translating(&shape, self.gpu())?;
        let memory = Memory::of(&plan, self.question.memory);
        let blocks = (shape.student_blocks + shape.teacher_blocks) as f64;
        Ok(self.client("client translate".into(), Kind::Translator, 1.0, blocks, cost, seconds, memory))
    }

    fn client_evaluate(&self, warnings: &mut Vec<String>) -> Stage {
        let Question { config, test_examples, .. } = self.question;
        let (side, settings) = (Role::Llm, &config.evaluate);
        let (lengths, decoder) = (self.lengths(side), self.decoder(side));
        let (prompt, examples) = (lengths.prompt(), *test_examples as f64);
        // Answers are taken to be as long as those of the public data.
        let new = lengths.mean(None).labels.clamp(1.0, settings.max_new_tokens as f64);
        let rows = (settings.per_device_eval_batch_size as f64).min(examples.max(1.0));
        let read = decoder.reading(&prompt, examples);
        // Rows that end leave their place to the next example.
        let decode = decoder.decoding(rows, prompt.tokens + new / 2.0) * (examples * new / rows);
        let seconds = self.rates.seconds(Kind::Lora, read)
            + self.rates.seconds(Kind::Generate, decode)
            + self.rates.load(decoder.bytes());
        let longest = lengths.longest().min(config.data.max_length);
        let stream = config.device.max_tokens_per_microbatch;
        let plan = memory::generating(self.model(side), settings, longest, stream, self.gpu());
        let memory = Memory::of(&plan, self.question.memory);
        if !memory.fits() {
            let fits = |batch| {
                let settings = gradtx_run::config::EvaluateConfig {
                    per_device_eval_batch_size: batch,
                    ..settings.clone()
                };
                let plan = memory::generating(self.model(side), &settings, longest, stream, self.gpu());
                Memory::of(&plan, self.question.memory).fits()
            };
            let help: Vec<String> = largest(1..settings.per_device_eval_batch_size, fits)
                .map(|n| format!("evaluate.per_device_eval_batch_size = {n}"))
                .into_iter()
                .collect();
            warnings.push(too_much("client evaluate llm", &memory, &help));
        }
        let tokens = examples * (prompt.tokens + new);
        self.client(
            "client evaluate llm".into(),
            Kind::Generate,
            examples,
            tokens,
            read + decode,
            seconds,
            memory,
        )
    }

    /// What is done for one client, on one rank.
    fn client(
        &self,
        name: String,
        kind: Kind,
        steps: f64,
        tokens: f64,
        cost: Cost,
        seconds: f64,
        memory: Memory,
    ) -> Stage {
        Stage {
            name,
            ranks: 1,
            steps,
            tokens,
            flops: cost.flops,
            seconds,
            gpu_hours: seconds / 3600.0,
            memory,
            basis: self.rates.of(kind).basis,
            needed: true,
        }
    }
}

/// A stage that does not fit, and what would.
fn too_much(name: &str, memory: &Memory, help: &[String]) -> String {
    let help = match help {
        [] => "no setting of batch or stream makes it fit: the model is too large for this device".into(),
        all => format!("{} would fit", all.join(" or ")),
    };
    let (need, there) = (human_bytes(memory.need), human_bytes(memory.available));
    format!("{name}: needs {need} of memory per rank, there are {there}; {help}")
}
