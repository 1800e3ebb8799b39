//! `inspect`: what is this file or directory, and is it intact?
//!
//! In: a path. Out: a [`Report`], as text or JSON: what it is, shapes, types, sizes,
//! hashes, where it comes from, and everything that is wrong with it. Values are read,
//! so that a number that is not one is found too.

mod emulator;
mod report;

pub use self::report::Report;
use anyhow::{Context as _, Result, ensure};
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Decoder, DecoderConfig, Emulator, Family, layer_of};
use gradtx_models::grad_transformer::GradTransformer;
use gradtx_models::t5::T5Config;
use gradtx_pipeline::package::Package;
use gradtx_run::config::{Config, RUN_FILE};
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use gradtx_run::record::RECORD_FILE;
use gradtx_run::ui::say;
use gradtx_runtime::artifact::{
    MANIFEST, Role, ShardState, TensorFile, TensorSource, TupleManifest, UpdateFile, UpdateVector,
    check_shard, checksum, checksum_file, fingerprint, is_model_dir, open_file, read_init, read_json,
};
use gradtx_runtime::checkpoint::Checkpoint;
use gradtx_runtime::text::shown;
use gradtx_train::examples::{describe, is_data};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Prints what a path is. Fails when it is damaged.
pub fn run(context: &Context, path: &Path) -> Result<()> {
    ensure!(path.exists(), "{}: no such file or directory", shown(path));
    let report = look(path);
    if context.ui.is_json() {
        context.ui.result_object("inspect", serde_json::to_value(&report)?);
    } else {
        say(report.text(0).trim_end());
    }
    match report.damage() {
        0 => Ok(()),
        n => Err(failed(
            format!("{}: not intact ({n} problem{})", shown(path), if n == 1 { "" } else { "s" }),
            report.hint(),
        )),
    }
}

/// Looks at a path that exists.
pub fn look(path: &Path) -> Report {
    look_at(path, &mut Walk::default())
}

/// How far below the first directory this is, and how many entries were seen. Whatever lies in
/// a directory, looking at it ends.
#[derive(Default)]
struct Walk {
    depth: usize,
    entries: usize,
}

/// Directories are entered this deep.
const DEEPEST: usize = 12;
/// Entries of directories that are looked at.
const MAX_ENTRIES: usize = 100_000;

fn look_at(path: &Path, walk: &mut Walk) -> Report {
    let has = |name: &str| path.join(name).is_file();
    let mut report = Report::new(path);
    let looked = if path.is_file() {
        look_at_file(path, &mut report)
    } else if has(RUN_FILE) {
        look_at_run(path, &mut report, walk)
    } else if has("manifest.json") {
        look_at_store(path, &mut report)
    } else if has("adapter_config.json") {
        look_at_adapter(path, &mut report)
    } else if has("config.json") {
        look_at_model(path, &mut report)
    } else if path.is_dir() {
        look_at_parts(path, &mut report, walk)
    } else {
        open_file(path).map(drop).map_err(anyhow::Error::from)
    };
    if let Err(error) = looked {
        report.problems.push(format!("{error:#}"));
    }
    if path.is_dir() && has(RECORD_FILE) {
        report.look_at_record(path);
    }
    report
}

fn look_at_file(path: &Path, report: &mut Report) -> Result<()> {
    if is_data(path) {
        report.kind = "file of data".into();
        report.fact("bytes", std::fs::metadata(path)?.len());
        report.fact("xxh3", checksum_file(path)?);
        let (facts, problems) = describe(path);
        report.facts.extend(facts);
        report.problems.extend(problems);
        return Ok(());
    }
    if path.extension().is_some_and(|e| e == "json" || e == "jsonl" || e == "toml") {
        report.kind = "text file".into();
        report.fact("bytes", std::fs::metadata(path)?.len());
        report.fact("xxh3", checksum_file(path)?);
        return Ok(());
    }
    report.kind = "safetensors file".into();
    let file = TensorFile::open(path)?;
    report.fact("bytes", file.size());
    if UpdateVector::recognises(&file) {
        report.kind = "update vector".into();
        // Its sizes first: a file of holes may claim any.
        UpdateFile::open(path)?.check_size()?;
    }
    report.fact("xxh3", checksum(file.bytes()));
    report.list_tensors(&file);
    for (key, value) in file.all_metadata() {
        report.fact(key, value);
    }
    if report.look_at_statistics(&file)? {
        report.scan(&file);
        return Ok(());
    }
    if UpdateVector::recognises(&file) {
        let update = UpdateVector::read(path)?;
        report.fact("guarantee", update.meta.privacy);
        return Ok(());
    }
    if Checkpoint::recognises(&file) {
        report.kind = "checkpoint".into();
        Checkpoint::load(path)?;
        return Ok(());
    }
    if let (Some(role), Some(shadow)) = (file.metadata("role"), file.metadata("shadow")) {
        report.kind = "shard of a tuple store".into();
        report.facts.insert(0, ("updates of".into(), format!("shadow {shadow}, {role}")));
        let written = file.metadata("values_xxh3").unwrap_or_default();
        for name in file.names() {
            let found = checksum(file.tensor(&name)?.bytes);
            ensure!(found == written, "tensor `{name}`: checksum is {found}, written was {written}");
        }
    }
    if file.names().iter().all(|name| layer_of(name).is_some()) {
        report.kind = "full weights of layers".into();
    }
    report.scan(&file);
    Ok(())
}

