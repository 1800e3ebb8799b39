//! `curate`: from public data to tuples.
//!
//! In: the public data and both base models. Out, in `RUN/shadow`: a tuple store (see
//! [`gradtx_runtime::artifact::TupleStore`]), `subsets.json` (which rows each shadow
//! subset has), `metrics/ROLE-NNNNN.jsonl` (the losses of a group of jobs), and
//! `throughput-ROLE.jsonl` (tokens per second of every group).
//!
//! Jobs run in groups that the configuration fixes: a group shares one packed stream per
//! step. A group whose files are all there and intact is not run again; otherwise all of
//! it is, so that its bytes are the same whatever was left to do.

use crate::args::{Role, RunArgs};
use crate::cluster::World;
use crate::config::{Config, RANDOM_SUBSETS, Recipe};
use crate::dispatch::{Work, dispatch};
use crate::failure::{failed, unusable, unusable_with};
use crate::record::{self, State};
use crate::stages::examples::Data;
use crate::stages::jobs::{Job, Snapshots, Trained, Training};
use crate::stages::side::Side;
use crate::stages::{Context, SHADOW_DIR, totals};
use anyhow::{Context as _, Result, ensure};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_runtime::artifact::{
    ShardState, StoreType, TuplePlan, assemble, check_shard, sweep_temporary, write_atomic, write_init,
    write_json, write_shard,
};
use gradtx_runtime::data::split::mixed_subset;
use gradtx_runtime::plan::available_memory;
use serde_json::json;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

/// Directories within a tuple store.
const PARTS: [&str; 3] = ["init", "metrics", "shards"];

/// Collects what is missing of the tuples.
pub fn run(context: &Context, world: &World, args: &RunArgs) -> Result<()> {
    let config = Config::of_ranks(args, world)?;
    ensure!(world.comm().size() == 1, "several ranks cannot do this yet");
    let dir = args.run.join(SHADOW_DIR);
    let sides = [Role::Tiny, Role::Llm].map(|role| Side::new(&config, role, context.threads));
    let [student, teacher] = sides;
    let (student, teacher) = (student?, teacher?);
    let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
    let settings = json!({
        "seed": config.seed,
        "data": public.checksum,
        "format": config.data.format,
        "instruction": config.data.instruction,
        "prompt": config.data.prompt,
        "max_length": config.data.max_length,
        "adapter": Side::adapter_settings(&config.adapter, &[&student, &teacher]),
        "curate": config.curate,
        "device": config.device,
        "tiny": student.space.base_model,
        "llm": teacher.space.base_model,
    });
    let State::Open(output) = record::open(&dir, "curate", settings.clone())? else {
        context.ui.done("curate", &dir, json!({}), format!("curate: {} is finished", dir.display()));
        return Ok(());
    };
    let subsets = choose_subsets(&config, &public)?;
    write_json(&dir.join("subsets.json"), &subsets)?;
    let plan = TuplePlan {
        shadows: config.curate.subsets,
        steps: config.curate.snapshots,
        dtype: StoreType::F32,
        student: student.space.clone(),
        teacher: teacher.space.clone(),
    };
    for part in PARTS.map(|name| dir.join(name)) {
        std::fs::create_dir_all(&part).with_context(|| format!("{}: cannot make", part.display()))?;
        sweep_temporary(&part)?;
    }
    for (side, recipe) in [(&student, &config.curate.tiny), (&teacher, &config.curate.llm)] {
        write_init(&dir, side.role.side(), &side.space, &side.init)?;
        let work = Collect {
            context,
            config: &config,
            dir: &dir,
            plan: &plan,
            side,
            recipe,
            public: &public,
            subsets: &subsets,
        };
        dispatch(&config.device, context.threads, work)?;
    }
    let assembled = assemble(&dir, &plan, settings)?;
    if let Some((shadow, role, why)) = assembled.damaged.first() {
        return Err(failed(format!("shadow {shadow}, {role}: {why}"), "run `gradtx curate` again"));
    }
    output.finish(&result_files(&dir)?)?;
    let (pairs, steps) = (assembled.manifest.shards.len(), plan.steps);
    let text = format!("curate: {pairs} shadow pairs of {steps} tuples, {}", dir.display());
    context.ui.done("curate", &dir, json!({ "pairs": pairs, "tuples": pairs * steps }), text);
    Ok(())
}

