//! Rates from benchmark results.
//!
//! In: files of JSON lines. Out: operations or bytes per second by device and kind of work.
//! A line counts if it has a `work` (`lora`, `translator`, `gemm`: `tflops` or
//! `share_of_peak`; `memory`, `generate`: `gb_per_s`) and a `device`, of its own or of a line
//! before it that describes the machine. The lines of earlier benchmarks, which name shapes
//! instead, are understood too. Lines of others (`"who"` is not `gradtx`) and lines about
//! other things are passed over.
//!
//! Where several lines report one rate, the median holds.

use super::device::{Cluster, Gpu, Hardware};
use super::rates::Kind;
use super::tokens::{Lengths, Mean};
use super::work::{DecoderWork, TranslatorWork};
use anyhow::{Context, Result};
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{DecoderConfig, Family, RopeScaling};
use gradtx_models::grad_transformer::{GradTransformer, GradTransformerConfig, StartToken};
use gradtx_models::lora::{BlockLayout, LoraConfig};
use gradtx_models::t5::T5Config;
use gradtx_runtime::artifact::{MAX_LINES_BYTES, read_regular_text};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A rate that was measured.
#[derive(Clone, Debug, PartialEq)]
struct Measured {
    gpu: Gpu,
    kind: Kind,
    /// Operations or bytes per second; of one thread on a CPU.
    per_second: f64,
    from: String,
}

/// All rates that were measured.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    /// Later ones are better known: they hide earlier ones of the same device and kind.
    sources: Vec<Vec<Measured>>,
}

impl Calibration {
    /// Reads a file, or all `.jsonl` files of a directory and those below it.
    pub fn read(&mut self, path: &Path) -> Result<()> {
        let mut source = vec![];
        for file in files(path)? {
            let text = read_regular_text(&file, MAX_LINES_BYTES)?;
            source.extend(measured(&text, &file.display().to_string())?);
        }
        self.sources.push(source);
        Ok(())
    }

    /// Reads the text of a file.
    pub fn read_text(&mut self, text: &str, from: &str) -> Result<()> {
        self.sources.push(measured(text, from)?);
        Ok(())
    }

    /// Operations or bytes per second of one rank, and where they were measured.
    pub fn per_second(&self, cluster: &Cluster, kind: Kind) -> Option<(f64, String)> {
        let threads = if cluster.gpu == Gpu::Cpu { cluster.threads.max(1) as f64 } else { 1.0 };
        self.sources.iter().rev().find_map(|source| {
            let mut found: Vec<&Measured> =
                source.iter().filter(|m| m.gpu == cluster.gpu && m.kind == kind).collect();
            found.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
            let middle = found.get(found.len().checked_sub(1)? / 2)?;
            Some((middle.per_second * threads, middle.from.clone()))
        })
    }
}

/// The file, or the `.jsonl` files of a directory, in order.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("{}: cannot read", path.display()))?;
    let mut entries = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    entries.sort();
    let mut found = vec![];
    for entry in entries {
        if entry.is_dir() {
            found.extend(files(&entry)?);
        } else if entry.extension().is_some_and(|e| e == "jsonl") {
            found.push(entry);
        }
    }
    Ok(found)
}

fn measured(text: &str, from: &str) -> Result<Vec<Measured>> {
    let mut machine = None;
    let mut found = vec![];
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Value =
            serde_json::from_str(line).with_context(|| format!("{from}: line {}: not JSON", i + 1))?;
        let own = match (line["device"].as_str(), line["cpu"].is_string()) {
            (Some(name), _) => Gpu::from_name(name),
            (None, true) => Some(Gpu::Cpu),
            (None, false) => None,
        };
        // What has a device but no work describes the machine of the lines after it.
        let describes = line["name"].is_null() && line["work"].is_null();
        machine = if describes { own.or(machine) } else { machine };
        let (Some(gpu), "gradtx") = (own.or(machine), line["who"].as_str().unwrap_or("gradtx")) else {
            continue;
        };
        let threads = if gpu == Gpu::Cpu { line["threads"].as_f64().unwrap_or(1.0).max(1.0) } else { 1.0 };
        if let Some((kind, per_second)) = rate(&line, gpu).filter(|(_, r)| r.is_finite() && *r > 0.0) {
            found.push(Measured { gpu, kind, per_second: per_second / threads, from: from.into() });
        }
    }
    Ok(found)
}