fn look_at_store(dir: &Path, report: &mut Report) -> Result<()> {
    report.kind = "tuple store".into();
    let manifest = TupleManifest::read(dir)?;
    let plan = &manifest.plan;
    report.fact("shadow subsets", plan.shadows);
    report.fact("tuples per subset", plan.steps);
    report.fact("type", format!("{:?}", plan.dtype));
    for role in Role::BOTH {
        let space = plan.space(role);
        report.fact(role.name(), format!("[L, d] = [{}, {}]", space.blocks, space.width));
        report.fact(
            &format!("{role} adapter"),
            format!(
                "r {}, alpha {}, {}{}",
                space.rank,
                space.alpha,
                space.targets.join(","),
                if space.freeze_a { ", B alone is trained" } else { "" }
            ),
        );
        report.fact(&format!("{role} base model"), &space.base_model);
        report.fact(&format!("{role} layout"), &space.layout);
        if let Err(error) = read_init(dir, role, space) {
            report.problems.push(error.to_string());
        }
    }
    report.fact("provenance", &manifest.provenance);
    if let Err(why) = manifest.check_complete() {
        report.problems.push(format!("{}: {why}", shown(&dir.join(MANIFEST))));
    }
    let mut bytes = 0;
    // What is listed, and what lies there: not what is claimed, which may be any number.
    for record in &manifest.shards {
        for (role, want) in Role::BOTH.into_iter().zip([&record.student, &record.teacher]) {
            let at = format!("shadow {}, {role}", record.shadow);
            match check_shard(dir, plan, role, record.shadow) {
                ShardState::Intact(found) if found == *want => bytes += found.bytes,
                ShardState::Intact(_) => {
                    report.problems.push(format!("{at}: the file is not the one that the manifest lists"));
                }
                ShardState::Missing => report.problems.push(format!("{at}: missing")),
                ShardState::Damaged(why) => report.problems.push(format!("{at}: {why}")),
            }
        }
    }
    let listed: BTreeSet<PathBuf> = manifest.files().map(|(name, _)| dir.join(name)).collect();
    for path in sorted_entries(&dir.join("shards"), &mut Walk::default())? {
        let is_shard = path.extension().is_some_and(|e| e == "safetensors");
        if is_shard && !listed.contains(&path) {
            report.problems.push(format!("{}: not in the manifest", shown(&path)));
        }
    }
    report.fact("bytes of shards", bytes);
    Ok(())
}

fn look_at_adapter(dir: &Path, report: &mut Report) -> Result<()> {
    report.kind = "adapter (PEFT)".into();
    let config = read_json(&dir.join("adapter_config.json"))?;
    for key in ["base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"] {
        report.fact(key, config.get(key).unwrap_or(&Value::Null));
    }
    let path = dir.join("adapter_model.safetensors");
    let file = TensorFile::open(&path)?;
    report.fact("bytes", file.size());
    report.fact("xxh3", checksum(file.bytes()));
    report.list_tensors(&file);
    report.scan(&file);
    Ok(())
}

