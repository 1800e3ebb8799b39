//! Gradients of whole decoders against the complex-step derivative of the same code,
//! in f64.

use crate::common::*;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Complex64, Device};
use gradtx_models::decoder::{Activations, DecoderConfig, Family, Gradients, Mode};
use gradtx_models::lora::{BlockLayout, Module};
use gradtx_runtime::data::{BatchCapacity, PackedBatch};
use std::ops::Range;

const STEP: f64 = 1e-30;
const TOLERANCE: f64 = 1e-9;

/// Largest relative difference between `gradient · u` and the complex-step derivative
/// along u, over one random direction u per range.
fn worst(
    values: &[f64],
    gradient: &[f64],
    ranges: &[(String, Range<usize>)],
    loss: impl Fn(&[Complex64]) -> Complex64,
) -> f64 {
    let mut worst: f64 = 0.0;
    for (i, (name, range)) in ranges.iter().enumerate() {
        let mut stream = Stream::new(77 + i as u64);
        let mut point: Vec<Complex64> = values.iter().map(|&x| Complex64::new(x, 0.0)).collect();
        let mut along = 0.0;
        for at in range.clone() {
            let u = stream.normal();
            point[at].im = STEP * u;
            along += gradient[at] * u;
        }
        let derivative = loss(&point).im / STEP;
        let error = (along - derivative).abs() / derivative.abs();
        assert!(derivative != 0.0 && error.is_finite(), "{name}: derivative {derivative}, gradient {along}");
        worst = worst.max(error);
    }
    worst
}

fn all_gradients(config: &DecoderConfig, values: &[f64], batch: &PackedBatch) -> Vec<f64> {
    let cpu = Cpu::new(2);
    let model = decoder(&cpu, config, values);
    let mut acts = Activations::new(&model, capacity(batch), Mode::AllParameters).unwrap();
    let mut grads = cpu.zeros(values.len()).unwrap();
    let on_device = upload(&cpu, batch);
    let into = Gradients::All(&mut grads[..]);
    model.loss_and_gradient(&mut acts, &on_device, None, into).unwrap();
    grads.to_vec()
}

fn adapter_gradients(
    config: &DecoderConfig,
    values: &[f64],
    layout: &BlockLayout,
    adapters: &[f64],
    batch: &PackedBatch,
    dropout: f64,
) -> Vec<f64> {
    let cpu = Cpu::new(2);
    let model = decoder(&cpu, config, values);
    let adapters = Adapters { values: cpu.buffer_from(adapters).unwrap(), layout };
    let mut acts = Activations::new(&model, capacity(batch), Mode::Adapters(layout)).unwrap();
    let mut grads = cpu.zeros(adapters.values.len()).unwrap();
    let into = Gradients::Adapters(&mut grads[..]);
    let view = Some(adapters.view(dropout));
    model.loss_and_gradient(&mut acts, &upload(&cpu, batch), view, into).unwrap();
    grads.to_vec()
}

#[test]
fn all_parameters_of_every_family() {
    let families = [
        (Family::Llama, false),
        (Family::Qwen2, true),
        (Family::Qwen2, false),
        (Family::Qwen3, true),
        (Family::Opt, true),
        (Family::Opt, false),
    ];
    for (family, tied) in families {
        let config = config(family, tied);
        let values = values(&config, 1);
        let batch = batch(&config, &[5, 1, 9], &[0, 0, 0], 3);
        let gradient = all_gradients(&config, &values, &batch);
        let layout = gradtx_models::decoder::Decoder::<Cpu, f64>::layout_of(&config);
        let params = layout.params().iter().filter(|p| !has_no_gradient(&config, &p.name));
        let ranges: Vec<_> = params.map(|p| (p.name.clone(), p.range())).collect();
        let cpu = Cpu::new(2);
        let loss = |point: &[Complex64]| weighted_loss(&decoder(&cpu, &config, point), &batch, None);
        // A bias of every key shifts all scores of a query alike only without rotation.
        let error = worst(&values, &gradient, &ranges, loss);
        assert!(error <= TOLERANCE, "{family:?}: {error:e}");
    }
}

fn check_adapters(family: Family, targets: &[Module], dropout: f64) -> f64 {
    let config = config(family, true);
    let base = values(&config, 1);
    let (layout, adapters) = adapters(&config, targets, dropout, 2, 5);
    let batch = batch(&config, &[5, 1, 9, 4], &[1, 0, 0, 1], 3);
    let gradient = adapter_gradients(&config, &base, &layout, &adapters, &batch, dropout);
    let mut ranges = Vec::new();
    for job in 0..2 {
        for block in 0..layout.blocks() {
            for slice in layout.slices() {
                let range = layout.range(block, slice);
                let shift = job * layout.total();
                let name = format!("job {job} block {block} {:?} {:?}", slice.module, slice.factor);
                ranges.push((name, range.start + shift..range.end + shift));
            }
        }
    }
    let cpu = Cpu::new(2);
    let frozen: Vec<Complex64> = base.iter().map(|&x| Complex64::new(x, 0.0)).collect();
    let model = decoder(&cpu, &config, &frozen);
    let loss = |point: &[Complex64]| {
        let adapters = Adapters { values: cpu.buffer_from(point).unwrap(), layout: &layout };
        weighted_loss(&model, &batch, Some(adapters.view(dropout)))
    };
    worst(&adapters, &gradient, &ranges, loss)
}

