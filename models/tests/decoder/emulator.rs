//! Emulators: matrices in factors and narrow MLPs against the whole model with the same function, adapters of some
//! layers, and directories.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::{Backend, Complex64, Device};
use gradtx_models::decoder::{
    Activations, Decoder, DecoderConfig, Emulator, Family, FullTrainer, GenerateLimits, Generator, Gradients,
    LayerParams, LayerShape, Mode, Prompt, Ranks,
};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module};
use gradtx_runtime::data::{BatchCapacity, PackedBatch};

/// Four layers, of which the inner two are compressed: all kinds of products, odd ranks.
fn emulator(family: Family) -> DecoderConfig {
    let whole = DecoderConfig { layers: 4, ..config(family, true) };
    let edge = LayerShape { ranks: Ranks::default(), intermediate: whole.intermediate };
    let first = LayerShape { ranks: Ranks { q: 7, k: 0, v: 5, o: 9 }, intermediate: 17 };
    let second = LayerShape { ranks: Ranks { q: 0, k: 3, v: 0, o: 0 }, intermediate: 40 };
    let layers = vec![edge, first, second, edge];
    let base_fingerprint = "0123".into();
    let emulator = Emulator { edge: [1, 1], ratio: 0.5, layers, base_fingerprint, prompt: None };
    DecoderConfig { emulator: Some(emulator), ..whole }
}

/// The whole model with the same function: factors multiplied out, zeros for the channels that are not there.
fn dense(config: &DecoderConfig, values: &[f64]) -> (DecoderConfig, Vec<f64>) {
    let whole = DecoderConfig { emulator: None, ..config.clone() };
    let [from, to] = [config, &whole].map(Decoder::<Cpu, f64>::layout_of);
    let mut out = vec![0.0; to.total()];
    for param in to.params() {
        let target = &mut out[param.range()];
        let of = |name: &str| from.get(name).map(|p| (&values[p.range()], p.shape.clone()));
        let name = param.name.as_str();
        if let Some((own, shape)) = of(name) {
            let (rows, cols) = (shape[0], shape.get(1).copied().unwrap_or(1));
            let stride = param.shape.get(1).copied().unwrap_or(1);
            for row in 0..rows {
                target[row * stride..][..cols].copy_from_slice(&own[row * cols..][..cols]);
            }
            continue;
        }
        let (stem, kind) = name.rsplit_once('.').unwrap();
        if kind == "bias" {
            target.copy_from_slice(of(&format!("{stem}.up.bias")).unwrap().0);
            continue;
        }
        let (up, shape) = of(&format!("{stem}.up.weight")).unwrap();
        let (down, _) = of(&format!("{stem}.down.weight")).unwrap();
        let (rank, cols) = (shape[1], param.shape[1]);
        for (row, target) in target.chunks_mut(cols).enumerate() {
            for (col, value) in target.iter_mut().enumerate() {
                *value = (0..rank).map(|k| up[row * rank + k] * down[k * cols + col]).sum();
            }
        }
    }
    (whole, out)
}

/// Adapters of the edge, with none of whose values 0.
fn edge_adapters(config: &DecoderConfig, targets: &[Module], layers: &[usize]) -> (BlockLayout, Vec<f64>) {
    let lora =
        LoraConfig { rank: 3, alpha: 4.0, dropout: 0.0, targets: targets.to_vec(), layers: layers.to_vec() };
    let layout = BlockLayout::new(config, &lora).unwrap();
    let mut stream = gradtx_kernels::rng::Stream::new(5);
    let values = (0..2 * layout.total()).map(|_| 0.3 * stream.normal()).collect();
    (layout, values)
}

