//! Gradients of the T5 stacks and of the Grad-Transformer, by complex step.
//!
//! A loss is computed in complex numbers with one tensor moved by `i·h·v`: `Im L / h` is
//! the derivative along v, exact to rounding, and must equal `gradient · v`.

use crate::common::relative_error;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{Backend, Out};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Complex64, Device};
use gradtx_models::grad_transformer::{
    Activations, Generator, GradTransformer, GradTransformerConfig, Normalization, NormalizationFit,
    NormalizationMode, StartToken, Trainer, Tuples,
};
use gradtx_models::t5::{Grads, Keep, Pass, Side, Stack, StackActs, StackShape, T5Config};
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use std::ops::Range;

const H: f64 = 1e-30;
const TOLERANCE: f64 = 1e-9;
const BATCH: usize = 2;
const SOURCE: usize = 5;
const TARGET: usize = 3;

/// `len` normal random numbers times `std`, others for every name.
fn random(name: &str, len: usize, std: f64) -> Vec<f64> {
    let mut stream = Stream::new(derive_named(5, name));
    (0..len).map(|_| stream.normal() * std).collect()
}

fn config(dropout_rate: f64, layers: usize) -> T5Config {
    T5Config {
        d_model: 10,
        d_kv: 3,
        d_ff: 13,
        num_layers: layers,
        num_decoder_layers: layers,
        num_heads: 2,
        relative_attention_num_buckets: 8,
        relative_attention_max_distance: 5,
        layer_norm_epsilon: 1e-6,
        dropout_rate,
    }
}

/// Encoder and decoder over one flat buffer, run on inputs that are checked like parameters.
struct Stacks {
    config: T5Config,
    layout: ParamLayout,
    encoder: Stack,
    decoder: Stack,
    /// Gradient of the loss in the decoder's and in the encoder's output.
    weights: [Vec<f64>; 2],
}

/// Inputs of a pass: flat parameters, encoder embeddings, decoder embeddings.
type Inputs<X> = [Vec<X>; 3];

impl Stacks {
    fn new(dropout: f64) -> Self {
        let config = config(dropout, 1);
        let mut layout = ParamLayout::new();
        let encoder = Stack::new(&config, Side::Encoder, &mut layout, "");
        let decoder = Stack::new(&config, Side::Decoder, &mut layout, "");
        let d = config.d_model;
        let weights = [
            random("of the decoder", BATCH * TARGET * d, 1.0),
            random("of the encoder", BATCH * SOURCE * d, 1.0),
        ];
        Self { config, layout, encoder, decoder, weights }
    }

    fn inputs(&self) -> Inputs<f64> {
        let d = self.config.d_model;
        [
            random("parameters", self.layout.total(), 0.7),
            random("source", BATCH * SOURCE * d, 1.0),
            random("target", BATCH * TARGET * d, 1.0),
        ]
    }

    /// The loss `Σ weights ⊙ outputs` and its gradients. The encoder's output counts twice: in
    /// the loss and as the decoder's memory.
    fn run<X: CpuReal>(&self, inputs: &Inputs<X>) -> (X, Inputs<X>)
    where
        Cpu: Backend<X>,
    {
        let cpu = Cpu::new(2);
        let values = cpu.buffer_from(&inputs[0]).unwrap();
        let keys = [11, 12];
        let pass =
            Pass { dev: &cpu, values: &values, keys: &keys, batch: BATCH, dropout: self.config.dropout_rate };
        let shape = StackShape { batch: BATCH + 1, tokens: SOURCE, memory: 0 };
        let mut enc = StackActs::new(&cpu, &self.encoder, shape, Keep::ForBackward).unwrap();
        let shape = StackShape { batch: BATCH + 1, tokens: TARGET, memory: SOURCE };
        let mut dec = StackActs::new(&cpu, &self.decoder, shape, Keep::ForBackward).unwrap();
        enc.input_mut(BATCH).copy_from_slice(&inputs[1]);
        dec.input_mut(BATCH).copy_from_slice(&inputs[2]);
        self.encoder.forward(&pass, &mut enc, None).unwrap();
        self.decoder.forward(&pass, &mut dec, Some(&enc)).unwrap();
        let weights: [Vec<X>; 2] = [0, 1].map(|i| self.weights[i].iter().map(|&w| X::from_f64(w)).collect());
        let dot = |x: &[X], w: &[X]| -> X { x.iter().zip(w).map(|(&x, &w)| x * w).sum() };
        let loss = dot(dec.output(BATCH), &weights[0]) + dot(enc.output(BATCH), &weights[1]);

        let mut buf = cpu.zeros::<X>(self.layout.total()).unwrap();
        let mut ignore = |_: Range<usize>, _: &mut [X]| Ok(());
        let mut grads: Grads<'_, Cpu, X> = Grads::new(&cpu, &mut buf, Out::Add, &mut ignore);
        dec.d_output_mut(BATCH).unwrap().copy_from_slice(&weights[0]);
        self.decoder.backward(&pass, &mut dec, Some(&enc), &mut grads).unwrap();
        let d_enc = enc.d_output_mut(BATCH).unwrap();
        let d_memory = dec.d_memory(BATCH).unwrap();
        for ((d, &m), &w) in d_enc.iter_mut().zip(d_memory).zip(&weights[1]) {
            *d = m + w;
        }
        self.encoder.backward(&pass, &mut enc, None, &mut grads).unwrap();
        let d_inputs = [enc.d_input(BATCH).unwrap().to_vec(), dec.d_input(BATCH).unwrap().to_vec()];
        let [d_source, d_target] = d_inputs;
        (loss, [buf.to_vec(), d_source, d_target])
    }
}

