//! [`Decoder`]: the weights of a model in one flat buffer, read, made, and written.
//!
//! In: a model directory in the Hugging Face layout, or a key for random values.
//! Out: views of (fused) matrices and vectors for the passes, and a directory again.
//!
//! A decoder is *frozen* or *trainable*. Rows of a frozen one's matrices inside the blocks
//! are as far apart as the device wants for adapters ([`lora_weight_stride`]);
//! those of a trainable one follow each other as the layout says, like gradients and
//! moments. Where the device wants no room, as the CPU, the two are the same.
//!
//! [`lora_weight_stride`]: gradtx_kernels::ops::LoraLinear::lora_weight_stride

use super::DecoderConfig;
use super::layout::{Places, RowStride, contiguous, is_hidden_matrix, places};
use super::names::HEAD;
use crate::lora::Module;
use gradtx_kernels::{Backend, Buffer, Device, Real, bf16, rng};
use gradtx_runtime::artifact::{NewTensor, TensorSource, write_tensors};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::params::{Param, ParamLayout};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Standard deviations of random initial weights. Norms start at 1, biases at 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InitialWeights {
    /// Embeddings of tokens, and of positions where these are learned.
    pub embedding: f64,
    /// LM head, where it is not the embedding.
    pub head: f64,
    /// Hidden matrices; `None` for 1/√in, further divided by √(2·layers) where a
    /// matrix writes into the residual stream.
    pub matrices: Option<f64>,
}

impl Default for InitialWeights {
    /// 0.02 everywhere, as the published families start.
    fn default() -> Self {
        Self { embedding: 0.02, head: 0.02, matrices: Some(0.02) }
    }
}

/// A decoder LLM: configuration and weights.
pub struct Decoder<D: Device, X: Real> {
    pub(super) device: D,
    pub(super) config: DecoderConfig,
    pub(super) layout: ParamLayout,
    /// The same tensors as they lie in `values`; equal to the layout in a trainable decoder.
    stored: ParamLayout,
    /// By `stored`.
    pub(super) places: Places,
    pub(super) values: D::Buf<X>,
}

impl DecoderConfig {
    /// Fails unless the weights have as many blocks as this says, and every tensor with its shape.
    /// Only headers are read, so this comes before anything of the model's size is made.
    pub fn check_weights(&self, weights: &TensorSource) -> Result<()> {
        let layers = self.family.layers();
        let is_of_base = |name: &&str| name.starts_with(layers.trim_start_matches("model."));
        if let Some(name) = weights.names().into_iter().find(is_of_base) {
            let why = "its name has no `model.` before, as tensors of the model without its head; read the directory \
                       once with transformers' AutoModelForCausalLM, and save it";
            return Err(Error::tensor(weights.origin(), name, why));
        }
        let block = |name: &str| name.strip_prefix(&layers)?.split('.').next()?.parse::<usize>().ok();
        let found =
            weights.names().into_iter().filter_map(block).max().map_or(0, |last| last.saturating_add(1));
        if found != self.layers {
            let why = format!("has {found} blocks; config.json says `num_hidden_layers` = {}", self.layers);
            return Err(Error::file(weights.origin(), why));
        }
        for param in places(self, contiguous).0.params() {
            if !self.tied && param.name == HEAD && !weights.contains(HEAD) {
                let why = "there is no such tensor, and config.json does not tie it to the embedding; set \
                           `tie_word_embeddings` to true there if the model was made so";
                return Err(Error::tensor(weights.origin(), HEAD, why));
            }
            weights.tensor(&param.name)?.expect_shape(&param.shape)?;
        }
        Ok(())
    }
}

impl<D: Device, X: Real> Decoder<D, X> {
    /// A trainable decoder with these values, in the order of [`Self::layout`].
    pub fn from_values(device: &D, config: DecoderConfig, values: D::Buf<X>) -> Result<Self> {
        Self::with_rows(device, config, values, contiguous)
    }