fn gradients<X>(
    model: &Decoder<Cpu, X>,
    layout: &BlockLayout,
    adapters: &[X],
    batch: &PackedBatch,
) -> Vec<f64>
where
    Cpu: Backend<X>,
    X: CpuReal + gradtx_kernels::Real<Acc = X>,
{
    let cpu = model.device();
    let adapters = Adapters { values: cpu.buffer_from(adapters).unwrap(), layout };
    let mut acts = Activations::new(model, capacity(batch), Mode::Adapters(layout)).unwrap();
    let mut grads = cpu.zeros(adapters.values.len()).unwrap();
    let view = Some(adapters.view(0.0));
    model
        .loss_and_gradient(&mut acts, &upload(cpu, batch), view, Gradients::Adapters(&mut grads[..]))
        .unwrap();
    grads.iter().map(|x: &X| x.to_f64()).collect()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    let norm: f64 = b.iter().map(|b| b * b).sum();
    assert!(norm > 0.0 && a.len() == b.len());
    (a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / norm).sqrt()
}

#[test]
fn an_emulator_computes_what_its_dense_form_does() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama, Family::Opt] {
        let config = emulator(family);
        let own = values(&config, 1);
        let (whole, all) = dense(&config, &own);
        let cpu = Cpu::new(2);
        let [model, other] = [(&config, &own), (&whole, &all)].map(|(c, v)| decoder::<f64>(&cpu, c, v));
        let batch = batch(&config, &[5, 1, 9, 4], &[1, 0, 0, 1], 3);
        let (layout, adapters) = edge_adapters(&config, &Module::ALL, &[0, 3]);
        let of_dense = BlockLayout::new(&whole, layout.lora()).unwrap();
        assert_eq!(layout.hash(), of_dense.hash(), "an adapter of the edge fits the LLM");
        let loss = |model, layout| {
            let adapters = Adapters { values: cpu.buffer_from(&adapters).unwrap(), layout };
            weighted_loss::<f64>(model, &batch, Some(adapters.view(0.0)))
        };
        let (a, b) = (loss(&model, &layout), loss(&other, &of_dense));
        assert!((a - b).abs() <= 1e-12 * b, "{family:?}: {a} and {b}");
        let [a, b] =
            [(&model, &layout), (&other, &of_dense)].map(|(m, l)| gradients(m, l, &adapters, &batch));
        assert!(far(&a, &b) <= 1e-11, "{family:?}: gradients differ by {:e}", far(&a, &b));
        // One value of one factor, and the comparison fails.
        let mut broken = own.clone();
        let at = model.layout().get(&family.tensor(1, Module::O, ".down.weight")).unwrap().offset;
        broken[at + 3] += 1e-3;
        let broken = gradients(&decoder::<f64>(&cpu, &config, &broken), &layout, &adapters, &batch);
        assert!(far(&broken, &b) > 1e-8);
    }
}

/// Backward ends at the first adapted layer, and gradients go to the right rows.
#[test]
fn gradients_of_some_layers_by_complex_step() {
    let cases: [(&[usize], &[Module]); 5] = [
        (&[0, 3], &[Module::Q, Module::V]),
        (&[3], &[Module::O, Module::Down]),
        (&[0], &[Module::Down]),
        (&[3], &[Module::Gate]),
        (&[0, 3], &Module::ALL),
    ];
    for (layers, targets) in cases {
        let config = emulator(Family::Qwen2);
        let base = values(&config, 1);
        let cpu = Cpu::new(2);
        let batch = batch(&config, &[5, 1, 9, 4], &[1, 0, 0, 1], 3);
        let (layout, adapters) = edge_adapters(&config, targets, layers);
        let found = gradients(&decoder::<f64>(&cpu, &config, &base), &layout, &adapters, &batch);
        let complex: Vec<Complex64> = base.iter().map(|&x| Complex64::new(x, 0.0)).collect();
        let model = decoder(&cpu, &config, &complex);
        let mut stream = gradtx_kernels::rng::Stream::new(8);
        for row in 0..2 * layout.blocks() {
            let range = row * layout.width()..(row + 1) * layout.width();
            let mut point: Vec<Complex64> = adapters.iter().map(|&x| Complex64::new(x, 0.0)).collect();
            let mut along = 0.0;
            for at in range {
                let u = stream.normal();
                point[at].im = 1e-30 * u;
                along += found[at] * u;
            }
            let adapters = Adapters { values: cpu.buffer_from(&point).unwrap(), layout: &layout };
            let want = weighted_loss(&model, &batch, Some(adapters.view(0.0))).im / 1e-30;
            let error = (along - want).abs() / want.abs();
            assert!(error <= 1e-9, "{layers:?} {targets:?} row {row}: {along}, expected {want}");
        }
    }
}

