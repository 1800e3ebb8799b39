//! Whole models on the device: a fine-tune of two adapters in one stream, greedy generation with
//! a cache, and training and use of a Grad-Transformer, each against the CPU.

use gradtx_emulator::record;
use gradtx_emulator::{
    Order, Schedule, Variant, configure, cublaslt, device, device_with, late_kernels, schedules,
};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::{CublasLt, Cuda};
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Buffer, Device, Real, bf16};
use gradtx_models::decoder::{
    Continuation, Decoder, DecoderConfig, Family, FullTrainer, GenerateLimits, Generator, PretrainStep,
    Prompt, RopeScaling,
};
use gradtx_models::grad_transformer::{
    Batch, Generator as TupleGenerator, GradTransformer, GradTransformerConfig, StagedTuples, StartToken,
    Trainer, Tuples,
};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module, MultiLora, PerExampleLora};
use gradtx_models::t5::T5Config;
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};

pub const WATCHED: Schedule = Schedule { order: Order::Random(3), race: true };
pub const FORWARD: Schedule = Schedule { order: Order::Forward, race: false };

pub fn cuda(schedule: Schedule) -> Cuda {
    configure(schedule);
    device(Variant { race: schedule.race, plant: None })
}

/// Fails unless a device has taken no memory since the first of some steps.
#[derive(Default)]
struct Steady {
    after_first: Option<u64>,
}

impl Steady {
    fn step(&mut self, cuda: &Cuda) {
        let now = cuda.allocations();
        assert_eq!(*self.after_first.get_or_insert(now), now, "a later step takes memory");
    }
}

fn random(name: &str, len: usize, mean: f64, spread: f64) -> Vec<f64> {
    let mut stream = Stream::new(derive_named(9, name));
    (0..len).map(|_| mean + spread * stream.normal()).collect()
}

fn to<X: Real>(values: &[f64]) -> Vec<X> {
    values.iter().map(|&x| X::from_f64(x)).collect()
}

/// `‖a − b‖ / ‖b‖`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let norm: f64 = b.iter().map(|&b| square(b)).sum();
    assert!(norm > 0.0, "a comparison with zeros says nothing");
    (a.iter().zip(b).map(|(a, b)| square(a - b)).sum::<f64>() / norm).sqrt()
}

/// Fails unless the distance is within the tolerance; NaN is not.
pub fn assert_near(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    let found = distance(a, b);
    record(what, "", found, tolerance);
    assert!(found <= tolerance, "{what}: distance {found:e}");
}

/// A step of AdamW.
pub fn step(step: u32) -> AdamWStep {
    AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step }
}

// ---- decoder

/// Sizes of a small decoder.
pub fn config(family: Family, head_dim: usize) -> DecoderConfig {
    if family == Family::Opt {
        return DecoderConfig { family, kv_heads: 4, ..config(Family::Llama, head_dim) };
    }
    DecoderConfig {
        family,
        vocab: 61,
        hidden: 48,
        intermediate: 40,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim,
        norm_eps: 1e-6,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        max_positions: 128,
        window: None,
        tied: true,
        bos: None,
        eos: vec![],
        pad: None,
        emulator: None,
    }
}

/// Values for every weight, none of them special, that bf16 can hold.
pub fn decoder<D: Backend<X>, X: Real>(device: &D, config: &DecoderConfig) -> Decoder<D, X> {
    let layout = Decoder::<D, X>::layout_of(config);
    let mut values = vec![0.0; layout.total()];
    for param in layout.params() {
        let (mean, spread) = match param.shape.as_slice() {
            [_, inputs] => (0.0, 1.2 / (*inputs as f64).sqrt()),
            _ if param.name.ends_with(".bias") => (0.0, 0.5),
            _ => (1.0, 0.3),
        };
        values[param.range()].copy_from_slice(&random(&param.name, param.range().len(), mean, spread));
    }
    values.iter_mut().for_each(|v| *v = bf16::from_f64(*v).to_f64());
    let values = device.buffer_from(&to::<X>(&values)).expect("there is memory");
    let decoder = Decoder::from_values(device, config.clone(), values).expect("values fit the configuration");
    decoder.frozen().expect("there is memory")
}

fn tokens(config: &DecoderConfig, len: usize, key: u64) -> Vec<u32> {
    let mut stream = Stream::new(key);
    (0..len).map(|_| stream.below(config.vocab) as u32).collect()
}

