//! T5 attention: bidirectional, causal and cross, bias and dropout.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{
    BucketMap, DROPOUT_STREAM, T5Attention, T5AttentionBackward, T5AttentionDims, T5AttentionForward,
};
use gradtx_kernels::rng::{drop_threshold, philox};

const BUCKETS: usize = 5;
const KEYS: [u64; 4] = [3, 1 << 40, 77, 8];

struct Case {
    dims: T5AttentionDims,
    map: Vec<u32>,
    biased: bool,
}

impl Case {
    fn new(queries: usize, keys: usize, causal: bool, biased: bool, dropout: f64) -> Self {
        let (batch, heads, head_dim) = (3, 2, 5);
        let dims = T5AttentionDims {
            batch,
            queries,
            keys,
            kv_rows: keys,
            heads,
            head_dim,
            causal,
            dropout,
            site: 6,
        };
        Self { dims, map: random_ids("map", queries * keys, BUCKETS), biased }
    }

    /// q, kv and the table.
    fn inputs(&self) -> Vec<Vec<f64>> {
        let d = &self.dims;
        let width = d.heads * d.head_dim;
        let q = random("q", d.batch * d.queries * width);
        let inputs = vec![q, random("kv", 2 * d.batch * d.keys * width), random("table", BUCKETS * d.heads)];
        inputs.into_iter().take(if self.biased { 3 } else { 2 }).collect()
    }

    fn bias<'a, X: CpuReal>(&'a self, inputs: &'a [Vec<X>]) -> Option<BucketMap<'a, Cpu, X>> {
        self.biased.then(|| BucketMap { table: &inputs[2][..], map: &self.map[..], buckets: BUCKETS })
    }

    /// o and the probabilities.
    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> (Vec<X>, Vec<X>) {
        let d = self.dims;
        let mut o = to::<X>(&vec![f64::NAN; inputs[0].len()]);
        let mut probs = nan::<X>(d.batch * d.heads * d.queries * d.keys);
        let keys = if d.dropout > 0.0 { &KEYS[..d.batch] } else { &[] };
        let (q, kv) = (&inputs[0], &inputs[1]);
        cpu.t5_attention_forward(T5AttentionForward {
            o: &mut o,
            probs: &mut probs,
            q,
            kv,
            bias: self.bias(inputs),
            keys,
            dims: d,
        })
        .expect("the shapes fit");
        (o, probs)
    }

    /// dq, dkv and the table's gradient added to `before`.
    fn gradient<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d_o: &[X], before: f64) -> Vec<Vec<X>> {
        let probs = self.run(cpu, inputs).1;
        let (mut dq, mut dkv) = (nan(inputs[0].len()), nan(inputs[1].len()));
        let mut table = to::<X>(&vec![before; BUCKETS * self.dims.heads]);
        let mut d_scores = nan(probs.len());
        let d_table = self.biased.then_some(&mut table[..]);
        let keys = &KEYS[..self.dims.batch];
        let (q, kv, bias) = (&inputs[0], &inputs[1], self.bias(inputs));
        cpu.t5_attention_backward(T5AttentionBackward {
            dq: &mut dq,
            dkv: &mut dkv,
            d_table,
            d_scores: &mut d_scores,
            d_o,
            probs: &probs,
            q,
            kv,
            bias,
            keys,
            dims: self.dims,
        })
        .expect("the shapes fit");
        let all = vec![dq, dkv, table];
        all.into_iter().take(inputs.len()).collect()
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.run(cpu, inputs).0]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        self.gradient(cpu, inputs, &d[0], 0.0).into_iter().map(Some).collect()
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(1, 1, false, true, 0.0),
        Case::new(5, 5, false, true, 0.0),
        Case::new(7, 7, true, true, 0.25),
        Case::new(5, 36, false, false, 0.0),
        Case::new(9, 13, false, false, 0.3),
        Case::new(36, 36, false, true, 0.1),
        Case::new(28, 28, true, true, 0.0),
    ]
}

/// The formulas of the contract.
fn naive(case: &Case, inputs: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let d = &case.dims;
    let width = d.heads * d.head_dim;
    let (mut o, mut probs) = (vec![0.0; inputs[0].len()], vec![]);
    for (b, h) in (0..d.batch).flat_map(|b| (0..d.heads).map(move |h| (b, h))) {
        for i in 0..d.queries {
            let q = &inputs[0][(b * d.queries + i) * width + h * d.head_dim..];
            let score = |j: usize| {
                let k = &inputs[1][(b * d.keys + j) * 2 * width + h * d.head_dim..];
                let bias = if case.biased {
                    inputs[2][case.map[i * d.keys + j] as usize * d.heads + h]
                } else {
                    0.0
                };
                bias + (0..d.head_dim).map(|c| q[c] * k[c]).sum::<f64>()
            };
            let seen = |j: usize| !d.causal || j <= i;
            let exps: Vec<_> = (0..d.keys).map(|j| if seen(j) { score(j).exp() } else { 0.0 }).collect();
            let sum: f64 = exps.iter().sum();
            for (j, e) in exps.iter().enumerate() {
                probs.push(e / sum);
                let counter = [(h * d.queries + i) as u32, j as u32 / 4, d.site, DROPOUT_STREAM];
                if philox(KEYS[b], counter)[j % 4] >= drop_threshold(d.dropout) {
                    for c in 0..d.head_dim {
                        let v = inputs[1][((b * d.keys + j) * 2 + 1) * width + h * d.head_dim + c];
                        o[(b * d.queries + i) * width + h * d.head_dim + c] +=
                            e / sum / (1.0 - d.dropout) * v;
                    }
                }
            }
        }
    }
    (o, probs)
}