/// What a line gives, for all threads together.
fn rate(line: &Value, gpu: Gpu) -> Option<(Kind, f64)> {
    let Some(work) = line["work"].as_str() else { return of_steps(line) };
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == work)?;
    if !kind.computes() {
        return Some((kind, line["gb_per_s"].as_f64()? * 1e9));
    }
    let share = || {
        let one = Cluster { nodes: 1, gpus_per_node: 1, gpu, threads: 1 };
        Some(line["share_of_peak"].as_f64()? * Hardware::of(&one).peak).filter(|_| gpu != Gpu::Cpu)
    };
    Some((kind, line["tflops"].as_f64().map(|t| t * 1e12).or_else(share)?))
}

/// What a line of the step benchmarks gives: `gemm …`, `lora MODEL EXAMPLESxTOKENS packed`,
/// `translator flan-t5-SIZE BLOCKSxWIDTH-BLOCKSxWIDTH batch N`.
fn of_steps(line: &Value) -> Option<(Kind, f64)> {
    let words: Vec<&str> = line["name"].as_str()?.split(' ').collect();
    let seconds = || line["median_s"].as_f64().filter(|s| *s > 0.0);
    match words[..] {
        ["gemm", ..] => Some((Kind::Gemm, line["gflops"].as_f64()? * 1e9)),
        ["lora", model, shape, "packed"] => {
            let (examples, tokens) = pair(shape)?;
            Some((Kind::Lora, lora_flops(&published(model)?, examples, tokens)? / seconds()?))
        }
        ["translator", model, shapes, "batch", batch] => {
            let (student, teacher) = shapes.split_once('-')?;
            let t5 = T5Config::preset(model.strip_prefix("flan-t5-")?)?;
            let flops = translator_flops(t5, pair(student)?, pair(teacher)?, batch.parse().ok()?)?;
            Some((Kind::Translator, flops / seconds()?))
        }
        _ => None,
    }
}

/// `AxB`
fn pair(text: &str) -> Option<(usize, usize)> {
    let (a, b) = text.split_once('x')?;
    Some((a.parse().ok()?, b.parse().ok()?))
}

fn lora_flops(model: &DecoderConfig, examples: usize, tokens: usize) -> Option<f64> {
    let layout = BlockLayout::new(model, &LoraConfig::default()).ok()?;
    let work = DecoderWork { model, layout: &layout, element: 4.0 };
    // Every token but the first of an example is a label.
    let mean: Mean = Lengths::uniform(tokens, tokens - 1).mean(None);
    Some(work.finetuning(&mean, examples as f64, examples * tokens).flops)
}

fn translator_flops(
    t5: T5Config,
    (student_blocks, student_width): (usize, usize),
    (teacher_blocks, teacher_width): (usize, usize),
    batch: usize,
) -> Option<f64> {
    let start_token = StartToken::Embedded;
    let config = GradTransformerConfig {
        student_width,
        student_blocks,
        teacher_width,
        teacher_blocks,
        start_token,
        targets: Default::default(),
        t5,
    };
    let model = GradTransformer::<Cpu, f32>::meta(&Cpu::new(1), config.clone()).ok()?;
    let work = TranslatorWork { config: &config, values: model.layout().count() as f64, element: 4.0 };
    Some(work.training(batch as f64).flops)
}