/// Segments of two jobs; everything after the first third is trained on.
pub fn batch(config: &DecoderConfig) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for (i, (len, job)) in [(9, 0), (70, 1), (1, 0), (23, 0)].into_iter().enumerate() {
        let example = Example {
            tokens: tokens(config, len, 40 + i as u64),
            trained: (0..len).map(|t| t >= len / 3).collect(),
        };
        let info = SegmentInfo { adapter: job, grad_row: job, key: 7 + 100 * i as u64 };
        batch.push(&example, info, 0.3 + 0.1 * i as f64);
    }
    batch
}

fn layout(config: &DecoderConfig, dropout: f64) -> BlockLayout {
    let targets = vec![Module::Q, Module::V, Module::Down];
    BlockLayout::new(config, &LoraConfig { rank: 3, alpha: 4.0, dropout, targets, layers: vec![] })
        .expect("the targets are there")
}

/// Losses and norms of two steps, and the update vectors; `after` each step is called.
fn fine_tune<D: Backend<X>, X: Real>(
    device: &D,
    config: &DecoderConfig,
    after: &mut dyn FnMut(),
) -> [Vec<f64>; 2] {
    fine_tune_in(device, config, &layout(config, 0.1), after)
}

pub fn fine_tune_in<D: Backend<X>, X: Real>(
    device: &D,
    config: &DecoderConfig,
    layout: &BlockLayout,
    after: &mut dyn FnMut(),
) -> [Vec<f64>; 2] {
    let model = decoder::<D, X>(device, config);
    let initial: Vec<f32> = to(&random("initial", layout.total(), 0.0, 0.2));
    let batch = batch(config);
    let capacity = BatchCapacity::of([&batch]);
    let mut jobs = MultiLora::new(&model, layout, 2, &initial, capacity).expect("there is memory");
    let mut numbers = Vec::new();
    for t in 1..=2 {
        let report = jobs.train_step(&model, &batch, step(t), Some(0.5)).expect("the step is possible");
        numbers.extend(report.losses.iter().chain(&report.norms));
        after();
    }
    let updates = (0..2).flat_map(|job| jobs.update(job).expect("there is such a job"));
    [numbers, updates.map(f64::from).collect()]
}

#[test]
fn fine_tuning_two_jobs() {
    for (family, head_dim) in [(Family::Qwen2, 10), (Family::Qwen3, 64), (Family::Opt, 12)] {
        let config = config(family, head_dim);
        let expected = fine_tune::<Cpu, f32>(&Cpu::new(1), &config, &mut || ());
        for &schedule in schedules(&[FORWARD, WATCHED]) {
            let (cuda, mut steady) = (cuda(schedule), Steady::default());
            let found = fine_tune::<Cuda, f32>(&cuda, &config, &mut || steady.step(&cuda));
            assert_near(&format!("{family:?}, losses and norms"), &found[0], &expected[0], 1e-4);
            // AdamW's first steps divide gradients by their own size: small ones are amplified.
            assert_near(&format!("{family:?}, update vectors"), &found[1], &expected[1], 5e-3);
        }
        configure(FORWARD);
        for library in [CublasLt::Off, cublaslt()] {
            let cuda = device_with(Variant::PLAIN, &library);
            let mut steady = Steady::default();
            let found = fine_tune::<Cuda, bf16>(&cuda, &config, &mut || steady.step(&cuda));
            let what = format!("{family:?} in bf16 by {library:?}, losses and norms");
            assert_near(&what, &found[0], &expected[0], 2e-2);
        }
    }
}

#[test]
fn fine_tuning_beside_a_frozen_a() {
    let config = config(Family::Qwen2, 10);
    let layout =
        BlockLayout::with_frozen_a(&config, layout(&config, 0.1).lora()).expect("the targets are there");
    let expected = fine_tune_in::<Cpu, f32>(&Cpu::new(1), &config, &layout, &mut || ());
    assert_eq!(expected[1].len(), 2 * layout.blocks() * layout.width());
    let found = fine_tune_in::<Cuda, f32>(&cuda(FORWARD), &config, &layout, &mut || ());
    assert_near("losses and norms", &found[0], &expected[0], 1e-4);
    assert_near("update vectors of B", &found[1], &expected[1], 5e-3);
}