/// Every file of a finished store, relative to it.
fn result_files(dir: &Path) -> Result<Vec<String>> {
    let mut files = vec!["manifest.json".to_string(), "subsets.json".into()];
    for part in PARTS {
        for entry in std::fs::read_dir(dir.join(part))? {
            files.push(format!("{part}/{}", entry?.file_name().to_string_lossy()));
        }
    }
    files.sort();
    Ok(files)
}

/// Rows of every shadow subset. Subsets may overlap. Without a mixture, each has rows of
/// one group, the groups in turn; with one, each has its own proportions of all groups.
fn choose_subsets(config: &Config, public: &Data) -> Result<Vec<Vec<usize>>> {
    let curate = &config.curate;
    let groups: Vec<Vec<usize>> = match curate.group_by.as_str() {
        RANDOM_SUBSETS => vec![(0..public.records.len()).collect()],
        column => {
            let groups = public.groups(column).map_err(|error| {
                let columns = public.records.first().map(|r| r.extra.keys().cloned().collect::<Vec<_>>());
                let hint = match columns.filter(|columns| !columns.is_empty()) {
                    Some(columns) => format!("columns to group by: {}; or \"random\"", columns.join(", ")),
                    None => "there is no column to group by; set it to \"random\"".into(),
                };
                unusable_with(format!("curate.group_by: {error:#}"), Some(hint))
            })?;
            groups.into_iter().map(|group| group.rows).collect()
        }
    };
    let mixed = curate.mixture > 0.0;
    let sizes = groups.iter().map(Vec::len);
    let available = if mixed { sizes.sum() } else { sizes.min().unwrap_or(0) };
    if available < curate.examples {
        return Err(unusable(format!(
            "curate.examples: {} examples of one subset, but {} has only {available} to choose from",
            curate.examples, config.data.public
        )));
    }
    let key = derive_named(config.seed, "shadow subsets");
    let subset = |k: usize| {
        let key = derive(key, k as u64);
        if mixed {
            return Ok(mixed_subset(&groups, curate.examples, curate.mixture, key)?);
        }
        let group = &groups[k % groups.len()];
        let order = Stream::new(key).permutation(group.len());
        Ok(order[..curate.examples].iter().map(|&i| group[i]).collect())
    };
    (0..curate.subsets).map(subset).collect()
}

/// All shadow jobs of one model.
struct Collect<'a> {
    context: &'a Context,
    config: &'a Config,
    dir: &'a Path,
    plan: &'a TuplePlan,
    side: &'a Side,
    recipe: &'a Recipe,
    public: &'a Data,
    subsets: &'a [Vec<usize>],
}

impl Work for Collect<'_> {
    type Output = ();

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<()> {
        let all = 0..self.subsets.len();
        let groups: Vec<Range<usize>> = all
            .clone()
            .step_by(self.config.curate.concurrent)
            .map(|from| from..(from + self.config.curate.concurrent).min(all.end))
            .collect();
        let name = self.side.role.name();
        let missing: Vec<&Range<usize>> = groups.iter().filter(|group| !self.is_done(group)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let examples = self.public.examples(self.config, self.side, self.context.threads)?;
        self.context.ui.line(format!("curate {name}: {}", examples.summary));
        let decoder = Decoder::<D, X>::load(device, &self.side.dir)?;
        let training = Training {
            side: self.side,
            recipe: self.recipe,
            snapshots: Snapshots { count: self.plan.steps, every: self.config.curate.every },
            stream_tokens: self.config.device.stream_tokens,
            throughput: &self.dir.join(format!("throughput-{name}.jsonl")),
        };
        let jobs_of = |group: &Range<usize>| -> Vec<Job<'_>> {
            group.clone().map(|k| self.job(&examples.examples, k)).collect()
        };
        let (plan, packing) = training.plan::<X, D>(&jobs_of(missing[0]))?;
        plan.check(available_memory()?)?;
        self.context.ui.line(format!("curate {name}: subsets {:?} in {packing}", missing[0]));
        self.context.ui.line(totals(&format!("curate {name}"), &plan));
        let steps = missing.len() as u64 * self.recipe.steps as u64;
        let mut progress = self.context.ui.progress(&format!("curate {name}"), steps);
        let mut last = vec![];
        for (i, group) in missing.into_iter().enumerate() {
            let before = i as u64 * self.recipe.steps as u64;
            let said = |step, rate: f64| {
                progress.set(before + step as u64, format!("subsets {group:?}, {rate:.0} tokens/s"));
            };
            let trained = training.run(&decoder, &jobs_of(group), said)?;
            self.write(group, &trained)?;
            last.extend(trained.iter().filter_map(|t| t.losses.last().copied()));
        }
        drop(progress);
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        self.context
            .ui
            .line(format!("curate {name}: {} jobs, mean loss of the last step {mean:.4}", last.len()));
        Ok(())
    }
}

