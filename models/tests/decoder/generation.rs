//! Greedy decoding with a cache against recomputing everything.

use crate::common::*;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Continuation, Decoder, Family, GenerateLimits, Generator, Prompt};
use gradtx_models::lora::Module;
use gradtx_runtime::data::{Example, PackedBatch, SegmentInfo};

const MAX_NEW: usize = 12;

/// By definition: the largest logit of the last position, again and again.
fn recompute(
    model: &Decoder<Cpu, f32>,
    adapters: &Adapters<'_, f32>,
    prompt: &Prompt,
    ends: &[u32],
) -> Continuation {
    let mut tokens = prompt.tokens.clone();
    let mut out = Continuation::default();
    while out.tokens.len() < MAX_NEW {
        let mut batch = PackedBatch::default();
        let trained = vec![false; tokens.len()];
        let info = SegmentInfo { adapter: prompt.adapter.unwrap_or(0), ..Default::default() };
        batch.push(&Example { tokens: tokens.clone(), trained }, info, 1.0);
        let logits = all_logits(model, &batch, prompt.adapter.map(|_| adapters.view(0.0)));
        let last = &logits[logits.len() - model.config().vocab..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
        if ends.contains(&best) {
            out.ended = true;
            break;
        }
        out.tokens.push(best);
        tokens.push(best);
    }
    out
}

#[test]
fn the_cache_changes_nothing_whoever_shares_the_batch() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Opt] {
        let config = config(family, true);
        let cpu = Cpu::new(2);
        let model = decoder_f32(&cpu, &config, 1);
        let (layout, values) = adapters(&config, &[Module::Q, Module::V, Module::Down], 0.0, 2, 5);
        let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        let adapters = Adapters { values: cpu.buffer_from(&values).unwrap(), layout: &layout };
        // More prompts than rows, lengths that leave at different times, both adapters and none.
        let prompts: Vec<Prompt> = [1, 9, 4, 17, 2, 6, 11, 3]
            .into_iter()
            .enumerate()
            .map(|(i, len)| Prompt {
                tokens: example(&config, len, 40 + i as u64).tokens,
                adapter: [Some(0), None, Some(1)][i % 3],
            })
            .collect();
        let limits = GenerateLimits { rows: 3, prompt_tokens: 20, context: 30 };
        let mut generator = Generator::new(&model, limits, Some(&layout)).unwrap();
        let free = generator.generate(&model, Some(adapters.view(0.0)), &prompts, MAX_NEW, &[]).unwrap();
        assert!(free.iter().all(|c| c.tokens.len() == MAX_NEW && !c.ended));
        assert_ne!(free[0], free[1]);
        // End at tokens that some sequences do reach.
        let ends = [free[0].tokens[3], free[3].tokens[6]];
        let view = Some(adapters.view(0.0));
        let together = generator.generate(&model, view, &prompts, MAX_NEW, &ends).unwrap();
        assert!(together.iter().any(|c| c.ended));
        for (i, prompt) in prompts.iter().enumerate() {
            assert_eq!(together[i], recompute(&model, &adapters, prompt, &ends), "prompt {i}");
            let view = Some(adapters.view(0.0));
            let single =
                generator.generate(&model, view, std::slice::from_ref(prompt), MAX_NEW, &ends).unwrap();
            assert_eq!(single[0], together[i], "prompt {i} alone");
        }
        assert!(family == Family::Opt || together[0] != together[1]);
    }
}

#[test]
fn impossible_requests_are_errors() {
    let config = config(Family::Llama, false);
    let cpu = Cpu::new(1);
    let model = decoder_f32(&cpu, &config, 1);
    let limits = GenerateLimits { rows: 2, prompt_tokens: 8, context: 12 };
    let mut generator = Generator::new(&model, limits, None).unwrap();
    let prompt = |len: usize| Prompt { tokens: vec![3; len], adapter: None };
    let mut message = |prompt: Prompt, max_new: usize| {
        let prompts = [Prompt { tokens: vec![1], adapter: None }, prompt];
        generator.generate(&model, None, &prompts, max_new, &[]).map_err(|e| e.to_string())
    };
    assert!(message(prompt(8), 4).is_ok());
    assert!(message(prompt(3), 0).unwrap().iter().all(|c| c.tokens.is_empty()));
    assert!(message(prompt(0), 4).unwrap_err().contains("prompt 1"));
    assert!(message(prompt(9), 1).is_err());
    assert!(message(prompt(8), 5).is_err());
    let mut generator = generator.within(9);
    let mut message = |prompt: Prompt, max_new: usize| {
        generator.generate(&model, None, &[prompt], max_new, &[]).map_err(|e| e.to_string())
    };
    let cut = message(prompt(8), 5).unwrap();
    assert_eq!((cut[0].tokens.len(), cut[0].ended), (1, false), "the model reads no more than 9 tokens");
    assert_eq!(message(prompt(4), 3).unwrap()[0].tokens.len(), 3);
    assert!(message(Prompt { tokens: vec![3; 9], adapter: None }, 1).unwrap_err().contains("no room"));
    assert!(message(Prompt { tokens: vec![29], adapter: None }, 1).unwrap_err().contains("29"));
    assert!(message(Prompt { tokens: vec![2], adapter: Some(0) }, 1).unwrap_err().contains("adapter 0"));
}
