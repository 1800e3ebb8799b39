//! Emulators of LLMs on CUDA: matrices in factors, narrow MLPs, adapters of the edge, as on the CPU.

use crate::models::{FORWARD, WATCHED, assert_near, config, cuda, decoder, fine_tune_in};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::Cuda;
use gradtx_kernels::{Backend, Real, bf16};
use gradtx_models::decoder::{
    DecoderConfig, Emulator, Family, GenerateLimits, Generator, LayerShape, Prompt, Ranks,
};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module};

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
