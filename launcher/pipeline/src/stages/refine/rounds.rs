//! The rounds of a refinement: the LLM answers, and is trained on what agrees.
//!
//! In: the TinyLM's answers, a translation. Out: the adapter, and how it went. All ranks answer; rank 0
//! compares and trains, and the others get its adapter before the next round.

use super::agreement::{Agreement, Comparison};
use super::answers::{Answer, Answering, Asked, Given, end_token, example, limits};
use super::shares::Shares;
use super::synthetic::Synthetic;
use super::training::Training;
use super::{DOUBTFUL_SHARE, Refinement, Round, TrainedOn, Translation};
use anyhow::Result;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{AdapterView, Decoder, Generator};
use gradtx_models::lora::{BlockLayout, Factor, Stacked};
use gradtx_run::config::{Config, RefineConfig};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::checkpoint::{self, Checkpoint, Values};
use gradtx_runtime::comm::Collectives;
use gradtx_runtime::data::{Example, Metric};
use gradtx_runtime::plan::Room;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use serde_json::{Value, json};
use std::path::PathBuf;

/// The LLM's part of a refinement.
pub(super) struct Llm<'a> {
    pub(super) context: &'a Context,
    pub(super) shares: Shares<'a>,
    pub(super) config: &'a Config,
    pub(super) side: &'a ModelSpec,
    pub(super) prompts: &'a Prompts,
    pub(super) asked: &'a Asked,
    pub(super) synthetic: Option<Synthetic>,
    /// On rank 0.
    pub(super) given: Option<&'a Given>,
    pub(super) translation: &'a Translation,
    pub(super) metric: Metric,
    pub(super) checkpoint: PathBuf,
    /// What the work is: a checkpoint of anything else is not used.
    pub(super) of: Value,
}

impl Work for Llm<'_> {
    /// On rank 0: how it went; the adapter's factors and rank.
    type Output = Option<(Refinement, Vec<f32>, usize)>;

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
        let comm = self.shares.comm;
        let mut leader = self.given.map(|given| Leader::new(&self, given, &whole)).transpose()?;
        let mut done = [leader.as_ref().map_or(0, |leader| leader.refinement.rounds.len() as u64)];
        comm.broadcast(0, &mut done)?;
        for _ in done[0]..self.config.refine.num_rounds as u64 {
            let mut values = leader.as_ref().map_or_else(|| vec![0.0; layout.total()], |l| l.values.clone());
            comm.broadcast(0, &mut values)?;
            let on_device = device.buffer_from(&values)?;
            let view = AdapterView { values: &on_device, layout, dropout: 0.0 };
            let asked = &self.asked.llm;
            let mut answering = Answering::new(&decoder, self.config, self.prompts, asked, view)?;
            let own = self.shares.gather(asked.len(), |chunk| answering.answers(&asked[chunk]))?;
            drop(answering);
            drop(on_device);
            if let (Some(leader), Some(own)) = (&mut leader, own) {
                leader.round(&decoder, &own, memory)?;
            }
        }
        Ok(leader.map(|leader| (leader.refinement, leader.values, layout.lora().rank)))
    }
}

/// Rank 0, which compares, trains, and keeps what is done.
struct Leader<'a> {
    work: &'a Llm<'a>,
    given: &'a Given,
    whole: &'a Stacked,
    /// The half of the TinyLM's answers that it is surest of.
    surest: Vec<usize>,
    /// After so many rounds, of the adapter `values`.
    refinement: Refinement,
    values: Vec<f32>,
}

impl<'a> Leader<'a> {
    /// From where an earlier process stopped, or from the translation.
    fn new(work: &'a Llm<'a>, given: &'a Given, whole: &'a Stacked) -> Result<Self> {
        let (surest, sure) = given.surest();
        let answered = given.answers.iter().filter(|a| a.ended).count();
        let (prompts, synthetic) = (work.asked.llm.len(), work.synthetic.clone());
        let started = Refinement { prompts, synthetic, answered, sure, rounds: vec![] };
        let (refinement, values) = match work.restore(&started, whole.layout())? {
            Some(restored) => restored,
            None => (started, whole.join([&work.translation.values, &work.fresh()])),
        };
        Ok(Self { work, given, whole, surest, refinement, values })
    }

