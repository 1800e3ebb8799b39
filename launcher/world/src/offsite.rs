//! The demo of GradOT: an LLM's emulators by score, ratio and λ, clients that train their edge, and the LLM with it.
//!
//! In: a directory and seeds. Out, for each seed:
//!
//! ```text
//! world/             see `crate::stage`
//! statistics/        of the LLM on public data
//! llm/{edge,whole}/  runs in which the LLM itself is fine-tuned on the clients' data: what an emulator is measured against
//! emulators/NAME/    a run for each emulator: emulator/, clients/N/, report.html
//! skill/NAME/        scores on examples with every operation told
//! offsite.json       all numbers
//! ```
//!
//! An emulator is as good as the LLM's score with the plugged-in edge is near that of an edge that was trained in
//! place, and as private as what can be had from it without the LLM is low: by training its edge on private data, or
//! all of it on public data first.

use crate::World;
use crate::demo::Job;
use crate::{PUBLIC_FILE, SKILL_FILE, stage};
use anyhow::Result;
use comfy_table::{CellAlignment, presets};
use gradtx_models::decoder::DecoderConfig;
use gradtx_pipeline::score::mean_with_interval;
use gradtx_pipeline::stages::{emulate, evaluate, finetune, merge, plugin};
use gradtx_report::stage as report;
use gradtx_report::table::{Entry, Tuned};
use gradtx_run::config::{RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::paths::{ADAPTER_DIR, EMULATOR_DIR, EMULATOR_MODEL_DIR, RUN_FILE_OF_WORLD};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{read_json, write_json};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The numbers of one seed, and of all.
pub const RESULTS_FILE: &str = "offsite.json";
/// Steps in which an attacker fine-tunes all of an emulator on public data.
const ATTACK_STEPS: usize = 100;

/// An emulator of the comparison.
struct Variant {
    name: &'static str,
    score: &'static str,
    ratio: f64,
    lambda: f64,
}

const fn variant(name: &'static str, score: &'static str, ratio: f64, lambda: f64) -> Variant {
    Variant { name, score, ratio, lambda }
}

/// The emulator that the attack is tried on, and the control.
const MAIN: &str = "gcs-0.5";
const VARIANTS: [Variant; 7] = [
    variant("gcs-0.7", "gcs", 0.7, 0.0),
    variant(MAIN, "gcs", 0.5, 0.0),
    variant("gcs-0.3", "gcs", 0.3, 0.0),
    variant("gcs-0.5-lambda", "gcs", 0.5, 0.25),
    variant("magnitude-0.5", "magnitude", 0.5, 0.0),
    variant("activation-0.5", "activation", 0.5, 0.0),
    variant("random-0.5", "random", 0.5, 0.0),
];

/// The emulators of a quick comparison, in which nobody attacks.
const QUICK: [&str; 2] = [MAIN, "random-0.5"];

/// Scores of one model in percent, by client.
type Scores = Vec<f64>;

/// The LLM itself.
#[derive(Clone, Debug, Default, Serialize)]
struct Llm {
    /// With every operation told.
    skill: f64,
    /// As it is.
    zero_shot: Scores,
    /// Its edge fine-tuned in place.
    edge: Scores,
    /// All of its layers fine-tuned.
    whole: Scores,
}

/// One emulator.
#[derive(Clone, Debug, Default, Serialize)]
struct Emulator {
    name: String,
    score: String,
    ratio: f64,
    lambda: f64,
    /// Parameters of the middle that are kept, as a share.
    kept: f64,
    /// Cosine of its edge's gradient to the LLM's on public data.
    edge_gradient_cosine: f64,
    /// Loss on public data.
    loss: f64,
    llm_loss: f64,
    /// With every operation told.
    skill: f64,
    zero_shot: Scores,
    /// With its edge fine-tuned.
    tuned: Scores,
    /// The LLM with this edge.
    plugged_in: Scores,
    /// The same edges on the next client's test data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    other_client: Scores,
    /// All layers fine-tuned on public data: with every operation told.
    #[serde(skip_serializing_if = "Option::is_none")]
    attacked_skill: Option<f64>,
    /// And the edge fine-tuned then.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attacked: Scores,
}

/// One seed.
#[derive(Clone, Debug, Serialize)]
struct Results {
    seed: u64,
    llm: Llm,
    emulators: Vec<Emulator>,
}

/// Runs everything that is missing for every seed, and prints what all of them give together.
pub fn run(context: &Context, job: &Job, dirs: &[(u64, PathBuf)]) -> Result<()> {
    let results = dirs.iter().map(|(seed, dir)| Seed { context, job, dir, seed: *seed }.results());
    let results = results.collect::<Result<Vec<_>>>()?;
    write_json(&job.dir.join(RESULTS_FILE), &results)?;
    context.ui.result(text(&results));
    Ok(())
}

/// One seed in its directory.
struct Seed<'a> {
    context: &'a Context,
    job: &'a Job,
    dir: &'a Path,
    seed: u64,
}

