//! [`Activations`]: every buffer that a pass over a packed stream needs, allocated once.
//!
//! What is kept for backward depends on what is trained. Buffers of a block are kept
//! per block when its backward reads them; otherwise all blocks share one. Frozen
//! products need no input kept, so training q and v adapters keeps neither the MLP's
//! normalised input nor its hidden row.

use super::backward::Gradients;
use super::forward::AdapterView;
use super::rope::RopeTables;
use super::{Decoder, DecoderConfig};
use crate::lora::{BlockLayout, Projection};
use gradtx_kernels::ops::{LmHead, LoraDims};
use gradtx_kernels::{Backend, Buffer, Device, Elem, Real};
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

/// What a pass is for.
#[derive(Clone, Copy, Debug)]
pub enum Mode<'a> {
    /// Losses, logits, generation: nothing is kept. With adapters of this layout, or without.
    Inference(Option<&'a BlockLayout>),
    /// Gradients of adapters of this layout; the base is frozen.
    Adapters(&'a BlockLayout),
    /// Gradients of all parameters, without adapters.
    AllParameters,
}

impl<'a> Mode<'a> {
    /// The adapters' layout.
    pub(super) fn adapters(self) -> Option<&'a BlockLayout> {
        match self {
            Self::Inference(layout) => layout,
            Self::Adapters(layout) => Some(layout),
            Self::AllParameters => None,
        }
    }

    fn trains(self) -> bool {
        !matches!(self, Self::Inference(_))
    }

    /// Backward reads the input of this product.
    pub(super) fn keeps_input(self, fused: Projection) -> bool {
        match self {
            Self::Inference(_) => false,
            Self::Adapters(layout) => !layout.targets(0, fused).is_empty(),
            Self::AllParameters => true,
        }
    }
}

/// A buffer of every block: one for each, or one that they share.
pub(super) struct PerBlock<D: Device, T: Elem> {
    buf: D::Buf<T>,
    /// Elements that a block has room for.
    room: usize,
    shared: bool,
}

impl<D: Device, T: Elem> PerBlock<D, T> {
    fn new(device: &D, plan: &Planned) -> Result<Self> {
        let buf = device.zeros(plan.room() * plan.copies)?;
        Ok(Self { buf, room: plan.room(), shared: plan.copies == 1 })
    }

    fn start(&self, block: usize) -> usize {
        if self.shared { 0 } else { block * self.room }
    }

    /// The first `len` elements of a block's part.
    pub(super) fn get(&self, block: usize, len: usize) -> D::View<'_, T> {
        let start = self.start(block);
        self.buf.view(start..start + len)
    }

    /// The same for writing.
    pub(super) fn get_mut(&mut self, block: usize, len: usize) -> D::ViewMut<'_, T> {
        let start = self.start(block);
        self.buf.view_mut(start..start + len)
    }
}

/// One buffer of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Planned {
    purpose: Purpose,
    name: &'static str,
    /// Shape of one copy.
    shape: Vec<usize>,
    /// One, or one for each block.
    copies: usize,
    /// Statistics are accumulators.
    accumulator: bool,
}

impl Planned {
    /// A value of every block; kept for each of them if `copies` says so.
    fn block(name: &'static str, shape: &[usize], copies: usize) -> Self {
        Self { purpose: Purpose::Activations, name, shape: shape.to_vec(), copies, accumulator: false }
    }

    /// A buffer that exists once.
    fn once(purpose: Purpose, name: &'static str, shape: &[usize]) -> Self {
        Self { purpose, ..Self::block(name, shape, 1) }
    }

    fn statistic(self) -> Self {
        Self { accumulator: true, ..self }
    }

