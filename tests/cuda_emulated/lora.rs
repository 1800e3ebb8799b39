//! Adapted layers: every piece, with several adapters, gradient rows and targets in one stream.

use crate::common::*;
use gradtx_kernels::ops::{LoraDims, LoraTarget, RmsNormDims, Segments};
use gradtx_kernels::{Backend, Device, Real, Result};

/// s and ds are rounded to bf16 on the way.
const LORA: Tolerance = Tolerance { f32: 3e-6, bf16: 1.2e-2 };

/// Length, adapter and gradient row of every segment.
type SegmentList = &'static [(u32, u32, u32)];

struct Adapted {
    segments: SegmentList,
    in_dim: usize,
    out_dim: usize,
    rank: usize,
    dropout: f64,
    residual: bool,
    /// x through RMSNorm, or as it is.
    norm: bool,
}

/// Two targets with gaps between their parameters and between their outputs, and the length of a row.
fn targets(in_dim: usize, out_dim: usize, rank: usize) -> (Vec<LoraTarget>, usize) {
    let len = out_dim / 2;
    let b0 = 4 + rank * (len + in_dim);
    let targets = vec![
        LoraTarget { a_offset: b0 + rank * len, b_offset: b0, out_start: 0, out_len: len, site: 5 },
        LoraTarget { a_offset: 4 + rank * len, b_offset: 4, out_start: out_dim - len, out_len: len, site: 9 },
    ];
    (targets, b0 + rank * (len + in_dim) + 3)
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
            offsets: D::all(&self.offsets),
            adapter: D::all(&self.adapter),
            grad_row: D::all(&self.grad_row),
            keys: D::all(&self.keys),
            count: self.count,
        }
    }
}

/// The rows of x in an adapter input, and s or ds behind them as y or dB show it.
fn rows_of<D: Backend<X>, X: Real>(d: &D, input: &D::Buf<X>, dims: &LoraDims<'_>) -> Result<Vec<f64>> {
    let stride = D::lora_row_stride(dims);
    let values = d.to_host(D::lora_rows(D::all(input), dims))?;
    let rows = values.chunks(stride).take(dims.tokens).flat_map(|row| &row[..dims.in_dim]);
    Ok(rows.map(|x| x.to_f64()).collect())
}

/// A buffer for an adapter input whose rows hold these values.
fn input_with<D: Backend<X>, X: Real>(d: &D, x: &[X], dims: &LoraDims<'_>) -> Result<D::Buf<X>> {
    let mut input = d.zeros::<X>(D::lora_input_len(dims))?;
    let stride = D::lora_row_stride(dims);
    for (t, row) in x.chunks(dims.in_dim).enumerate() {
        let rows = D::lora_rows_mut(D::all_mut(&mut input), dims);
        d.upload(D::slice_mut(rows, t * stride..t * stride + dims.in_dim), row)?;
    }
    Ok(input)
}

impl Case for Adapted {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Self { in_dim, out_dim, rank, dropout, .. } = *self;
        let (targets, adapter_stride) = targets(in_dim, out_dim, rank);
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
        let w = put(d, &inputs.values::<X>("w", out_dim * in_dim))?;
        let residual = put(d, &inputs.values::<X>("residual", tokens * out_dim))?;
        let mut inv = put(d, &nan::<X::Acc>(tokens))?;
        let mut input = input_with(d, &x_values, &dims)?;
        let (segments, adapters) = (stream.view(), D::all(&adapters));
        if self.norm {
            let (to, inv_to) = (D::all_mut(&mut input), D::all_mut(&mut inv));
            d.rmsnorm_lora_forward(to, inv_to, D::all(&x), D::all(&w_norm), adapters, segments, norm, dims)?;
        } else {
            d.lora_down_forward(D::all_mut(&mut input), adapters, segments, dims)?;
        }
        let mut y = put(d, &nan::<X>(tokens * out_dim))?;
        let residual = self.residual.then(|| D::all(&residual));
        d.lora_linear_forward(
            D::all_mut(&mut y),
            D::all(&input),
            D::all(&w),
            residual,
            adapters,
            segments,
            dims,
        )?;