/// `|complex step − gradient · v| / |complex step|`, v over one range of values.
fn directional_error(
    values: &[f64],
    gradient: &[f64],
    range: std::ops::Range<usize>,
    loss: impl Fn(&[Complex64]) -> Complex64,
) -> f64 {
    let v = random("direction", range.len(), 1.0);
    let mut moved: Vec<Complex64> = values.iter().map(|&x| Complex64::new(x, 0.0)).collect();
    for (x, v) in moved[range.clone()].iter_mut().zip(&v) {
        x.im = H * v;
    }
    let step = loss(&moved).im / H;
    let product: f64 = gradient[range].iter().zip(&v).map(|(g, v)| g * v).sum();
    (step - product).abs() / step.abs()
}

fn assert_tight(what: &str, error: f64) {
    assert!(error <= TOLERANCE, "{what}: relative error {error:e}");
}

#[test]
fn an_encoder_and_a_decoder_layer() {
    for dropout in [0.0, 0.3] {
        let stacks = Stacks::new(dropout);
        let inputs = stacks.inputs();
        let (_, gradients) = stacks.run::<f64>(&inputs);
        let loss = |which: usize, moved: &[Complex64]| {
            let mut complex = inputs.clone().map(|x| x.iter().map(|&x| Complex64::new(x, 0.0)).collect());
            complex[which] = moved.to_vec();
            stacks.run::<Complex64>(&complex).0
        };
        for param in stacks.layout.params() {
            let error = directional_error(&inputs[0], &gradients[0], param.range(), |x| loss(0, x));
            assert_tight(&format!("{} with dropout {dropout}", param.name), error);
        }
        for (which, name) in [(1, "source"), (2, "target")] {
            let all = 0..inputs[which].len();
            let error = directional_error(&inputs[which], &gradients[which], all.clone(), |x| loss(which, x));
            assert_tight(&format!("{name} with dropout {dropout}"), error);
            // Negative control: one part in a million is seen.
            let wrong: Vec<f64> = gradients[which].iter().map(|g| g * (1.0 + 1e-6)).collect();
            let error = directional_error(&inputs[which], &wrong, all, |x| loss(which, x));
            assert!(error > TOLERANCE, "the check does not see a wrong gradient of {name}");
        }
    }
}

fn translator_config(dropout: f64, start_token: StartToken) -> GradTransformerConfig {
    GradTransformerConfig {
        student_width: 7,
        student_blocks: SOURCE,
        teacher_width: 9,
        teacher_blocks: TARGET,
        start_token,
        targets: Default::default(),
        t5: config(dropout, 2),
    }
}

/// A model with these values: random ones have zero biases, which would hide mistakes.
fn translator<X: CpuReal>(config: &GradTransformerConfig, values: &[X]) -> GradTransformer<Cpu, X>
where
    Cpu: Backend<X>,
{
    let mut model = GradTransformer::random(&Cpu::new(2), config.clone(), 1).unwrap();
    model.values_mut().copy_from_slice(values);
    model
}

fn to_f32(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|x| x as f32).collect()
}

/// Two tuples: student, teacher, keys.
fn tuples(config: &GradTransformerConfig) -> (Vec<f32>, Vec<f32>, Vec<u64>) {
    let student = random("student", BATCH * config.student_len(), 1.0);
    let teacher = random("teacher", BATCH * config.teacher_len(), 1.0);
    (to_f32(student), to_f32(teacher), vec![21, 22])
}