    /// Elements of one copy.
    fn room(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The buffers of a pass, in the order of [`Activations`]'s fields.
struct Plan {
    x: Planned,
    inputs: [Planned; 4],
    inv_rms: [Planned; 2],
    qkv: Planned,
    qkv_normed: Planned,
    qk_inv_rms: Planned,
    lse: Planned,
    x_mid: Planned,
    gate_up: Planned,
    last: [Planned; 5],
    gradients: [Planned; 5],
    rope: [Planned; 2],
}

impl Plan {
    fn new<D: Backend<X>, X: Real>(
        config: &DecoderConfig,
        room: BatchCapacity,
        mode: Mode<'_>,
        positions: usize,
    ) -> Self {
        let (t, trains) = (room.tokens, mode.trains());
        let (h, r, f, v) = (config.hidden, config.qkv_dim(), config.intermediate, config.vocab);
        let copies = |kept: bool| if kept { config.layers.max(1) } else { 1 };
        let all = copies(trains);
        let input_len = |fused| D::lora_input_len(&lora_dims(config, mode.adapters(), 0.0, 0, fused, t));
        let names = ["qkv_input", "o_input", "gate_up_input", "down_input"];
        let input = |fused: Projection| {
            // o is read by attention's own backward, whether o_proj is adapted or not.
            let kept = mode.keeps_input(fused) || (trains && fused == Projection::O);
            Planned::block(names[fused as usize], &[input_len(fused)], copies(kept))
        };
        let widest = Projection::ALL.map(input_len).into_iter().max().unwrap_or(0);
        let (normed, norms) = match config.family.qk_norm() {
            true => (r, config.heads + config.kv_heads),
            false => (0, 0),
        };
        let chunk = head_chunk::<D, X>(room);
        let rows = t.max(chunk);
        let scratch = |name, shape: &[usize]| Planned::once(Purpose::Scratch, name, shape);
        let t_if = if trains { t } else { 0 };
        Self {
            // One more than blocks: the input of each, and the output of the last.
            x: Planned::block("x", &[t, h], if trains { config.layers + 1 } else { 1 }),
            inputs: Projection::ALL.map(input),
            inv_rms: ["attention_inv_rms", "mlp_inv_rms"].map(|n| Planned::block(n, &[t], all).statistic()),
            qkv: Planned::block("qkv", &[t, r], all),
            qkv_normed: Planned::block("qkv_normed", &[t, normed], all),
            qk_inv_rms: Planned::block("qk_inv_rms", &[t, norms], all).statistic(),
            lse: Planned::block("lse", &[config.heads, t], all).statistic(),
            x_mid: Planned::block("x_mid", &[t, h], all),
            gate_up: Planned::block("gate_up", &[t, 2 * f], all),
            last: [
                scratch("final", &[rows, h]),
                scratch("final_inv_rms", &[rows]).statistic(),
                scratch("head_logits", &[chunk, v]),
                scratch("head_rows", &[2, chunk, h]),
                scratch("losses", &[room.labels]).statistic(),
            ],
            gradients: [
                scratch("d_x", &[t_if, h]),
                scratch("d_input", &[if trains { widest } else { 0 }]),
                scratch("d_proj", &[t_if, r.max(2 * f).max(h)]),
                scratch("d_qkv", &[t_if, r]),
                scratch("delta", &[config.heads, t_if]).statistic(),
            ],
            rope: ["cos", "sin"].map(|n| scratch(n, &[positions, config.head_dim / 2]).statistic()),
        }
    }

    /// The same as a plan to be printed.
    fn memory<X: Real>(&self) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        let blocks =
            [&self.x, &self.qkv, &self.qkv_normed, &self.qk_inv_rms, &self.lse, &self.x_mid, &self.gate_up];
        let once = self.last.iter().chain(&self.gradients).chain(&self.rope);
        for p in blocks.into_iter().chain(&self.inputs).chain(&self.inv_rms).chain(once) {
            if p.room() > 0 {
                let shape: Vec<usize> =
                    (p.copies > 1).then_some(p.copies).into_iter().chain(p.shape.iter().copied()).collect();
                let size = if p.accumulator { size_of::<X::Acc>() } else { size_of::<X>() };
                plan.add(p.purpose, p.name, &shape, size);
            }
        }
        plan
    }
}

/// Labels of a chunk of the head.
fn head_chunk<D: LmHead<X>, X: Real>(room: BatchCapacity) -> usize {
    room.labels.clamp(1, D::CHUNK)
}

/// Shapes of an adapted product of one block.
pub(super) fn lora_dims<'a>(
    config: &DecoderConfig,
    layout: Option<&'a BlockLayout>,
    dropout: f64,
    block: usize,
    fused: Projection,
    tokens: usize,
) -> LoraDims<'a> {
    let (in_dim, out_dim) = fused.dims(config);
    let none: &[_] = &[];
    LoraDims {
        tokens,
        in_dim,
        out_dim,
        rank: layout.map_or(1, |l| l.lora().rank),
        scale: layout.map_or(0.0, |l| l.lora().scale()),
        dropout,
        adapter_stride: layout.map_or(0, BlockLayout::total),
        targets: layout.map_or(none, |l| l.targets(block, fused)),
    }
}

