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

use crate::aggregate::{self, Combine};
use crate::artifacts::{expect_run_model, open_side, open_update};
use crate::lineage::{Kind, Lineage, adapter_sums};
use crate::records::{RefineInputs, TranslateInputs};
use crate::score::{answer, exact_match, rouge1};
use crate::stages::evaluate::{metric, without_prefix};
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    Activations, AdapterView, Continuation, Decoder, GenerateLimits, Generator, Mode, Prompt,
};
use gradtx_models::lora::{BlockLayout, Factor, LoraJobs, Stacked, read_peft};
use gradtx_run::config::{Config, Recipe, RefineConfig, RunArgs};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::failure::failed;
use gradtx_run::paths::{ADAPTER_DIR, UPDATE_FILE};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::{UpdateVector, checksum_file, write_json};
use gradtx_runtime::checkpoint::{self, Checkpoint, Values};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, Metric, PackedBatch, Record};
use gradtx_runtime::plan::Room;
use gradtx_runtime::text::shown;
use gradtx_train::examples::{Data, Streams};
use gradtx_train::prompts::Prompts;
use gradtx_train::side::Side;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// How a refinement went.
pub const REFINEMENT_FILE: &str = "refinement.json";
/// The adapter after the last whole round.
const CHECKPOINT: &str = "round.safetensors";
/// Below this share of answers that agree the translation is doubtful.
const DOUBTFUL: f64 = 0.1;

/// What to refine, to where.
pub struct Job {
    /// The update vector files that were translated.
    pub updates: Vec<PathBuf>,
    /// The translation's directory.
    pub translated: PathBuf,
    /// Directory of the results.
    pub out: PathBuf,
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
    config: Config,
    student: Side,
    teacher: Side,
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
        let config = Config::of_run(args)?.on_device(context, &job.out)?;
        let student = open_side(&config, Role::Tiny, context.threads)?;
        let teacher = open_side(&config, Role::Llm, context.threads)?;
        expect_run_model(&args.run, Role::Tiny, &student.space.base_model)?;
        let updates: Vec<UpdateVector> =
            job.updates.iter().map(|path| open_update(&student, &teacher, path)).collect::<Result<_>>()?;
        let sums = job.updates.iter().map(|path| checksum_file(path)).collect::<Result<Vec<_>, _>>()?;
        let translation = Translation::open(&job.translated, &sums, &teacher)?;
        expect_consent(&job.updates, &updates)?;
        let combined = aggregate::combine(&updates, translation.combine)?;
        let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
        let prompts = [public.prompts(&config, &student)?, public.prompts(&config, &teacher)?];
        Ok(Self { job, config, student, teacher, sums, translation, combined, public, prompts })
    }
}

impl Stage for Refining<'_> {
    type Inputs = RefineInputs;
    type Output = Refinement;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        &self.job.out
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
            method: translation.lineage.method,
            tiny: student.space.base_model.clone(),
            llm: teacher.space.base_model.clone(),
            adapter: Side::adapter_inputs(&config.adapter, &[student, teacher]),
            device: config.device.clone(),
            reading: config.data.reading_inputs(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Refinement)> {
        let Self { job, config, student, teacher, prompts, combined: (combined, examples), .. } = self;
        let tiny: Vec<f32> =
            student.init.iter().zip(combined).map(|(start, change)| start + change).collect();
        let asked = Asked::choose(config, &self.public, prompts)?;
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
        update.write(&job.out.join(UPDATE_FILE))?;
        write_json(&job.out.join(REFINEMENT_FILE), &refinement)?;
        files.extend([UPDATE_FILE.into(), REFINEMENT_FILE.into()]);
        Ok((files, refinement))
    }

    fn tell(&self, context: &Context, refinement: &Refinement) -> Result<()> {
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
    combine: Combine,
    sums: Vec<String>,
    layout: BlockLayout,
    /// Factors, `[L, d]`.
    values: Vec<f32>,
}

