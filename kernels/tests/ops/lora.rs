//! Adapted layers: gradients of every piece, the masks of the contract, and the promise
//! that an adapter's bits do not depend on what shares its stream.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{
    DROPOUT_STREAM, LoraDims, LoraDownBackward, LoraLinear, LoraLinearBackward, LoraLinearForward,
    LoraTarget, RmsNormDims, RmsNormLoraBackward, RmsNormLoraForward, Segments,
};
use gradtx_kernels::rng::{drop_threshold, philox};

/// A packed stream: segment lengths, adapters, gradient rows and keys.
#[derive(Clone)]
struct Stream {
    offsets: Vec<u32>,
    adapter: Vec<u32>,
    grad_row: Vec<u32>,
    keys: Vec<u64>,
}

impl Stream {
    fn new(segments: &[(u32, u32, u32)]) -> Self {
        let mut stream = Self { offsets: vec![0], adapter: vec![], grad_row: vec![], keys: vec![] };
        for (i, &(len, adapter, grad_row)) in segments.iter().enumerate() {
            stream.offsets.push(stream.offsets[i] + len);
            stream.adapter.push(adapter);
            stream.grad_row.push(grad_row);
            stream.keys.push(1000 + 77 * i as u64);
        }
        stream
    }

    fn view(&self) -> Segments<'_, Cpu> {
        let Self { offsets, adapter, grad_row, keys } = self;
        Segments { offsets, adapter, grad_row, keys, count: keys.len() }
    }

    fn tokens(&self) -> usize {
        self.offsets[self.keys.len()] as usize
    }

    fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }

    /// The stream of these segments alone.
    fn only(&self, chosen: &[usize]) -> Self {
        let mut stream = Self { offsets: vec![0], adapter: vec![], grad_row: vec![], keys: vec![] };
        for &i in chosen {
            stream.offsets.push(stream.offsets.last().expect("not empty") + self.range(i).len() as u32);
            stream.adapter.push(self.adapter[i]);
            stream.grad_row.push(self.grad_row[i]);
            stream.keys.push(self.keys[i]);
        }
        stream
    }
}

/// Two targets with gaps between their parameters and between their outputs.
fn targets(in_dim: usize, out_dim: usize, rank: usize) -> Vec<LoraTarget> {
    let len = out_dim / 2;
    let a1 = 1 + rank * len;
    let b0 = a1 + rank * in_dim + 2;
    let a0 = b0 + rank * len;
    vec![
        LoraTarget { a_offset: a0, b_offset: b0, out_start: 0, out_len: len, site: 5 },
        LoraTarget { a_offset: a1, b_offset: 1, out_start: out_dim - len, out_len: len, site: 9 },
    ]
}

fn stride(in_dim: usize, out_dim: usize, rank: usize) -> usize {
    4 + 2 * rank * (in_dim + out_dim / 2)
}

struct Case {
    stream: Stream,
    targets: Vec<LoraTarget>,
    in_dim: usize,
    out_dim: usize,
    rank: usize,
    dropout: f64,
    jobs: usize,
    /// Whether x goes through RMSNorm first.
    norm: bool,
    /// Whether a bias is added.
    bias: bool,
    /// Makes the gradient wrong, for the negative control.
    broken: bool,
    /// Whether A has no gradient.
    frozen: bool,
}

impl Case {
    fn new(
        segments: &[(u32, u32, u32)],
        (in_dim, out_dim, rank): (usize, usize, usize),
        dropout: f64,
    ) -> Self {
        let stream = Stream::new(segments);
        let jobs = segments.iter().map(|s| s.1 as usize + 1).max().expect("not empty");
        let targets = targets(in_dim, out_dim, rank);
        Self {
            stream,
            targets,
            in_dim,
            out_dim,
            rank,
            dropout,
            jobs,
            norm: false,
            bias: false,
            broken: false,
            frozen: false,
        }
    }