/// Buffers of a forward and backward pass. Shapes are for a full stream of T tokens.
pub struct Activations<D: Device, X: Real> {
    pub(super) capacity: BatchCapacity,
    trains: bool,
    /// Hash of the adapters' layout, if there are adapters.
    pub(super) layout: Option<String>,
    /// `[L + 1][T, H]` residual stream before each block, and after the last.
    pub(super) x: PerBlock<D, X>,
    /// `[L][adapter input]` of q/k/v, o, gate/up and down.
    pub(super) inputs: [PerBlock<D, X>; 4],
    /// `[L][T]` of the two norms of a block.
    pub(super) inv_rms: [PerBlock<D, X::Acc>; 2],
    /// `[L][T, R]`; rotated in place, or before the q/k norm where there is one.
    pub(super) qkv: PerBlock<D, X>,
    /// `[L][T, R]` normalised and rotated, where there is a q/k norm.
    pub(super) qkv_normed: PerBlock<D, X>,
    /// `[L][T, heads + kv_heads]`
    pub(super) qk_inv_rms: PerBlock<D, X::Acc>,
    /// `[L][heads, T]`
    pub(super) lse: PerBlock<D, X::Acc>,
    /// `[L][T, H]` residual stream between attention and MLP.
    pub(super) x_mid: PerBlock<D, X>,
    /// `[L][T, 2F]`
    pub(super) gate_up: PerBlock<D, X>,
    /// `[T, H]` after the final norm.
    pub(super) last: D::Buf<X>,
    /// `[T]`
    pub(super) last_inv_rms: D::Buf<X::Acc>,
    /// `[chunk, V]`
    pub(super) head_logits: D::Buf<X>,
    /// `[2][chunk, H]`
    pub(super) head_rows: D::Buf<X>,
    /// `[M]`
    pub(super) losses: D::Buf<X::Acc>,
    /// `[T, H]` gradient of the residual stream.
    pub(super) d_x: D::Buf<X>,
    /// The largest adapter input, for gradients of any.
    pub(super) d_input: D::Buf<X>,
    /// `[T, max(R, 2F, H)]` gradient of a product's output.
    pub(super) d_proj: D::Buf<X>,
    /// `[T, R]`
    pub(super) d_qkv: D::Buf<X>,
    /// `[heads, T]`
    pub(super) delta: D::Buf<X::Acc>,
    pub(super) rope: RopeTables<D, X::Acc>,
    /// What passes without adapters lend in an adapter's place.
    pub(super) nothing: D::Buf<X::Acc>,
    pub(super) chunk: usize,
    pub(super) labels: usize,
}

impl<D: Backend<X>, X: Real> Activations<D, X> {
    /// Buffers for streams up to `capacity`, for this decoder in this mode.
    pub fn new(decoder: &Decoder<D, X>, capacity: BatchCapacity, mode: Mode<'_>) -> Result<Self> {
        Self::with_positions(decoder, capacity, mode, capacity.tokens)
    }

    /// The buffers that [`Self::new`] would allocate.
    pub fn plan(config: &DecoderConfig, capacity: BatchCapacity, mode: Mode<'_>) -> MemoryPlan {
        let mut plan = Plan::new::<D, X>(config, capacity, mode, capacity.tokens).memory::<X>();
        let dims = |fused| lora_dims(config, mode.adapters(), 0.0, 0, fused, capacity.tokens);
        let scratch = Projection::ALL.map(|fused| D::lora_scratch(&dims(fused), capacity.segments));
        // The device's own, which it keeps for all that need some.
        match scratch.into_iter().max() {
            Some(bytes @ 1..) if mode.trains() => plan.add(Purpose::Scratch, "sums of adapters", &[bytes], 1),
            _ => (),
        }
        plan
    }

