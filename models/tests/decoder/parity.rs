//! Parity with transformers and PEFT: the golden fixtures under `tests/goldens`.

use crate::common::fixture;
use crate::common::{Adapters, all_logits, assert_near, capacity, upload, weighted_loss};
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::AdamWStep;
use gradtx_models::decoder::{
    Activations, Decoder, DecoderConfig, FullTrainer, GenerateLimits, Generator, Gradients, Mode,
    PretrainStep, Prompt,
};
use gradtx_models::lora::{MultiLora, PeftAdapter, read_peft, write_peft};
use gradtx_runtime::artifact::TensorFile;
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};
use std::collections::BTreeSet;

const TOLERANCE: f64 = 1e-4;

struct Golden {
    file: TensorFile,
    examples: Vec<Example>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let file = TensorFile::open(&fixture(name).join("golden.safetensors")).unwrap();
        let ids = |name| file.tensor(name).unwrap().to_u32().unwrap();
        let (tokens, offsets, prompts) = (ids("tokens"), ids("offsets"), ids("prompt_lens"));
        let examples = offsets
            .windows(2)
            .zip(prompts)
            .map(|(w, prompt)| {
                let tokens = tokens[w[0] as usize..w[1] as usize].to_vec();
                let trained = (0..tokens.len()).map(|i| i >= prompt as usize).collect();
                Example { tokens, trained }
            })
            .collect();
        Self { file, examples }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.file.tensor(name).unwrap().to_f32().unwrap()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.file.tensor(name).unwrap().to_u32().unwrap()
    }

    /// Examples whose mean losses are averaged.
    fn stream(&self, range: std::ops::Range<usize>) -> PackedBatch {
        let mut batch = PackedBatch::default();
        for example in &self.examples[range.clone()] {
            let weight = 1.0 / (example.labels() * range.len()) as f64;
            batch.push(example, SegmentInfo::default(), weight);
        }
        batch
    }

    /// The largest stream of four examples.
    fn capacity(&self) -> BatchCapacity {
        let streams: Vec<_> = (0..10).map(|s| self.stream(4 * s..4 * s + 4)).collect();
        BatchCapacity::of(&streams)
    }

    fn assert_losses(&self, found: &[(f64, f64)]) {
        let near = |found: f64, want: f32| (found - want as f64).abs() <= TOLERANCE * (want as f64).abs();
        let want = self.floats("train_losses").into_iter().zip(self.floats("train_grad_norms"));
        for (step, (found, want)) in found.iter().zip(want).enumerate() {
            assert!(near(found.0, want.0), "loss of step {step}: {found:?}, {want:?}");
            assert!(near(found.1, want.1), "norm of step {step}: {found:?}, {want:?}");
        }
    }

    fn names_of(&self, prefix: &str) -> Vec<(String, String)> {
        let names = self.file.names().into_iter();
        names.filter_map(|n| n.strip_prefix(prefix).map(|rest| (n.clone(), rest.to_owned()))).collect()
    }
}

fn adamw(lr: f64, step: u32) -> AdamWStep {
    AdamWStep { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step }
}

fn check_greedy(golden: &Golden, model: &Decoder<Cpu, f32>, adapter: Option<&Adapters<'_, f32>>) {
    let prompt = golden.ids("greedy_prompt");
    let want = golden.ids("greedy_tokens");
    let limits = GenerateLimits { rows: 1, prompt_tokens: prompt.len(), context: prompt.len() + want.len() };
    let mut generator = Generator::new(model, limits, adapter.map(|a| a.layout)).unwrap();
    let prompts = [Prompt { tokens: prompt, adapter: adapter.map(|_| 0) }];
    let view = adapter.map(|a| a.view(0.0));
    let found = generator.generate(model, view, &prompts, want.len(), &[]).unwrap();
    assert_eq!(found[0].tokens, want);
}

