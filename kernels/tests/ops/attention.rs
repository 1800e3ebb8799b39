//! Packed attention and its cache.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{
    Attention, AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, CacheStore, DecodeDims,
    QkvDims,
};

struct Case {
    offsets: Vec<u32>,
    dims: AttentionDims,
}

impl Case {
    fn new(lengths: &[u32], (heads, kv_heads, head_dim): (usize, usize, usize), gap: usize) -> Self {
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        }));
        let qkv = QkvDims { tokens: offsets[lengths.len()] as usize, heads, kv_heads, head_dim };
        let scale = 1.0 / (head_dim as f64).sqrt();
        let dims = AttentionDims { qkv, segments: lengths.len(), scale, o_stride: heads * head_dim + gap };
        Self { offsets, dims }
    }

    fn qkv(&self) -> Vec<f64> {
        random("qkv", self.dims.qkv.tokens * self.dims.qkv.row())
    }

    fn run<X: CpuReal>(&self, cpu: &Cpu, qkv: &[X]) -> (Vec<X>, Vec<X>) {
        let QkvDims { tokens, heads, .. } = self.dims.qkv;
        let mut o = vec![X::zero(); tokens * self.dims.o_stride];
        let mut lse = nan::<X>(heads * tokens);
        cpu.attention_forward(AttentionForward {
            o: &mut o,
            lse: &mut lse,
            qkv,
            offsets: &self.offsets,
            dims: self.dims,
        })
        .expect("the shapes fit");
        (o, lse)
    }

    fn gradient<X: CpuReal>(&self, cpu: &Cpu, qkv: &[X], d_o: &[X]) -> Vec<X> {
        let (o, lse) = self.run(cpu, qkv);
        let mut dqkv = nan::<X>(qkv.len());
        let mut delta = nan::<X>(lse.len());
        cpu.attention_backward(AttentionBackward {
            dqkv: &mut dqkv,
            delta: &mut delta,
            d_o,
            o: &o,
            lse: &lse,
            qkv,
            offsets: &self.offsets,
            dims: self.dims,
        })
        .expect("the shapes fit");
        dqkv
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.run(cpu, &inputs[0]).0]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        vec![Some(self.gradient(cpu, &inputs[0], &d[0]))]
    }
}

/// The formulas of the contract, one query at a time.
fn naive(case: &Case, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let QkvDims { tokens, heads, kv_heads, head_dim } = case.dims.qkv;
    let row = case.dims.qkv.row();
    let mut o = vec![0.0; tokens * case.dims.o_stride];
    let mut lse = vec![0.0; heads * tokens];
    for segment in case.offsets.windows(2) {
        for t in segment[0] as usize..segment[1] as usize {
            for h in 0..heads {
                let kv = h / (heads / kv_heads);
                let q = &qkv[t * row + h * head_dim..][..head_dim];
                let at = |u: usize, first: usize| &qkv[u * row + (first + kv) * head_dim..][..head_dim];
                let seen = segment[0] as usize..t + 1;
                let exps: Vec<f64> = seen
                    .clone()
                    .map(|u| {
                        let dot: f64 = q.iter().zip(at(u, heads)).map(|(a, b)| a * b).sum();
                        (case.dims.scale * dot).exp()
                    })
                    .collect();
                let sum: f64 = exps.iter().sum();
                lse[h * tokens + t] = sum.ln();
                for (u, e) in seen.zip(exps) {
                    for (d, v) in at(u, heads + kv_heads).iter().enumerate() {
                        o[t * case.dims.o_stride + h * head_dim + d] += e / sum * v;
                    }
                }
            }
        }
    }
    (o, lse)
}

#[test]
fn values_are_those_of_the_formula() {
    for (lengths, heads) in
        [(vec![1, 5, 123, 300], (4, 2, 8)), (vec![64, 65], (3, 1, 20)), (vec![7], (2, 2, 128))]
    {
        let case = Case::new(&lengths, heads, 3);
        let qkv = case.qkv();
        let (o, lse) = naive(&case, &qkv);
        let found = case.run(&Cpu::new(2), &qkv);
        assert_close("o", &found.0, &o, 1e-13);
        assert_close("lse", &found.1, &lse, 1e-13);
        let found = case.run(&Cpu::new(2), &to::<f32>(&qkv));
        assert_close("o in f32", &found.0, &o, 2e-6);
        assert_close("lse in f32", &found.1, &lse, 2e-6);
        let d_o = random("do", o.len());
        let gradient = case.gradient(&Cpu::new(2), &qkv, &d_o);
        assert_close(
            "dqkv in f32",
            &case.gradient(&Cpu::new(2), &to::<f32>(&qkv), &to(&d_o)),
            &gradient,
            5e-6,
        );
    }
}

#[test]
fn gradients() {
    for (lengths, heads, gap) in [
        (vec![1], (2, 1, 2), 0),
        (vec![3, 1, 5], (4, 2, 6), 2),
        (vec![123, 1, 66], (2, 1, 4), 0),
        (vec![9], (3, 3, 8), 1),
    ] {
        let case = Case::new(&lengths, heads, gap);
        check_gradients("attention", &case, &[case.qkv()]);
    }
}

/// Attention whose backward is off in one value.
struct Broken(Case);

impl OpCase for Broken {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        self.0.forward(cpu, inputs)
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut dqkv = self.0.gradient(cpu, &inputs[0], &d[0]);
        dqkv[20] *= X::from_f64(1.0 + 1e-5);
        vec![Some(dqkv)]
    }
}

#[test]
#[should_panic(expected = "gradient of input 0")]
fn the_check_sees_one_wrong_element() {
    let case = Case::new(&[5], (2, 1, 2), 0);
    check_gradients("attention", &Broken(Case::new(&[5], (2, 1, 2), 0)), &[case.qkv()]);
}

