//! Adapted layers: every piece, with several adapters, gradient rows and targets in one stream.

use crate::common::*;
use gradtx_kernels::ops::{
    LoraDims, LoraDownBackward, LoraLinearBackward, LoraLinearForward, LoraTarget, RmsNormDims,
    RmsNormLoraBackward, RmsNormLoraForward, Segments,
};
use gradtx_kernels::{Backend, Buffer, Device, Real, Result, ViewMut};

/// s and ds are rounded to bf16 on the way.
const LORA: Tolerance = Tolerance { f32: 3e-6, bf16: 1.2e-2 };

/// Length, adapter and gradient row of every segment.
pub type SegmentList = &'static [(u32, u32, u32)];

#[derive(Clone, Copy)]
pub struct Adapted {
    pub segments: SegmentList,
    pub in_dim: usize,
    pub out_dim: usize,
    pub rank: usize,
    pub targets: usize,
    pub dropout: f64,
    pub residual: bool,
    pub bias: bool,
    /// x through RMSNorm, or as it is.
    pub norm: bool,
    /// Whether rows of the weight are as far apart as the device likes best.
    pub room: bool,
}

/// Targets with gaps between their parameters and between their outputs, of different lengths,
/// and the length of a row. Everything is aligned to 16 bytes if the layer's input is.
fn targets(in_dim: usize, out_dim: usize, rank: usize, count: usize) -> (Vec<LoraTarget>, usize) {
    let unit = if in_dim.is_multiple_of(4) { 4 } else { 3 };
    let mut end = unit;
    let mut place = |len: usize| {
        let start = end;
        end = (end + len + 1).next_multiple_of(unit);
        start
    };
    let target = |n: usize| {
        let share = out_dim / count;
        let (out_start, out_len) = (n * share + n % 2, share - n % 2);
        let (a, b) = (rank * in_dim, rank * out_len);
        let (a_offset, b_offset) = match n % 2 {
            0 => (place(a), place(b)),
            _ => {
                let b_offset = place(b);
                (place(a), b_offset)
            }
        };
        LoraTarget { a_offset, b_offset, out_start, out_len, site: 5 + 4 * n as u32 }
    };
    let targets = (0..count).map(target).collect();
    (targets, end)
}

/// A weight with the rows that the device likes best, NaN between them; or with plain ones.
fn weight<D: Backend<X>, X: Real>(d: &D, w: &[X], in_dim: usize, room: bool) -> Result<D::Buf<X>> {
    let stride = if room { D::lora_weight_stride(in_dim) } else { in_dim };
    let mut rows = nan(w.len() / in_dim * stride);
    for (to, from) in rows.chunks_mut(stride).zip(w.chunks(in_dim)) {
        to[..in_dim].copy_from_slice(from);
    }
    put(d, &rows)
}

/// The buffers of a stream.
struct Stream<D: Device> {
    offsets: D::Buf<u32>,
    adapter: D::Buf<u32>,
    grad_row: D::Buf<u32>,
    keys: D::Buf<u64>,
    count: usize,
}

impl<D: Device> Stream<D> {
    fn new(device: &D, segments: SegmentList) -> Result<Self> {
        let mut offsets = vec![0];
        for segment in segments {
            offsets.push(offsets.last().expect("not empty") + segment.0);
        }
        let keys: Vec<u64> = (0..segments.len() as u64).map(|i| 1000 + ((77 * i) << 33) + i).collect();
        Ok(Self {
            offsets: put(device, &offsets)?,
            adapter: put(device, &segments.iter().map(|s| s.1).collect::<Vec<_>>())?,
            grad_row: put(device, &segments.iter().map(|s| s.2).collect::<Vec<_>>())?,
            keys: put(device, &keys)?,
            count: segments.len(),
        })
    }

    fn view(&self) -> Segments<'_, D> {
        Segments {
            offsets: self.offsets.all(),
            adapter: self.adapter.all(),
            grad_row: self.grad_row.all(),
            keys: self.keys.all(),
            count: self.count,
        }
    }
}

/// The rows of x in an adapter input, and s or ds behind them as y or dB show it.
fn rows_of<D: Backend<X>, X: Real>(d: &D, input: &D::Buf<X>, dims: &LoraDims<'_>) -> Result<Vec<f64>> {
    let stride = D::lora_row_stride(dims);
    let values = d.to_host(D::lora_rows(input.all(), dims))?;
    let rows = values.chunks(stride).take(dims.tokens).flat_map(|row| &row[..dims.in_dim]);
    Ok(rows.map(|x| x.to_f64()).collect())
}