/// Mean squared error of a translator and its gradient; also checks what `on_ready` is told.
fn translator_loss<X: CpuReal>(config: &GradTransformerConfig, values: &[X]) -> (X, Vec<X>)
where
    Cpu: Backend<X>,
{
    let model = translator(config, values);
    let mut acts = Activations::new(&model, BATCH).unwrap();
    let (student, teacher, keys) = tuples(config);
    model.load_batch(&mut acts, Tuples { student: &student, teacher: &teacher, keys: &keys }).unwrap();
    model.forward(&mut acts, true).unwrap();
    let scale = 1.0 / (BATCH * config.teacher_len()) as f64;
    let loss = model.loss_sum(&mut acts, scale).unwrap() * X::from_f64(scale);
    let mut buf = model.device().zeros::<X>(values.len()).unwrap();
    let mut ready: Vec<(std::ops::Range<usize>, Vec<X>)> = vec![];
    let mut on_ready = |range: std::ops::Range<usize>, gradients: &mut [X]| {
        ready.push((range.clone(), gradients[range].to_vec()));
        Ok(())
    };
    let mut grads: Grads<'_, Cpu, X> = Grads::new(model.device(), &mut buf, Out::Add, &mut on_ready);
    model.backward(&mut acts, true, &mut grads).unwrap();
    let mut end = values.len();
    let mut covered = 0;
    for (range, gradients) in ready {
        assert!(range.end <= end, "ranges come from the back to the front");
        assert_eq!(buf[range.clone()], gradients[..], "what was reported as ready is final");
        covered += model.layout().params().iter().filter(|p| range.contains(&p.offset)).count();
        end = range.start;
    }
    assert_eq!(covered, model.layout().params().len(), "every parameter was reported once");
    (loss, buf.to_vec())
}

#[test]
fn a_whole_grad_transformer() {
    for (dropout, start_token) in
        [(0.0, StartToken::Embedded), (0.2, StartToken::Embedded), (0.2, StartToken::Zero)]
    {
        let config = translator_config(dropout, start_token);
        let layout =
            GradTransformer::<Cpu, f64>::random(&Cpu::new(1), config.clone(), 1).unwrap().layout().clone();
        let values = random("translator", layout.total(), 0.6);
        let (_, gradient) = translator_loss::<f64>(&config, &values);
        for param in layout.params() {
            let loss = |x: &[Complex64]| translator_loss::<Complex64>(&config, x).0;
            let error = directional_error(&values, &gradient, param.range(), loss);
            assert_tight(&format!("{} with dropout {dropout}, {start_token:?}", param.name), error);
        }
    }
}

#[test]
fn dropout_depends_on_each_tuples_key_only() {
    let config = translator_config(0.2, StartToken::Embedded);
    let model = GradTransformer::<Cpu, f64>::random(&Cpu::new(2), config.clone(), 3).unwrap();
    let mut acts = Activations::new(&model, 2).unwrap();
    let (student, teacher, _) = tuples(&config);
    let mut predict = |from: usize, to: usize, keys: &[u64], training: bool| {
        let (s, t) = (config.student_len(), config.teacher_len());
        let part = Tuples { student: &student[from * s..to * s], teacher: &teacher[from * t..to * t], keys };
        model.load_batch(&mut acts, part).unwrap();
        model.forward(&mut acts, training).unwrap();
        acts.pred(&config).to_vec()
    };
    let both = predict(0, 2, &[5, 6], true);
    let alone = [predict(0, 1, &[5], true), predict(1, 2, &[6], true)].concat();
    let error = relative_error(&both, &alone);
    assert!(error <= 1e-12, "a tuple's masks depend on its neighbours: {error:e}");
    let other = relative_error(&predict(0, 2, &[5, 7], true), &both);
    assert!(other > 1e-3, "another key changes nothing");
    let without = relative_error(&predict(0, 2, &[5, 7], false), &predict(0, 2, &[5, 6], false));
    assert!(without == 0.0, "keys matter outside of training");
}