impl Translation {
    fn open(dir: &Path, updates: &[String], teacher: &Side) -> Result<Self> {
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
        let combine = made.combine;
        let adapter = read_peft(&adapter, &teacher.model)?;
        Ok(Self { lineage, combine, sums, layout: adapter.layout, values: adapter.values })
    }
}

/// The prompts, for both models.
struct Asked {
    records: Vec<Record>,
    tiny: Vec<Vec<u32>>,
    llm: Vec<Vec<u32>>,
}

impl Asked {
    fn choose(config: &Config, public: &Data, prompts: &[Prompts; 2]) -> Result<Self> {
        let key = derive_named(config.seed, "prompts of refinement");
        let order = Stream::new(key).permutation(public.records.len());
        let chosen = order.into_iter().take(config.refine.prompts);
        let records: Vec<Record> = chosen.map(|row| public.records[row].clone()).collect();
        let tokens =
            |prompts: &Prompts| records.iter().map(|r| prompts.prompt(r)).collect::<Result<Vec<_>>>();
        Ok(Self { tiny: tokens(&prompts[0])?, llm: tokens(&prompts[1])?, records })
    }
}

/// An answer, which never leaves this process.
#[derive(Clone, Default)]
struct Answer {
    tokens: Vec<u32>,
    /// Without what the prompt form writes before an answer.
    text: String,
    /// It ended by itself.
    ended: bool,
}

/// Room for answers to these prompts.
fn limits(config: &Config, prompts: &Prompts, tokens: &[Vec<u32>]) -> GenerateLimits {
    let settings = &config.evaluate;
    let longest = tokens.iter().map(Vec::len).max().unwrap_or(1);
    GenerateLimits {
        rows: settings.batch.min(tokens.len()),
        prompt_tokens: longest.max(config.device.stream_tokens.min(longest * settings.batch)),
        context: (longest + settings.max_new_tokens).min(prompts.context()),
    }
}

/// Answers all prompts with an adapter.
fn answers<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    config: &Config,
    prompts: &Prompts,
    tokens: &[Vec<u32>],
    view: AdapterView<'_, D, f32>,
) -> Result<Vec<Answer>> {
    let limits = limits(config, prompts, tokens);
    let mut generator = Generator::new(decoder, limits, Some(view.layout))?.within(prompts.context());
    let asked: Vec<Prompt> =
        tokens.iter().map(|tokens| Prompt { tokens: tokens.clone(), adapter: Some(0) }).collect();
    let (most, stops) = (config.evaluate.max_new_tokens, prompts.check.stops());
    let tokenizer = &prompts.tokenizer;
    let prefix = tokenizer.decode(&tokenizer.encode(prompts.check.prefix())?.ids, true)?;
    let found = generator.generate(decoder, Some(view), &asked, most, stops)?;
    let answer = |Continuation { tokens, ended }| {
        let text = tokenizer.decode(&tokens, true)?;
        Ok(Answer { text: without_prefix(&text, &prefix).to_string(), tokens, ended })
    };
    found.into_iter().map(answer).collect()
}

/// The token that ends an answer in training examples.
fn end_token(prompts: &Prompts, record: &Record) -> Result<Option<u32>> {
    let (data, _) = prompts.examples(std::slice::from_ref(record), 1)?;
    let last = data.examples.first().and_then(|example| {
        let trained = example.tokens.iter().zip(&example.trained).filter(|(_, is_trained)| **is_trained);
        trained.map(|(&token, _)| token).find(|token| prompts.check.stops().contains(token))
    });
    Ok(last.or(prompts.check.stops().first().copied()))
}

/// A prompt with an answer to be learned.
fn example(prompt: &[u32], answer: &[u32], end: Option<u32>) -> Example {
    let tokens: Vec<u32> = prompt.iter().chain(answer).copied().chain(end).collect();
    let trained = (0..tokens.len()).map(|i| i >= prompt.len()).collect();
    Example { tokens, trained }
}