#[test]
fn values_are_those_of_the_formula() {
    for case in cases() {
        let inputs = case.inputs();
        let (o, probs) = naive(&case, &inputs);
        let found = case.run(&Cpu::new(2), &inputs);
        assert_close("o", &found.0, &o, 1e-13);
        assert_close("probs", &found.1, &probs, 1e-13);
        let single: Vec<Vec<f32>> = inputs.iter().map(|x| to(x)).collect();
        assert_close("o in f32", &case.run(&Cpu::new(2), &single).0, &o, 2e-6);
    }
}

#[test]
fn gradients() {
    for case in cases() {
        check_gradients("t5 attention", &case, &case.inputs());
    }
}

#[test]
fn table_gradients_are_added_alike_on_all_threads() {
    let case = Case::new(36, 36, true, true, 0.1);
    let inputs: Vec<Vec<f32>> = case.inputs().iter().map(|x| to(x)).collect();
    let d_o: Vec<f32> = to(&random("do", inputs[0].len()));
    let one = (case.run(&Cpu::new(1), &inputs), case.gradient(&Cpu::new(1), &inputs, &d_o, 2.0));
    for threads in [2, 3] {
        assert!(
            one == (
                case.run(&Cpu::new(threads), &inputs),
                case.gradient(&Cpu::new(threads), &inputs, &d_o, 2.0)
            )
        );
    }
    let wide = case.inputs();
    let zero = case.gradient(&Cpu::new(1), &wide, &random("do", wide[0].len()), 0.0);
    let two: Vec<f64> = zero[2].iter().map(|g| g + 2.0).collect();
    assert_close("table", &one.1[2], &two, 1e-5);
}

#[test]
fn one_query_on_a_cache_is_the_last_row() {
    let case = Case::new(9, 9, true, true, 0.0);
    let inputs = case.inputs();
    let expected = case.run(&Cpu::new(1), &inputs).0;
    let d = case.dims;
    let width = d.heads * d.head_dim;
    let kv_rows = 12;
    let mut cache = vec![f64::NAN; d.batch * kv_rows * 2 * width];
    let (mut q, mut last) = (vec![], vec![]);
    for b in 0..d.batch {
        let rows = 9 * 2 * width;
        cache[b * kv_rows * 2 * width..][..rows].copy_from_slice(&inputs[1][b * rows..][..rows]);
        let row = (b * 9 + 8) * width..(b * 9 + 9) * width;
        q.extend_from_slice(&inputs[0][row.clone()]);
        last.extend_from_slice(&expected[row]);
    }
    let dims = T5AttentionDims { queries: 1, kv_rows, causal: false, ..d };
    let bias = BucketMap { table: &inputs[2][..], map: &case.map[8 * 9..], buckets: BUCKETS };
    let (mut o, mut probs) = (vec![f64::NAN; q.len()], vec![f64::NAN; d.batch * d.heads * 9]);
    Cpu::new(1)
        .t5_attention_forward(T5AttentionForward {
            o: &mut o,
            probs: &mut probs,
            q: &q,
            kv: &cache,
            bias: Some(bias),
            keys: &[],
            dims,
        })
        .expect("the shapes fit");
    assert_close("decoded", &o, &last, 1e-13);
}

#[test]
fn wrong_shapes_are_errors() {
    let case = Case::new(4, 3, false, true, 0.0);
    let inputs = case.inputs();
    let (mut o, mut probs) = case.run(&Cpu::new(1), &inputs);
    let (cpu, d) = (Cpu::new(1), case.dims);
    let (q, kv, bias) = (&inputs[0][..], &inputs[1][..], case.bias(&inputs));
    assert_shape_error(cpu.t5_attention_forward(T5AttentionForward {
        o: &mut o[1..],
        probs: &mut probs,
        q,
        kv,
        bias,
        keys: &[],
        dims: d,
    }));
    assert_shape_error(cpu.t5_attention_forward(T5AttentionForward {
        o: &mut o,
        probs: &mut probs[1..],
        q,
        kv,
        bias,
        keys: &[],
        dims: d,
    }));
    assert_shape_error(cpu.t5_attention_forward(T5AttentionForward {
        o: &mut o,
        probs: &mut probs,
        q,
        kv: &kv[1..],
        bias,
        keys: &[],
        dims: d,
    }));
    let masked = T5AttentionDims { dropout: 0.1, ..d };
    assert_shape_error(cpu.t5_attention_forward(T5AttentionForward {
        o: &mut o,
        probs: &mut probs,
        q,
        kv,
        bias,
        keys: &[],
        dims: masked,
    }));
    let map = [BUCKETS as u32; 12];
    let outside = BucketMap { map: &map[..], ..bias.unwrap() };
    assert!(
        cpu.t5_attention_forward(T5AttentionForward {
            o: &mut o,
            probs: &mut probs,
            q,
            kv,
            bias: Some(outside),
            keys: &[],
            dims: d
        })
        .is_err()
    );
}