    /// As [`Self::new`], where positions go beyond the length of a stream (decoding on a cache).
    pub(super) fn with_positions(
        decoder: &Decoder<D, X>,
        capacity: BatchCapacity,
        mode: Mode<'_>,
        positions: usize,
    ) -> Result<Self> {
        let (device, config) = (&decoder.device, &decoder.config);
        let plan = Plan::new::<D, X>(config, capacity, mode, positions);
        let [i0, i1, i2, i3] = &plan.inputs;
        let new = |p: &Planned| PerBlock::new(device, p);
        let accumulators = |p: &Planned| PerBlock::new(device, p);
        let one = |p: &Planned| device.zeros(p.room());
        let one_acc = |p: &Planned| device.zeros(p.room());
        Ok(Self {
            capacity,
            trains: mode.trains(),
            layout: mode.adapters().map(BlockLayout::hash),
            x: new(&plan.x)?,
            inputs: [new(i0)?, new(i1)?, new(i2)?, new(i3)?],
            inv_rms: [accumulators(&plan.inv_rms[0])?, accumulators(&plan.inv_rms[1])?],
            qkv: new(&plan.qkv)?,
            qkv_normed: new(&plan.qkv_normed)?,
            qk_inv_rms: accumulators(&plan.qk_inv_rms)?,
            lse: accumulators(&plan.lse)?,
            x_mid: new(&plan.x_mid)?,
            gate_up: new(&plan.gate_up)?,
            last: one(&plan.last[0])?,
            last_inv_rms: one_acc(&plan.last[1])?,
            head_logits: one(&plan.last[2])?,
            head_rows: one(&plan.last[3])?,
            losses: one_acc(&plan.last[4])?,
            d_x: one(&plan.gradients[0])?,
            d_input: one(&plan.gradients[1])?,
            d_proj: one(&plan.gradients[2])?,
            d_qkv: one(&plan.gradients[3])?,
            delta: one_acc(&plan.gradients[4])?,
            rope: RopeTables::new(device, config, positions)?,
            nothing: device.zeros(0)?,
            chunk: head_chunk::<D, X>(capacity),
            labels: 0,
        })
    }

    /// Loss of every label of the last stream, `[M]`, in nats and unweighted.
    pub fn losses(&self) -> D::View<'_, X::Acc> {
        self.losses.view(0..self.labels)
    }

    /// Fails unless this stream, and adapters of this layout, have a place in these buffers.
    pub(super) fn check(
        &self,
        used: BatchCapacity,
        adapters: Option<&AdapterView<'_, D, X::Acc>>,
    ) -> Result<()> {
        let room = self.capacity;
        if used.tokens > room.tokens || used.labels > room.labels {
            let why = format!("it has {used:?}, the activations have room for {room:?}");
            return Err(Error::invalid("packed stream", why));
        }
        match (&self.layout, adapters.map(|a| a.layout.hash())) {
            (_, None) => Ok(()),
            (Some(here), Some(given)) if *here == given => Ok(()),
            (here, Some(given)) => Err(Error::invalid(
                "adapters of a pass",
                format!("their layout is {given}, the activations were allocated for {here:?}"),
            )),
        }
    }

    /// Fails unless the mode of these buffers is the one that such gradients need.
    pub(super) fn check_gradients(&self, grads: &Gradients<'_, D, X::Acc>, adapters: bool) -> Result<()> {
        let wants_adapters = matches!(grads, Gradients::Adapters(_));
        if self.trains && wants_adapters == self.layout.is_some() && wants_adapters == adapters {
            return Ok(());
        }
        let why = "they need activations of the matching mode, and adapters exactly when the base is frozen";
        Err(Error::invalid("gradients", why))
    }
}
