//! Models of real sizes with random values, and whether they fit.

use super::machine;
use super::options::Blocks;
use super::values::{fill, fill_rows};
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_models::decoder::{Decoder, DecoderConfig};
use gradtx_models::grad_transformer::{GradTransformer, GradTransformerConfig, StartToken};
use gradtx_models::lora::{BlockLayout, LoraConfig};
use gradtx_models::t5::T5Config;
use gradtx_plan::cost::calibrate::published;
use gradtx_run::failure::{failed, unusable};
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_text};
use gradtx_runtime::data::{Example, PackedBatch, SegmentInfo};
use gradtx_runtime::params::{Param, ParamLayout};
use gradtx_runtime::plan::{MemoryPlan, human_bytes};
use std::path::Path;

/// Standard deviation of random weights.
const SPREAD: f64 = 0.02;

/// A decoder, by name or by file.
#[derive(Clone, Debug)]
pub struct NamedDecoder {
    /// Its name in results.
    pub name: String,
    /// Its sizes.
    pub config: DecoderConfig,
}

impl NamedDecoder {
    /// A published model such as `qwen2.5-7b`, or the path of a `config.json` (or its directory).
    pub fn find(model: &str) -> Result<Self> {
        if let Some(config) = published(&model.to_lowercase()) {
            return Ok(Self { name: model.to_lowercase(), config });
        }
        let path = Path::new(model);
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        if !file.is_file() {
            let what = "neither a known model (qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b) nor a config.json";
            return Err(unusable(format!("--model {model}: {what}")));
        }
        let text = read_text(&file, MAX_CONFIG_BYTES)?;
        let config = DecoderConfig::parse(&file, &text)?;
        Ok(Self { name: parent(&file), config })
    }

    /// The adapters of these targets.
    pub fn adapters(&self, rank: usize, targets: &[String]) -> Result<BlockLayout> {
        let targets = LoraConfig::targets_from_names(targets)?;
        Ok(BlockLayout::new(&self.config, &LoraConfig { rank, targets, ..LoraConfig::default() })?)
    }

    /// The frozen decoder with random weights, drawn on the device; norms are ones.
    pub fn make<X: Real<Acc = f32>, D: Backend<X>>(&self, device: &D) -> Result<Decoder<D, X>> {
        Ok(Decoder::frozen_with(device, &self.config, |param, view, stride| {
            if is_norm(param) {
                return Ok(device.fill(view, X::one())?);
            }
            let cols = param.shape.last().copied().unwrap_or(stride);
            let key = derive_named(1, &param.name);
            Ok(fill_rows::<D, X>(device, view, (cols, stride), SPREAD, key)?)
        })?)
    }
}

/// The name of the directory that a file is in.
fn parent(file: &Path) -> String {
    let name = file.parent().and_then(Path::file_name).or_else(|| file.file_stem());
    name.map_or("model".into(), |name| name.to_string_lossy().into_owned())
}

fn norms_to_one<X: Real, D: Device>(device: &D, values: &mut D::Buf<X>, layout: &ParamLayout) -> Result<()> {
    for param in layout.params().iter().filter(|param| is_norm(param)) {
        device.fill(values.view_mut(param.range()), X::one())?;
    }
    Ok(())
}

fn is_norm(param: &Param) -> bool {
    param.shape.len() == 1 && param.name.ends_with("norm.weight")
}

/// Sizes of a translator.
#[derive(Debug, Clone, clap::Args)]
pub struct TranslatorArgs {
    /// Flan-T5 between the projections: small, base, large, xl, xxl, or the path of a config.json
    /// (default: small on a CPU, large on a GPU).
    #[arg(long, value_name = "NAME|FILE")]
    pub translator: Option<String>,
    /// Blocks of the TinyLM's updates and their width.
    #[arg(long, value_name = "BLOCKSxWIDTH", default_value = "36x12800")]
    pub tiny: Blocks,
    /// Blocks of the LLM's updates and their width.
    #[arg(long, value_name = "BLOCKSxWIDTH", default_value = "28x22528")]
    pub llm: Blocks,
}

/// A translator's sizes, and its name in results.
#[derive(Clone, Debug)]
pub struct NamedTranslator {
    /// Such as `flan-t5-large`.
    pub name: String,
    /// Its sizes.
    pub config: GradTransformerConfig,
}