/// What the TinyLM answers, and how sure it is.
struct Given {
    answers: Vec<Answer>,
    /// Probability of every answer; 0 of those that did not end.
    probability: Vec<f64>,
}

impl Given {
    /// The half of the ended answers that the TinyLM is surest of, in the prompts' order, and their mean
    /// probability.
    fn surest(&self) -> (Vec<usize>, f64) {
        let mut ended: Vec<usize> = (0..self.answers.len()).filter(|&i| self.answers[i].ended).collect();
        ended.sort_by(|&i, &j| self.probability[j].total_cmp(&self.probability[i]).then(i.cmp(&j)));
        ended.truncate(ended.len().div_ceil(2));
        ended.sort_unstable();
        let sum: f64 = ended.iter().map(|&i| self.probability[i]).sum();
        let mean = sum / ended.len().max(1) as f64;
        (ended, mean)
    }
}

struct Tiny<'a> {
    context: &'a Context,
    config: &'a Config,
    side: &'a Side,
    prompts: &'a Prompts,
    asked: &'a Asked,
    adapter: &'a [f32],
}

impl Work for Tiny<'_> {
    type Output = Given;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Given> {
        let Self { config, side, prompts, asked, .. } = self;
        let mut plan = Decoder::<D, X>::plan(&side.model, false);
        let limits = limits(config, prompts, &asked.tiny);
        plan.extend(Generator::<D, X>::plan(&side.model, limits, Some(&side.layout)));
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &side.dir)?;
        let values = device.buffer_from(self.adapter)?;
        let view = AdapterView { values: &values, layout: &side.layout, dropout: 0.0 };
        let answers = answers(&decoder, config, prompts, &asked.tiny, view)?;
        let end = end_token(prompts, &asked.records[0])?;
        let examples: Vec<Example> =
            asked.tiny.iter().zip(&answers).map(|(prompt, a)| example(prompt, &a.tokens, end)).collect();
        let mut probability = probabilities(&decoder, view, &examples, config.device.stream_tokens)?;
        for (p, answer) in probability.iter_mut().zip(&answers) {
            *p *= f64::from(u8::from(answer.ended));
        }
        Ok(Given { answers, probability })
    }
}

/// The probability of the answer of every example.
fn probabilities<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    view: AdapterView<'_, D, f32>,
    examples: &[Example],
    stream_tokens: usize,
) -> Result<Vec<f64>> {
    let mut streams = Streams::new(stream_tokens);
    let recipe = Recipe::default();
    let all: Vec<&Example> = examples.iter().collect();
    streams.push_step(&all, &recipe, 0, 0, 0);
    let streams = streams.finish();
    let capacity = capacity(&streams);
    let device = decoder.device();
    let mut acts = Activations::new(decoder, capacity, Mode::Inference(Some(view.layout)))?;
    let mut batch = DeviceBatch::new(device, capacity)?;
    let mut sums = vec![];
    for stream in &streams {
        batch.load(device, stream)?;
        decoder.loss(&mut acts, &batch, Some(view))?;
        let losses = device.to_host(acts.losses())?;
        let first = sums.len();
        sums.resize(first + stream.segments(), 0.0f64);
        for (segment, loss) in stream.label_segment.iter().zip(losses) {
            sums[first + *segment as usize] += f64::from(loss);
        }
    }
    Ok(sums.into_iter().map(|sum| (-sum).exp()).collect())
}

/// Room for the largest of these streams.
fn capacity(streams: &[PackedBatch]) -> BatchCapacity {
    let mut capacity = BatchCapacity::default();
    for stream in streams {
        capacity.tokens = capacity.tokens.max(stream.len());
        capacity.segments = capacity.segments.max(stream.segments());
        capacity.labels = capacity.labels.max(stream.labels());
    }
    capacity
}