#[test]
fn cached_decoding_is_that_of_the_dense_form() {
    let config = emulator(Family::Qwen3);
    let own = values(&config, 1);
    let (whole, all) = dense(&config, &own);
    let cpu = Cpu::new(2);
    let to_f32 = |values: &[f64]| values.iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let texts = [(&config, own), (&whole, all)].map(|(config, values)| {
        let model = decoder::<f32>(&cpu, config, &to_f32(&values));
        let prompts: Vec<Prompt> = [1, 9, 4, 6]
            .map(|len| Prompt { tokens: example(config, len, 40 + len as u64).tokens, adapter: None })
            .into();
        let limits = GenerateLimits { rows: 3, prompt_tokens: 20, context: 30 };
        Generator::new(&model, limits, None).unwrap().generate(&model, None, &prompts, 12, &[]).unwrap()
    });
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn activations_of_some_layers_are_fewer() {
    let config = emulator(Family::Qwen2);
    let room = BatchCapacity { tokens: 100, segments: 4, labels: 50 };
    let bytes = |layers: &[usize]| {
        let layout = edge_adapters(&config, &[Module::Q, Module::V], layers).0;
        Activations::<Cpu, f32>::plan(&config, room, Mode::Adapters(&layout)).total()
    };
    let (both, last) = (bytes(&[0, 3]), bytes(&[3]));
    // Two residual streams of three layers, but for the one that they share.
    assert!(both - last > 4 * 100 * (2 * config.hidden * 2) as u64, "{both} and {last}");
    let whole = DecoderConfig { emulator: None, ..config.clone() };
    let sizes = [&config, &whole].map(|config| Decoder::<Cpu, f32>::plan(config, false).total());
    assert!(sizes[0] < sizes[1]);
}

#[test]
fn emulators_are_written_and_read() {
    for family in Family::ALL {
        let config = DecoderConfig { eos: vec![2, 5], ..emulator(family) };
        let model = decoder_f32(&Cpu::new(1), &config, 1);
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), false).unwrap();
        let again = Decoder::<Cpu, f32>::load(&Cpu::new(1), dir.path()).unwrap();
        assert_eq!(again.config(), &config);
        assert_eq!(&**again.values(), &**model.values());
        let code = std::fs::read_to_string(dir.path().join("modeling_gradot.py")).unwrap();
        let text = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["model_type"], format!("gradot_{}", family.model_type()));
        // Each class that config.json names is in the file that it names.
        for class in json["auto_map"].as_object().unwrap().values() {
            let class = class.as_str().unwrap().strip_prefix("modeling_gradot.").unwrap();
            assert!(code.contains(&format!("class {class}(")), "{class}");
        }
    }
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = decoder_f32(&Cpu::new(1), &emulator(Family::Qwen2), 1);
    model.save(dir.path(), false).unwrap();
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value), words: &[&str]| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        let message = Decoder::<Cpu, f32>::load(&Cpu::new(1), dir.path()).err().unwrap().to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "no `{word}` in: {message}"));
    };
    // The family's own classes would leave the matrices in factors out.
    refused(
        &|json| {
            json["model_type"] = "qwen2".into();
            json["architectures"] = serde_json::json!(["Qwen2ForCausalLM"]);
        },
        &["config.json", "model_type", "gradot_qwen2"],
    );
    refused(&|json| json["model_type"] = "gradot_gpt2".into(), &["model_type", "gradot_gpt2"]);
    refused(&|json| drop(json.as_object_mut().unwrap().remove("gradot")), &["field `gradot` is missing"]);
    refused(&|json| json["gradot"]["version"] = 2.into(), &["gradot.version", "expected 1"]);
    refused(&|json| json["gradot"]["ratio"] = 1.5.into(), &["gradot.ratio"]);
    refused(&|json| json["gradot"]["edge"] = serde_json::json!([2, 2]), &["no middle of 4 layers"]);
    refused(&|json| json["gradot"]["edge"] = serde_json::json!([2, 1]), &["layers[1]", "edge"]);
    refused(&|json| json["gradot"]["layers"][1]["q"] = 25.into(), &["rank 25 of q_proj", "at most 24"]);
    refused(&|json| json["gradot"]["layers"][1]["q"] = 6.into(), &["q_proj.down", "expected shape [6, 24]"]);
    refused(&|json| json["gradot"]["layers"][1]["intermediate"] = 41.into(), &["intermediate` = 41"]);
    refused(&|json| json["gradot"]["layers"][2]["x"] = 1.into(), &["gradot.layers"]);
    refused(&|json| drop(json["gradot"]["layers"].as_array_mut().unwrap().pop()), &["3 entries"]);
    refused(&|json| json["gradot"]["secret"] = 1.into(), &["unknown field `gradot.secret`"]);
}

