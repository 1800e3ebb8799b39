//! Gradients of examples that share a stream: each depends on its example alone.

use crate::common::*;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::AdamWStep;
use gradtx_models::decoder::{Decoder, Family};
use gradtx_models::lora::{BlockLayout, ExampleGradients, LoraConfig, Module, PerExampleLora};
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};

const ROOM: BatchCapacity = BatchCapacity { tokens: 400, segments: 8, labels: 400 };

struct Setting {
    model: Decoder<Cpu, f32>,
    layout: BlockLayout,
    initial: Vec<f32>,
    examples: Vec<Example>,
}

impl Setting {
    fn new(dropout: f64) -> Self {
        let config = config(Family::Qwen2, true);
        let model = decoder_f32(&Cpu::new(2), &config, 1);
        let lora =
            LoraConfig { rank: 2, alpha: 32.0, dropout, targets: Module::ALL.to_vec(), layers: vec![] };
        let layout = BlockLayout::new(&config, &lora).unwrap();
        // B is not zero, so that A has gradients.
        let (_, values) = adapters(&config, &Module::ALL, dropout, 1, 5);
        let initial = (0..layout.total()).map(|i| values[i % values.len()] as f32).collect();
        let examples = [7, 33, 2, 20, 123, 5, 64]
            .iter()
            .enumerate()
            .map(|(i, &n)| example(&config, n, i as u64))
            .collect();
        Self { model, layout, initial, examples }
    }

    fn lora(&self) -> PerExampleLora<Cpu, f32> {
        PerExampleLora::new(&self.model, &self.layout, &self.initial, ROOM).unwrap()
    }

    /// These examples in one stream, with weights and keys of their own.
    fn packed(&self, which: &[usize]) -> PackedBatch {
        let mut batch = PackedBatch::default();
        for (row, &i) in which.iter().enumerate() {
            let info = SegmentInfo { adapter: 0, grad_row: row as u32, key: 1000 + i as u64 };
            let example = &self.examples[i];
            batch.push(example, info, 1.0 / example.labels() as f64);
        }
        batch
    }

    fn gradients(&self, lora: &mut PerExampleLora<Cpu, f32>, which: &[usize]) -> ExampleGradients {
        lora.gradients(&self.model, &self.packed(which)).unwrap()
    }
}

#[test]
fn examples_of_a_stream_have_their_own_gradients() {
    for dropout in [0.0, 0.2] {
        let setting = Setting::new(dropout);
        let (mut lora, total) = (setting.lora(), setting.layout.total());
        let alone: Vec<ExampleGradients> = (0..7).map(|i| setting.gradients(&mut lora, &[i])).collect();
        for which in [vec![0, 1, 2, 3, 4, 5, 6], vec![6, 2, 0], vec![4, 5], vec![3]] {
            let found = setting.gradients(&mut lora, &which);
            assert_eq!(found.gradients.len(), which.len() * total);
            for (row, &i) in which.iter().enumerate() {
                let gradient = &found.gradients[row * total..(row + 1) * total];
                assert_near(gradient, &alone[i].gradients, 1e-6, &format!("example {i} of {which:?}"));
                assert!((found.losses[row] - alone[i].losses[0]).abs() < 1e-6);
            }
        }
        // Another example has another gradient, and dropout has an effect.
        assert!(distance(&alone[0].gradients, &alone[1].gradients) > 0.1);
        if dropout > 0.0 {
            let without = Setting::new(0.0);
            let plain = without.gradients(&mut without.lora(), &[4]);
            assert!(distance(&plain.gradients, &alone[4].gradients) > 0.01);
        }
    }
}

#[test]
fn an_example_changes_no_other_gradient() {
    let mut setting = Setting::new(0.2);
    let (mut lora, total) = (setting.lora(), setting.layout.total());
    let which = [0, 4, 3];
    let before = setting.gradients(&mut lora, &which);
    // As many tokens, and a longer one.
    for len in [123, 140] {
        setting.examples[4] = example(setting.model.config(), len, 77);
        let after = setting.gradients(&mut lora, &which);
        for row in [0, 2] {
            let part = row * total..(row + 1) * total;
            assert_near(&after.gradients[part.clone()], &before.gradients[part], 1e-6, "a neighbour");
        }
        let own = total..2 * total;
        assert!(distance(&after.gradients[own.clone()], &before.gradients[own]) > 0.1);
    }
}

#[test]
fn a_gradient_of_the_caller_s_is_applied() {
    let setting = Setting::new(0.0);
    let mut lora = setting.lora();
    let step = AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
    let mut gradient = vec![0.0; setting.layout.total()];
    gradient[3] = -2.0;
    assert!((lora.apply(&gradient, step).unwrap() - 2.0).abs() < 1e-6);
    let update = lora.update().unwrap();
    assert!((update[3] - 0.1).abs() < 1e-5 && update.iter().filter(|x| **x != 0.0).count() == 1);
    gradient[0] = f32::NAN;
    assert!(lora.apply(&gradient, step).is_err());
    let mut wrong = setting.packed(&[0, 1]);
    wrong.grad_row[1] = 0;
    let said = lora.gradients(&setting.model, &wrong).unwrap_err().to_string();
    assert!(said.contains("expected adapter 0 and row 1"), "{said}");
}
