//! [`FlatAdamW`]: AdamW with its moments over a flat buffer.
//!
//! Either all of a matrix `[rows, len]`, where each row is one model or adapter and
//! is clipped by its own norm; or some ranges of one row, clipped by their common
//! norm, when another optimizer takes the rest. The equations are in the contract
//! [`gradtx_kernels::ops::AdamW`].

use super::finite_norms;
use crate::{Error, Result};
use gradtx_kernels::{
    Device, Real,
    ops::{AdamW, AdamWStep},
};
use std::ops::Range;

/// AdamW's state: first and second moments, and scratch for norms.
pub struct FlatAdamW<D: Device, A: Real> {
    rows: usize,
    len: usize,
    ranges: Vec<Range<usize>>,
    /// `[rows, len]`, or the ranges one after the other.
    m: D::Buf<A>,
    /// As `m`.
    v: D::Buf<A>,
    /// `[max(rows, ranges)]`
    sums: D::Buf<A>,
    /// `[rows]`
    scale: D::Buf<A>,
}

impl<D: AdamW<A>, A: Real> FlatAdamW<D, A> {
    /// For `rows` independent rows of `len` values. Moments start at 0.
    pub fn new(device: &D, rows: usize, len: usize) -> Result<Self> {
        Self::with_ranges(device, rows, len, vec![0..len])
    }

    /// For these ranges of a buffer of `len` values, as one model. They must not overlap.
    pub fn over_ranges(device: &D, len: usize, mut ranges: Vec<Range<usize>>) -> Result<Self> {
        ranges.retain(|r| !r.is_empty());
        ranges.sort_by_key(|r| r.start);
        let apart = ranges.windows(2).all(|w| w[0].end <= w[1].start);
        if !apart || ranges.last().is_some_and(|r| r.end > len) {
            let why = format!("they overlap or end after element {len}: {ranges:?}");
            return Err(Error::invalid("ranges for AdamW", why));
        }
        Self::with_ranges(device, 1, len, ranges)
    }

    fn with_ranges(device: &D, rows: usize, len: usize, ranges: Vec<Range<usize>>) -> Result<Self> {
        let held: usize = rows * ranges.iter().map(Range::len).sum::<usize>();
        Ok(Self {
            m: device.zeros(held)?,
            v: device.zeros(held)?,
            sums: device.zeros(rows.max(ranges.len()))?,
            scale: device.zeros(rows)?,
            rows,
            len,
            ranges,
        })
    }

    /// Elements of each moment.
    pub fn state_len(&self) -> usize {
        D::len(&self.m)
    }

    /// First and second moments.
    pub fn moments(&self) -> (&D::Buf<A>, &D::Buf<A>) {
        (&self.m, &self.v)
    }

    /// First and second moments, to be filled from a checkpoint.
    pub fn moments_mut(&mut self) -> (&mut D::Buf<A>, &mut D::Buf<A>) {
        (&mut self.m, &mut self.v)
    }

    /// One step on `params` with `grads`, both `[rows, len]`. Each row's gradient is
    /// first scaled to a norm of at most `max_norm`. Returns the norm of each row
    /// before that; if one is not finite, fails and changes nothing.
    pub fn step(
        &mut self,
        device: &D,
        mut params: D::ViewMut<'_, A>,
        grads: D::View<'_, A>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<Vec<f64>> {
        let norms = self.norms(device, grads, step.step)?;
        match max_norm {
            Some(max) => device.clip_scale(
                D::all_mut(&mut self.scale),
                D::view(&self.sums, 0..self.rows),
                self.rows,
                max,
            )?,
            None => device.fill(D::all_mut(&mut self.scale), A::one())?,
        }
        let mut at = 0;
        for range in &self.ranges {
            let part = if self.rows == 1 { range.clone() } else { 0..self.rows * self.len };
            let state = at..at + part.len();
            at = state.end;
            device.adamw(
                D::slice_mut(D::reborrow(&mut params), part.clone()),
                D::view_mut(&mut self.m, state.clone()),
                D::view_mut(&mut self.v, state),
                D::slice(grads, part.clone()),
                D::all(&self.scale),
                self.rows,
                part.len() / self.rows,
                step,
            )?;
        }
        Ok(norms)
    }

    /// Leaves each row's sum of squares in `sums[..rows]`, and returns its root.
    fn norms(&mut self, device: &D, grads: D::View<'_, A>, step: u32) -> Result<Vec<f64>> {
        let name = |row: usize| if self.rows == 1 { "the model".into() } else { format!("row {row}") };
        let step = format!("step {step}");
        if self.ranges.len() == 1 && self.ranges[0] == (0..self.len) {
            let sums = D::view_mut(&mut self.sums, 0..self.rows);
            device.sum_squares(sums, grads, self.rows, self.len)?;
            return finite_norms(&device.to_host(D::view(&self.sums, 0..self.rows))?, step, name);
        }
        for (i, range) in self.ranges.iter().enumerate() {
            let sum = D::view_mut(&mut self.sums, i..i + 1);
            device.sum_squares(sum, D::slice(grads, range.clone()), 1, range.len())?;
        }
        let parts = device.to_host(D::view(&self.sums, 0..self.ranges.len()))?;
        let total = A::from_f64(parts.iter().map(|s| s.to_f64()).sum());
        device.upload(D::view_mut(&mut self.sums, 0..1), &[total])?;
        finite_norms(&[total], step, name)
    }
}