impl Collect<'_> {
    fn job<'e>(&self, examples: &'e [gradtx_runtime::data::Example], shadow: usize) -> Job<'e> {
        let key = derive(derive_named(self.config.seed, "shadow job"), shadow as u64);
        Job { examples: self.subsets[shadow].iter().map(|&row| &examples[row]).collect(), key }
    }

    fn metrics_file(&self, group: &Range<usize>) -> std::path::PathBuf {
        self.dir.join("metrics").join(format!("{}-{:05}.jsonl", self.side.role.name(), group.start))
    }

    fn is_done(&self, group: &Range<usize>) -> bool {
        let role = self.side.role.side();
        let whole = |k| matches!(check_shard(self.dir, self.plan, role, k), ShardState::Intact(_));
        self.metrics_file(group).is_file() && group.clone().all(whole)
    }

    fn write(&self, group: &Range<usize>, trained: &[Trained]) -> Result<()> {
        write_atomic(&self.metrics_file(group), |out| {
            for (shadow, job) in group.clone().zip(trained) {
                for (step, loss) in job.losses.iter().enumerate() {
                    writeln!(out, "{}", json!({ "subset": shadow, "step": step + 1, "loss": loss }))?;
                }
            }
            Ok(())
        })?;
        for (shadow, job) in group.clone().zip(trained) {
            write_shard(self.dir, self.plan, self.side.role.side(), shadow, &job.updates)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many rows of each of three tasks every subset has.
    fn counts(mixture: f64) -> Vec<[usize; 3]> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("public.jsonl");
        let row = |i: usize| json!({ "prompt": "p", "response": "r", "task": i % 3 }).to_string() + "\n";
        std::fs::write(&path, (0..90).map(row).collect::<String>()).unwrap();
        let mut config = Config::default();
        config.curate.subsets = 12;
        config.curate.examples = 24;
        config.curate.group_by = "task".into();
        config.curate.mixture = mixture;
        let public = Data::read(&[path], &config.data, "data.public").unwrap();
        let subsets = choose_subsets(&config, &public).unwrap();
        assert_eq!(subsets, choose_subsets(&config, &public).unwrap());
        let count = |subset: &Vec<usize>| {
            let mut rows = subset.clone();
            rows.sort_unstable();
            rows.dedup();
            assert_eq!(rows.len(), 24, "no row twice");
            [0, 1, 2].map(|task| rows.iter().filter(|&&row| row % 3 == task).count())
        };
        subsets.iter().map(count).collect()
    }

    #[test]
    fn a_subset_has_one_task_or_its_own_mixture() {
        for (k, count) in counts(0.0).into_iter().enumerate() {
            let mut wanted = [0; 3];
            wanted[k % 3] = 24;
            assert_eq!(count, wanted);
        }
        let mixed = counts(1.0);
        assert!(mixed.iter().any(|count| count.iter().all(|&n| n > 0)), "{mixed:?}");
        assert!(mixed.windows(2).any(|pair| pair[0] != pair[1]), "{mixed:?}");
        let even = counts(1e6);
        assert!(even.iter().all(|count| *count == [8, 8, 8]), "{even:?}");
    }
}