    fn with_rows(device: &D, config: DecoderConfig, values: D::Buf<X>, stride: RowStride) -> Result<Self> {
        let (stored, places) = places(&config, stride);
        let (want, found) = (stored.total(), values.len());
        if want != found {
            let why = format!("this configuration has {want} values, found {found}");
            return Err(Error::invalid("decoder weights", why));
        }
        let layout = Self::layout_of(&config);
        Ok(Self { device: device.clone(), config, layout, stored, places, values })
    }

    /// The layout that a decoder of this configuration has.
    pub fn layout_of(config: &DecoderConfig) -> ParamLayout {
        places(config, contiguous).0
    }

    /// Fails unless the values are in the order of [`Self::layout`], as gradients are.
    pub(super) fn expect_trainable(&self) -> Result<()> {
        if self.config.blocks().iter().any(|block| block.factor_columns() > 0) {
            let why = "it has matrices in factors, which are frozen; train adapters of its edge, or all parameters of \
                       the emulator that `gradtx emulate --dense` writes";
            return Err(Error::invalid("decoder whose parameters are to be trained", why));
        }
        self.expect_contiguous()
    }

    /// Fails unless the values are in the order of [`Self::layout`], whatever of them is trained.
    pub(super) fn expect_contiguous(&self) -> Result<()> {
        if self.stored == self.layout {
            return Ok(());
        }
        let why = "it is frozen: there is room for adapters between the rows of its matrices";
        Err(Error::invalid("decoder whose parameters are to be trained", why))
    }

    /// The values of one tensor of [`Self::layout`], without what lies between its rows.
    pub fn tensor(&self, param: &Param) -> Result<Vec<X>> {
        let place = self.stored.get(&param.name).filter(|place| place.shape.len() == param.shape.len());
        let place = place.ok_or_else(|| {
            Error::invalid(
                format!("parameter `{}`", param.name),
                "this model has none of that name and shape",
            )
        })?;
        let host = self.device.to_host(self.values.view(place.range()))?;
        Ok(match (&param.shape[..], &place.shape[..]) {
            (&[_, cols], &[_, stride]) if stride > cols => {
                host.chunks(stride).flat_map(|row| &row[..cols]).copied().collect()
            }
            _ => host,
        })
    }
}

impl<D: Backend<X>, X: Real> Decoder<D, X> {
    /// The weights' buffer, for a memory plan; frozen unless all parameters are trained.
    pub fn plan(config: &DecoderConfig, trained: bool) -> MemoryPlan {
        let (purpose, stride): (_, RowStride) = match trained {
            true => (Purpose::Trained, contiguous),
            false => (Purpose::Frozen, D::lora_weight_stride),
        };
        Allocator::plan_sizes(Purpose::Frozen, |alloc| {
            alloc.set_purpose(purpose);
            Self::allocate(alloc, &places(config, stride).0)
        })
    }

    /// The values of a decoder whose tensors lie like this, all zero.
    fn allocate(alloc: &mut Allocator<'_, D>, stored: &ParamLayout) -> Result<D::Buf<X>> {
        alloc.buffer("decoder", &[stored.total()])
    }

    fn zeros(device: &D, stored: &ParamLayout) -> Result<D::Buf<X>> {
        Self::allocate(&mut Allocator::new(device, Purpose::Frozen), stored)
    }

    /// Reads a model directory: `config.json` and (sharded) safetensors in bf16, f16 or f32.
    /// The decoder is frozen.
    ///
    /// Every tensor of the model must be there with its shape and finite values, and no
    /// other, except a head that equals the embedding it is tied to.
    pub fn load(device: &D, dir: &Path) -> Result<Self> {
        Self::load_with_rows(device, dir, D::lora_weight_stride)
    }

    /// [`Self::load`] with the rows that training parameters needs.
    pub fn load_trainable(device: &D, dir: &Path) -> Result<Self> {
        Self::load_with_rows(device, dir, contiguous)
    }