    fn dims(&self) -> LoraDims<'_> {
        LoraDims {
            tokens: self.stream.tokens(),
            in_dim: self.in_dim,
            out_dim: self.out_dim,
            rank: self.rank,
            scale: 1.5,
            dropout: self.dropout,
            adapter_stride: stride(self.in_dim, self.out_dim, self.rank),
            targets: &self.targets,
        }
    }

    fn norm_dims(&self) -> RmsNormDims {
        RmsNormDims::new(self.stream.tokens(), self.in_dim, 1e-6)
    }

    /// x, adapters, residual, w, w_norm.
    fn inputs(&self) -> Vec<Vec<f64>> {
        let dims = self.dims();
        vec![
            random("x", dims.tokens * dims.in_dim),
            random("adapters", self.jobs * dims.adapter_stride),
            random("residual", dims.tokens * dims.out_dim),
            random("w", dims.out_dim * dims.in_dim),
            random("w_norm", dims.in_dim),
        ]
    }

    /// Adapter input, inverse rms and y.
    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> (Vec<X>, Vec<X>, Vec<X>) {
        let [x, adapters, residual, w, w_norm] = inputs else { panic!("five inputs") };
        let (dims, segments) = (self.dims(), self.stream.view());
        let mut input = nan(<Cpu as LoraLinear<X>>::lora_input_len(&dims));
        let mut inv_rms = nan(dims.tokens);
        let mut y = nan(dims.tokens * dims.out_dim);
        let bias: Vec<X> = to(&random("bias", dims.out_dim));
        if self.norm {
            let norm = self.norm_dims();
            cpu.rmsnorm_lora_forward(RmsNormLoraForward {
                input: &mut input,
                inv_rms: &mut inv_rms,
                x,
                w_norm,
                adapters,
                segments,
                norm,
                dims,
            })
            .expect("the shapes fit");
        } else {
            assert_eq!(<Cpu as LoraLinear<X>>::lora_row_stride(&dims), dims.in_dim);
            <Cpu as LoraLinear<X>>::lora_rows_mut(&mut input, &dims).copy_from_slice(x);
            cpu.lora_down_forward(&mut input, adapters, segments, dims).expect("the shapes fit");
        }
        cpu.lora_linear_forward(LoraLinearForward {
            y: &mut y,
            input: &input,
            w,
            bias: self.bias.then_some(&bias[..]),
            residual: Some(residual),
            adapters,
            segments,
            dims,
        })
        .expect("the shapes fit");
        (input, inv_rms, y)
    }

    /// dx and the gradient rows, added to ones that hold `before`.
    fn gradients<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], dy: &[X], before: f64) -> (Vec<X>, Vec<X>) {
        let [x, adapters, _, w, w_norm] = inputs else { panic!("five inputs") };
        let (dims, segments) = (self.dims(), self.stream.view());
        let (input, inv_rms, _) = self.run(cpu, inputs);
        let rows = *self.stream.grad_row.iter().max().expect("not empty") as usize + 1;
        let mut grads = to::<X>(&vec![before; rows * dims.adapter_stride]);
        let mut d_input = nan::<X>(input.len());
        cpu.lora_linear_backward(LoraLinearBackward {
            d_input: &mut d_input,
            grads: &mut grads,
            dy,
            input: &input,
            w,
            adapters,
            segments,
            dims,
        })
        .expect("the shapes fit");
        let mut dx = vec![X::zero(); x.len()];
        let of_a = if self.frozen { &mut [][..] } else { &mut grads[..] };
        if self.norm {
            let norm = self.norm_dims();
            cpu.rmsnorm_lora_backward(RmsNormLoraBackward {
                dx: &mut dx,
                d_input: &mut d_input,
                grads: of_a,
                x,
                input: &input,
                inv_rms: &inv_rms,
                w_norm,
                adapters,
                segments,
                norm,
                dims,
            })
            .expect("the shapes fit");
        } else {
            cpu.lora_down_backward(LoraDownBackward {
                d_input: &mut d_input,
                grads: of_a,
                input: &input,
                adapters,
                segments,
                dims,
            })
            .expect("the shapes fit");
            dx.copy_from_slice(<Cpu as LoraLinear<X>>::lora_rows(&d_input, &dims));
        }
        (dx, grads)
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.run(cpu, inputs).2]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let (dx, mut grads) = self.gradients(cpu, inputs, &d[0], 0.0);
        if self.broken {
            grads[self.targets[0].a_offset] *= X::from_f64(1.0 + 1e-6);
        }
        let stride = self.dims().adapter_stride;
        let mut d_adapters = vec![X::zero(); inputs[1].len()];
        // Gradient rows of one adapter add up to its gradient.
        for (row, grad) in grads.chunks(stride).enumerate() {
            let Some(segment) = self.stream.grad_row.iter().position(|&r| r as usize == row) else {
                continue;
            };
            let adapter = self.stream.adapter[segment] as usize;
            for (sum, &g) in d_adapters[adapter * stride..].iter_mut().zip(grad) {
                *sum += g;
            }
        }
        vec![Some(dx), Some(d_adapters), Some(d[0].clone()), None, None]
    }
}

#[test]
fn gradients_with_and_without_dropout_and_norm() {
    let streams: [&[(u32, u32, u32)]; 4] = [
        &[(1, 0, 0)],
        &[(5, 0, 0), (3, 0, 0)],
        &[(2, 1, 0), (4, 0, 1), (1, 1, 2)],
        &[(3, 2, 2), (7, 0, 0), (1, 1, 3), (5, 2, 2)],
    ];
    for segments in streams {
        for (shape, dropout) in [((5, 6, 1), 0.0), ((7, 4, 2), 0.3), ((70, 9, 3), 0.4), ((123, 35, 16), 0.0)]
        {
            for norm in [false, true] {
                let case = Case { norm, bias: norm, ..Case::new(segments, shape, dropout) };
                check_gradients("lora", &case, &case.inputs());
            }
        }
    }
}

