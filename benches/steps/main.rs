//! Training steps on this CPU, on the shapes of real models with random weights.
//!
//! ```text
//! cargo bench -p gradtx-benches --bench steps -- [lora|translator|gemm] [--threads N] [--runs N]
//! ```
//!
//! * `lora`: LoRA fine-tuning step (r = 2, α = 32, q and v, dropout 0.05) of a
//!   Qwen2.5-0.5B-shaped model on 4 examples of 256 tokens packed into one stream, every
//!   token a label: forward, backward, clipping, AdamW. In f32.
//! * `translator`: Grad-Transformer step, Flan-T5-small-shaped, 36 blocks of 12,800 to 28
//!   of 22,528, batch 8, dropout 0.1, all parameters trained.
//! * `gemm`: the rate of the matrix product alone on the shapes that dominate both: the
//!   floor that the steps are held against.
//!
//! One line of JSON each. `peer_torch.py` beside this file does the same in PyTorch, and
//! `compare.sh` runs the two in turn.

use anyhow::{Result, bail};
use clap::Parser;
use gradtx_benches::{measure, median};
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::{AdamWStep, Gemm, GemmDims};
use gradtx_kernels::rng::Stream;
use gradtx_models::decoder::{Decoder, DecoderConfig, Family, InitialWeights, RopeScaling};
use gradtx_models::grad_transformer::{GradTransformer, GradTransformerConfig, StartToken, Trainer, Tuples};
use gradtx_models::lora::{BlockLayout, LoraConfig, LoraJobs, initial_adapter};
use gradtx_models::t5::T5Config;
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};
use std::time::Instant;

/// What to measure, and how often.
#[derive(Parser)]
struct Args {
    /// lora, translator, gemm; all of them when none is named.
    what: Vec<String>,
    /// Threads; as many as this process may use when not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Steps that are not counted.
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    /// Steps that are counted.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Dropout of the translator.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// What cargo passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let cpu = args.threads.map_or_else(Cpu::default, Cpu::new);
    let all = ["gemm", "lora", "translator"].map(String::from);
    for what in if args.what.is_empty() { &all[..] } else { &args.what } {
        match what.as_str() {
            "gemm" => gemm(&cpu, &args)?,
            "lora" => lora(&cpu, &args)?,
            "translator" => translator(&cpu, &args)?,
            other => bail!("`{other}` is none of gemm, lora, translator"),
        }
    }
    Ok(())
}

const STEP: AdamWStep =
    AdamWStep { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1 };

/// Sizes of Qwen2.5-0.5B.
fn qwen_half_billion() -> DecoderConfig {
    DecoderConfig {
        family: Family::Qwen2,
        vocab: 151_936,
        hidden: 896,
        intermediate: 4864,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::None,
        max_positions: 4096,
        tied: true,
        bos: None,
        eos: vec![],
        pad: None,
    }
}

fn lora(cpu: &Cpu, args: &Args) -> Result<()> {
    const EXAMPLES: usize = 4;
    const TOKENS: usize = 256;
    let config = qwen_half_billion();
    let decoder = Decoder::<Cpu, f32>::random(cpu, &config, &InitialWeights::default(), 1)?;
    let layout = BlockLayout::new(&config, &LoraConfig::default())?;
    let capacity =
        BatchCapacity { tokens: EXAMPLES * TOKENS, segments: EXAMPLES, labels: EXAMPLES * (TOKENS - 1) };
    let mut jobs = LoraJobs::new(&decoder, &layout, 1, &initial_adapter(&layout, 2), capacity)?;
    let mut stream = Stream::new(3);
    let mut batch = PackedBatch::default();
    for i in 0..EXAMPLES {
        let tokens = (0..TOKENS).map(|_| stream.below(config.vocab) as u32).collect();
        let example = Example { tokens, trained: vec![true; TOKENS] };
        let info = SegmentInfo { adapter: 0, grad_row: 0, key: i as u64 };
        batch.push(&example, info, 1.0 / (example.labels() * EXAMPLES) as f64);
    }
    let mut step = 0;
    measure(cpu, "lora qwen2.5-0.5b 4x256 packed", EXAMPLES * TOKENS, args.warmup, args.runs, || {
        step += 1;
        let report = jobs.train_step(&decoder, &batch, AdamWStep { step, ..STEP }, Some(1.0))?;
        Ok(report.losses[0])
    })
}

fn translator(cpu: &Cpu, args: &Args) -> Result<()> {
    const BATCH: usize = 8;
    let mut t5 = T5Config::preset("small").expect("small is a preset");
    t5.dropout_rate = args.dropout;
    let config = GradTransformerConfig {
        student_width: 12_800,
        student_blocks: 36,
        teacher_width: 22_528,
        teacher_blocks: 28,
        start_token: StartToken::Embedded,
        t5,
    };
    let mut model = GradTransformer::<Cpu, f32>::random(cpu, config.clone(), 1)?;
    let mut trainer = Trainer::new(&mut model, BATCH)?;
    let mut stream = Stream::new(2);
    let mut normal = |n: usize| (0..n).map(|_| stream.normal() as f32).collect::<Vec<_>>();
    let students = normal(BATCH * config.student_len());
    let teachers = normal(BATCH * config.teacher_len());
    let blocks = BATCH * (config.student_blocks + config.teacher_blocks);
    let mut step = 0;
    measure(cpu, "translator flan-t5-small 36x12800-28x22528 batch 8", blocks, args.warmup, args.runs, || {
        step += 1;
        let keys: Vec<u64> = (0..BATCH as u64).map(|i| step as u64 * 100 + i).collect();
        let tuples = Tuples { student: &students, teacher: &teachers, keys: &keys };
        let report = trainer.train_step(&mut model, tuples, AdamWStep { step, ..STEP }, Some(1.0))?;
        Ok(report.loss)
    })
}

fn gemm(cpu: &Cpu, args: &Args) -> Result<()> {
    // (rows, outputs, inputs, weight stored [outputs, inputs]): MLP up, its backward, head.
    let shapes = [
        (1024, 9728, 896, true),
        (1024, 896, 4864, true),
        (1024, 896, 9728, false),
        (1020, 30_000, 896, true),
        (2048, 2048, 2048, false),
    ];
    for (m, n, k, trans) in shapes {
        let mut stream = Stream::new(9);
        let mut random = |len: usize| {
            let values: Vec<f32> = (0..len).map(|_| stream.uniform() as f32 - 0.5).collect();
            cpu.buffer_from(&values)
        };
        let (a, b) = (random(m * k)?, random(k * n)?);
        let mut c = cpu.zeros::<f32>(m * n)?;
        let mut seconds = vec![];
        for run in 0..args.warmup + args.runs {
            let begin = Instant::now();
            cpu.gemm(&mut c, &a, &b, GemmDims::new(m, n, k, false, trans))?;
            if run >= args.warmup {
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
        let rate = 2.0 * (m * n * k) as f64 / median(&mut seconds) / 1e9;
        println!(
            "{}",
            serde_json::json!({"name": format!("gemm {m}x{n}x{k}{}", if trans { " bT" } else { "" }),
                "gflops": (rate * 10.0).round() / 10.0, "threads": cpu.threads()})
        );
    }
    Ok(())
}
