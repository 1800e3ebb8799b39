//! LM head with its loss, and argmax.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{LmHead, LmHeadDims, LmHeadLoss, LmHeadScratch};
use gradtx_kernels::{Error, Result};

/// Inputs x, w; output the loss of every label. Gradients of the losses are the weights.
#[derive(Clone, Copy)]
struct Case(LmHeadDims);

/// What one call is given besides x and w.
struct Call<'a, X> {
    dx: Option<&'a mut [X]>,
    dw: Option<&'a mut [X]>,
    weights: &'a [X],
    rows: Vec<u32>,
    targets: Vec<u32>,
}

impl Case {
    fn new(tokens: usize, labels: usize, hidden: usize, vocab: usize, chunk: usize) -> Self {
        Self(LmHeadDims { tokens, labels, hidden, vocab, chunk })
    }

    fn inputs(&self) -> Vec<Vec<f64>> {
        let LmHeadDims { tokens, hidden, vocab, .. } = self.0;
        let w = random("w", vocab * hidden).iter().map(|w| w / (hidden as f64).sqrt()).collect();
        vec![random("x", tokens * hidden), w]
    }

    /// As many rows as there are labels, in increasing order.
    fn rows(&self) -> Vec<u32> {
        let LmHeadDims { tokens, labels, .. } = self.0;
        (0..labels).map(|m| ((m + 1) * tokens / labels - 1) as u32).collect()
    }

    fn targets(&self) -> Vec<u32> {
        random_ids("targets", self.0.labels, self.0.vocab)
    }

    fn call<'a, X: CpuReal>(&self, weights: &'a [X]) -> Call<'a, X> {
        Call { dx: None, dw: None, weights, rows: self.rows(), targets: self.targets() }
    }

    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], call: Call<'_, X>) -> Result<Vec<X>> {
        let LmHeadDims { labels, hidden, vocab, chunk, .. } = self.0;
        let mut loss = nan(labels);
        let (mut logits, mut rows, mut d_rows) =
            (nan(chunk * vocab), nan(chunk * hidden), nan(chunk * hidden));
        let scratch = LmHeadScratch { logits: &mut logits[..], rows: &mut rows[..], d_rows: &mut d_rows[..] };
        let Call { dx, dw, weights, rows, targets } = call;
        cpu.lm_head_loss(LmHeadLoss {
            loss: &mut loss,
            dx,
            dw,
            scratch,
            x: &inputs[0],
            w: &inputs[1],
            rows: &rows,
            targets: &targets,
            weights,
            dims: self.0,
        })?;
        Ok(loss)
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let weights = vec![X::one(); self.0.labels];
        vec![self.run(cpu, inputs, self.call(&weights)).expect("shapes agree")]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let (mut dx, mut dw) = (nan(inputs[0].len()), before(inputs[1].len()));
        let call = Call { dx: Some(&mut dx), dw: Some(&mut dw), ..self.call(&d[0]) };
        self.run(cpu, inputs, call).expect("shapes agree");
        vec![Some(dx), Some(added(&dw))]
    }
}

#[test]
fn gradients() {
    // One chunk, several with a rest, one label per chunk, more room than labels.
    for (tokens, labels, hidden, vocab, chunk) in
        [(1, 1, 1, 2, 1), (5, 5, 3, 7, 2), (123, 41, 5, 33, 8), (9, 4, 12, 123, 1), (7, 3, 5, 65, 100)]
    {
        let case = Case::new(tokens, labels, hidden, vocab, chunk);
        check_gradients(&format!("{:?}", case.0), &case, &case.inputs());
    }
}

#[test]
fn f32_and_threads() {
    let case = Case::new(60, 41, 24, 3001, 16);
    check_f32("lm_head", &case, &case.inputs(), 1e-5);
}

#[test]
fn loss_is_the_formula_and_chunks_do_not_matter() {
    let case = Case::new(9, 5, 12, 123, 2);
    let inputs = case.inputs();
    let expected: Vec<f64> = case
        .rows()
        .iter()
        .zip(case.targets())
        .map(|(&row, target)| {
            let x = &inputs[0][row as usize * 12..][..12];
            let z: Vec<f64> =
                inputs[1].chunks(12).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
            z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[target as usize]
        })
        .collect();
    for chunk in [1, 2, 5] {
        let case = Case(LmHeadDims { chunk, ..case.0 });
        assert_close("loss", &case.forward(&Cpu::new(1), &inputs)[0], &expected, 1e-13);
    }
}

