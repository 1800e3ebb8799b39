//! Token embedding.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::Embedding;

/// Input table; output x.
struct Case {
    vocab: usize,
    dim: usize,
    rows: usize,
}

impl Case {
    fn ids(&self) -> Vec<u32> {
        random_ids("ids", self.rows, self.vocab)
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let mut x = nan(self.rows * self.dim);
        cpu.embedding_forward(&mut x, &inputs[0], &self.ids(), self.dim).expect("shapes agree");
        vec![x]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut d_table = before(inputs[0].len());
        cpu.embedding_backward(&mut d_table, &d[0], &self.ids(), self.dim).expect("shapes agree");
        vec![Some(added(&d_table))]
    }
}

#[test]
fn gradients_f32_and_threads() {
    // Fewer rows of the table than ids, so that ids repeat; and the other way round.
    for (vocab, dim, rows) in [(1, 1, 1), (5, 123, 123), (123, 5, 5), (41, 301, 123)] {
        let case = Case { vocab, dim, rows };
        let inputs = [random("table", vocab * dim)];
        check_gradients("embedding", &case, &inputs);
        check_f32("embedding", &case, &inputs, 1e-6);
    }
}

/// Rows of a table added to those that are there: a second input beside it.
struct Added(Case);

impl OpCase for Added {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let mut x = inputs[1].clone();
        cpu.embedding_add(&mut x, &inputs[0], &self.0.ids(), self.0.dim).expect("shapes agree");
        vec![x]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let d_table = self.0.backward(cpu, inputs, d).remove(0);
        vec![d_table, Some(d[0].clone())]
    }
}

#[test]
fn rows_that_are_added() {
    for (vocab, dim, rows) in [(1, 1, 1), (5, 123, 123), (41, 301, 123)] {
        let case = Added(Case { vocab, dim, rows });
        let inputs = [random("table", vocab * dim), random("x", rows * dim)];
        check_gradients("embedding added", &case, &inputs);
        check_f32("embedding added", &case, &inputs, 1e-6);
    }
}

#[test]
fn rows_are_those_of_the_ids() {
    let (table, ids, cpu) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 0, 2], Cpu::new(1));
    let mut x = [0.0f32; 6];
    cpu.embedding_forward(&mut x, &table, &ids, 2).unwrap();
    assert_eq!(x, [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
    cpu.embedding_add(&mut x, &table, &ids, 2).unwrap();
    assert_eq!(x, [10.0, 12.0, 2.0, 4.0, 10.0, 12.0]);
}

#[test]
fn wrong_shapes_and_ids() {
    let cpu = Cpu::new(2);
    let table = random("table", 12);
    let mut x = nan::<f64>(8);
    assert_shape_error(cpu.embedding_forward(&mut x, &table, &[0], 4));
    assert_shape_error(cpu.embedding_forward(&mut x, &table[1..], &[0, 1], 4));
    assert!(cpu.embedding_forward(&mut x, &table, &[0, 3], 4).is_err(), "id beyond the table");
    assert_shape_error(cpu.embedding_add(&mut x, &table, &[0], 4));
    assert_shape_error(cpu.embedding_add(&mut x, &table[1..], &[0, 1], 4));
    assert!(cpu.embedding_add(&mut x, &table, &[0, 3], 4).is_err(), "id beyond the table");
    let mut d_table = table.clone();
    assert_shape_error(cpu.embedding_backward(&mut d_table, &x, &[0], 4));
    assert_shape_error(cpu.embedding_backward(&mut d_table[1..], &x, &[0, 1], 4));
    assert!(cpu.embedding_backward(&mut d_table, &x, &[0, 3], 4).is_err(), "id beyond the table");
}
