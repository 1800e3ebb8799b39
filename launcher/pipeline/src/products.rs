//! What `translate --method products` does: [`gradtx_train::products`] on a run's tuple store.
//!
//! In: `RUN/shadow`, clients' updates of the TinyLM; where the penalty is chosen by the LLM's loss, the
//! LLM and the public data. Out: factors of the LLM's adapter of rank `translate.lora_r`, and
//! [`Details`]. What depends on the run alone, the penalty, is kept in `RUN/products`.

use crate::artifacts::Tuples;
use crate::fold::Fold;
use crate::records::{PenaltyInputs, ProductsInputs};
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_models::grad_transformer::{Components, Targets};
use gradtx_models::lora::Products;
use gradtx_run::config::{Config, PenaltyChoice, PenaltyRule};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{failed, is_busy};
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{Role as Part, read_json, write_json};
use gradtx_runtime::data::Example;
use gradtx_train::examples::Data;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::products::coordinates::{Coordinates, Residuals, mean_weights, measure};
use gradtx_train::products::penalty::{Losses, Penalty, Trial, USUAL, by_error, by_loss, trials};
use gradtx_train::products::{Groups, Kernel, read_adapter};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The file of the penalty in its directory.
const PENALTY_FILE: &str = "penalty.json";

/// How a translation came to be, for anyone to see.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Details {
    /// The penalty, and how it was found.
    pub penalty: Penalty,
    /// Rank of the adapter.
    pub rank: usize,
    /// How far every client's update is from the shadow students' span: see [`Kernel::distance`].
    pub distance: Vec<f64>,
    /// Weight of every shadow pair's product.
    pub weights: Vec<f64>,
}

/// The translation of a run, opened.
pub struct Translation<'a> {
    /// Where messages go.
    pub context: &'a Context,
    /// The run directory.
    pub run: &'a Path,
    /// Shadow pairs that are left out of the store.
    pub fold: Option<&'a Fold>,
    /// Its settings.
    pub config: &'a Config,
    /// The LLM, with adapters as the shadows have them.
    pub teacher: &'a ModelSpec,
    /// The tuple store.
    pub tuples: &'a Tuples,
}