#[test]
fn what_is_compressed_has_no_adapters() {
    let config = emulator(Family::Qwen2);
    let refused = |targets: &[Module], layers: &[usize]| {
        let lora = LoraConfig { targets: targets.to_vec(), layers: layers.to_vec(), ..LoraConfig::default() };
        BlockLayout::new(&config, &lora).unwrap_err().to_string()
    };
    let message = refused(&[Module::Q], &[]);
    assert!(message.contains("q_proj of layer 1 is compressed"), "{message}");
    let message = refused(&[Module::K], &[0, 1]);
    assert!(message.contains("k_proj of layer 1"), "k is computed with q and v: {message}");
    let message = refused(&[Module::Up], &[0, 1]);
    assert!(message.contains("17 outputs") && message.contains("layers_to_transform"), "{message}");
    let model = decoder_f32(&Cpu::new(1), &config, 1);
    let capacity = BatchCapacity { tokens: 4, segments: 1, labels: 1 };
    let message = FullTrainer::new(&model, false, capacity).err().unwrap().to_string();
    assert!(message.contains("in factors"), "{message}");
    assert!(config.expect_whole("models.llm").unwrap_err().to_string().contains("emulator"));
}

/// Full weights of the edge: the gradient through factors and narrow MLPs is that through the dense form.
#[test]
fn full_weights_of_the_edge_see_the_dense_gradient() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let config = emulator(family);
        let own = values(&config, 1);
        let (whole, all) = dense(&config, &own);
        let cpu = Cpu::new(2);
        let batch = batch(&config, &[5, 1, 9, 4], &[0; 4], 3);
        let gradient = |config: &DecoderConfig, values: &[f64]| {
            let model = decoder::<f64>(&cpu, config, values);
            let params = LayerParams::new(config, &[0, 3]).unwrap();
            let mut acts = Activations::new(&model, capacity(&batch), Mode::Layers(&params)).unwrap();
            let mut grads = cpu.zeros(params.total()).unwrap();
            let into = Gradients::Layers(&mut grads[..], &params);
            model.loss_and_gradient(&mut acts, &upload(&cpu, &batch), None, into).unwrap();
            (params, grads.to_vec())
        };
        let ((params, found), (of_dense, want)) = (gradient(&config, &own), gradient(&whole, &all));
        assert_eq!(params.params(), of_dense.params());
        assert!(far(&found, &want) <= 1e-11, "{family:?}: {:e}", far(&found, &want));
        // Compressed layers stay as they are.
        let message = LayerParams::new(&config, &[0, 1]).unwrap_err().to_string();
        assert!(message.contains("layer 1 has matrices in factors"), "{message}");
    }
}