/// A buffer for an adapter input whose rows hold these values, and NaN behind them.
fn input_with<D: Backend<X>, X: Real>(d: &D, x: &[X], dims: &LoraDims<'_>) -> Result<D::Buf<X>> {
    let mut input = put(d, &nan::<X>(D::lora_input_len(dims)))?;
    let stride = D::lora_row_stride(dims);
    for (t, row) in x.chunks(dims.in_dim).enumerate() {
        let rows = D::lora_rows_mut(input.all_mut(), dims);
        d.upload(rows.slice(t * stride..t * stride + dims.in_dim), row)?;
    }
    Ok(input)
}

impl Case for Adapted {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Self { in_dim, out_dim, rank, dropout, .. } = *self;
        let (targets, adapter_stride) = targets(in_dim, out_dim, rank, self.targets);
        let tokens = self.segments.iter().map(|s| s.0 as usize).sum();
        let rows = |column: fn(&(u32, u32, u32)) -> u32| {
            self.segments.iter().map(|s| column(s) as usize + 1).max().expect("not empty")
        };
        let (jobs, grad_rows) = (rows(|s| s.1), rows(|s| s.2));
        let scale = 1.5;
        let dims =
            LoraDims { tokens, in_dim, out_dim, rank, scale, dropout, adapter_stride, targets: &targets };
        let norm = RmsNormDims::new(tokens, in_dim, 1e-6);
        let stream = Stream::new(d, self.segments)?;
        let adapters = put(d, &inputs.sums::<X::Acc>("adapters", jobs * adapter_stride))?;
        let x_values = inputs.values::<X>("x", tokens * in_dim);
        let x = put(d, &x_values)?;
        let w_norm = put(d, &inputs.values::<X>("w_norm", in_dim))?;
        let w = weight(d, &inputs.values::<X>("w", out_dim * in_dim), in_dim, self.room)?;
        let residual = put(d, &inputs.values::<X>("residual", tokens * out_dim))?;
        let bias = put(d, &inputs.values::<X>("bias", out_dim))?;
        let mut inv = put(d, &nan::<X::Acc>(tokens))?;
        let mut input = input_with(d, &x_values, &dims)?;
        let (segments, adapters) = (stream.view(), adapters.all());
        if self.norm {
            let (to, inv_to) = (input.all_mut(), inv.all_mut());
            d.rmsnorm_lora_forward(RmsNormLoraForward {
                input: to,
                inv_rms: inv_to,
                x: x.all(),
                w_norm: w_norm.all(),
                adapters,
                segments,
                norm,
                dims,
            })?;
        } else {
            d.lora_down_forward(input.all_mut(), adapters, segments, dims)?;
        }
        let mut y = put(d, &nan::<X>(tokens * out_dim))?;
        let residual = self.residual.then(|| residual.all());
        d.lora_linear_forward(LoraLinearForward {
            y: y.all_mut(),
            input: input.all(),
            w: w.all(),
            bias: self.bias.then(|| bias.all()),
            residual,
            adapters,
            segments,
            dims,
        })?;

        let dy = put(d, &inputs.values::<X>("dy", tokens * out_dim))?;
        let mut grads = put(d, &inputs.sums::<X::Acc>("grads", grad_rows * adapter_stride))?;
        let mut d_input = put(d, &nan::<X>(D::lora_input_len(&dims)))?;
        let (to, grads_to, dy) = (d_input.all_mut(), grads.all_mut(), dy.all());
        d.lora_linear_backward(LoraLinearBackward {
            d_input: to,
            grads: grads_to,
            dy,
            input: input.all(),
            w: w.all(),
            adapters,
            segments,
            dims,
        })?;
        let mut results = Results::default();
        if self.norm {
            let mut dx = put(d, &inputs.values::<X>("dx", tokens * in_dim))?;
            let (dx_to, d_to, grads_to) = (dx.all_mut(), d_input.all_mut(), grads.all_mut());
            let (x, inv, w_norm) = (x.all(), inv.all(), w_norm.all());
            let input = input.all();
            d.rmsnorm_lora_backward(RmsNormLoraBackward {
                dx: dx_to,
                d_input: d_to,
                grads: grads_to,
                x,
                input,
                inv_rms: inv,
                w_norm,
                adapters,
                segments,
                norm,
                dims,
            })?;
            results.take(d, "dx", &dx)?;
        } else {
            let (d_to, grads_to) = (d_input.all_mut(), grads.all_mut());
            d.lora_down_backward(LoraDownBackward {
                d_input: d_to,
                grads: grads_to,
                input: input.all(),
                adapters,
                segments,
                dims,
            })?;
            results.add("rows of d_input", rows_of(d, &d_input, &dims)?);
        }
        results.add("rows of input", rows_of(d, &input, &dims)?);
        results.take(d, "y", &y)?;
        results.take(d, "grads", &grads)?;
        Ok(results)
    }
}