fn look_at_model(dir: &Path, report: &mut Report) -> Result<()> {
    report.kind = "model directory".into();
    let config = read_json(&dir.join("config.json"))?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("unknown").to_owned();
    if !is_model_dir(dir) {
        report.problems.push("there is no model.safetensors and no index of shards".into());
    }
    report.fact("model type", &model_type);
    if let Some(entries) = config.as_object() {
        for (key, value) in entries.iter().filter(|(_, v)| v.is_number()) {
            report.fact(key, value);
        }
    }
    let source = TensorSource::open(dir)?;
    let names: Vec<String> = source.names().into_iter().map(String::from).collect();
    if let Err(error) = check_model(dir, &model_type, &source, report) {
        report.problems.push(error.to_string());
    }
    let mut parameters = 0;
    for name in &names {
        parameters += source.tensor(name)?.len();
    }
    report.fact("parameters", parameters);
    report.fact("files", source.files().len());
    report.fact("bytes", source.files().iter().map(TensorFile::size).sum::<usize>());
    report.fact("fingerprint", fingerprint(dir, 2)?);
    for file in source.files() {
        report.list_tensors(file);
        report.scan(file);
    }
    let others = ["tokenizer.json", "generation_config.json", "normalization.safetensors"];
    for other in others.iter().filter(|name| dir.join(name).is_file()) {
        report.fact(other, checksum_file(&dir.join(other))?);
    }
    Ok(())
}

/// Whether configuration and tensors belong together, for the models that this program runs.
fn check_model(dir: &Path, model_type: &str, source: &TensorSource, report: &mut Report) -> Result<()> {
    if model_type == "grad_transformer" {
        report.kind = "translator".into();
        GradTransformer::<Cpu, f32>::load(&Cpu::new(1), dir)?;
    } else if model_type == "t5" {
        T5Config::open(&dir.join("config.json"))?;
    } else if Family::ALL.iter().any(|family| {
        family.model_type() == model_type.strip_prefix(Emulator::MODEL_TYPE).unwrap_or(model_type)
    }) {
        let model = DecoderConfig::read(dir)?;
        if let Some(emulator) = &model.emulator {
            report.look_at_emulator(&model, emulator);
        }
        let layout = Decoder::<Cpu, f32>::layout_of(&model);
        for param in layout.params() {
            source.tensor(&param.name)?.expect_shape(&param.shape)?;
        }
    } else {
        report.fact("runs here", "no: this program does not know its type");
    }
    Ok(())
}

fn look_at_run(dir: &Path, report: &mut Report, walk: &mut Walk) -> Result<()> {
    report.kind = "run directory".into();
    let config = Config::read(&dir.join(RUN_FILE))?;
    report.fact("seed", config.seed);
    report.fact("TinyLM", shown(&config.models.tiny));
    report.fact("LLM", shown(&config.models.llm));
    report.fact("public data", &config.data.public);
    if let Some(package) = Package::of_run(dir)? {
        report.look_at_package(&package, dir);
    }
    look_at_subdirectories(dir, report, walk)
}

fn look_at_parts(dir: &Path, report: &mut Report, walk: &mut Walk) -> Result<()> {
    report.kind = match dir.join("world.json").is_file() {
        true => "miniature world".into(),
        false => "directory".into(),
    };
    report.look_at_emulation(dir)?;
    for entry in sorted_entries(dir, walk)? {
        let inner = entry.extension().is_some_and(|e| e == "safetensors");
        if inner {
            report.parts.push(look_at(&entry, walk));
        }
    }
    look_at_subdirectories(dir, report, walk)?;
    let nothing = report.parts.is_empty() && !dir.join(RECORD_FILE).is_file();
    ensure!(!nothing, "nothing here is a model, adapter, update vector, tuple store, translator or run");
    Ok(())
}

/// Looks at what stages made within a directory. Links to directories are not followed: they
/// may lead in circles.
fn look_at_subdirectories(dir: &Path, report: &mut Report, walk: &mut Walk) -> Result<()> {
    ensure!(walk.depth < DEEPEST, "{}: more than {DEEPEST} directories deep", shown(dir));
    walk.depth += 1;
    for entry in sorted_entries(dir, walk)? {
        let known = [MANIFEST, "adapter_config.json", "config.json", RECORD_FILE, RUN_FILE];
        if std::fs::symlink_metadata(&entry).is_ok_and(|found| found.is_dir()) {
            if known.iter().any(|name| entry.join(name).is_file()) {
                report.parts.push(look_at(&entry, walk));
            } else {
                look_at_subdirectories(&entry, report, walk)?;
            }
        }
    }
    walk.depth -= 1;
    Ok(())
}

/// The entries of a directory, in order.
fn sorted_entries(dir: &Path, walk: &mut Walk) -> Result<Vec<PathBuf>> {
    let list = || format!("{}: cannot list", shown(dir));
    let mut entries = vec![];
    for entry in std::fs::read_dir(dir).with_context(list)? {
        entries.push(entry.with_context(list)?.path());
        walk.entries += 1;
        let dir = shown(dir);
        ensure!(walk.entries <= MAX_ENTRIES, "{dir}: more than {MAX_ENTRIES} entries: not read further");
    }
    entries.sort();
    Ok(entries)
}