struct Llm<'a> {
    context: &'a Context,
    config: &'a Config,
    side: &'a Side,
    prompts: &'a Prompts,
    asked: &'a Asked,
    given: &'a Given,
    translation: &'a Translation,
    metric: Metric,
    checkpoint: PathBuf,
    /// What the work is: a checkpoint of anything else is not used.
    of: Value,
}

impl Work for Llm<'_> {
    /// How it went; the adapter's factors and rank.
    type Output = (Refinement, Vec<f32>, usize);

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output> {
        let model = &self.side.model;
        let whole = Stacked::new(model, [&self.translation.layout, &self.side.layout])?;
        let layout = whole.layout();
        let memory = memory_for(device, &self.context.place)?;
        let mut plan = Decoder::<D, X>::plan(model, false);
        let limits = limits(self.config, self.prompts, &self.asked.llm);
        plan.extend(Generator::<D, X>::plan(model, limits, Some(layout)));
        plan.check(memory)?;
        let decoder = Decoder::<D, X>::load(device, &self.side.dir)?;
        let (surest, sure) = self.given.surest();
        let answered = self.given.answers.iter().filter(|a| a.ended).count();
        let begun = Refinement { prompts: self.asked.llm.len(), answered, sure, rounds: vec![] };
        let (mut refinement, mut values) = match self.restore(&begun, layout)? {
            Some(restored) => restored,
            None => (begun, whole.join([&self.translation.values, &self.fresh()])),
        };
        let end = end_token(self.prompts, &self.asked.records[0])?;
        for round in refinement.rounds.len()..self.config.refine.rounds {
            let on_device = device.buffer_from(&values)?;
            let view = AdapterView { values: &on_device, layout, dropout: 0.0 };
            let own = answers(&decoder, self.config, self.prompts, &self.asked.llm, view)?;
            drop(on_device);
            let agreed = self.agreed(&own);
            let on = self.choose(round, &agreed, (&surest, sure));
            let examples = self.examples(on, (&agreed, &own), &surest, end)?;
            let mut loss = None;
            if on != TrainedOn::Nothing {
                let key = derive(derive_named(self.config.seed, "refinement"), round as u64);
                let training = Training { config: self.config, examples: &examples, key };
                let jobs = training.begin(&decoder, &whole, &values, memory)?;
                (values, loss) = training.run(&decoder, jobs)?;
            }
            let share = agreed.len() as f64 / own.len().max(1) as f64;
            refinement.rounds.push(Round { agreed: agreed.len(), share, trained_on: on, loss });
            self.tell(&refinement);
            self.save(&refinement, &values)?;
        }
        Ok((refinement, values, layout.lora().rank))
    }
}