/// One segment of one token; several adapters; segments of several tiles; more adapters than have
/// columns of their own; tokens enough for two to a warp.
const STREAMS: [SegmentList; 6] = [
    &[(1, 0, 0)],
    &[(5, 1, 0), (1, 0, 2), (9, 1, 2)],
    &[(3, 2, 1), (40, 0, 0), (7, 2, 1)],
    &[(37, 1, 0), (1, 3, 1), (66, 0, 1)],
    &[(3, 20, 1), (1, 0, 0), (6, 7, 1)],
    &[(90, 0, 0), (1, 2, 1), (45, 1, 0)],
];

/// A case that takes the fused way.
pub fn fused(stream: usize, shape: (usize, usize, usize, usize), dropout: f64) -> Adapted {
    let (in_dim, out_dim, rank, targets) = shape;
    let segments = STREAMS[stream];
    Adapted {
        segments,
        in_dim,
        out_dim,
        rank,
        targets,
        dropout,
        residual: true,
        bias: false,
        norm: true,
        room: true,
    }
}

#[test]
fn adapted_layers() {
    let cases = [
        fused(0, (3, 4, 1, 2), 0.0),
        Adapted { residual: false, ..fused(1, (20, 14, 2, 2), 0.25) },
        fused(2, (64, 48, 3, 3), 0.1),
        Adapted { residual: false, ..fused(1, (33, 70, 8, 2), 0.0) },
        fused(3, (136, 24, 2, 1), 0.5),
        fused(5, (520, 24, 2, 2), 0.1),
        fused(2, (776, 40, 1, 2), 0.3),
        Adapted { bias: true, ..fused(3, (256, 24, 2, 2), 0.0) },
        Adapted { bias: true, residual: false, ..fused(1, (33, 26, 2, 2), 0.1) },
        fused(1, (264, 21, 5, 3), 0.2),
    ];
    for case in cases {
        for norm in [false, true] {
            let Adapted { in_dim, out_dim, rank, targets, .. } = case;
            let name = format!("lora {in_dim}→{out_dim}, rank {rank}, {targets} targets, norm {norm}");
            check(&name, &Adapted { norm, ..case }, LORA);
        }
    }
}

/// Shared columns, weights without room for B, and layers that nothing is adapted of.
#[test]
fn adapted_layers_by_separate_passes() {
    let shared = fused(4, (24, 18, 2, 2), 0.1);
    for norm in [false, true] {
        check(&format!("many adapters, norm {norm}"), &Adapted { norm, ..shared }, LORA);
    }
    check("rank 11 of 3 targets", &fused(2, (12, 21, 11, 3), 0.0), LORA);
    check("no room", &Adapted { room: false, ..fused(1, (40, 30, 2, 2), 0.2) }, LORA);
    check("no targets", &fused(1, (16, 10, 2, 0), 0.2), LORA);
    check("no targets, no room", &Adapted { room: false, ..fused(1, (15, 10, 2, 0), 0.0) }, LORA);
}

/// More units than a block's shared memory has sums for.
#[test]
fn wide_layers_of_a_large_rank() {
    let case = Adapted { segments: &[(2, 0, 0), (1, 1, 0)], ..fused(0, (4104, 8, 12, 1), 0.1) };
    for norm in [false, true] {
        check(&format!("lora 4104→8, norm {norm}"), &Adapted { norm, ..case }, LORA);
    }
}

/// Fewer bytes of shared memory per block than kernels would like, for devices of this thread.
pub struct LittleShared;

impl LittleShared {
    pub fn new(bytes: usize) -> Self {
        gradtx_emulator::limit_shared_memory(bytes);
        Self
    }
}

impl Drop for LittleShared {
    fn drop(&mut self) {
        gradtx_emulator::limit_shared_memory(163 << 10);
    }
}

/// As on devices of capability 8.6 and 8.9: fewer sums at a time, and none where not even those of
/// one unit fit, which then are in scratch memory.
#[test]
fn layers_on_devices_with_99_kib_of_shared_memory() {
    if gradtx_emulator::on_device() {
        return;
    }
    let _little = LittleShared::new(99 << 10);
    // Without a norm s is a sum of so many products that its rounding to bf16 shows in dB.
    let wide = Tolerance { bf16: 4e-2, ..LORA };
    for in_dim in [12_692, 12_704, 25_400] {
        let case = Adapted { segments: &[(2, 0, 0), (1, 1, 0)], ..fused(0, (in_dim, 8, 2, 1), 0.1) };
        for (norm, tolerance) in [(false, wide), (true, LORA)] {
            check(&format!("lora {in_dim}→8 in 99 KiB, norm {norm}"), &Adapted { norm, ..case }, tolerance);
        }
    }
    // Fewer rows on their way than where there is more: in f32, in bf16.
    for in_dim in [2048, 3584] {
        let case = Adapted { segments: &[(11, 0, 0), (4, 1, 0)], ..fused(0, (in_dim, 8, 2, 2), 0.1) };
        check(&format!("lora {in_dim}→8 in 99 KiB"), &case, wide);
    }
}