#[test]
fn large_logits_do_not_overflow_and_nan_shows() {
    let case = Case::new(1, 1, 1, 3, 1);
    let call = || Call { targets: vec![1], ..case.call(&[1.0f32]) };
    let loss = case.run(&Cpu::new(1), &[vec![1000.0], vec![2.0, 1.9, -5.0]], call()).unwrap();
    assert_close("loss", &loss, &[100.0f32], 1e-5);
    let loss = case.run(&Cpu::new(1), &[vec![1000.0], vec![2.0, 1.9, f32::NAN]], call()).unwrap();
    assert!(loss[0].is_nan());
}

#[test]
fn gradients_alone_equal_those_together() {
    let case = Case::new(9, 5, 12, 123, 2);
    let (cpu, inputs, weights) = (Cpu::new(2), case.inputs(), random("weights", 5));
    let both = case.backward(&cpu, &inputs, std::slice::from_ref(&weights));
    let mut dx = nan::<f64>(inputs[0].len());
    case.run(&cpu, &inputs, Call { dx: Some(&mut dx), ..case.call(&weights) }).unwrap();
    assert_eq!(both[0].as_ref(), Some(&dx));
    let mut dw = before::<f64>(inputs[1].len());
    case.run(&cpu, &inputs, Call { dw: Some(&mut dw), ..case.call(&weights) }).unwrap();
    assert_eq!(both[1].as_ref(), Some(&added(&dw)));
    // Rows without a label get no gradient.
    let labelled = case.rows();
    for (row, dx) in dx.chunks(12).enumerate() {
        assert_eq!(dx.iter().all(|&d| d == 0.0), !labelled.contains(&(row as u32)));
    }
}

#[test]
fn wrong_shapes_rows_and_targets() {
    let case = Case::new(4, 2, 3, 5, 2);
    let (cpu, inputs, weights) = (Cpu::new(1), case.inputs(), random("weights", 2));
    let run = |inputs: &[Vec<f64>], call| case.run(&cpu, inputs, call).map(|_| ());
    run(&inputs, case.call(&weights)).unwrap();
    assert_shape_error(run(&inputs, case.call(&weights[1..])));
    assert_shape_error(run(&[inputs[0][1..].to_vec(), inputs[1].clone()], case.call(&weights)));
    assert_shape_error(run(&[inputs[0].clone(), inputs[1][1..].to_vec()], case.call(&weights)));
    assert_shape_error(run(&inputs, Call { rows: vec![1], ..case.call(&weights) }));
    assert_shape_error(run(&inputs, Call { targets: vec![1], ..case.call(&weights) }));
    let (mut short_dx, mut short_dw) = ([0.0; 3], [0.0; 3]);
    assert_shape_error(run(&inputs, Call { dx: Some(&mut short_dx), ..case.call(&weights) }));
    assert_shape_error(run(&inputs, Call { dw: Some(&mut short_dw), ..case.call(&weights) }));
    for (rows, targets) in [(vec![1, 4], vec![0, 1]), (vec![2, 2], vec![0, 1]), (vec![0, 1], vec![0, 5])] {
        let refused = run(&inputs, Call { rows, targets, ..case.call(&weights) });
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    }
}

#[test]
fn argmax_takes_the_first_of_equals() {
    for threads in [1, 3] {
        let cpu = Cpu::new(threads);
        for cols in [1, 5, 123, 1024, 5001] {
            let rows = 17;
            // Few values, so that the largest stands in many places.
            let logits: Vec<f32> =
                random_ids("logits", rows * cols, 7).iter().map(|&i| i as f32 - 9.0).collect();
            let mut ids = vec![u32::MAX; rows];
            cpu.argmax(&mut ids, &logits, rows, cols).unwrap();
            for (id, row) in ids.iter().zip(logits.chunks(cols)) {
                let mut first = 0;
                for c in 1..cols {
                    if row[c] > row[first] {
                        first = c;
                    }
                }
                assert_eq!(*id as usize, first);
            }
        }
    }
}

#[test]
fn argmax_of_unusual_rows_and_wrong_shapes() {
    let cpu = Cpu::new(1);
    let (low, nan) = (f32::NEG_INFINITY, f32::NAN);
    let mut ids = [9; 4];
    let logits = [low, low, low, nan, -2.0, -2.0, 1.0, nan, 3.0, nan, nan, nan];
    cpu.argmax(&mut ids, &logits, 4, 3).unwrap();
    assert_eq!(ids, [0, 1, 2, 0]);
    assert_shape_error(cpu.argmax(&mut ids[1..], &logits, 4, 3));
    assert_shape_error(cpu.argmax(&mut ids, &logits[1..], 4, 3));
    assert!(cpu.argmax(&mut ids, &[] as &[f32], 4, 0).is_err());
}
