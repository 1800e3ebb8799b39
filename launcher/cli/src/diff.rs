//! `diff`: how two updates, or two adapters, differ.
//!
//! In: two update vectors or two PEFT adapters of the same kind. Out: their norms, cosine and relative
//! difference, of all values, by block, and by module. Update vectors are flat: which values belong to
//! which module is known only with their model, so without one they are compared by block. An
//! adapter and an update vector are compared as updates, which takes the adapter that training started
//! from.

use crate::model_args::{Model, ModelArgs, spec_of_update};
use anyhow::{Result, bail};
use gradtx_models::lora::{BlockLayout, Factor, LoraConfig, PeftMatrix, peft_matrices};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable_with};
use gradtx_run::paths::{ADAPTER_DIR, UPDATE_FILE};
use gradtx_run::role::Role;
use gradtx_run::ui::say;
use gradtx_runtime::artifact::{UpdateFile, UpdateVector};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::adapted_layers;
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Compare two update vectors or two adapters: norms, cosine, relative difference, by block and module.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Update vector file, PEFT adapter directory, or the directory of a stage with one of these.
    #[arg(value_name = "A")]
    pub a: PathBuf,
    /// The other one.
    #[arg(value_name = "B")]
    pub b: PathBuf,
    /// The model that they are of: with it, update vectors are compared by module too.
    #[command(flatten)]
    pub model: ModelArgs,
    /// PEFT directory of the adapter that training started from, to compare an adapter with an update
    /// vector (default: the run's).
    #[arg(long, value_name = "DIR")]
    pub init: Option<PathBuf>,
}

/// Compares.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let (a, b) = (Operand::open(&job.a)?, Operand::open(&job.b)?);
    let args = &job.model;
    let named = args.run.is_some() || args.config.is_some() || args.model.is_some();
    let model = if named { Some(args.resolve(Role::Tiny)?) } else { None };
    let (what, pairs, notes) = match (a, b) {
        (Operand::Update(a), Operand::Update(b)) => {
            let notes = expect_comparable(&job.a, &a, &job.b, &b)?;
            ("update vectors", of_updates(&a, &b, model.as_ref(), &job.a)?, notes)
        }
        (Operand::Adapter(a), Operand::Adapter(b)) => {
            ("adapters", matched(peft_matrices(&a)?, &peft_matrices(&b)?, &a, &b)?, vec![])
        }
        (a, b) => {
            let Some(model) = &model else {
                let hint =
                    "name the model with --run (and --model) or --init, or convert one with `gradtx convert`";
                let what = format!(
                    "{} and {}: an adapter and an update vector; they can be compared as updates only",
                    shown(&job.a),
                    shown(&job.b)
                );
                return Err(unusable_with(what, Some(hint.into())));
            };
            let [a, b] = [(a, &job.a), (b, &job.b)]
                .map(|(operand, path)| operand.into_update(model, job, path, context));
            ("update vectors", of_updates(&a?, &b?, Some(model), &job.a)?, vec![])
        }
    };
    notes.iter().for_each(|note| context.ui.notice(&format!("diff: note: {note}")));
    let tables = Tables::of(&pairs);
    if !context.ui.is_json() {
        say(tables.text(what).trim_end());
    }
    context.ui.result_object(
        "diff",
        json!({ "kind": what, "all": tables.all, "blocks": tables.blocks,
        "modules": tables.modules, "notes": notes }),
    );
    Ok(())
}

/// What a path of the command line holds.
enum Operand {
    Update(Box<UpdateVector>),
    Adapter(PathBuf),
}

impl Operand {
    fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self::Update(Box::new(UpdateVector::read(path)?)));
        }
        let (update, adapter) = (path.join(UPDATE_FILE), path.join(ADAPTER_DIR));
        if update.is_file() {
            return Ok(Self::Update(Box::new(UpdateVector::read(&update)?)));
        }
        if let Some(dir) = [path, &adapter].into_iter().find(|dir| dir.join("adapter_config.json").is_file())
        {
            return Ok(Self::Adapter(dir.to_owned()));
        }
        let what = match path.exists() {
            true => format!("{}: holds neither {UPDATE_FILE} nor adapter_config.json", shown(path)),
            false => format!("{}: no such file or directory", shown(path)),
        };
        let hint = "name an update vector file, a PEFT adapter directory, or what `gradtx finetune` or `translate` made";
        Err(unusable_with(what, Some(hint.into())))
    }

    /// The update that it is, or that it makes of the adapter that training started from.
    fn into_update(self, model: &Model, job: &Job, path: &Path, context: &Context) -> Result<UpdateVector> {
        let spec = model.spec(job.init.as_deref(), context.threads)?;
        match self {
            Self::Update(update) => {
                let file = if path.is_file() { path.to_owned() } else { path.join(UPDATE_FILE) };
                spec_of_update(spec, &UpdateFile::open(&file)?, &file)?;
                Ok(*update)
            }
            Self::Adapter(dir) => {
                let adapter = model.adapter(&dir, context.threads)?;
                Ok(spec.update(spec.update_of_peft(&dir, &adapter)?, 0))
            }
        }
    }
}