/// Dynamic shared memory just below what needs no permission, which declared memory lifts above it.
#[test]
fn declared_shared_memory_counts_too() {
    for in_dim in [6064, 6096, 6112] {
        let case = Adapted { segments: &[(3, 0, 0)], ..fused(0, (in_dim, 8, 2, 1), 0.0) };
        check(&format!("lora {in_dim}→8"), &case, LORA);
    }
}

/// What does not fit is refused.
#[test]
fn shapes_are_checked() {
    use gradtx_emulator::{Order, Schedule, Variant, configure, device};
    configure(Schedule { order: Order::Forward, race: false });
    let cuda = device(Variant::PLAIN);
    let refusal = |case: Adapted| {
        let found = Case::run::<gradtx_kernels::cuda::Cuda, f32>(&case, &cuda, Inputs::new(Precision::F32));
        found.expect_err("it does not fit").to_string()
    };
    let found = refusal(fused(1, (8, 40, 1, 5), 0.0));
    assert!(found.contains("5 targets"), "{found}");
    let found = refusal(fused(1, (8, 40, 1, 2), 1.0));
    assert!(found.contains("dropout"), "{found}");
}

/// An adapter's gradient row has the same bits alone and among others.
#[test]
fn gradient_rows_do_not_depend_on_the_stream() {
    use gradtx_emulator::{Order, Schedule, Variant, configure, device};
    configure(Schedule { order: Order::Forward, race: false });
    let cuda = device(Variant::PLAIN);
    let run = |segments: SegmentList, part: std::ops::Range<usize>| -> Vec<u32> {
        let (in_dim, out_dim, rank) = (24, 16, 2);
        let (targets, adapter_stride) = targets(in_dim, out_dim, rank, 2);
        let tokens = segments.iter().map(|s| s.0 as usize).sum::<usize>();
        let dims = LoraDims {
            tokens,
            in_dim,
            out_dim,
            rank,
            scale: 0.7,
            dropout: 0.0,
            adapter_stride,
            targets: &targets,
        };
        let inputs = Inputs::new(Precision::F32);
        let stream = Stream::new(&cuda, segments).unwrap();
        let values = |name, cols: usize| {
            inputs.values::<f32>(name, 60 * cols)[part.start * cols..part.end * cols].to_vec()
        };
        let mut input = input_with(&cuda, &values("x", in_dim), &dims).unwrap();
        let mut d_input = input_with(&cuda, &values("d", in_dim), &dims).unwrap();
        let adapters = put(&cuda, &inputs.sums::<f32>("adapters", 3 * adapter_stride)).unwrap();
        let (w, dy) = (inputs.values::<f32>("w", in_dim * out_dim), values("dy", out_dim));
        let (w, dy) = (weight(&cuda, &w, in_dim, true).unwrap(), put(&cuda, &dy).unwrap());
        let mut grads = cuda.zeros::<f32>(3 * adapter_stride).unwrap();
        let (to, grads_to) = (d_input.all_mut(), grads.all_mut());
        let (all, adapters) = (stream.view(), adapters.all());
        use gradtx_kernels::ops::LoraLinear;
        cuda.lora_down_forward(input.all_mut(), adapters, all, dims).unwrap();
        LoraLinear::<f32>::lora_linear_backward(
            &cuda,
            LoraLinearBackward {
                d_input: to,
                grads: grads_to,
                dy: dy.all(),
                input: input.all(),
                w: w.all(),
                adapters,
                segments: all,
                dims,
            },
        )
        .unwrap();
        let (to, grads_to) = (d_input.all_mut(), grads.all_mut());
        cuda.lora_down_backward(LoraDownBackward {
            d_input: to,
            grads: grads_to,
            input: input.all(),
            adapters,
            segments: all,
            dims,
        })
        .unwrap();
        let row = grads.view(adapter_stride..2 * adapter_stride);
        cuda.to_host(row).unwrap().into_iter().map(f32::to_bits).collect()
    };
    let among = run(&[(13, 0, 0), (40, 2, 1), (7, 0, 2)], 0..60);
    let alone = run(&[(40, 2, 1)], 13..53);
    assert!(among == alone && among.iter().any(|&bits| bits != 0));
}