    fn load_with_rows(device: &D, dir: &Path, stride: RowStride) -> Result<Self> {
        let config = DecoderConfig::read(dir)?;
        let source = TensorSource::open(dir)?;
        config.check_weights(&source)?;
        let layout = Self::layout_of(&config);
        for name in source.names() {
            if layout.get(name).is_none() && !is_ignorable(name) {
                check_extra(&config, &source, name)?;
            }
        }
        Self::filled(device, &config, stride, |param| Ok(converted(&source.tensor(&param.name)?.to_f32()?)))
    }

    /// A frozen decoder with random weights: a pure function of configuration, spread and key.
    pub fn random(device: &D, config: &DecoderConfig, initial: &InitialWeights, key: u64) -> Result<Self> {
        Self::filled(device, config, D::lora_weight_stride, |param| {
            let mut stream = rng::Stream::new(rng::derive_named(key, &param.name));
            let host: Vec<f32> = match initial_spread(config, initial, param) {
                Some(std) => (0..param.len()).map(|_| (std * stream.normal()) as f32).collect(),
                None if param.name.ends_with(".bias") => vec![0.0; param.len()],
                None => vec![1.0; param.len()],
            };
            Ok(converted(&host))
        })
    }

    /// The same decoder with the rows that training all parameters needs.
    pub fn trainable(self) -> Result<Self> {
        self.restored(contiguous)
    }

    /// The same decoder with the rows that adapters are fastest with.
    pub fn frozen(self) -> Result<Self> {
        self.restored(D::lora_weight_stride)
    }

    fn restored(self, stride: RowStride) -> Result<Self> {
        if places(&self.config, stride).0 == self.stored {
            return Ok(self);
        }
        Self::filled(&self.device, &self.config, stride, |param| self.tensor(param))
    }

    /// A decoder whose rows are so far apart, with the values that `values` gives for each tensor.
    fn filled(
        device: &D,
        config: &DecoderConfig,
        stride: RowStride,
        values: impl Fn(&Param) -> Result<Vec<X>>,
    ) -> Result<Self> {
        let (stored, _) = places(config, stride);
        let mut buf = Self::zeros(device, &stored)?;
        for (param, place) in Self::layout_of(config).params().iter().zip(stored.params()) {
            let mut host = values(param)?;
            if let (&[rows, cols], &[_, stride]) = (&param.shape[..], &place.shape[..])
                && stride > cols
            {
                let mut spread = vec![X::zero(); rows * stride];
                for (to, from) in spread.chunks_mut(stride).zip(host.chunks(cols)) {
                    to[..cols].copy_from_slice(from);
                }
                host = spread;
            }
            device.upload(buf.view_mut(place.range()), &host)?;
        }
        Self::with_rows(device, config.clone(), buf, stride)
    }