/// Fails unless two updates have the same form; notes what else is not the same.
fn expect_comparable(
    path_a: &Path,
    a: &UpdateVector,
    path_b: &Path,
    b: &UpdateVector,
) -> Result<Vec<String>> {
    let (x, y) = (&a.meta.space, &b.meta.space);
    if x.layout != y.layout || [x.blocks, x.width] != [y.blocks, y.width] {
        let form = |space: &gradtx_runtime::artifact::UpdateSpace| {
            let (targets, of_b) = (space.targets.join(", "), if space.freeze_a { ", B alone" } else { "" });
            format!(
                "[{}, {}], rank {}, alpha {}, {targets}{of_b}",
                space.blocks, space.width, space.rank, space.alpha
            )
        };
        let what = format!(
            "{} and {}: update vectors of different forms: {} and {}",
            shown(path_a),
            shown(path_b),
            form(x),
            form(y)
        );
        return Err(failed(what, "only updates of one model with the same adapter settings can be compared"));
    }
    let mut notes = vec![];
    if x.base_model != y.base_model {
        notes.push(format!("they are of different base models: {} and {}", x.base_model, y.base_model));
    } else if x.init != y.init {
        notes.push("they are counted from different initial adapters (another seed or --init)".into());
    }
    Ok(notes)
}

/// Two lists of values of one matrix, or of a whole block where modules are not known.
struct Pair {
    block: usize,
    module: Option<String>,
    a: Vec<f32>,
    b: Vec<f32>,
}

fn of_updates(a: &UpdateVector, b: &UpdateVector, model: Option<&Model>, path: &Path) -> Result<Vec<Pair>> {
    let space = &a.meta.space;
    let Some(model) = model else {
        let blocks = a.values.chunks(space.width).zip(b.values.chunks(space.width)).enumerate();
        return Ok(blocks
            .map(|(block, (a, b))| Pair { block, module: None, a: a.to_vec(), b: b.to_vec() })
            .collect());
    };
    let lora = LoraConfig {
        rank: space.rank,
        alpha: space.alpha,
        dropout: 0.0,
        targets: LoraConfig::targets_from_names(&space.targets)?,
        layers: adapted_layers(&model.decoder, &model.config.lora),
    };
    let layout = match space.freeze_a {
        true => BlockLayout::with_frozen_a(&model.decoder, &lora)?,
        false => BlockLayout::new(&model.decoder, &lora)?,
    };
    if layout.hash() != space.layout {
        let what = format!(
            "{}: not an update of {}: that has {} blocks of {} values, the update {} of {}",
            shown(path),
            shown(&model.dir),
            layout.blocks(),
            layout.width(),
            space.blocks,
            space.width
        );
        return Err(failed(what, "name the model that it is of (--model tiny, llm or a directory), or none"));
    }
    let mut pairs = vec![];
    for block in 0..layout.blocks() {
        for slice in layout.slices() {
            let Some(range) = layout.range_in_update(block, slice) else { continue };
            let module = Some(matrix_name(layout.family().module_name(slice.module), slice.factor));
            pairs.push(Pair {
                block: layout.layers()[block],
                module,
                a: a.values[range.clone()].to_vec(),
                b: b.values[range].to_vec(),
            });
        }
    }
    Ok(pairs)
}

fn matrix_name(module: &str, factor: Factor) -> String {
    match factor {
        Factor::A => format!("{module}.lora_A"),
        Factor::B => format!("{module}.lora_B"),
    }
}

/// The matrices of two adapters, side by side.
fn matched(a: Vec<PeftMatrix>, b: &[PeftMatrix], path_a: &Path, path_b: &Path) -> Result<Vec<Pair>> {
    let name = |m: &PeftMatrix| format!("layers.{}.{}", m.block, matrix_name(m.module.name(), m.factor));
    let mut others: BTreeMap<String, &PeftMatrix> = b.iter().map(|m| (name(m), m)).collect();
    let mut pairs = vec![];
    for matrix in a {
        let Some(other) = others.remove(&name(&matrix)) else {
            bail!("{}: has {}, which {} does not have", shown(path_a), name(&matrix), shown(path_b))
        };
        if matrix.shape != other.shape {
            bail!(
                "{}: {} has shape {:?}, in {} it has {:?}: adapters of another rank or model",
                shown(path_a),
                name(&matrix),
                matrix.shape,
                shown(path_b),
                other.shape
            );
        }
        let module = Some(matrix_name(matrix.module.name(), matrix.factor));
        pairs.push(Pair { block: matrix.block, module, a: matrix.values, b: other.values.clone() });
    }
    match others.into_keys().next() {
        None => Ok(pairs),
        Some(name) => bail!("{}: has {name}, which {} does not have", shown(path_b), shown(path_a)),
    }
}