impl NamedTranslator {
    /// As asked for, or of a size that suits the device.
    pub fn find(args: &TranslatorArgs, is_cpu: bool) -> Result<Self> {
        let by_default = if is_cpu { "small" } else { "large" };
        let asked = args.translator.as_deref().unwrap_or(by_default);
        let size = asked.strip_prefix("flan-t5-").unwrap_or(asked);
        let (name, t5) = match T5Config::preset(size) {
            Some(t5) => (format!("flan-t5-{size}"), t5),
            None if Path::new(asked).is_file() => {
                (parent(Path::new(asked)), T5Config::open(Path::new(asked))?)
            }
            None => {
                let what = "neither a size of Flan-T5 (small, base, large, xl, xxl) nor a config.json";
                return Err(unusable(format!("--translator {asked}: {what}")));
            }
        };
        let config = GradTransformerConfig {
            student_width: args.tiny.width,
            student_blocks: args.tiny.blocks,
            teacher_width: args.llm.width,
            teacher_blocks: args.llm.blocks,
            start_token: StartToken::Embedded,
            targets: Default::default(),
            t5,
        };
        Ok(Self { name, config })
    }

    /// The model with random values; norms are ones.
    pub fn make<X: Real<Acc = f32>, D: Backend<X>>(&self, device: &D) -> Result<GradTransformer<D, X>> {
        let mut model = GradTransformer::meta(device, self.config.clone())?;
        let mut values = device.zeros::<X>(model.layout().total())?;
        fill::<D, X>(device, values.all_mut(), SPREAD, 2)?;
        norms_to_one::<X, D>(device, &mut values, model.layout())?;
        *model.values_mut() = values;
        Ok(model)
    }

    /// Blocks from the TinyLM to the LLM.
    pub fn shape(&self) -> String {
        let c = &self.config;
        let Blocks { blocks, width } = Blocks { blocks: c.student_blocks, width: c.student_width };
        format!("{} {blocks}x{width}-{}x{}", self.name, c.teacher_blocks, c.teacher_width)
    }
}

/// A packed stream of examples of random tokens, all but the first of each a label, which take
/// turns among `jobs` adapters. Every job's loss is the mean over its examples of their means.
pub fn stream(lengths: &[usize], vocab: usize, jobs: usize) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for (i, &length) in lengths.iter().enumerate() {
        let tokens = super::values::tokens(length, vocab, i as u64);
        let example = Example { tokens, trained: vec![true; length] };
        let job = i % jobs;
        let examples = (lengths.len() - job).div_ceil(jobs);
        let info = SegmentInfo { adapter: job as u32, grad_row: job as u32, key: i as u64 };
        batch.push(&example, info, 1.0 / (example.labels().max(1) * examples) as f64);
    }
    batch
}

/// Fails where buffers do not fit; says what would: the largest number of `--OPTION` (halved
/// again and again) for which `plan` fits.
pub fn check_memory<D: Device>(
    device: &D,
    what: &str,
    option: &str,
    asked: usize,
    plan: impl Fn(usize) -> Result<MemoryPlan>,
) -> Result<()> {
    let room = machine::room(device)?;
    let free = room.available();
    let need = |n: usize| Ok::<u64, anyhow::Error>(room.taken(&plan(n)?));
    let total = need(asked)?;
    if total <= free {
        return Ok(());
    }
    let mut smaller = asked / 2;
    while smaller > 0 && need(smaller)? > free {
        smaller /= 2;
    }
    let hint = match smaller {
        0 => "take a smaller model or a device with more memory".into(),
        n => format!("with {option} {n} it needs {}, which fits", human_bytes(need(n)?)),
    };
    let (total, free) = (human_bytes(total), human_bytes(free));
    Err(failed(format!("{what} with {option} {asked} needs {total}, and {free} are free"), hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;
    use gradtx_runtime::plan::Purpose;

    #[test]
    fn every_job_s_weights_are_a_mean_of_means() {
        for (lengths, jobs) in [(vec![3, 4, 5, 6, 7], 2), (vec![9; 4], 4), (vec![2, 8], 1)] {
            let batch = stream(&lengths, 11, jobs);
            let mut sums = vec![0.0; jobs];
            for (i, weight) in batch.weights.iter().enumerate() {
                sums[batch.adapter[batch.label_segment[i] as usize] as usize] += weight;
            }
            assert!(sums.iter().all(|sum: &f64| (sum - 1.0).abs() < 1e-12), "{lengths:?} {jobs} {sums:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        let cpu = Cpu::new(1);
        let plan = |n: usize| {
            let mut plan = MemoryPlan::new();
            plan.add(Purpose::Activations, "x", &[n, 1 << 20, 1 << 10], 4);
            Ok(plan)
        };
        check_memory(&cpu, "this", "--tokens", 0, plan).unwrap();
        // No machine has 2^48 · 4 bytes, and every one has none.
        let error = check_memory(&cpu, "this", "--tokens", 1 << 18, plan).unwrap_err().to_string();
        assert!(error.contains("1024.00 TiB") && error.contains("--tokens 262144"), "{error}");
    }

    #[test]
    fn unknown_models_are_refused() {
        let error = NamedDecoder::find("qwen9").unwrap_err().to_string();
        assert!(error.contains("qwen9") && error.contains("config.json"), "{error}");
        assert_eq!(NamedDecoder::find("Qwen2.5-7B").unwrap().config.hidden, 3584);
    }
}