#[test]
fn cached_generation_equals_recomputation() {
    for start_token in [StartToken::Embedded, StartToken::Zero] {
        let config = translator_config(0.1, start_token);
        let mut model = GradTransformer::<Cpu, f64>::random(&Cpu::new(2), config.clone(), 4).unwrap();
        let total = model.layout().total();
        model.values_mut().copy_from_slice(&random("translator", total, 0.6));
        let (student, _, keys) = tuples(&config);
        // Room for one student at a time, then for more than there are: the same result.
        let generated = Generator::new(&model, 1).unwrap().generate(&model, &student).unwrap();
        let together = Generator::new(&model, 3).unwrap().generate(&model, &student).unwrap();
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x as f64).collect() };
        let error = relative_error(&wide(&together), &wide(&generated));
        assert!(error <= 1e-6, "a batch changes generation: {error:e}");
        // With what was generated as the known blocks, every block predicts itself.
        let mut acts = Activations::new(&model, BATCH).unwrap();
        model.load_batch(&mut acts, Tuples { student: &student, teacher: &generated, keys: &keys }).unwrap();
        model.forward(&mut acts, false).unwrap();
        let error = relative_error(acts.pred(&config), &wide(&generated));
        assert!(error <= 1e-6, "cached generation differs from recomputation by {error:e}");
        // Negative control: known blocks that were not generated predict something else.
        let other: Vec<f32> = generated.iter().map(|x| x + 0.1).collect();
        model.load_batch(&mut acts, Tuples { student: &student, teacher: &other, keys: &keys }).unwrap();
        model.forward(&mut acts, false).unwrap();
        assert!(relative_error(acts.pred(&config), &wide(&generated)) > 1e-4);
    }
}

#[test]
fn micro_batches_and_threads_do_not_change_a_step() {
    let config = translator_config(0.1, StartToken::Embedded);
    let (student, teacher, keys) = tuples(&config);
    let batch = Tuples { student: &student, teacher: &teacher, keys: &keys };
    let step = gradtx_kernels::ops::AdamWStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        step: 1,
    };
    let run = |threads: usize, micro_batch: usize| {
        let mut model = GradTransformer::<Cpu, f32>::random(&Cpu::new(threads), config.clone(), 6).unwrap();
        let mut trainer = Trainer::new(&mut model, micro_batch).unwrap();
        let report = trainer.train_step(&mut model, batch, step, Some(1.0)).unwrap();
        let gradients: Vec<f64> = trainer.gradients().iter().map(|&x| x as f64).collect();
        (report, gradients, model.values().to_vec())
    };
    let (report, gradients, values) = run(1, 2);
    let (same_report, _, same_values) = run(3, 2);
    assert!(report == same_report && values == same_values, "the number of threads changes a step");
    let (split, split_gradients, _) = run(1, 1);
    assert!((split.loss - report.loss).abs() <= 1e-6 * report.loss);
    assert!(relative_error(&split_gradients, &gradients) <= 1e-5);
    assert!(report.grad_norm > 0.0 && report.grad_norm.is_finite());
}

#[test]
fn trainers_that_own_a_part_each_make_the_step_of_one() {
    let config = translator_config(0.1, StartToken::Embedded);
    let (student, teacher, keys) = tuples(&config);
    let batch = Tuples { student: &student, teacher: &teacher, keys: &keys };
    let step = gradtx_kernels::ops::AdamWStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
    };
    let new = || GradTransformer::<Cpu, f32>::random(&Cpu::new(1), config.clone(), 6).unwrap();
    let mut whole = new();
    let total = whole.layout().total();
    let mut trainer = Trainer::new(&mut whole, 2).unwrap();
    let report = trainer.train_step(&mut whole, batch, step, Some(0.5)).unwrap();
    let masters = trainer.master_values(&whole).unwrap();

    let scale = 1.0 / (keys.len() * config.teacher_len()) as f64;
    let cut = [0, 70, 500, total - 123, total];
    let parts: Vec<Vec<Range<usize>>> =
        vec![vec![0..70, 500..total - 123], vec![70..500, total - 123..total]];
    let mut shares: Vec<_> = parts
        .iter()
        .map(|own| {
            let mut model = new();
            let mut trainer = Trainer::of_ranges(&mut model, 2, own.clone()).unwrap();
            let mut reported = 0;
            let mut count = |range: Range<usize>, _: &mut [f32]| {
                reported += range.len();
                Ok(())
            };
            trainer.gradients_of(&model, batch, scale, &mut count).unwrap();
            assert!(reported >= model.layout().count() && reported <= total, "only in the last micro-batch");
            let squares = trainer.sum_squares(&Cpu::new(1)).unwrap();
            (model, trainer, squares)
        })
        .collect();
    let squares: f64 = shares.iter().map(|(_, _, squares)| squares).sum();
    assert!(shares.iter().all(|(_, _, own)| *own > 0.0 && *own < squares));
    for ((model, trainer, _), own) in shares.iter_mut().zip(&parts) {
        let before = model.values().to_vec();
        let norm = trainer.apply(model, step, Some(0.5), squares).unwrap();
        assert!((norm - report.grad_norm).abs() <= 1e-6 * norm);
        let held = trainer.master_values(model).unwrap();
        let want: Vec<f32> = own.iter().flat_map(|range| masters[range.clone()].to_vec()).collect();
        let worst = held.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(held.len() == want.len() && worst <= 1e-6, "{worst}");
        for range in cut.windows(2).map(|w| w[0]..w[1]) {
            let moved = model.values()[range.clone()] != before[range.clone()];
            assert_eq!(moved, own.contains(&range), "{range:?} of {own:?}");
        }
        // What comes back from a checkpoint.
        trainer.set_master_values(model, &want).unwrap();
        assert_eq!(trainer.master_values(model).unwrap(), want);
        let one = Tuples {
            student: &student[..config.student_len()],
            teacher: &teacher[..config.teacher_len()],
            keys: &keys[..1],
        };
        assert!(trainer.is_finite(model, one, scale).unwrap());
        let huge = vec![1e25; config.teacher_len()];
        assert!(!trainer.is_finite(model, Tuples { teacher: &huge, ..one }, scale).unwrap());
    }
}