impl Seed<'_> {
    fn results(&self) -> Result<Results> {
        let world = self.dir.join("world");
        stage::run(self.context, &world, World::Offsite, self.seed, self.job.device)?;
        let llm = self.llm()?;
        let variants = VARIANTS.iter().filter(|variant| !self.job.quick || QUICK.contains(&variant.name));
        let emulators = variants.map(|variant| self.emulator(variant)).collect::<Result<_>>()?;
        Ok(Results { seed: self.seed, llm, emulators })
    }

    /// A run of this seed with other settings.
    fn args(&self, run: &str, set: Vec<String>) -> RunArgs {
        RunArgs {
            run: self.dir.join(run),
            config: Some(self.dir.join("world").join(RUN_FILE_OF_WORLD)),
            preset: self.job.preset,
            device: Some(self.job.device),
            dtype: Some(self.job.dtype),
            tuples: None,
            translator: None,
            set,
        }
    }

    fn clients(&self) -> impl Iterator<Item = usize> + use<> {
        1..=World::Offsite.clients()
    }

    fn data(&self, client: usize, part: &str) -> PathBuf {
        self.dir.join(format!("world/private/client-{client}/{part}.jsonl"))
    }

    /// The score of a model on test data, in percent.
    fn scored(
        &self,
        args: &RunArgs,
        data: PathBuf,
        out: PathBuf,
        base: Option<&Path>,
        adapter: Option<PathBuf>,
    ) -> Result<f64> {
        let base = base.map(Path::to_owned);
        let job = evaluate::Job { data: vec![data], out, role: Role::Llm, base, adapter, part: None };
        Ok(100.0 * evaluate::run(self.context, args, &job)?.score)
    }

    /// With every operation told.
    fn skill(
        &self,
        args: &RunArgs,
        name: &str,
        base: Option<&Path>,
        adapter: Option<PathBuf>,
    ) -> Result<f64> {
        let data = self.dir.join("world").join(SKILL_FILE);
        self.scored(args, data, self.dir.join("skill").join(name), base, adapter)
    }

    /// Fine-tunes a model on the data of a client; returns the adapter.
    fn finetuned(&self, args: &RunArgs, data: PathBuf, out: PathBuf, role: Role) -> Result<PathBuf> {
        let job = finetune::Job { data, out: out.clone(), role, peft: true, allow_refinement: false };
        finetune::run(self.context, args, &job)?;
        Ok(out.join(ADAPTER_DIR))
    }

    /// The setting that trains the edge of the LLM alone.
    fn edge_alone(&self, args: &RunArgs) -> Result<String> {
        let settings = RunSettings::open(args)?;
        let [first, last] = settings.config().emulator.edge;
        let layers = DecoderConfig::read(&settings.config().models.llm)?.layers;
        let edge: Vec<usize> = (0..first).chain(layers - last..layers).collect();
        Ok(format!("lora.layers_to_transform={edge:?}"))
    }

    /// What an emulator is measured against.
    fn llm(&self) -> Result<Llm> {
        let plain = self.args("llm/whole", vec![]);
        let of_edge = self.args("llm/edge", vec![self.edge_alone(&plain)?]);
        let mut llm = Llm { skill: self.skill(&plain, "llm", None, None)?, ..Llm::default() };
        for client in self.clients() {
            let score = |args: &RunArgs, entry: Entry, is_trained: bool| {
                let home = args.run.join(format!("clients/client-{client}"));
                let adapter = is_trained.then(|| {
                    self.finetuned(args, self.data(client, "train"), home.join("finetuned"), Role::Llm)
                });
                let out = home.join("evaluated").join(entry.slug());
                self.scored(args, self.data(client, "test"), out, None, adapter.transpose()?)
            };
            llm.zero_shot.push(score(&plain, Entry::Base(Role::Llm), false)?);
            llm.edge.push(score(&of_edge, Entry::FinetunedEdge(Role::Llm), true)?);
            llm.whole.push(score(&plain, Entry::Finetuned(Role::Llm), true)?);
        }
        Ok(llm)
    }

    fn emulator(&self, variant: &Variant) -> Result<Emulator> {
        let &Variant { name, score, ratio, lambda } = variant;
        let run = format!("emulators/{name}");
        let model = self.dir.join(&run).join(EMULATOR_DIR).join(EMULATOR_MODEL_DIR);
        let set = vec![
            format!("models.tiny={}", model.display()),
            format!("emulator.score={score}"),
            format!("emulator.ratio={ratio}"),
            format!("emulator.lambda={lambda:?}"),
        ];
        let args = self.args(&run, set);
        let is_main = name == MAIN;
        self.emulate(&args, None)?;
        let report: Value = read_json(&args.run.join(EMULATOR_DIR).join(emulate::REPORT_FILE))?;
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        let mut found = Emulator {
            name: name.into(),
            score: score.into(),
            ratio,
            lambda,
            kept: number("kept"),
            edge_gradient_cosine: number("edge_gradient_cosine"),
            loss: number("emulator_loss"),
            llm_loss: number("llm_loss"),
            skill: self.skill(&args, name, Some(&model), None)?,
            ..Emulator::default()
        };
        let attacked = (is_main && !self.job.quick).then(|| self.attacked(&args, &mut found)).transpose()?;
        for client in self.clients() {
            let home = args.run.join(format!("clients/client-{client}"));
            let (train, test) = (self.data(client, "train"), self.data(client, "test"));
            let out = |entry: Entry| home.join("evaluated").join(entry.slug());
            let scored = |entry: Entry, base: &Path, adapter: Option<PathBuf>| {
                self.scored(&args, test.clone(), out(entry), Some(base), adapter)
            };
            let adapter = self.finetuned(&args, train.clone(), home.join("finetuned"), Role::Tiny)?;
            let upgraded = home.join("upgraded");
            let plugging = plugin::Job {
                run: args.clone(),
                adapter: vec![adapter.clone()],
                emulator: None,
                examples: vec![],
                out: upgraded.clone(),
            };
            plugin::run(self.context, &plugging)?;
            found.zero_shot.push(scored(Entry::Emulator(Tuned::Nothing), &model, None)?);
            found.tuned.push(scored(Entry::Emulator(Tuned::Edge), &model, Some(adapter))?);
            found.plugged_in.push(scored(Entry::PluggedIn, &upgraded, None)?);
            if is_main {
                let other = self.data(client % World::Offsite.clients() + 1, "test");
                let out = self.dir.join(format!("other-client/client-{client}"));
                found.other_client.push(self.scored(&args, other, out, Some(&upgraded), None)?);
            }
            if let Some(attack) = &attacked {
                let adapter = self.finetuned(&attack.args, train, home.join("attack"), Role::Tiny)?;
                let entry = Entry::Emulator(Tuned::WholeThenEdge);
                found.attacked.push(scored(entry, &attack.model, Some(adapter))?);
            }
        }
        let page = report::Job { evaluations: vec![self.dir.join("llm")], ..report::Job::of(args.run) };
        report::run(self.context, &page)?;
        Ok(found)
    }

    /// Makes an emulator of the statistics that all of them share; where its place is given, in whole matrices.
    fn emulate(&self, args: &RunArgs, dense: Option<PathBuf>) -> Result<()> {
        let job = emulate::Job {
            run: args.clone(),
            statistics: Some(self.dir.join("statistics")),
            dense: dense.is_some(),
            out: dense,
            dry_run: false,
            try_lambda: vec![],
        };
        emulate::run(self.context, &job)
    }

    /// What an attacker makes of an emulator with public data alone: all of its matrices, multiplied out, are
    /// fine-tuned.
    fn attacked(&self, args: &RunArgs, found: &mut Emulator) -> Result<Attack> {
        let dense = args.run.join("attack/dense");
        self.emulate(args, Some(dense.clone()))?;
        let with = |run: &str, tiny: &Path, more: &[String]| {
            let mut set = vec![format!("models.tiny={}", tiny.display())];
            set.extend_from_slice(more);
            self.args(&format!("emulators/{}/attack/{run}", found.name), set)
        };
        let more = [
            "lora.r=16".into(),
            "lora.target_modules=all-linear".into(),
            format!("finetune.tiny.max_steps={ATTACK_STEPS}"),
            "finetune.tiny.global_batch_size=128".into(),
        ];
        let emulator = dense.join(EMULATOR_MODEL_DIR);
        let healing = with("healing", &emulator, &more);
        let public = self.dir.join("world").join(PUBLIC_FILE);
        let adapter = self.finetuned(&healing, public, healing.run.join("finetuned"), Role::Tiny)?;
        let model = args.run.join("attack/healed");
        let merging = merge::Job { role: Role::Tiny, adapter, out: model.clone() };
        merge::run(self.context, &healing, &merging)?;
        let attack = Attack { args: with("client", &model, &[self.edge_alone(args)?]), model };
        let name = format!("{}-attacked", found.name);
        found.attacked_skill = Some(self.skill(&attack.args, &name, Some(&attack.model), None)?);
        Ok(attack)
    }
}