        let dy = put(d, &inputs.values::<X>("dy", tokens * out_dim))?;
        let mut grads = put(d, &inputs.sums::<X::Acc>("grads", grad_rows * adapter_stride))?;
        let mut d_input = d.zeros::<X>(D::lora_input_len(&dims))?;
        let (to, grads_to, dy) = (D::all_mut(&mut d_input), D::all_mut(&mut grads), D::all(&dy));
        d.lora_linear_backward(to, grads_to, dy, D::all(&input), D::all(&w), adapters, segments, dims)?;
        let mut results = Results::default();
        if self.norm {
            let mut dx = put(d, &inputs.values::<X>("dx", tokens * in_dim))?;
            let (dx_to, d_to, grads_to) =
                (D::all_mut(&mut dx), D::all_mut(&mut d_input), D::all_mut(&mut grads));
            let (x, inv, w_norm) = (D::all(&x), D::all(&inv), D::all(&w_norm));
            let input = D::all(&input);
            d.rmsnorm_lora_backward(
                dx_to, d_to, grads_to, x, input, inv, w_norm, adapters, segments, norm, dims,
            )?;
            results.take(d, "dx", &dx)?;
        } else {
            let (d_to, grads_to) = (D::all_mut(&mut d_input), D::all_mut(&mut grads));
            d.lora_down_backward(d_to, grads_to, D::all(&input), adapters, segments, dims)?;
            results.add("rows of d_input", rows_of(d, &d_input, &dims)?);
        }
        results.add("rows of input", rows_of(d, &input, &dims)?);
        results.take(d, "y", &y)?;
        results.take(d, "grads", &grads)?;
        Ok(results)
    }
}

#[test]
fn adapted_layers() {
    let streams: [SegmentList; 3] =
        [&[(1, 0, 0)], &[(5, 1, 0), (1, 0, 2), (9, 1, 2)], &[(3, 2, 1), (40, 0, 0), (7, 2, 1)]];
    for (n, (segments, in_dim, out_dim, rank, dropout)) in [
        (streams[0], 3, 4, 1, 0.0),
        (streams[1], 20, 14, 2, 0.25),
        (streams[2], 64, 48, 2, 0.1),
        (streams[1], 33, 70, 11, 0.0),
        (streams[2], 136, 24, 4, 0.5),
    ]
    .into_iter()
    .enumerate()
    {
        for norm in [false, true] {
            let case = Adapted { segments, in_dim, out_dim, rank, dropout, residual: n % 2 == 1, norm };
            check(&format!("lora {in_dim}→{out_dim}, rank {rank}, norm {norm}"), &case, LORA);
        }
    }
}

/// An adapter's gradient row has the same bits alone and among others.
#[test]
fn gradient_rows_do_not_depend_on_the_stream() {
    use crate::emulator::{Order, Schedule, Variant, configure, device};
    configure(Schedule { order: Order::Forward, race: false });
    let cuda = device(Variant { race: false, plant: None });
    let run = |segments: SegmentList, part: std::ops::Range<usize>| -> Vec<u32> {
        let (in_dim, out_dim, rank) = (24, 16, 2);
        let (targets, adapter_stride) = targets(in_dim, out_dim, rank);
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
        let input = input_with(&cuda, &values("x", in_dim), &dims).unwrap();
        let mut d_input = input_with(&cuda, &values("d", in_dim), &dims).unwrap();
        let adapters = put(&cuda, &inputs.sums::<f32>("adapters", 3 * adapter_stride)).unwrap();
        let (w, dy) = (inputs.values::<f32>("w", in_dim * out_dim), values("dy", out_dim));
        let (w, dy) = (put(&cuda, &w).unwrap(), put(&cuda, &dy).unwrap());
        let mut grads = cuda.zeros::<f32>(3 * adapter_stride).unwrap();
        type D = gradtx_kernels::cuda::Cuda;
        let (to, grads_to) = (D::all_mut(&mut d_input), D::all_mut(&mut grads));
        let (all, adapters) = (stream.view(), D::all(&adapters));
        use gradtx_kernels::ops::LoraLinear;
        LoraLinear::<f32>::lora_linear_backward(
            &cuda,
            to,
            grads_to,
            D::all(&dy),
            D::all(&input),
            D::all(&w),
            adapters,
            all,
            dims,
        )
        .unwrap();
        let (to, grads_to) = (D::all_mut(&mut d_input), D::all_mut(&mut grads));
        cuda.lora_down_backward(to, grads_to, D::all(&input), adapters, all, dims).unwrap();
        let row = D::view(&grads, adapter_stride..2 * adapter_stride);
        cuda.to_host(row).unwrap().into_iter().map(f32::to_bits).collect()
    };
    let among = run(&[(13, 0, 0), (40, 2, 1), (7, 0, 2)], 0..60);
    let alone = run(&[(40, 2, 1)], 13..53);
    assert!(among == alone && among.iter().any(|&bits| bits != 0));
}