#[test]
fn segments_depend_on_no_other_and_on_no_threads() {
    let lengths = [1, 5, 123, 70];
    let shape = (6, 2, 16);
    let case = Case::new(&lengths, shape, 0);
    let qkv: Vec<f32> = to(&case.qkv());
    let (o, lse) = case.run(&Cpu::new(1), &qkv);
    let d_o: Vec<f32> = to(&random("do", o.len()));
    let dqkv = case.gradient(&Cpu::new(1), &qkv, &d_o);
    for threads in [2, 3] {
        assert_eq!(case.run(&Cpu::new(threads), &qkv), (o.clone(), lse.clone()));
        assert_eq!(case.gradient(&Cpu::new(threads), &qkv, &d_o), dqkv);
    }
    for (i, &len) in lengths.iter().enumerate() {
        let alone = Case::new(&[len], shape, 0);
        let tokens = case.offsets[i] as usize..case.offsets[i + 1] as usize;
        let rows = |data: &[f32], cols: usize| data[tokens.start * cols..tokens.end * cols].to_vec();
        let (own, width) = (rows(&qkv, case.dims.qkv.row()), case.dims.o_stride);
        let (own_o, own_lse) = alone.run(&Cpu::new(2), &own);
        assert_eq!(own_o, rows(&o, width), "segment of {len}");
        assert_eq!(own_lse[..len as usize], lse[tokens.clone()]);
        assert_eq!(alone.gradient(&Cpu::new(2), &own, &rows(&d_o, width)), rows(&dqkv, case.dims.qkv.row()));
    }
}

#[test]
fn decoding_continues_a_prompt() {
    let lengths = [1u32, 5, 123];
    let case = Case::new(&lengths, (4, 2, 8), 0);
    let qkv = case.qkv();
    let (row, cols) = (case.dims.qkv.row(), case.dims.o_stride);
    let expected = case.run(&Cpu::new(1), &qkv).0;
    let (slots, capacity) = (5, 130);
    let slot = [4u32, 0, 2];
    let dims = |tokens| DecodeDims {
        qkv: QkvDims { tokens, ..case.dims.qkv },
        capacity,
        slots,
        scale: case.dims.scale,
    };
    // Prompts are all tokens but the last; the prompt of the first segment would be empty.
    let last = |i: usize| case.offsets[i + 1] as usize - 1;
    let prompt = |i: usize| case.offsets[i] as usize..last(i);
    let packed: Vec<f64> = (1..3).flat_map(prompt).flat_map(|t| &qkv[t * row..][..row]).copied().collect();
    let width = slots * capacity * 2 * 8;
    let (mut k, mut v) = (vec![f64::NAN; width], vec![f64::NAN; width]);
    let cpu = Cpu::new(2);
    cpu.cache_store(CacheStore {
        k_cache: &mut k,
        v_cache: &mut v,
        qkv: &packed,
        offsets: &[0, 4, 126],
        slot: &slot[1..],
        dims: dims(126),
    })
    .expect("the shapes fit");
    let new: Vec<f64> = (0..3).flat_map(|i| &qkv[last(i) * row..][..row]).copied().collect();
    let mut o = vec![f64::NAN; 3 * cols];
    let position = lengths.map(|len| len - 1);
    cpu.attention_decode(AttentionDecode {
        o: &mut o,
        k_cache: &mut k,
        v_cache: &mut v,
        qkv: &new,
        slot: &slot,
        position: &position,
        dims: dims(3),
    })
    .expect("the shapes fit");
    let rows: Vec<f64> = (0..3).flat_map(|i| &expected[last(i) * cols..][..cols]).copied().collect();
    assert_close("decoded", &o, &rows, 1e-13);
    let beyond = cpu.attention_decode(AttentionDecode {
        o: &mut o,
        k_cache: &mut k,
        v_cache: &mut v,
        qkv: &new,
        slot: &slot,
        position: &[0, 130, 0],
        dims: dims(3),
    });
    assert!(beyond.is_err());
    assert!(
        cpu.attention_decode(AttentionDecode {
            o: &mut o,
            k_cache: &mut k,
            v_cache: &mut v,
            qkv: &new,
            slot: &[0, 5, 1],
            position: &position,
            dims: dims(3)
        })
        .is_err()
    );
}

#[test]
fn wrong_shapes_are_errors() {
    let case = Case::new(&[2, 3], (2, 1, 4), 0);
    let (qkv, cpu) = (case.qkv(), Cpu::new(1));
    let (mut o, mut lse) = case.run(&Cpu::new(1), &qkv);
    assert_shape_error(cpu.attention_forward(AttentionForward {
        o: &mut o[1..],
        lse: &mut lse,
        qkv: &qkv,
        offsets: &case.offsets,
        dims: case.dims,
    }));
    assert_shape_error(cpu.attention_forward(AttentionForward {
        o: &mut o,
        lse: &mut lse[1..],
        qkv: &qkv,
        offsets: &case.offsets,
        dims: case.dims,
    }));
    assert_shape_error(cpu.attention_forward(AttentionForward {
        o: &mut o,
        lse: &mut lse,
        qkv: &qkv[1..],
        offsets: &case.offsets,
        dims: case.dims,
    }));
    assert_shape_error(cpu.attention_forward(AttentionForward {
        o: &mut o,
        lse: &mut lse,
        qkv: &qkv,
        offsets: &case.offsets[1..],
        dims: case.dims,
    }));
    assert!(
        cpu.attention_forward(AttentionForward {
            o: &mut o,
            lse: &mut lse,
            qkv: &qkv,
            offsets: &[0, 2, 4],
            dims: case.dims
        })
        .is_err()
    );
}