/// An emulator after an attack.
struct Attack {
    args: RunArgs,
    model: PathBuf,
}

/// The mean of some scores; empty where there are none.
fn mean(scores: &[f64]) -> String {
    if scores.is_empty() {
        return String::new();
    }
    format!("{:.1}", mean_with_interval(scores).0)
}

/// The table over all seeds.
fn text(results: &[Results]) -> String {
    let all = |of: &dyn Fn(&Results) -> Scores| results.iter().flat_map(of).collect::<Vec<f64>>();
    let mut table = comfy_table::Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "model",
        "kept",
        "cosine",
        "loss",
        "skill %",
        "as it is",
        "tuned",
        "plugged in",
        "gap",
        "± 95 %",
    ]);
    let llm = |name: &str, tuned: String, skill: String, zero_shot: String| {
        [name.into(), String::new(), String::new(), String::new(), skill, zero_shot, tuned]
    };
    let skill = mean(&all(&|of| vec![of.llm.skill]));
    table.add_row(llm(
        "LLM, its edge in place",
        mean(&all(&|of| of.llm.edge.clone())),
        skill,
        mean(&all(&|of| of.llm.zero_shot.clone())),
    ));
    table.add_row(llm(
        "LLM, all layers",
        mean(&all(&|of| of.llm.whole.clone())),
        String::new(),
        String::new(),
    ));
    let names = results.first().map_or(&[][..], |first| &first.emulators).iter().map(|e| &e.name);
    for (i, name) in names.enumerate() {
        let scores = |of: &dyn Fn(&Emulator) -> Scores| all(&|results| of(&results.emulators[i]));
        let number = |of: &dyn Fn(&Emulator) -> f64| mean_with_interval(&scores(&|e| vec![of(e)])).0;
        let gaps = scores(&|e| e.plugged_in.iter().zip(&e.tuned).map(|(a, b)| a - b).collect());
        let (gap, interval) = mean_with_interval(&gaps);
        table.add_row([
            name.clone(),
            format!("{:.2}", number(&|e| e.kept)),
            format!("{:.3}", number(&|e| e.edge_gradient_cosine)),
            format!("{:.2}", number(&|e| e.loss)),
            mean(&scores(&|e| vec![e.skill])),
            mean(&scores(&|e| e.zero_shot.clone())),
            mean(&scores(&|e| e.tuned.clone())),
            mean(&scores(&|e| e.plugged_in.clone())),
            format!("{gap:.1}"),
            interval.map_or(String::new(), |half| format!("{half:.1}")),
        ]);
        if name == MAIN {
            let mut row = llm(
                "  attacked",
                mean(&scores(&|e| e.attacked.clone())),
                mean(&scores(&|e| e.attacked_skill.into_iter().collect())),
                String::new(),
            )
            .to_vec();
            row.push(format!("other client {}", mean(&scores(&|e| e.other_client.clone()))));
            table.add_row(row);
        }
    }
    for column in 1..10 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!(
        "{table}\n{} of {} clients each; exact match on the clients' test data. skill: every operation told; gap: plugged in less tuned; attacked: all layers fine-tuned on public data first.",
        if results.len() == 1 { "1 seed".into() } else { format!("{} seeds", results.len()) },
        World::Offsite.clients()
    )
}