/// Sums over values.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    aa: f64,
    bb: f64,
    ab: f64,
    difference: f64,
}

impl Sums {
    fn add(&mut self, pair: &Pair) {
        for (&a, &b) in pair.a.iter().zip(&pair.b) {
            let (a, b) = (f64::from(a), f64::from(b));
            self.aa += a * a;
            self.bb += b * b;
            self.ab += a * b;
            self.difference += (a - b) * (a - b);
        }
    }

    fn row(&self, name: String) -> Row {
        let quotient = |a: f64, b: f64| (b > 0.0).then(|| a / b);
        Row {
            name,
            norm_a: self.aa.sqrt(),
            norm_b: self.bb.sqrt(),
            norm_difference: self.difference.sqrt(),
            relative_difference: quotient(self.difference.sqrt(), self.aa.sqrt()),
            cosine: quotient(self.ab, (self.aa * self.bb).sqrt()).map(|cosine| cosine.clamp(-1.0, 1.0)),
        }
    }
}

/// One line of a table.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    norm_a: f64,
    norm_b: f64,
    norm_difference: f64,
    /// Norm of the difference by that of A; none where A is zero.
    relative_difference: Option<f64>,
    /// None where one of them is zero.
    cosine: Option<f64>,
}

/// All comparisons.
struct Tables {
    all: Row,
    blocks: Vec<Row>,
    modules: Vec<Row>,
}

impl Tables {
    fn of(pairs: &[Pair]) -> Self {
        let (mut all, mut blocks, mut modules) = (Sums::default(), BTreeMap::new(), BTreeMap::new());
        let mut order: Vec<&str> = vec![];
        for pair in pairs {
            all.add(pair);
            blocks.entry(pair.block).or_insert_with(Sums::default).add(pair);
            if let Some(module) = &pair.module {
                modules
                    .entry(module.as_str())
                    .or_insert_with(|| {
                        order.push(module);
                        Sums::default()
                    })
                    .add(pair);
            }
        }
        Self {
            all: all.row("all".into()),
            blocks: blocks.into_iter().map(|(block, sums)| sums.row(format!("block {block}"))).collect(),
            modules: order.into_iter().map(|name| modules[name].row(name.into())).collect(),
        }
    }

    fn text(&self, what: &str) -> String {
        let mut text = format!(
            "{what}\n{:18} {:>11} {:>11} {:>11} {:>9} {:>8}\n",
            "", "norm A", "norm B", "norm A-B", "relative", "cosine"
        );
        let number =
            |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        for row in std::iter::once(&self.all).chain(&self.blocks).chain(&self.modules) {
            let (relative, cosine) = (number(row.relative_difference, 4), number(row.cosine, 4));
            let _ = writeln!(
                text,
                "{:18} {:11.4e} {:11.4e} {:11.4e} {relative:>9} {cosine:>8}",
                row.name, row.norm_a, row.norm_b, row.norm_difference
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(block: usize, module: &str, a: &[f32], b: &[f32]) -> Pair {
        Pair { block, module: Some(module.into()), a: a.to_vec(), b: b.to_vec() }
    }

    #[test]
    fn numbers_by_hand() {
        let pairs = [
            pair(0, "q", &[3.0, 0.0], &[0.0, 3.0]),
            pair(0, "v", &[4.0], &[4.0]),
            pair(1, "q", &[0.0], &[2.0]),
        ];
        let tables = Tables::of(&pairs);
        assert_eq!((tables.all.norm_a, tables.all.norm_b), (5.0, 29f64.sqrt()));
        assert_eq!(tables.all.norm_difference, 22f64.sqrt());
        assert_eq!(tables.all.cosine, Some(16.0 / (25.0 * 29.0f64).sqrt()));
        assert_eq!(tables.all.relative_difference, Some(22f64.sqrt() / 5.0));
        assert_eq!((tables.blocks.len(), tables.modules.len()), (2, 2));
        assert_eq!((tables.blocks[1].cosine, tables.blocks[1].relative_difference), (None, None));
        assert_eq!(tables.modules.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["q", "v"]);
        assert_eq!(tables.modules[1].cosine, Some(1.0));
        assert!(tables.text("x").contains("block 1"));
    }
}
