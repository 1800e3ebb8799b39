//! Operations of a step, as `--profile` names them.

use super::work::{LAUNCH, Work};
use crate::counts::{self, Count};
use crate::measured::Ceilings;
use crate::profile::floor;
use std::collections::HashMap;

/// All launches of one name.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Operation {
    /// The kernel's name; products of matrices with their dimensions.
    pub name: String,
    /// Launches.
    pub calls: usize,
    /// What all of them take.
    pub count: Count,
    /// What kind of work it is.
    pub work: Work,
    /// Runs beside the others, on the second queue.
    pub beside: bool,
}

impl Operation {
    /// Seconds that it takes at least.
    pub fn floor(&self, ceilings: &Ceilings) -> f64 {
        floor(self.count, ceilings)
    }

    /// Seconds that it should take, by the share of its floor that this kind of work reaches.
    pub fn expected(&self, ceilings: &Ceilings) -> f64 {
        let between = if self.beside { 0.0 } else { LAUNCH };
        self.work.seconds(self.count, ceilings) + self.calls as f64 * between
    }
}

/// The operations of a step, in the order of their first launches.
#[derive(Clone, Debug, Default)]
pub(super) struct Operations {
    all: Vec<Operation>,
    by_name: HashMap<String, usize>,
    beside: bool,
}

impl Operations {
    /// `calls` launches, each of which takes `each`.
    pub fn add(&mut self, calls: usize, name: impl Into<String>, each: Count, work: Work) {
        if calls == 0 {
            return;
        }
        let (name, n) = (name.into(), calls as f64);
        let count = Count { flops: n * each.flops, bytes: n * each.bytes };
        let beside = self.beside;
        let at = *self.by_name.entry(name.clone()).or_insert(self.all.len());
        match self.all.get_mut(at) {
            Some(found) => {
                found.calls += calls;
                found.count = found.count + count;
                found.beside &= beside;
            }
            None => self.all.push(Operation { name, calls, count, work, beside }),
        }
    }

    /// What `add` adds runs beside the rest, on the second queue.
    pub fn beside(&mut self, add: impl FnOnce(&mut Self)) {
        self.beside = true;
        add(self);
        self.beside = false;
    }

    /// `calls` products `[m, k] · [k, n]` of values of `x` bytes into such values.
    pub fn product(&mut self, calls: usize, (m, n, k): (usize, usize, usize), x: usize) {
        let count = counts::whole_product(m, n, k, (x, x as f64));
        self.add(calls, product_name(m, n, k), count, Work::of_product(count));
    }

    /// Those whose sums are accumulators: gradients of weights.
    pub fn weight_gradient(&mut self, calls: usize, (m, n, k): (usize, usize, usize), x: usize) {
        let count = counts::whole_product(m, n, k, (x, counts::ACC));
        self.add(calls, product_name(m, n, k), count, Work::of_product(count));
    }

    /// The operations.
    pub fn all(&self) -> &[Operation] {
        &self.all
    }
}

fn product_name(m: usize, n: usize, k: usize) -> String {
    format!("product {m}x{n}x{k}")
}