impl Translation<'_> {
    /// The settings that a result depends on, apart from the tuple store.
    pub fn inputs(config: &Config) -> ProductsInputs {
        let lora_r = (!config.lora.freeze_a).then_some(config.translate.lora_r);
        ProductsInputs { lora_r, penalty: choice(config) }
    }

    /// Translates clients' updates: the LLM with adapters of the new rank, an update of these, and how it
    /// came to be. Products of several clients are added up with these shares.
    pub fn of(&self, clients: &[&[f32]], shares: &[f64]) -> Result<(ModelSpec, Vec<f32>, Details)> {
        let store = &self.tuples.store;
        let groups = self.groups()?;
        let kernel = Kernel::read(store, &groups, clients)?;
        let side = self.side()?;
        let products = self.products()?;
        let penalty = self.penalty(&groups, &kernel, &products, &side)?;
        let all: Vec<usize> = (0..groups.count()).collect();
        let mut weights = vec![0.0; store.pairs()];
        let mut distance = vec![];
        for (i, (client, share)) in kernel.clients.iter().zip(shares).enumerate() {
            let own = kernel.weights(&all, client, penalty.penalty)?;
            distance.push(kernel.distance(i, &own));
            let own = groups.spread(&all, &own);
            weights.iter_mut().zip(own).for_each(|(sum, w)| *sum += share * w);
        }
        let update = side.update_of(&products.read_out(&weights, &side.layout)?);
        let details = Details { penalty, rank: side.space.rank, distance, weights };
        Ok((side, update, details))
    }

    /// Reads out what a Grad-Transformer predicted for a client's update: the LLM with adapters of the new
    /// rank, and an update of these.
    pub fn of_coordinates(
        &self,
        components: &Components,
        client: &[f32],
        predicted: &[f32],
    ) -> Result<(ModelSpec, Vec<f32>)> {
        let groups = self.groups()?;
        let base = match components.penalty() {
            None => mean_weights(&groups),
            Some(penalty) => {
                let kernel = Kernel::read(&self.tuples.store, &groups, &[client])?;
                let all: Vec<usize> = (0..groups.count()).collect();
                groups.spread(&all, &kernel.weights(&all, &kernel.clients[0], penalty)?)
            }
        };
        let side = self.side()?;
        let factors =
            self.products()?.read_out_blocks(&components.weights(&base, predicted)?, &side.layout)?;
        let update = side.update_of(&factors);
        Ok((side, update))
    }

    /// What a Grad-Transformer is to predict in the place of the LLM's updates: components of the shadow
    /// teachers' products, and the coordinates of every tuple.
    pub fn coordinates(&self, targets: Targets, limit: usize) -> Result<(Components, Coordinates)> {
        let (store, groups) = (&self.tuples.store, self.groups()?);
        let (components, coordinates) = measure(store, &self.teacher.layout, &groups, limit)?;
        if targets != Targets::Residual {
            return Ok((components, coordinates));
        }
        let kernel = Kernel::read(store, &groups, &[])?;
        let side = self.side()?;
        let penalty = match self.config.translate.penalty {
            PenaltyChoice::Fixed(penalty) => penalty,
            PenaltyChoice::By(_) => self.penalty(&groups, &kernel, &self.products()?, &side)?.penalty,
        };
        let residuals = Residuals { store, groups: &groups, kernel: &kernel, penalty };
        Ok((components.with_penalty(Some(penalty)), residuals.of(&coordinates)?))
    }

    /// The LLM with adapters of the rank that sums of products are written as. Where A is frozen they are sums of B:
    /// adapters as the shadows have them.
    fn side(&self) -> Result<ModelSpec> {
        match self.teacher.layout.freezes_a() {
            true => Ok(self.teacher.clone()),
            false => self.teacher.of_rank(self.config.translate.lora_r),
        }
    }

    /// The shadow teachers' products.
    fn products(&self) -> Result<Products> {
        let (store, layout) = (&self.tuples.store, &self.teacher.layout);
        let init = store.init(Part::Teacher)?;
        Ok(Products::new(layout, store.pairs(), |pair, range, out| {
            read_adapter(store, layout, &init, (pair, store.steps() - 1), range, out)
        })?)
    }

    /// Groups of the pairs; in a store that does not tell, each pair is its own.
    fn groups(&self) -> Result<Groups> {
        let store = &self.tuples.store;
        Ok(Groups::new(&self.tuples.groups()?.unwrap_or_else(|| {
            let what = "translate: warning: an older version of gradtx made these tuples, without the groups of \
                        shadow subsets: each is taken for a group of its own";
            self.context.ui.notice(what);
            (0..store.pairs()).collect()
        })))
    }

    fn penalty(
        &self,
        groups: &Groups,
        kernel: &Kernel,
        products: &Products,
        side: &ModelSpec,
    ) -> Result<Penalty> {
        let rule = match self.config.translate.penalty {
            PenaltyChoice::Fixed(penalty) => return Ok(Penalty::fixed(penalty, groups.count())),
            PenaltyChoice::By(rule) => rule,
        };
        let dir = Fold::products_dir(self.fold, self.run);
        let choice = Choosing { translation: self, dir, rule, groups, kernel, products, side };
        match stage::run(self.context, &choice) {
            Ok(Some(found)) => Ok(found),
            Ok(None) => {
                let path = choice.dir.join(PENALTY_FILE);
                serde_json::from_value(read_json(&path)?)
                    .with_context(|| format!("{}: not a penalty", path.display()))
            }
            // Another process is at it, for another client.
            Err(error) if is_busy(&error) => self.choose(self.context, rule, groups, kernel, products, side),
            Err(error) => Err(error),
        }
    }

    fn choose(
        &self,
        context: &Context,
        rule: PenaltyRule,
        groups: &Groups,
        kernel: &Kernel,
        products: &Products,
        side: &ModelSpec,
    ) -> Result<Penalty> {
        let trials = trials(kernel, self.config.seed)?;
        if trials.is_empty() {
            return Ok(Penalty::fixed(USUAL, groups.count()));
        }
        let found = match rule {
            PenaltyRule::Mse => by_error(&trials, &groups.means(&products.inner_products())),
            PenaltyRule::Loss => {
                let examples = self.examples(groups, &trials)?;
                let work = Losses {
                    context,
                    side,
                    products,
                    groups,
                    trials: &trials,
                    examples: &examples,
                    stream_tokens: self.config.device.max_tokens_per_microbatch,
                };
                by_loss(&trials, groups.count(), &dispatch(&self.config.device, context, work)?)
            }
        };
        context.ui.line(format!(
            "translate: penalty {}, the best of {} on {} left-out groups of shadows",
            found.penalty,
            found.tried.len(),
            found.left_out
        ));
        Ok(found)
    }

    /// Public examples of the groups that are left out, as the LLM sees them.
    fn examples(&self, groups: &Groups, trials: &[Trial]) -> Result<Vec<Vec<Example>>> {
        let config = self.config;
        let public =
            Data::read(config.data.public.as_slice(), &config.data, "data.public").map_err(|error| {
                let hint =
                    "the penalty is chosen on the public data; without it, give --set translate.penalty=0.01";
                failed(format!("{error:#}"), hint)
            })?;
        let known = &self.tuples.store.manifest().provenance["data"];
        if *known != *public.checksum {
            let what = format!("data.public: is not the data that the tuples were made of ({known})");
            return Err(failed(what, "give the same files; see `gradtx inspect` of the tuple store"));
        }
        let subsets = self.tuples.subsets()?;
        let prompts = public.prompts(config, self.teacher)?;
        let key = derive_named(config.seed, "examples of groups");
        let mut out = vec![vec![]; groups.count()];
        for (group, examples) in out.iter_mut().enumerate() {
            if !trials.iter().any(|trial| trial.group == group) {
                continue;
            }
            let mut rows: Vec<usize> =
                groups.pairs(group).flat_map(|pair| subsets[pair].iter().copied()).collect();
            rows.sort_unstable();
            rows.dedup();
            let order = Stream::new(derive(key, group as u64)).permutation(rows.len());
            let mut chosen = vec![];
            for at in order.into_iter().take(config.translate.penalty_examples) {
                let record = public.records.get(rows[at]).with_context(|| {
                    format!("row {} of the public data, which a shadow subset lists, is not there", rows[at])
                })?;
                chosen.push(record.clone());
            }
            *examples = prompts.examples(&chosen, self.context.threads)?.0.examples;
        }
        Ok(out)
    }
}