/// Losses and gradients of examples of one adapter, twice: rows are cleared in between.
fn example_gradients<D: Backend<X>, X: Real>(device: &D, config: &DecoderConfig) -> [Vec<f64>; 2] {
    let model = decoder::<D, X>(device, config);
    let layout = layout(config, 0.1);
    let initial: Vec<f32> = to(&random("initial", layout.total(), 0.0, 0.2));
    let mut batch = batch(config);
    batch.adapter.fill(0);
    batch.grad_row = (0..batch.segments() as u32).collect();
    let capacity = BatchCapacity::of([&batch]);
    let mut lora = PerExampleLora::new(&model, &layout, &initial, capacity).expect("there is memory");
    lora.gradients(&model, &batch).expect("the pass is possible");
    let found = lora.gradients(&model, &batch).expect("the pass is possible");
    [found.losses, found.gradients.into_iter().map(f64::from).collect()]
}

#[test]
fn gradients_of_examples() {
    let config = config(Family::Qwen2, 10);
    let expected = example_gradients::<Cpu, f32>(&Cpu::new(1), &config);
    let rows = batch(&config).segments();
    let found = example_gradients::<Cuda, f32>(&cuda(WATCHED), &config);
    assert_near("losses", &found[0], &expected[0], 1e-4);
    // The third example has one token, and so no label.
    for row in (0..rows).filter(|&row| row != 2) {
        let part = row * found[1].len() / rows..(row + 1) * found[1].len() / rows;
        assert_near(&format!("example {row}"), &found[1][part.clone()], &expected[1][part], 1e-4);
    }
}

/// Loss and gradient norm of a step of training all parameters, and the embedding after it.
fn pretrain<D: Backend<X>, X: Real>(device: &D, config: &DecoderConfig) -> [Vec<f64>; 2] {
    let frozen = decoder::<D, X>(device, config);
    let batch = batch(config);
    let capacity = BatchCapacity::of([&batch]);
    let trainable = frozen.duplicate().and_then(Decoder::trainable);
    let mut model = trainable.expect("there is memory");
    for param in model.layout().params() {
        let values = |model: &Decoder<D, X>| -> Vec<f64> {
            let tensor = model.tensor(param).expect("it has this tensor");
            tensor.into_iter().map(|x| x.to_f64()).collect()
        };
        assert_eq!(values(&frozen), values(&model), "{}", param.name);
    }
    let mut pretrainer = FullTrainer::new(&model, false, capacity).expect("there is memory");
    let numbers = PretrainStep { adamw: step(1), max_norm: Some(1.0), muon: None };
    let (loss, norm) = pretrainer.train_step(&mut model, &batch, numbers).expect("the step is possible");
    let embedding = model.tensor(&model.layout().params()[0]).expect("it has this tensor");
    [vec![loss, norm], embedding.into_iter().map(|x| x.to_f64()).collect()]
}

/// Adapters and training of all parameters want rows of weights at different distances.
#[test]
fn training_all_parameters() {
    let config = config(Family::Qwen2, 10);
    let expected = pretrain::<Cpu, f32>(&Cpu::new(1), &config);
    let found = pretrain::<Cuda, f32>(&cuda(FORWARD), &config);
    assert_near("loss and norm", &found[0], &expected[0], 1e-4);
    assert_near("embedding", &found[1], &expected[1], 1e-3);
    let frozen = decoder::<Cuda, f32>(&cuda(FORWARD), &config);
    let capacity = BatchCapacity { tokens: 1, segments: 1, labels: 1 };
    let refusal = FullTrainer::new(&frozen, false, capacity).err().expect("its rows have room").to_string();
    assert!(refusal.contains("frozen"), "{refusal}");
    let plan = |trained| Decoder::<Cuda, f32>::plan(&config, trained).total();
    assert!(plan(false) > plan(true), "the room is counted");
}

/// The same continuations, twice; `after` each time is called.
fn continuations<D: Backend<X>, X: Real>(
    device: &D,
    config: &DecoderConfig,
    after: &mut dyn FnMut(),
) -> Vec<Continuation> {
    let model = decoder::<D, X>(device, config);
    let layout = layout(config, 0.0);
    let values = device.buffer_from(&to::<X::Acc>(&random("adapters", 2 * layout.total(), 0.0, 0.2)));
    let values = values.expect("there is memory");
    let prompts: Vec<Prompt> = [1, 9, 4, 17, 2]
        .into_iter()
        .enumerate()
        .map(|(i, len)| Prompt {
            tokens: tokens(config, len, 90 + i as u64),
            adapter: [Some(0), None, Some(1)][i % 3],
        })
        .collect();
    let limits = GenerateLimits { rows: 3, prompt_tokens: 20, context: 30 };
    let mut generator = Generator::new(&model, limits, Some(&layout)).expect("there is memory");
    let view = gradtx_models::decoder::AdapterView { values: &values, layout: &layout, dropout: 0.0 };
    let [first, second] = [(); 2].map(|()| {
        let found = generator.generate(&model, Some(view), &prompts, 8, &[]).expect("prompts fit");
        after();
        found
    });
    assert_eq!(first, second, "the second time is another one");
    second
}