#[test]
#[should_panic(expected = "gradient of input 1")]
fn the_check_sees_one_wrong_element() {
    let case = Case { broken: true, ..Case::new(&[(5, 0, 0)], (7, 4, 2), 0.3) };
    check_gradients("lora", &case, &case.inputs());
}

#[test]
fn without_targets_it_is_a_plain_layer() {
    let mut case = Case::new(&[(5, 0, 0), (2, 1, 1)], (7, 4, 2), 0.3);
    case.targets.clear();
    let inputs = case.inputs();
    let (input, _, y) = case.run(&Cpu::new(1), &inputs);
    assert_eq!(input, inputs[0]);
    let (dx, grads) = case.gradients(&Cpu::new(1), &inputs, &random("dy", y.len()), 3.0);
    assert!(dx.iter().all(|x| x.is_finite()) && grads.iter().all(|&g| g == 3.0));
}

/// s and y by the contract's formulas, masks included.
fn naive(case: &Case, inputs: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let [x, adapters, residual, w, _] = inputs else { panic!("five inputs") };
    let dims = case.dims();
    let mut s = vec![0.0; dims.tokens * dims.tail()];
    let mut y = residual.clone();
    if case.bias {
        let bias = random("bias", dims.out_dim);
        y.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += b);
    }
    for i in 0..case.stream.keys.len() {
        let adapter = &adapters[case.stream.adapter[i] as usize * dims.adapter_stride..];
        for (p, t) in case.stream.range(i).enumerate() {
            let x = &x[t * dims.in_dim..][..dims.in_dim];
            for o in 0..dims.out_dim {
                y[t * dims.out_dim + o] +=
                    (0..dims.in_dim).map(|c| x[c] * w[o * dims.in_dim + c]).sum::<f64>();
            }
            for (n, target) in dims.targets.iter().enumerate() {
                let kept = |c: usize| {
                    let counter = [p as u32, c as u32 / 4, target.site, DROPOUT_STREAM];
                    philox(case.stream.keys[i], counter)[c % 4] >= drop_threshold(dims.dropout)
                };
                let drop = |c: usize| if kept(c) { x[c] / (1.0 - dims.dropout) } else { 0.0 };
                for r in 0..dims.rank {
                    let a = &adapter[target.a_offset + r * dims.in_dim..];
                    let value = dims.scale * (0..dims.in_dim).map(|c| drop(c) * a[c]).sum::<f64>();
                    s[t * dims.tail() + n * dims.rank + r] = value;
                    for o in 0..target.out_len {
                        let b = adapter[target.b_offset + o * dims.rank + r];
                        y[t * dims.out_dim + target.out_start + o] += value * b;
                    }
                }
            }
        }
    }
    (s, y)
}

#[test]
fn values_and_masks_are_those_of_the_contract() {
    for dropout in [0.0, 0.35] {
        let bias = dropout > 0.0;
        let case = Case { bias, ..Case::new(&[(1, 1, 0), (5, 0, 1), (123, 1, 0)], (133, 34, 2), dropout) };
        let inputs = case.inputs();
        let (s, y) = naive(&case, &inputs);
        let (input, _, found) = case.run(&Cpu::new(2), &inputs);
        assert_close("s", &input[inputs[0].len()..], &s, 1e-13);
        assert_close("y", &found, &y, 1e-13);
        let single: Vec<Vec<f32>> = inputs.iter().map(|x| to(x)).collect();
        assert_close("y in f32", &case.run(&Cpu::new(2), &single).2, &y, 1e-6);
    }
}

/// Three adapters, four gradient rows, in f32.
fn mixed() -> (Case, Vec<Vec<f32>>, Vec<f32>) {
    let segments = [(1, 0, 0), (5, 1, 1), (123, 2, 2), (64, 1, 1), (200, 0, 3)];
    let case = Case { norm: true, ..Case::new(&segments, (192, 130, 2), 0.2) };
    let inputs: Vec<Vec<f32>> = case.inputs().iter().map(|x| to(x)).collect();
    let dy = to(&random("dy", case.stream.tokens() * case.out_dim));
    (case, inputs, dy)
}