fn check_base(name: &str) {
    let golden = Golden::open(name);
    let cpu = Cpu::new(2);
    let mut model = Decoder::<Cpu, f32>::load(&cpu, &fixture(name).join("model")).unwrap();
    let first = golden.stream(0..1);
    assert_near(&all_logits(&model, &first, None), &golden.floats("logits"), TOLERANCE, "logits");
    for (i, want) in golden.floats("example_losses").into_iter().enumerate() {
        let found = weighted_loss(&model, &golden.stream(i..i + 1), None);
        assert_near(&[found], &[want], TOLERANCE, &format!("loss of example {i}"));
    }

    let mut acts = Activations::new(&model, capacity(&first), Mode::AllParameters).unwrap();
    let mut grads = cpu.zeros(model.layout().total()).unwrap();
    let into = Gradients::All(&mut grads[..]);
    model.loss_and_gradient(&mut acts, &upload(&cpu, &first), None, into).unwrap();
    let wanted = golden.names_of("grad.");
    let params = model.layout().params().iter();
    let count = params.filter(|p| !crate::common::has_no_gradient(model.config(), &p.name)).count();
    assert_eq!(wanted.len(), count, "a gradient for every parameter that has one");
    for (tensor, param) in wanted {
        let found = &grads[model.layout().range(&param).unwrap()];
        assert_near(found, &golden.floats(&tensor), TOLERANCE, &tensor);
    }
    check_greedy(&golden, &model, None);

    if golden.names_of("train_losses").is_empty() {
        return;
    }
    let mut trainer = FullTrainer::new(&model, false, golden.capacity()).unwrap();
    let mut losses = Vec::new();
    for step in 0..10 {
        let numbers = PretrainStep { adamw: adamw(1e-3, step + 1), max_norm: Some(1.0), muon: None };
        let from = 4 * step as usize;
        losses.push(trainer.train_step(&mut model, &golden.stream(from..from + 4), numbers).unwrap());
    }
    golden.assert_losses(&losses);
    for (tensor, param) in golden.names_of("final.") {
        let found = &model.values()[model.layout().range(&param).unwrap()];
        assert_near(found, &golden.floats(&tensor), TOLERANCE, &tensor);
    }
}

#[test]
fn qwen2() {
    check_base("qwen2");
}

#[test]
fn qwen2_with_a_head_of_its_own() {
    check_base("qwen2_untied");
}

#[test]
fn llama_with_scaled_rotary_frequencies() {
    check_base("llama");
}

#[test]
fn mistral() {
    check_base("mistral");
}

#[test]
fn qwen3() {
    check_base("qwen3");
}

#[test]
fn opt() {
    check_base("opt");
}

/// A matrix of the adapter by its name in PEFT's file.
fn named<'v>(adapter: &PeftAdapter, values: &'v [f32], name: &str) -> &'v [f32] {
    let layout = &adapter.layout;
    for block in 0..layout.blocks() {
        for slice in layout.slices() {
            let path = layout.family().module_path(slice.module);
            let path = format!("layers.{block}.{path}.lora_{:?}.", slice.factor);
            if name.contains(&path) {
                return &values[layout.range(block, slice)];
            }
        }
    }
    panic!("{name} is not a matrix of the adapter");
}

#[test]
fn qwen2_with_an_adapter() {
    check_adapter("qwen2", "qwen2_lora");
}

#[test]
fn opt_with_an_adapter() {
    check_adapter("opt", "opt_lora");
}

fn check_adapter(base: &str, name: &str) {
    let golden = Golden::open(name);
    let cpu = Cpu::new(2);
    let model = Decoder::<Cpu, f32>::load(&cpu, &fixture(base).join("model")).unwrap();
    let peft = read_peft(&fixture(name).join("adapter"), model.config()).unwrap();
    let adapters = Adapters { values: cpu.buffer_from(&peft.values).unwrap(), layout: &peft.layout };
    let first = golden.stream(0..1);
    let logits = all_logits(&model, &first, Some(adapters.view(0.0)));
    assert_near(&logits, &golden.floats("logits"), TOLERANCE, "logits");
    check_greedy(&golden, &model, Some(&adapters));

    let mut acts = Activations::new(&model, capacity(&first), Mode::Adapters(&peft.layout)).unwrap();
    let mut grads = cpu.zeros(peft.values.len()).unwrap();
    let (into, view) = (Gradients::Adapters(&mut grads[..]), Some(adapters.view(0.0)));
    model.loss_and_gradient(&mut acts, &upload(&cpu, &first), view, into).unwrap();
    let wanted = golden.names_of("grad.");
    assert_eq!(wanted.len(), peft.layout.blocks() * peft.layout.slices().len());
    for (tensor, name) in wanted {
        assert_near(named(&peft, &grads, &name), &golden.floats(&tensor), TOLERANCE, &tensor);
    }

    let mut jobs = MultiLora::new(&model, &peft.layout, 1, &peft.values, golden.capacity()).unwrap();
    let mut losses = Vec::new();
    for step in 0..10 {
        let batch = golden.stream(4 * step as usize..4 * step as usize + 4);
        let report = jobs.train_step(&model, &batch, adamw(1e-2, step + 1), Some(1.0)).unwrap();
        losses.push((report.losses[0], report.norms[0]));
    }
    golden.assert_losses(&losses);
    let trained = jobs.adapter(0).unwrap();
    for (tensor, name) in golden.names_of("final.") {
        assert_near(named(&peft, &trained, &name), &golden.floats(&tensor), TOLERANCE, &tensor);
    }
}