#[test]
fn translation_works_in_the_saved_units() {
    let config = translator_config(0.1, StartToken::Embedded);
    let mut model = GradTransformer::<Cpu, f32>::random(&Cpu::new(2), config.clone(), 7).unwrap();
    let shapes =
        [[config.student_blocks, config.student_width], [config.teacher_blocks, config.teacher_width]];
    let mut fit = NormalizationFit::new(NormalizationMode::ScalarCentred, shapes[0], shapes[1]);
    let (student, teacher, _) = tuples(&config);
    let small = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| 1e-3 * (x + 2.0)).collect() };
    let (student, teacher) = (small(&student), small(&teacher));
    for (s, t) in student.chunks(config.student_len()).zip(teacher.chunks(config.teacher_len())) {
        fit.add(s, t).unwrap();
    }
    model.set_normalization(fit.finish().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path()).unwrap();
    let loaded = GradTransformer::<Cpu, f32>::load(&Cpu::new(1), dir.path()).unwrap();
    assert_eq!(loaded.normalization(), model.normalization());
    let mut generator = Generator::new(&loaded, 2).unwrap();
    let translated = generator.translate(&loaded, &student).unwrap();
    let mut inside = student.clone();
    loaded.normalization().apply_student(&mut inside).unwrap();
    let mut by_hand = generator.generate(&loaded, &inside).unwrap();
    loaded.normalization().undo_teacher(&mut by_hand).unwrap();
    assert_eq!(translated, by_hand);
    // Negative control: raw units give something else.
    assert_ne!(generator.generate(&loaded, &student).unwrap(), translated);
    // Statistics of another shape are refused, and the file must be there.
    let other = Normalization::none(shapes[1], shapes[0]);
    assert!(model.set_normalization(other).is_err());
    std::fs::remove_file(dir.path().join("normalization.safetensors")).unwrap();
    let message = GradTransformer::<Cpu, f32>::load(&Cpu::new(1), dir.path()).err().unwrap().to_string();
    assert!(message.contains("normalization.safetensors"), "{message}");
}

#[test]
fn the_memory_plan_lists_what_is_taken() {
    let config = translator_config(0.1, StartToken::Embedded);
    let mut model = GradTransformer::<Cpu, f32>::random(&Cpu::new(2), config, 7).unwrap();
    let bytes = |plan: &MemoryPlan, purpose: Purpose| -> u64 {
        plan.entries().iter().filter(|e| e.purpose == purpose).map(|e| e.bytes).sum()
    };
    let [plan, double] = [2, 4].map(|batch| Trainer::plan(&model, batch).unwrap());
    assert_eq!(bytes(&plan, Purpose::Trained), 4 * model.layout().total() as u64);
    assert_eq!(bytes(&plan, Purpose::Optimizer), 8 * model.layout().total() as u64);
    // Only the two maps of buckets do not grow with the batch.
    let maps = 4 * (SOURCE * SOURCE + TARGET * TARGET) as u64;
    let [one, two] = [&plan, &double].map(|p| bytes(p, Purpose::Activations) - maps);
    assert_eq!(two, 2 * one);
    assert_eq!(bytes(&double, Purpose::Scratch), 2 * bytes(&plan, Purpose::Scratch));
    assert!(bytes(&Generator::plan(&model, 2).unwrap(), Purpose::Cache) > 0);
    Trainer::new(&mut model, 2).unwrap();
}