    /// One round: what the LLM answered, compared and trained on.
    fn round<X: Real<Acc = f32>, D: Backend<X>>(
        &mut self,
        decoder: &Decoder<D, X>,
        own: &[Answer],
        memory: Room,
    ) -> Result<()> {
        let work = self.work;
        let config = work.config;
        let round = self.refinement.rounds.len();
        let evaluate = &config.evaluate;
        let (form, words) = (evaluate.answer_extraction, evaluate.rouge_tokenizer);
        let comparison = Comparison { metric: work.metric, form, words };
        let Agreement { prompts: agreed, rouge1 } = comparison.of(&self.given.answers, own);
        let on = self.choose(round, &agreed);
        let examples = self.examples(on, (&agreed, own))?;
        let mut loss = None;
        if on != TrainedOn::Nothing {
            let key = derive(derive_named(config.seed, "refinement"), round as u64);
            let training = Training { config, examples: &examples, key };
            let jobs = training.begin(decoder, self.whole, &self.values, memory)?;
            (self.values, loss) = training.run(decoder, jobs)?;
        }
        let share = agreed.len() as f64 / own.len().max(1) as f64;
        self.refinement.rounds.push(Round { agreed: agreed.len(), share, rouge1, trained_on: on, loss });
        self.report();
        work.save(&self.refinement, &self.values)
    }

    fn choose(&self, round: usize, agreed: &[usize]) -> TrainedOn {
        let RefineConfig { min_agreements: least, min_confidence: enough, .. } = self.work.config.refine;
        match agreed.len() >= least {
            true => TrainedOn::Agreed,
            false if round == 0 && self.refinement.sure >= enough && self.surest.len() >= least => {
                TrainedOn::Surest
            }
            false => TrainedOn::Nothing,
        }
    }

    /// The LLM's own words where both agree; those of the TinyLM where only it is asked.
    fn examples(&self, on: TrainedOn, (agreed, own): (&[usize], &[Answer])) -> Result<Vec<Example>> {
        let Llm { prompts, asked, .. } = self.work;
        let end = end_token(prompts, &asked.records[0])?;
        match on {
            TrainedOn::Nothing => Ok(vec![]),
            TrainedOn::Agreed => {
                Ok(agreed.iter().map(|&i| example(&asked.llm[i], &own[i].tokens, end)).collect())
            }
            TrainedOn::Surest => {
                let of_tiny = |&i: &usize| {
                    let answer = prompts.tokenizer.encode(&self.given.answers[i].text)?.ids;
                    Ok(example(&asked.llm[i], &answer, end))
                };
                self.surest.iter().map(of_tiny).collect()
            }
        }
    }

    /// Shows how the last round went.
    fn report(&self) {
        let Some(Round { agreed, share, rouge1, trained_on, .. }) = self.refinement.rounds.last() else {
            return;
        };
        let Context { ui, .. } = self.work.context;
        let number = self.refinement.rounds.len();
        let on = match trained_on {
            TrainedOn::Agreed => "trained on them".to_string(),
            TrainedOn::Surest => "too few: trained on the answers that the TinyLM is surest of".to_string(),
            TrainedOn::Nothing => {
                let least = self.work.config.refine.min_agreements;
                format!("fewer than refine.min_agreements = {least}: not trained")
            }
        };
        let all = self.refinement.prompts;
        let percent = 100.0 * share;
        let alike = rouge1.map_or(String::new(), |mean| format!(", mean ROUGE-1 {:.1}", 100.0 * mean));
        ui.line(format!(
            "refine: round {number}: {agreed} of {all} answers agree ({percent:.0} %{alike}), {on}"
        ));
        if number == 1 && *share < DOUBTFUL_SHARE {
            ui.notice(&format!(
                "refine: warning: only {percent:.0} % of the answers agree: the translation is doubtful. The \
                 client's task may be unlike all shadows', or its update is not what it seems"
            ));
        }
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

    fn save(&self, refinement: &Refinement, values: &[f32]) -> Result<()> {
        let state = json!({ "of": self.of, "refinement": refinement });
        Ok(checkpoint::save(&self.checkpoint, &[("adapter", Values::F32(values))], &state)?)
    }

    /// What an earlier process has done, if it is of the same work.
    fn restore(&self, started: &Refinement, layout: &BlockLayout) -> Result<Option<(Refinement, Vec<f32>)>> {
        if !self.checkpoint.is_file() {
            return Ok(None);
        }
        let saved = match Checkpoint::load(&self.checkpoint) {
            Ok(saved) if saved.state()["of"] == self.of => saved,
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::warn!("{error}; the refinement starts over");
                return Ok(None);
            }
        };
        let found = serde_json::from_value::<Refinement>(saved.state()["refinement"].clone());
        let is_same = |found: &Refinement| Refinement { rounds: vec![], ..found.clone() } == *started;
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