impl Llm<'_> {
    /// The adapter that shadows start from, doing nothing.
    fn fresh(&self) -> Vec<f32> {
        let (layout, mut values) = (&self.side.layout, self.side.init.clone());
        for block in 0..layout.blocks() {
            for slice in layout.slices().iter().filter(|slice| slice.factor == Factor::B) {
                values[layout.range(block, slice)].fill(0.0);
            }
        }
        values
    }

    /// The prompts that both models answer alike; for summaries, the half of them whose two answers are
    /// most alike.
    fn agreed(&self, own: &[Answer]) -> Vec<usize> {
        let evaluate = &self.config.evaluate;
        let given = &self.given.answers;
        let both: Vec<usize> = (0..own.len()).filter(|&i| own[i].ended && given[i].ended).collect();
        if self.metric == Metric::Rouge1 {
            let alike = |i: usize| rouge1(&own[i].text, &given[i].text, evaluate.rouge_tokens);
            let mut both: Vec<(f64, usize)> = both.into_iter().map(|i| (alike(i), i)).collect();
            both.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            both.truncate(both.len().div_ceil(2));
            let mut chosen: Vec<usize> =
                both.into_iter().filter(|(score, _)| *score > 0.0).map(|(_, i)| i).collect();
            chosen.sort_unstable();
            return chosen;
        }
        let is_same = |i: &usize| {
            !answer(&own[*i].text, evaluate.answer).trim().is_empty()
                && exact_match(&given[*i].text, &own[*i].text, evaluate.answer)
        };
        both.into_iter().filter(is_same).collect()
    }

    fn choose(&self, round: usize, agreed: &[usize], (surest, sure): (&[usize], f64)) -> TrainedOn {
        let RefineConfig { least, sure: enough, .. } = self.config.refine;
        match agreed.len() >= least {
            true => TrainedOn::Agreed,
            false if round == 0 && sure >= enough && surest.len() >= least => TrainedOn::Surest,
            false => TrainedOn::Nothing,
        }
    }

    /// The LLM's own words where both agree; those of the TinyLM where only it is asked.
    fn examples(
        &self,
        on: TrainedOn,
        (agreed, own): (&[usize], &[Answer]),
        surest: &[usize],
        end: Option<u32>,
    ) -> Result<Vec<Example>> {
        let prompts = &self.asked.llm;
        match on {
            TrainedOn::Nothing => Ok(vec![]),
            TrainedOn::Agreed => {
                Ok(agreed.iter().map(|&i| example(&prompts[i], &own[i].tokens, end)).collect())
            }
            TrainedOn::Surest => {
                let of_tiny = |&i: &usize| {
                    let answer = self.prompts.tokenizer.encode(&self.given.answers[i].text)?.ids;
                    Ok(example(&prompts[i], &answer, end))
                };
                surest.iter().map(of_tiny).collect()
            }
        }
    }

    fn tell(&self, refinement: &Refinement) {
        let Some(Round { agreed, share, trained_on, .. }) = refinement.rounds.last() else { return };
        let number = refinement.rounds.len();
        let on = match trained_on {
            TrainedOn::Agreed => "trained on them".to_string(),
            TrainedOn::Surest => "too few: trained on the answers that the TinyLM is surest of".to_string(),
            TrainedOn::Nothing => {
                format!("fewer than refine.least = {}: not trained", self.config.refine.least)
            }
        };
        let all = refinement.prompts;
        let percent = 100.0 * share;
        self.context
            .ui
            .line(format!("refine: round {number}: {agreed} of {all} answers agree ({percent:.0} %), {on}"));
        if number == 1 && *share < DOUBTFUL {
            self.context.ui.notice(&format!(
                "refine: warning: only {percent:.0} % of the answers agree: the translation is doubtful. The \
                 client's task may be unlike all shadows', or its update is not what it seems"
            ));
        }
    }

    fn save(&self, refinement: &Refinement, values: &[f32]) -> Result<()> {
        let state = json!({ "of": self.of, "refinement": refinement });
        Ok(checkpoint::save(&self.checkpoint, &[("adapter", Values::F32(values))], &state)?)
    }

    /// What an earlier process has done, if it is of the same work.
    fn restore(&self, begun: &Refinement, layout: &BlockLayout) -> Result<Option<(Refinement, Vec<f32>)>> {
        if !self.checkpoint.is_file() {
            return Ok(None);
        }
        let saved = match Checkpoint::load(&self.checkpoint) {
            Ok(saved) if saved.state()["of"] == self.of => saved,
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::warn!("{error}; the refinement begins anew");
                return Ok(None);
            }
        };
        let found = serde_json::from_value::<Refinement>(saved.state()["refinement"].clone());
        let is_same = |found: &Refinement| Refinement { rounds: vec![], ..found.clone() } == *begun;
        match found.ok().filter(is_same) {
            Some(found) if saved.len_of("adapter")? == layout.total() => {
                let mut values = vec![0.0; layout.total()];
                saved.read_f32("adapter", &mut values)?;
                Ok(Some((found, values)))
            }
            _ => Ok(None),
        }
    }
}

/// The training of one round.
struct Training<'a> {
    config: &'a Config,
    examples: &'a [Example],
    key: u64,
}