#[test]
fn greedy_generation() {
    let config = config(Family::Qwen2, 10);
    let expected = continuations::<Cpu, f32>(&Cpu::new(1), &config, &mut || ());
    for &schedule in schedules(&[FORWARD, WATCHED]) {
        let (cuda, mut steady) = (cuda(schedule), Steady::default());
        let found = continuations::<Cuda, f32>(&cuda, &config, &mut || steady.step(&cuda));
        // Five prompts on three rows: passes for three rows and for fewer, most of them repeated.
        assert!(cuda.graph_launches() >= 10, "{} launches of graphs", cuda.graph_launches());
        assert!(found.iter().map(|c| &c.tokens).eq(expected.iter().map(|c| &c.tokens)), "other tokens");
    }
    let found = continuations::<Cuda, bf16>(&cuda(FORWARD), &config, &mut || ());
    assert!(found.iter().all(|c| c.tokens.len() == 8));
}

// ---- Grad-Transformer

fn translator_config() -> GradTransformerConfig {
    GradTransformerConfig {
        student_width: 70,
        student_blocks: 5,
        teacher_width: 90,
        teacher_blocks: 3,
        start_token: StartToken::Embedded,
        targets: Default::default(),
        t5: T5Config {
            d_model: 40,
            d_kv: 12,
            d_ff: 26,
            num_layers: 2,
            num_decoder_layers: 2,
            num_heads: 3,
            relative_attention_num_buckets: 8,
            relative_attention_max_distance: 5,
            layer_norm_epsilon: 1e-6,
            dropout_rate: 0.1,
        },
    }
}

/// Losses and norms of three steps of two micro-batches each, on tuples that change from step to
/// step and are sent ahead, from two sets of pinned memory if `staged`; then what the model translates
/// to. `after` each step is called.
fn translate<D: Backend<X>, X: Real>(device: &D, staged: bool, after: &mut dyn FnMut()) -> [Vec<f64>; 2] {
    let config = translator_config();
    let mut model = GradTransformer::<D, X>::random(device, config.clone(), 1).expect("there is memory");
    let total = model.layout().total();
    let values: Vec<X> = to(&random("translator", total, 0.0, 0.2));
    device.upload(model.values_mut().all_mut(), &values).expect("as many values as the model has");
    let values = |what: &str, len: usize| -> Vec<Vec<f32>> {
        (0..4).map(|t| to(&random(&format!("{what} {t}"), 3 * len, 0.0, 1.0))).collect()
    };
    let (students, teachers) =
        (values("student", config.student_len()), values("teacher", config.teacher_len()));
    let keys: Vec<[u64; 3]> = (0..4).map(|t| [21 + t, 32 + t, 43 + t]).collect();
    let tuples = |t: usize| Tuples { student: &students[t], teacher: &teachers[t], keys: &keys[t] };
    let mut trainer = Trainer::new(&mut model, 2).expect("there is memory");
    let (mut numbers, scale) = (Vec::new(), 1.0 / (3 * config.teacher_len()) as f64);
    let new = || StagedTuples::<D, X>::new(device, &config, 3).expect("there is memory");
    let mut sets = if staged { vec![new(), new()] } else { vec![] };
    // In the memory of the step before last, which nobody has waited for.
    let fill = |set: &mut StagedTuples<D, X>, t: usize| {
        let to = set.values_mut().expect("the device goes on");
        gradtx_kernels::cpu::narrow(to.student, &students[t]);
        gradtx_kernels::cpu::narrow(to.teacher, &teachers[t]);
        to.keys.copy_from_slice(&keys[t]);
    };
    sets.iter_mut().enumerate().for_each(|(t, set)| fill(set, t));
    for t in 0..3 {
        let batch =
            |t: usize| -> Batch<'_, D, X> { if staged { (&sets[t % 2]).into() } else { tuples(t).into() } };
        let sum = trainer.gradients_alone(&model, batch(t), scale).expect("tuples fit");
        trainer.load_ahead(&model, batch(t + 1)).expect("tuples fit");
        if staged {
            fill(&mut sets[t % 2], t + 2.min(3 - t));
        }
        let squares = trainer.sum_squares(device).expect("there are gradients");
        let numbers_of_step = step(t as u32 + 1);
        let norm = trainer.apply(&mut model, numbers_of_step, Some(1.0), squares).expect("they are finite");
        numbers.extend([sum * scale, norm]);
        after();
    }
    let (tuples, student) = (tuples(3), &students[3]);
    numbers.push(trainer.evaluate(&model, tuples).expect("tuples fit"));
    let mut generator = TupleGenerator::new(&model, 2).expect("there is memory");
    let generated = generator.generate(&model, student).expect("students fit");
    [numbers, generated.into_iter().map(f64::from).collect()]
}