/// Sizes of a published Qwen2.5 model by its name, such as `qwen2.5-7b`.
pub fn published(name: &str) -> Option<DecoderConfig> {
    let (hidden, intermediate, layers, heads, kv_heads, head_dim) = match name {
        "qwen2.5-0.5b" => (896, 4864, 24, 14, 2, 64),
        "qwen2.5-1.5b" => (1536, 8960, 28, 12, 2, 128),
        "qwen2.5-3b" => (2048, 11_008, 36, 16, 2, 128),
        "qwen2.5-7b" => (3584, 18_944, 28, 28, 4, 128),
        "qwen2.5-14b" => (5120, 13_824, 48, 40, 8, 128),
        "qwen2.5-32b" => (5120, 27_648, 64, 40, 8, 128),
        _ => return None,
    };
    // The small ones share embedding and head, and the large ones have a padded vocabulary.
    let tied = hidden <= 2048;
    Some(DecoderConfig {
        family: Family::Qwen2,
        vocab: if tied { 151_936 } else { 152_064 },
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::None,
        max_positions: 32_768,
        window: None,
        tied,
        bos: None,
        eos: vec![],
        pad: None,
        emulator: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: &str = r#"{"date":"2026-11-21","cpu":"AMD EPYC","cores":2}
{"who":"gradtx","name":"gemm 1024x9728x896 bT","gflops":130.0,"threads":2}
{"who":"gradtx","name":"gemm 2048x2048x2048","gflops":90.0,"threads":2}
{"who":"gradtx","name":"gemm 1x1x1","gflops":100.0,"threads":2}
{"who":"gradtx","name":"lora qwen2.5-0.5b 4x256 packed","median_s":16.0,"tokens_per_s":64,"threads":2}
{"who":"torch","name":"lora qwen2.5-0.5b 4x256 packed","median_s":1.0,"threads":2}
{"who":"gradtx","name":"translator flan-t5-small 36x12800-28x22528 batch 8","median_s":1.1,"threads":2}
{"who":"gradtx","name":"something else","median_s":1.1,"threads":2}
"#;

    fn cpu(threads: usize) -> Cluster {
        Cluster { nodes: 1, gpus_per_node: 1, gpu: Gpu::Cpu, threads }
    }

    #[test]
    fn step_benchmarks_are_understood() {
        let mut calibration = Calibration::default();
        calibration.read_text(STEPS, "raw.jsonl").unwrap();
        let rate = |kind| calibration.per_second(&cpu(2), kind).unwrap().0;
        assert_eq!(rate(Kind::Gemm), 100e9, "the median");
        // 1,024 tokens of 4 · 358 million, and as many labels of 4 · 136 million.
        let lora = 1024.0 * 4.0 * (358e6 + 136e6) / 16.0;
        assert!((rate(Kind::Lora) / lora - 1.0).abs() < 0.05, "{} {lora}", rate(Kind::Lora));
        // Published: 85 % of this step is matrix products, so it cannot beat them.
        assert!(rate(Kind::Translator) > 40e9 && rate(Kind::Translator) < 200e9);
        assert_eq!(calibration.per_second(&cpu(2), Kind::Generate), None);
        assert_eq!(calibration.per_second(&cpu(6), Kind::Gemm).unwrap().0, 300e9);
        let gpu = Cluster { gpu: Gpu::H100, ..cpu(2) };
        assert_eq!(calibration.per_second(&gpu, Kind::Gemm), None);
    }

    #[test]
    fn later_calibrations_win_and_nonsense_is_named() {
        let line =
            |tflops: f64| format!("{{\"device\":\"h100\"}}\n{{\"work\":\"lora\",\"tflops\":{tflops}}}\n");
        let h100 = Cluster { gpu: Gpu::H100, ..cpu(1) };
        let mut calibration = Calibration::default();
        for (tflops, from) in [(300.0, "a"), (400.0, "b")] {
            calibration.read_text(&line(tflops), from).unwrap();
        }
        assert_eq!(calibration.per_second(&h100, Kind::Lora), Some((400e12, "b".into())));
        // Negative or missing numbers are no measurement.
        calibration.read_text(&line(-1.0), "c").unwrap();
        assert_eq!(calibration.per_second(&h100, Kind::Lora), Some((400e12, "b".into())));
        let share = r#"{"work":"translator","device":"h100","share_of_peak":0.5}"#;
        calibration.read_text(share, "d").unwrap();
        assert_eq!(calibration.per_second(&h100, Kind::Translator).unwrap().0, 0.5 * 989e12);
        let error = format!("{:#}", calibration.read_text("{}\nnot json", "bad.jsonl").unwrap_err());
        assert!(error.contains("bad.jsonl") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn directories_are_read_to_the_bottom() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/raw.jsonl"), STEPS).unwrap();
        std::fs::write(dir.path().join("a/notes.txt"), "no JSON").unwrap();
        let mut calibration = Calibration::default();
        calibration.read(dir.path()).unwrap();
        let (_, from) = calibration.per_second(&cpu(1), Kind::Lora).unwrap();
        assert!(from.ends_with("raw.jsonl"), "{from}");
        assert!(calibration.read(&dir.path().join("none.jsonl")).is_err());
    }
}