/// What the penalty of a run depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChosenInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// Checksum of the tuple store's manifest.
    pub tuples: String,
    /// Group of every shadow pair, where the store gives.
    pub groups: Option<Vec<usize>>,
    /// The settings.
    pub translate: ProductsInputs,
    /// Fingerprint of the LLM.
    pub llm: String,
}

impl Inputs for ChosenInputs {
    const STAGE: &'static str = "penalty";
}

/// The choice of a run's penalty.
pub struct Choosing<'a> {
    translation: &'a Translation<'a>,
    dir: PathBuf,
    rule: PenaltyRule,
    groups: &'a Groups,
    kernel: &'a Kernel,
    products: &'a Products,
    side: &'a ModelSpec,
}

impl Stage for Choosing<'_> {
    type Inputs = ChosenInputs;
    type Output = Penalty;

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn advice(&self) -> String {
        format!("remove {} to choose the penalty again", quoted(&self.dir.to_string_lossy()))
    }

    fn inputs(&self) -> Result<ChosenInputs> {
        let Translation { config, teacher, tuples, .. } = self.translation;
        Ok(ChosenInputs {
            seed: config.seed,
            tuples: tuples.manifest.clone(),
            groups: tuples.groups()?,
            translate: Translation::inputs(config),
            llm: teacher.space.base_model.clone(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Penalty)> {
        let Self { translation, rule, groups, kernel, products, side, .. } = self;
        let found = translation.choose(context, *rule, groups, kernel, products, side)?;
        write_json(&self.dir.join(PENALTY_FILE), &found)?;
        Ok((vec![PENALTY_FILE.into()], found))
    }

    /// The choice says what it found.
    fn report(&self, _: &Context, _: &Penalty) -> Result<()> {
        Ok(())
    }

    fn was_finished(&self, _: &Context) -> Result<()> {
        Ok(())
    }
}

/// The choice of the penalty, with what it depends on.
pub(crate) fn choice(config: &Config) -> PenaltyInputs {
    let translate = &config.translate;
    match translate.penalty {
        PenaltyChoice::By(by @ PenaltyRule::Loss) => {
            PenaltyInputs::ByLoss { by, examples: translate.penalty_examples }
        }
        other => PenaltyInputs::Choice(other),
    }
}
