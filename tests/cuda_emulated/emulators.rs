//! Emulators of LLMs on CUDA: matrices in factors, narrow MLPs, adapters of the edge, as on the CPU.

use crate::models::{FORWARD, WATCHED, assert_near, batch, config, cuda, decoder, fine_tune_in, step};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::Cuda;
use gradtx_kernels::{Backend, Real, bf16};
use gradtx_models::decoder::{
    Decoder, DecoderConfig, Emulator, Family, GenerateLimits, Generator, LayerParams, LayerShape,
    LayerTrainer, Prompt, Ranks,
};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module};
use gradtx_runtime::data::BatchCapacity;

/// Four layers, of which the inner two are compressed: all kinds of products, with odd ranks and even ones.
fn emulator(family: Family, ranks: Ranks) -> DecoderConfig {
    let whole = DecoderConfig { layers: 4, ..config(family, 10) };
    let edge = LayerShape { ranks: Ranks::default(), intermediate: whole.intermediate };
    let first = LayerShape { ranks, intermediate: 24 };
    let second = LayerShape { ranks: Ranks { k: ranks.k, ..Ranks::default() }, intermediate: 17 };
    let layers = vec![edge, first, second, edge];
    let base_fingerprint = "0123".into();
    let emulator = Emulator { edge: [1, 1], ratio: 0.5, layers, base_fingerprint, prompt: None };
    DecoderConfig { emulator: Some(emulator), ..whole }
}

#[test]
fn fine_tuning_the_edge_of_an_emulator() {
    for (family, ranks) in [
        (Family::Qwen2, Ranks { q: 8, k: 8, v: 0, o: 16 }),
        (Family::Qwen3, Ranks { q: 7, k: 3, v: 5, o: 9 }),
        (Family::Opt, Ranks { q: 8, k: 0, v: 5, o: 9 }),
    ] {
        let config = emulator(family, ranks);
        let targets = vec![Module::Q, Module::V, Module::Down];
        let lora = LoraConfig { rank: 3, alpha: 4.0, dropout: 0.1, targets, layers: vec![0, 3] };
        let layout = BlockLayout::new(&config, &lora).expect("the edge has whole matrices");
        let expected = fine_tune_in::<Cpu, f32>(&Cpu::new(1), &config, &layout, &mut || ());
        let found = fine_tune_in::<Cuda, f32>(&cuda(WATCHED), &config, &layout, &mut || ());
        assert_near(&format!("{family:?}, losses and norms"), &found[0], &expected[0], 1e-4);
        assert_near(&format!("{family:?}, update vectors"), &found[1], &expected[1], 5e-3);
        let found = fine_tune_in::<Cuda, bf16>(&cuda(FORWARD), &config, &layout, &mut || ());
        assert_near(&format!("{family:?} in bf16, losses and norms"), &found[0], &expected[0], 2e-2);
    }
}

fn texts<D: Backend<X>, X: Real>(device: &D, config: &DecoderConfig) -> Vec<Vec<u32>> {
    let model = decoder::<D, X>(device, config);
    let prompts: Vec<Prompt> = [1u32, 9, 4]
        .map(|len| Prompt { tokens: (0..len).map(|i| (7 * i + len) % 61).collect(), adapter: None })
        .into();
    let limits = GenerateLimits { rows: 2, prompt_tokens: 20, context: 30 };
    let mut generator = Generator::new(&model, limits, None).expect("there is memory");
    let found = generator.generate(&model, None, &prompts, 8, &[]).expect("prompts fit");
    found.into_iter().map(|continuation| continuation.tokens).collect()
}

#[test]
fn an_emulator_generates_as_on_the_cpu() {
    for family in [Family::Qwen2, Family::Opt] {
        let config = emulator(family, Ranks { q: 7, k: 3, v: 5, o: 9 });
        assert_eq!(texts::<Cuda, f32>(&cuda(FORWARD), &config), texts::<Cpu, f32>(&Cpu::new(1), &config));
    }
}

/// Losses and gradient norms of three steps on the full weights of the edge, then its masters; and whether the
/// decoder's values are the nearest ones of these.
fn train_edge<D: Backend<X>, X: Real<Acc = f32>>(device: &D, config: &DecoderConfig) -> [Vec<f64>; 2] {
    let mut model = decoder::<D, X>(device, config).trainable().expect("there is memory");
    let params = LayerParams::new(config, &[0, 3]).expect("the edge has whole matrices");
    let of_model = |model: &Decoder<D, X>, name: &str| {
        let param = model.layout().get(name).expect("it has these layers").clone();
        model.tensor(&param).expect("it can be read")
    };
    let mut masters = vec![0.0; params.total()];
    for param in params.params() {
        let values = of_model(&model, &param.name);
        masters[param.range()].iter_mut().zip(values).for_each(|(master, x)| *master = x.to_f64() as f32);
    }
    let stream = batch(config);
    let room = BatchCapacity::of([&stream]);
    let mut trainer = LayerTrainer::new(&mut model, params.clone(), &masters, room).expect("there is memory");
    let mut numbers = vec![];
    for t in 1..=3 {
        numbers.push(trainer.accumulate(&model, &stream).expect("the stream fits"));
        numbers.push(trainer.apply(&mut model, step(t), Some(1.0)).expect("gradients are finite"));
    }
    let masters = trainer.masters().expect("they can be read");
    for param in params.params() {
        let near = |(value, master): (X, &f32)| value == X::from_f64(f64::from(*master));
        let values = of_model(&model, &param.name);
        assert!(values.into_iter().zip(&masters[param.range()]).all(near), "{}", param.name);
    }
    [numbers, masters.into_iter().map(f64::from).collect()]
}

#[test]
fn full_weights_of_the_edge_as_on_the_cpu() {
    for (family, ranks) in [
        (Family::Qwen2, Ranks { q: 8, k: 8, v: 0, o: 16 }),
        (Family::Qwen3, Ranks { q: 7, k: 3, v: 5, o: 9 }),
    ] {
        let config = emulator(family, ranks);
        let expected = train_edge::<Cpu, f32>(&Cpu::new(1), &config);
        let found = train_edge::<Cuda, f32>(&cuda(WATCHED), &config);
        assert_near(&format!("{family:?}, edge: losses and norms"), &found[0], &expected[0], 1e-4);
        assert_near(&format!("{family:?}, edge: weights"), &found[1], &expected[1], 1e-4);
        let found = train_edge::<Cuda, bf16>(&cuda(FORWARD), &config);
        assert_near(&format!("{family:?}, edge in bf16: losses and norms"), &found[0], &expected[0], 2e-2);
    }
}