/// Whole chunks of columns, an odd rest, several parts of tokens: the bits of every gradient but that of A.
#[test]
fn a_frozen_a_has_no_gradient_and_changes_no_other() {
    for (norm, in_dim, threads) in [(true, 192, 2), (false, 133, 3)] {
        let segments = [(1, 0, 0), (5, 1, 1), (123, 2, 2), (64, 1, 1), (200, 0, 3)];
        let mut case = Case { norm, ..Case::new(&segments, (in_dim, 130, 2), 0.2) };
        let inputs: Vec<Vec<f32>> = case.inputs().iter().map(|x| to(x)).collect();
        let dy: Vec<f32> = to(&random("dy", case.stream.tokens() * case.out_dim));
        let (dx, grads) = case.gradients(&Cpu::new(threads), &inputs, &dy, 3.0);
        case.frozen = true;
        let (frozen_dx, frozen) = case.gradients(&Cpu::new(threads), &inputs, &dy, 3.0);
        assert_eq!(frozen_dx, dx);
        let stride = case.dims().adapter_stride;
        let mut want = grads.clone();
        for row in want.chunks_mut(stride) {
            for target in &case.targets {
                row[target.a_offset..][..case.rank * in_dim].fill(3.0);
            }
        }
        assert!(frozen == want && want != grads);
    }
}

/// The rows of these segments.
fn rows_of(stream: &Stream, chosen: &[usize], data: &[f32], cols: usize) -> Vec<f32> {
    chosen.iter().flat_map(|&i| stream.range(i)).flat_map(|t| &data[t * cols..][..cols]).copied().collect()
}

#[test]
fn an_adapter_does_not_notice_the_others() {
    let (case, inputs, dy) = mixed();
    let cpu = Cpu::new(2);
    let y = case.run(&cpu, &inputs).2;
    let (dx, grads) = case.gradients(&cpu, &inputs, &dy, 0.0);
    for chosen in [vec![0], vec![1, 3], vec![2], vec![4]] {
        let alone = Case { stream: case.stream.only(&chosen), targets: case.targets.clone(), ..case };
        let take = |data: &[f32], cols| rows_of(&case.stream, &chosen, data, cols);
        let mut own = inputs.clone();
        own[0] = take(&inputs[0], case.in_dim);
        own[2] = take(&inputs[2], case.out_dim);
        assert_eq!(alone.run(&cpu, &own).2, take(&y, case.out_dim), "y of {chosen:?}");
        let (own_dx, own_grads) = alone.gradients(&cpu, &own, &take(&dy, case.out_dim), 0.0);
        assert_eq!(own_dx, take(&dx, case.in_dim), "dx of {chosen:?}");
        let stride = case.dims().adapter_stride;
        let row = case.stream.grad_row[chosen[0]] as usize * stride;
        assert_eq!(own_grads[row..][..stride], grads[row..][..stride], "gradient of {chosen:?}");
        assert!(grads[row..][..stride].iter().any(|&g| g != 0.0));
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (case, inputs, dy) = mixed();
    let run = |threads| {
        let cpu = Cpu::new(threads);
        (case.run(&cpu, &inputs), case.gradients(&cpu, &inputs, &dy, 0.5))
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}

#[test]
fn wrong_shapes_are_errors() {
    let case = Case::new(&[(5, 0, 0), (2, 1, 1)], (7, 4, 2), 0.0);
    let (dims, inputs, cpu) = (case.dims(), case.inputs(), Cpu::new(1));
    let mut input = case.run(&cpu, &inputs).0;
    let (adapters, view) = (&inputs[1], case.stream.view());
    let mut y = vec![0.0; 7 * 4];
    assert_shape_error(cpu.lora_down_forward(&mut input[1..], adapters, view, dims));
    assert_shape_error(cpu.lora_down_forward(&mut input, &adapters[1..], view, dims));
    assert_shape_error(cpu.lora_linear_forward(LoraLinearForward {
        y: &mut y[1..],
        input: &input,
        w: &inputs[3],
        bias: None,
        residual: None,
        adapters,
        segments: view,
        dims,
    }));
    assert_shape_error(cpu.lora_linear_forward(LoraLinearForward {
        y: &mut y,
        input: &input,
        w: &inputs[3],
        bias: Some(&[0.0; 3]),
        residual: None,
        adapters,
        segments: view,
        dims,
    }));
    let short = Segments { keys: &view.keys[1..], ..view };
    assert_shape_error(cpu.lora_down_forward(&mut input, adapters, short, dims));
    let offsets = [0, 7, 5];
    let disordered = Segments { offsets: &offsets[..], ..view };
    assert!(cpu.lora_down_forward(&mut input, adapters, disordered, dims).is_err());
    let mut outside = case.targets.clone();
    outside[0].out_start = 3;
    assert!(
        cpu.lora_down_forward(&mut input, adapters, view, LoraDims { targets: &outside, ..dims }).is_err()
    );
}