#[test]
fn adapters_with_dropout() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Mistral, Family::Opt] {
        let error = check_adapters(family, &Module::ALL, 0.3);
        assert!(error <= TOLERANCE, "{family:?}: {error:e}");
    }
}

/// Backward ends early in the first block where nothing below is adapted.
#[test]
fn adapters_of_every_part_of_a_block() {
    let cases: [&[Module]; 6] = [
        &[Module::Q, Module::V],
        &[Module::O],
        &[Module::Gate],
        &[Module::Up, Module::Down],
        &[Module::Down],
        &[Module::K, Module::Down],
    ];
    for targets in cases {
        let error = check_adapters(Family::Qwen2, targets, 0.0);
        assert!(error <= TOLERANCE, "{targets:?}: {error:e}");
    }
    let cases: [&[Module]; 5] = [
        &[Module::Q, Module::V],
        &[Module::O],
        &[Module::Up],
        &[Module::Gate, Module::Up, Module::Down],
        &[Module::Down],
    ];
    for targets in cases {
        let error = check_adapters(Family::Opt, targets, 0.0);
        assert!(error <= TOLERANCE, "OPT, {targets:?}: {error:e}");
    }
}

#[test]
fn a_wrong_gradient_is_found() {
    let config = config(Family::Qwen2, true);
    let values = values(&config, 1);
    let batch = batch(&config, &[5, 9], &[0, 0], 3);
    let mut gradient = all_gradients(&config, &values, &batch);
    let layout = gradtx_models::decoder::Decoder::<Cpu, f64>::layout_of(&config);
    let param = layout.get("model.layers.0.self_attn.k_proj.weight").unwrap();
    gradient[param.offset + 7] *= 1.0 + 1e-4;
    let cpu = Cpu::new(2);
    let loss = |point: &[Complex64]| weighted_loss(&decoder(&cpu, &config, point), &batch, None);
    let error = worst(&values, &gradient, &[(param.name.clone(), param.range())], loss);
    assert!(error > TOLERANCE, "{error:e}");
}

#[test]
fn activations_of_another_mode_are_refused() {
    let config = config(Family::Llama, false);
    let cpu = Cpu::new(1);
    let model = decoder(&cpu, &config, &values(&config, 1));
    let batch = batch(&config, &[5], &[0], 3);
    let (layout, adapters) = adapters(&config, &[Module::Q], 0.0, 1, 5);
    let adapters = Adapters { values: cpu.buffer_from(&adapters).unwrap(), layout: &layout };
    let mut grads = cpu.zeros(values(&config, 1).len()).unwrap();
    let mut try_mode = |mode, with_adapters: bool| {
        let mut acts = Activations::new(&model, capacity(&batch), mode).unwrap();
        let into = Gradients::All(&mut grads[..]);
        let view = with_adapters.then(|| adapters.view(0.0));
        model.loss_and_gradient(&mut acts, &upload(&cpu, &batch), view, into).is_ok()
    };
    assert!(try_mode(Mode::AllParameters, false));
    assert!(!try_mode(Mode::AllParameters, true));
    assert!(!try_mode(Mode::Inference(None), false));
    assert!(!try_mode(Mode::Adapters(&layout), false));
    let mut acts = Activations::new(&model, capacity(&batch), Mode::Inference(None)).unwrap();
    let longer = crate::common::batch(&config, &[6], &[0], 3);
    assert!(
        model.loss(&mut acts, &upload(&cpu, &longer), None).is_err(),
        "more tokens than there is room for"
    );
}

#[test]
fn frozen_bases_keep_less() {
    let config = config(Family::Qwen2, true);
    let room = BatchCapacity { tokens: 100, segments: 4, labels: 50 };
    let bytes = |mode| Activations::<Cpu, f32>::plan(&config, room, mode).total();
    let layout = |targets: &[Module]| adapters(&config, targets, 0.0, 1, 5).0;
    let (attention, everything) = (layout(&[Module::Q, Module::V]), layout(&Module::ALL));
    let inference = bytes(Mode::Inference(None));
    let (few, many) = (bytes(Mode::Adapters(&attention)), bytes(Mode::Adapters(&everything)));
    assert!(inference < few && few < many && bytes(Mode::AllParameters) <= many);
    // Neither the MLP's normalised input nor its hidden row is kept for q and v, beyond one of each.
    let tails = |n: usize| n * layout(&Module::ALL).lora().rank;
    let kept = 100 * (config.hidden + tails(2) + config.intermediate + tails(1)) * (config.layers - 1);
    assert!(many - few >= 4 * kept as u64);
}