#[test]
fn an_adapter_of_peft_is_written_as_it_was_read() {
    for (base, name) in [("qwen2", "qwen2_lora"), ("opt", "opt_lora")] {
        let model = DecoderConfig::read(&fixture(base).join("model")).unwrap();
        let from = fixture(name).join("adapter");
        let peft = read_peft(&from, &model).unwrap();
        let dir = tempfile::tempdir().unwrap();
        write_peft(dir.path(), &peft.layout, &peft.values, peft.base_model.as_deref().unwrap()).unwrap();
        assert_eq!(read_peft(dir.path(), &model).unwrap(), peft);
        let [written, theirs] = [dir.path(), &from]
            .map(|dir| TensorFile::open(&dir.join("adapter_model.safetensors")).unwrap().names());
        assert_eq!(written.iter().collect::<BTreeSet<_>>(), theirs.iter().collect(), "{name}");
    }
}

/// The comparisons with OPT can fail: positions from another row on, and norms as of the other families.
#[test]
fn a_wrong_opt_is_found() {
    let golden = Golden::open("opt");
    let cpu = Cpu::new(1);
    let model = Decoder::<Cpu, f32>::load(&cpu, &fixture("opt/model")).unwrap();
    let first = golden.stream(0..1);
    let wanted = golden.floats("logits");
    let far = |config: &DecoderConfig, values: &[f32]| {
        let model = crate::common::decoder(&cpu, config, values);
        crate::common::distance(&all_logits(&model, &first, None), &wanted)
    };
    let (config, values) = (model.config().clone(), model.values().to_vec());
    assert!(far(&config, &values) <= TOLERANCE);
    let mut shifted = values.clone();
    let table = model.layout().range("model.decoder.embed_positions.weight").unwrap();
    shifted[table].rotate_left(config.hidden);
    assert!(far(&config, &shifted) > 10.0 * TOLERANCE);
    assert!(far(&DecoderConfig { norm_eps: 1e-2, ..config.clone() }, &values) > 10.0 * TOLERANCE);
    for bias in ["self_attn.out_proj", "self_attn.v_proj", "fc1", "fc2", "final_layer_norm"] {
        let mut without = values.clone();
        let bias = model.layout().range(&format!("model.decoder.layers.1.{bias}.bias")).unwrap();
        without[bias].fill(0.0);
        assert!(far(&config, &without) > 10.0 * TOLERANCE);
    }
}

/// The comparisons can fail: another rotary base, and the adapter left out.
#[test]
fn a_wrong_model_is_found() {
    let golden = Golden::open("qwen2_lora");
    let cpu = Cpu::new(1);
    let dir = fixture("qwen2/model");
    let model = Decoder::<Cpu, f32>::load(&cpu, &dir).unwrap();
    let first = golden.stream(0..1);
    let without = all_logits(&model, &first, None);
    assert!(crate::common::distance(&without, &golden.floats("logits")) > 10.0 * TOLERANCE);
    let mut config = model.config().clone();
    config.rope_theta *= 1.01;
    let turned = crate::common::decoder(&cpu, &config, model.values());
    assert!(crate::common::distance(&all_logits(&turned, &first, None), &without) > TOLERANCE);
}