#[test]
fn training_and_using_a_grad_transformer() {
    let expected = translate::<Cpu, f32>(&Cpu::new(1), false, &mut || ());
    let mut losses = Vec::new();
    // Whatever is as late as it may be, copies or kernels.
    for (schedule, late, staged) in [
        (FORWARD, false, false),
        (FORWARD, true, false),
        (FORWARD, false, true),
        (FORWARD, true, true),
        (WATCHED, false, true),
    ] {
        late_kernels(late);
        let (cuda, mut steady) = (cuda(schedule), Steady::default());
        let found = translate::<Cuda, f32>(&cuda, staged, &mut || steady.step(&cuda));
        late_kernels(false);
        assert_near("losses and norms", &found[0], &expected[0], 1e-4);
        assert_near("generated blocks", &found[1], &expected[1], 5e-3);
        // Two kinds of micro-batches, forward and backward, in the second and the third step.
        assert_eq!(cuda.graph_launches(), 8);
        losses.push(found);
    }
    assert!(losses.iter().all(|found| *found == losses[0]), "the order of copies shows in the results");
    let cuda = cuda(FORWARD);
    let found = translate::<Cuda, bf16>(&cuda, false, &mut || ());
    assert_near("losses and norms in bf16", &found[0], &expected[0], 2e-2);
    assert_eq!(translate::<Cuda, bf16>(&cuda, true, &mut || ()), found, "staged tuples are other tuples");
    assert_eq!(translate::<Cpu, f32>(&Cpu::new(1), true, &mut || ()), expected);
}

/// Translating again and again: to the bit the same from the device's memory of the operations, and never
/// from that of another model.
#[test]
fn repeated_translations() {
    let cuda = cuda(FORWARD);
    let config = translator_config();
    let model = |seed: u64| {
        let mut model =
            GradTransformer::<Cuda, f32>::random(&cuda, config.clone(), seed).expect("there is memory");
        let values: Vec<f32> = to(&random(&format!("translator {seed}"), model.layout().total(), 0.0, 0.2));
        cuda.upload(model.values_mut().all_mut(), &values).expect("as many values as the model has");
        model
    };
    let (one, mut other) = (model(1), model(2));
    let student: Vec<f32> = to(&random("student", 3 * config.student_len(), 0.0, 1.0));
    let mut generator = TupleGenerator::new(&one, 2).expect("there is memory");
    let mut generate = |model: &GradTransformer<Cuda, f32>| {
        let before = cuda.graph_launches();
        (generator.generate(model, &student).expect("students fit"), cuda.graph_launches() - before)
    };
    // Two sizes of batches, each the students and three blocks.
    let [first, second, third] = [(); 3].map(|()| generate(&one));
    assert_eq!([first.1, second.1, third.1], [0, 8, 8]);
    assert!(second.0 == first.0 && third.0 == first.0, "what is repeated gives something else");
    let [of_other, again] = [(); 2].map(|()| generate(&other));
    assert_eq!([of_other.1, again.1], [0, 8]);
    assert!(of_other.0 == again.0 && of_other.0 != first.0);
    // The values of the other one in another buffer.
    let values = cuda.to_host(one.values().all()).expect("they are there");
    *other.values_mut() = cuda.buffer_from(&values).expect("there is memory");
    assert_eq!(generate(&other), (first.0.clone(), 0));
    assert_eq!(generate(&one), (first.0, 0));
}