impl Training<'_> {
    /// As the shadows of the LLM are trained, over the steps of a round.
    fn recipe(&self) -> Recipe {
        let RefineConfig { steps, batch, .. } = self.config.refine;
        let of_shadows = &self.config.curate.llm;
        Recipe { steps, batch, warmup: of_shadows.warmup.min(steps), ..of_shadows.clone() }
    }

    /// The packed streams of a step; its examples are drawn with replacement.
    fn streams(&self, recipe: &Recipe, step: u32) -> Vec<PackedBatch> {
        let mut random = Stream::new(derive(derive_named(self.key, "examples"), u64::from(step)));
        let drawn: Vec<&Example> =
            (0..recipe.batch).map(|_| &self.examples[random.below(self.examples.len())]).collect();
        let mut streams = Streams::new(self.config.device.stream_tokens);
        streams.push_step(&drawn, recipe, 0, self.key, step);
        streams.finish()
    }

    /// Buffers for it, with the translation frozen.
    fn begin<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        whole: &Stacked,
        values: &[f32],
        memory: Room,
    ) -> Result<LoraJobs<D, X>> {
        let recipe = self.recipe();
        let mut room = BatchCapacity::default();
        for step in 0..recipe.steps {
            let own = capacity(&self.streams(&recipe, step));
            room.tokens = room.tokens.max(own.tokens);
            room.segments = room.segments.max(own.segments);
            room.labels = room.labels.max(own.labels);
        }
        let mut plan = Decoder::<D, X>::plan(decoder.config(), false);
        plan.extend(LoraJobs::<D, X>::plan(decoder.config(), whole.layout(), 1, room));
        plan.check(memory)?;
        Ok(LoraJobs::new(decoder, whole.layout(), 1, values, room)?.with_frozen(whole.is_first())?)
    }

    /// Trains, and gives the adapter and the loss of the last step.
    fn run<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        mut jobs: LoraJobs<D, X>,
    ) -> Result<(Vec<f32>, Option<f64>)> {
        let recipe = self.recipe();
        let mut last = 0.0;
        for step in 0..recipe.steps {
            last = 0.0;
            for stream in self.streams(&recipe, step) {
                last += jobs.accumulate(decoder, &stream)?.iter().sum::<f64>();
            }
            jobs.apply(recipe.step(step), recipe.clip())?;
        }
        Ok((jobs.adapter(0)?, Some(last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_surest_half_is_of_those_that_ended() {
        let answer = |ended| Answer { ended, ..Answer::default() };
        let given = Given {
            answers: [true, false, true, true, true, true].map(answer).to_vec(),
            probability: vec![0.2, 0.0, 0.9, 0.4, 0.9, 0.1],
        };
        let (surest, mean) = given.surest();
        assert_eq!(surest, [2, 3, 4]);
        assert!((mean - (0.9 + 0.9 + 0.4) / 3.0).abs() < 1e-12);
        let nothing = Given { answers: vec![answer(false); 3], probability: vec![0.0; 3] };
        assert_eq!(nothing.surest(), (vec![], 0.0));
    }

    #[test]
    fn examples_train_on_the_answer_and_its_end() {
        let found = example(&[1, 2], &[5, 6], Some(9));
        assert_eq!(found.tokens, [1, 2, 5, 6, 9]);
        assert_eq!(found.trained, [false, false, true, true, true]);
    }

    #[test]
    fn steps_draw_other_examples_and_the_same_again() {
        let config = Config::default();
        let examples: Vec<Example> = (0..50).map(|i| example(&[i, i], &[i], None)).collect();
        let training = Training { config: &config, examples: &examples, key: 3 };
        let recipe = training.recipe();
        assert_eq!((recipe.steps, recipe.batch, recipe.lr), (40, 16, config.curate.llm.lr));
        let [first, again, second] = [0, 0, 1].map(|step| training.streams(&recipe, step));
        assert_eq!(first, again);
        assert_ne!(first, second);
        assert_eq!(first.iter().map(PackedBatch::segments).sum::<usize>(), 16);
    }
}