    /// A frozen decoder whose values are made where they stay: `fill` is given each tensor of
    /// [`Self::layout_of`], its memory on the device (zeros), and the elements from one row to the
    /// next. What lies between rows must stay zero.
    ///
    /// # Errors
    /// Those of `fill`, and if there is no memory.
    pub fn frozen_with(
        device: &D,
        config: &DecoderConfig,
        mut fill: impl FnMut(&Param, D::ViewMut<'_, X>, usize) -> Result<()>,
    ) -> Result<Self> {
        let (stored, _) = places(config, D::lora_weight_stride);
        let mut buf = Self::zeros(device, &stored)?;
        for (param, place) in Self::layout_of(config).params().iter().zip(stored.params()) {
            let stride = place.shape.last().copied().unwrap_or(1);
            fill(param, buf.view_mut(place.range()), stride)?;
        }
        Self::with_rows(device, config.clone(), buf, D::lora_weight_stride)
    }

    /// A copy with weights of its own.
    pub fn duplicate(&self) -> Result<Self> {
        let mut values = Self::zeros(&self.device, &self.stored)?;
        self.device.copy(values.all_mut(), self.values.all())?;
        let (device, config) = (self.device.clone(), self.config.clone());
        let (layout, stored, places) = (self.layout.clone(), self.stored.clone(), self.places.clone());
        Ok(Self { device, config, layout, stored, places, values })
    }
}

impl<D: Device, X: Real> Decoder<D, X> {
    /// Writes `config.json` and `model.safetensors`, and what else an emulator needs, into a directory that exists, as
    /// bf16 or f32.
    pub fn save(&self, dir: &Path, half: bool) -> Result<()> {
        let (dtype, name) = if half { (Dtype::BF16, "bfloat16") } else { (Dtype::F32, "float32") };
        let mut bytes = Vec::with_capacity(self.layout.params().len());
        for param in self.layout.params() {
            let host = self.tensor(param)?;
            let numbers = host.iter().map(|x| x.to_f64());
            bytes.push(match half {
                true => numbers.flat_map(|x| bf16::from_f32(x as f32).to_le_bytes()).collect::<Vec<u8>>(),
                false => numbers.flat_map(|x| (x as f32).to_le_bytes()).collect(),
            });
        }
        let params = self.layout.params().iter().zip(&bytes);
        let tensors: Vec<NewTensor<'_>> =
            params.map(|(p, bytes)| (p.name.clone(), dtype, p.shape.clone(), &bytes[..])).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_tensors(&dir.join("model.safetensors"), &tensors, &metadata)?;
        self.config.write(dir, name).map(drop)
    }

    /// Where it lives.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Sizes and constants.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Names, shapes and places of the weights.
    pub fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    /// All weights, flat; in the order of [`Self::layout`] if the decoder is trainable.
    pub fn values(&self) -> &D::Buf<X> {
        &self.values
    }

    /// All weights, flat, for an optimizer if the decoder is trainable.
    pub fn values_mut(&mut self) -> &mut D::Buf<X> {
        &mut self.values
    }

    /// The matrices inside the blocks: all two-dimensional parameters but embedding and head.
    pub(crate) fn hidden_matrices(&self) -> impl Iterator<Item = &Param> {
        self.layout.params().iter().filter(|p| is_hidden_matrix(&self.config, p))
    }

    /// Part of the weights.
    pub(super) fn weights(&self, range: &Range<usize>) -> D::View<'_, X> {
        self.values.view(range.clone())
    }
}

/// Values in the weights' type.
fn converted<X: Real>(host: &[f32]) -> Vec<X> {
    host.iter().map(|&x| X::from_f64(x as f64)).collect()
}

/// Tables that old checkpoints carry although the configuration determines them.
fn is_ignorable(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// A tensor that is no parameter: fine only if it is the head of a tied model and equal to the embedding.
fn check_extra(config: &DecoderConfig, source: &TensorSource, name: &str) -> Result<()> {
    let tensor = source.tensor(name)?;
    if !(config.tied && name == HEAD) {
        return Err(Error::tensor(tensor.path, name, "this configuration has no such tensor"));
    }
    tensor.expect_shape(&[config.vocab, config.hidden])?;
    let embedding = config.family.names().embedding();
    if tensor.to_f32()? == source.tensor(&embedding)?.to_f32()? {
        return Ok(());
    }
    let why = format!("config.json ties it to `{embedding}`, but it holds other values");
    Err(Error::tensor(tensor.path, name, why))
}

/// Standard deviation of a parameter's initial values; none for norms and biases.
fn initial_spread(config: &DecoderConfig, initial: &InitialWeights, param: &Param) -> Option<f64> {
    let &[_, inputs] = param.shape.as_slice() else { return None };
    if !is_hidden_matrix(config, param) {
        return Some(if param.name == HEAD { initial.head } else { initial.embedding });
    }
    let writes = |module| param.name.ends_with(&format!("{}.weight", config.family.module_path(module)));
    let natural = || {
        let into_stream = writes(Module::O) || writes(Module::Down);
        let depth = if into_stream { 2.0 * config.layers as f64 } else { 1.0 };
        1.0 / (inputs as f64 * depth).sqrt()
    };
    Some(initial.matrices.unwrap_or_else(natural))
}
