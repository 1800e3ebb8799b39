//! Tiny random models and streams, and comparisons.

use gradtx_kernels::cpu::{Cpu, CpuBuf, CpuReal};
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Backend, Device};
use gradtx_models::decoder::{Activations, AdapterView, Decoder, DecoderConfig, Family, Mode, RopeScaling};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
use std::path::{Path, PathBuf};

pub fn config(family: Family, tied: bool) -> DecoderConfig {
    if family == Family::Opt {
        let rotary = config(Family::Llama, tied);
        return DecoderConfig { family, kv_heads: 4, norm_eps: 1e-5, rope_theta: 1e4, ..rotary };
    }
    DecoderConfig {
        family,
        vocab: 29,
        hidden: 24,
        intermediate: 40,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        norm_eps: 1e-6,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        max_positions: 256,
        window: None,
        tied,
        bos: None,
        eos: vec![],
        pad: None,
        emulator: None,
    }
}

/// Values for every weight, none of them special: norms around 1, biases not 0.
pub fn values(config: &DecoderConfig, key: u64) -> Vec<f64> {
    let layout = Decoder::<Cpu, f32>::layout_of(config);
    let mut stream = Stream::new(key);
    let mut values = vec![0.0; layout.total()];
    for param in layout.params() {
        let (mean, spread) = match param.shape.as_slice() {
            [_, inputs] => (0.0, 1.2 / (*inputs as f64).sqrt()),
            _ if param.name.ends_with(".bias") => (0.0, 0.5),
            _ => (1.0, 0.3),
        };
        values[param.range()].iter_mut().for_each(|v| *v = mean + spread * stream.normal());
    }
    values
}

/// Whether the gradient of a parameter is 0 up to rounding: that of a bias of all keys, which without rotation shifts
/// all scores of a query alike.
pub fn has_no_gradient(config: &DecoderConfig, name: &str) -> bool {
    !config.block().attention.is_rotary && name.ends_with("k_proj.bias")
}

pub fn decoder<X: CpuReal>(device: &Cpu, config: &DecoderConfig, values: &[X]) -> Decoder<Cpu, X> {
    Decoder::from_values(device, config.clone(), device.buffer_from(values).unwrap()).unwrap()
}

pub fn decoder_f32(device: &Cpu, config: &DecoderConfig, key: u64) -> Decoder<Cpu, f32> {
    let values: Vec<f32> = values(config, key).iter().map(|&x| x as f32).collect();
    decoder(device, config, &values)
}

/// A layout, and adapters none of whose values are 0.
pub fn adapters(
    config: &DecoderConfig,
    targets: &[Module],
    dropout: f64,
    count: usize,
    key: u64,
) -> (BlockLayout, Vec<f64>) {
    let lora = LoraConfig { rank: 3, alpha: 4.0, dropout, targets: targets.to_vec(), layers: vec![] };
    let layout = BlockLayout::new(config, &lora).unwrap();
    let mut stream = Stream::new(key);
    let values = (0..count * layout.total()).map(|_| 0.3 * stream.normal()).collect();
    (layout, values)
}

/// Random tokens; everything after the first third is trained on.
pub fn example(config: &DecoderConfig, len: usize, key: u64) -> Example {
    let mut stream = Stream::new(key);
    let tokens = (0..len).map(|_| stream.below(config.vocab) as u32).collect();
    Example { tokens, trained: (0..len).map(|i| i >= len / 3).collect() }
}

/// Segments of these lengths; segment i has adapter and gradient row `rows[i]`.
pub fn batch(config: &DecoderConfig, lengths: &[usize], rows: &[u32], key: u64) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for (i, (&len, &row)) in lengths.iter().zip(rows).enumerate() {
        let info = SegmentInfo { adapter: row, grad_row: row, key: key + 100 * i as u64 };
        batch.push(&example(config, len, key + i as u64), info, 0.3 + 0.1 * i as f64);
    }
    batch
}

pub fn capacity(batch: &PackedBatch) -> BatchCapacity {
    BatchCapacity::of([batch])
}

pub fn upload<X: CpuReal>(device: &Cpu, batch: &PackedBatch) -> DeviceBatch<Cpu, X> {
    let mut on_device = DeviceBatch::new(device, capacity(batch)).unwrap();
    on_device.load(device, batch).unwrap();
    on_device
}

/// Adapter values on the device beside their layout.
pub struct Adapters<'a, X: CpuReal> {
    pub values: CpuBuf<X>,
    pub layout: &'a BlockLayout,
}

impl<X: CpuReal> Adapters<'_, X> {
    pub fn view(&self, dropout: f64) -> AdapterView<'_, Cpu, X> {
        AdapterView { values: &self.values, layout: self.layout, dropout }
    }
}

/// `Σ weight · loss` of a stream.
pub fn weighted_loss<X: CpuReal>(
    decoder: &Decoder<Cpu, X>,
    batch: &PackedBatch,
    adapters: Option<AdapterView<'_, Cpu, X>>,
) -> X
where
    Cpu: Backend<X>,
{
    let mode = Mode::Inference(adapters.map(|a| a.layout));
    let mut acts = Activations::new(decoder, capacity(batch), mode).unwrap();
    decoder.loss(&mut acts, &upload(decoder.device(), batch), adapters).unwrap();
    acts.losses().iter().zip(&batch.weights).map(|(&loss, &w)| loss * X::from_f64(w)).sum()
}

/// Logits at every position of a stream.
pub fn all_logits(
    decoder: &Decoder<Cpu, f32>,
    batch: &PackedBatch,
    adapters: Option<AdapterView<'_, Cpu, f32>>,
) -> Vec<f32> {
    let mode = Mode::Inference(adapters.map(|a| a.layout));
    let mut acts = Activations::new(decoder, capacity(batch), mode).unwrap();
    let rows: Vec<u32> = (0..batch.len() as u32).collect();
    decoder.logits(&mut acts, &upload(decoder.device(), batch), adapters, &rows).unwrap()
}

/// `‖a − b‖ / ‖b‖`.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(a as f64 - b as f64)).sum();
    let norm: f64 = b.iter().map(|&b| square(b as f64)).sum();
    assert!(norm > 0.0, "a comparison with zeros says nothing");
    (difference / norm).sqrt()
}

/// Fails unless the distance is within the tolerance; NaN is not.
pub fn assert_near(a: &[f32], b: &[f32], tolerance: f64, what: &str) {
    let found = distance(a, b);
    assert!(found <= tolerance, "{what}: distance {found:e}");
}

/// A directory of golden fixtures, such as `qwen2/model`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/fixtures").join(name)
}
