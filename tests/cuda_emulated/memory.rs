//! Memory plans against what a device gives out: the stand-in driver counts as a GPU does, in pages. Each test has
//! a device, and so a memory, of its own.

use crate::models::{batch, config, decoder, step};
use gradtx_emulator::{Order, Schedule, configure, device_of_rank, on_device, peak_memory};
use gradtx_kernels::cuda::Cuda;
use gradtx_kernels::{Device, Result};
use gradtx_models::decoder::{Decoder, DecoderConfig, Family, GenerateLimits, Generator};
use gradtx_models::grad_transformer::{
    Generator as TupleGenerator, GradTransformer, GradTransformerConfig, StartToken, Trainer,
};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module, MultiLora};
use gradtx_models::t5::T5Config;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Room};

const PAGE: u64 = 2 << 20;

/// A device of its own, with its memory counted from now on.
fn counted(ordinal: usize) -> Cuda {
    configure(Schedule { order: Order::Forward, race: false });
    let cuda = device_of_rank(ordinal);
    peak_memory(&cuda, true);
    cuda
}

/// Fails unless a plan is what `take` takes of a device at most, but for what is small: a page for buffers that no
/// plan names. `later` is what it takes when it works, and has not yet.
fn expect_planned(what: &str, cuda: &Cuda, plan: &MemoryPlan, later: u64, take: impl FnOnce() -> Result<()>) {
    let room = |cuda: &Cuda| {
        let free = cuda.free_memory().expect("it can be asked").expect("a device has memory of its own");
        Room::Device { free, group: false }
    };
    let before = peak_memory(cuda, true);
    take().expect("there is memory");
    let (taken, planned) = (peak_memory(cuda, false) - before, room(cuda).taken(plan));
    assert!(taken + later <= planned + PAGE, "{what}: {taken} bytes, {later} more later, {planned} planned");
    // It is no plan either that says too much.
    assert!(
        planned <= taken + later + 2 * PAGE,
        "{what}: {taken} bytes, {later} more later, {planned} planned"
    );
}

/// Large enough that buffers have pages of their own.
fn large() -> DecoderConfig {
    DecoderConfig {
        vocab: 3000,
        hidden: 256,
        intermediate: 700,
        layers: 3,
        head_dim: 64,
        ..config(Family::Qwen2, 64)
    }
}

fn adapters(config: &DecoderConfig, rank: usize) -> BlockLayout {
    let targets = vec![Module::Q, Module::V, Module::Down];
    BlockLayout::new(config, &LoraConfig { rank, alpha: 4.0, dropout: 0.1, targets }).expect("they are there")
}

fn scratch(plan: &MemoryPlan) -> u64 {
    plan.entries().iter().filter(|entry| entry.name == "sums of adapters").map(|entry| entry.bytes).sum()
}

#[test]
fn fine_tuning_takes_what_is_planned() {
    if on_device() {
        return;
    }
    let (cuda, config) = (counted(10), large());
    let layout = adapters(&config, 16);
    let capacity = BatchCapacity { tokens: 1000, segments: 9, labels: 1000 };
    let mut plan = Decoder::<Cuda, f32>::plan(&config, false);
    plan.extend(MultiLora::<Cuda, f32>::plan(&config, &layout, 2, capacity));
    let later = scratch(&plan);
    assert!(later >= PAGE, "{later} bytes of scratch memory");
    expect_planned("fine-tuning", &cuda, &plan, later, || {
        let model =
            Decoder::<Cuda, f32>::frozen_with(&cuda, &config, |_, _, _| Ok(())).expect("there is memory");
        drop(
            MultiLora::new(&model, &layout, 2, &vec![0.0; layout.total()], capacity)
                .expect("there is memory"),
        );
        Ok(())
    });
}

/// Scratch memory is a closed formula, and grows to it in the first step.
#[test]
fn fine_tuning_steps_take_the_planned_scratch_memory() {
    configure(Schedule { order: Order::Forward, race: false });
    let config = config(Family::Qwen2, 10);
    let cuda = device_of_rank(if on_device() { 0 } else { 11 });
    let model = decoder::<Cuda, f32>(&cuda, &config);
    let before = cuda.scratch();
    for rank in [3, 40] {
        let (layout, batch) = (adapters(&config, rank), batch(&config));
        let capacity = BatchCapacity::of([&batch]);
        let mut jobs = MultiLora::new(&model, &layout, 2, &vec![0.1; layout.total()], capacity)
            .expect("there is memory");
        for number in 1..=2 {
            jobs.train_step(&model, &batch, step(number), Some(0.5)).expect("the step is possible");
        }
        let planned = scratch(&MultiLora::<Cuda, f32>::plan(&config, &layout, 2, capacity));
        assert_eq!(cuda.scratch() as u64, planned, "rank {rank}");
    }
    assert!(cuda.scratch() > before);
}

#[test]
fn generation_takes_what_is_planned() {
    if on_device() {
        return;
    }
    let (cuda, config) = (counted(12), large());
    let layout = adapters(&config, 8);
    let limits = GenerateLimits { rows: 30, prompt_tokens: 1000, context: 600 };
    let mut plan = Decoder::<Cuda, f32>::plan(&config, false);
    plan.extend(Generator::<Cuda, f32>::plan(&config, limits, Some(&layout)));
    expect_planned("generation", &cuda, &plan, 0, || {
        let model =
            Decoder::<Cuda, f32>::frozen_with(&cuda, &config, |_, _, _| Ok(())).expect("there is memory");
        drop(Generator::new(&model, limits, Some(&layout)).expect("there is memory"));
        Ok(())
    });
}

#[test]
fn training_a_translator_takes_what_is_planned() {
    if on_device() {
        return;
    }
    let cuda = counted(13);
    let config = GradTransformerConfig {
        student_width: 3000,
        student_blocks: 7,
        teacher_width: 5000,
        teacher_blocks: 6,
        start_token: StartToken::Embedded,
        targets: Default::default(),
        t5: T5Config {
            num_layers: 2,
            num_decoder_layers: 2,
            ..T5Config::preset("small").expect("it is known")
        },
    };
    let outline = GradTransformer::<Cuda, f32>::meta(&cuda, config.clone()).expect("it can be described");
    let mut plan = Trainer::plan(&outline, 40).expect("it can be planned");
    plan.extend(TupleGenerator::plan(&outline, 20).expect("it can be planned"));
    expect_planned("a translator", &cuda, &plan, 0, || {
        let mut model = GradTransformer::<Cuda, f32>::random(&cuda, config, 1).expect("there is memory");
        let trainer = Trainer::new(&mut model, 40).expect("there is memory");
        let generator = TupleGenerator::new(&model, 20).expect("there is memory");
        drop((trainer, generator));
        Ok(())
    });
}
