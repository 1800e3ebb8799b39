//! [`FlatAdamW`]: AdamW with its moments over a flat buffer.
//!
//! Either all of a matrix `[rows, len]`, or the same range of every row, where each row is one model or adapter
//! and is clipped by its own norm; or some ranges of one row, clipped by their common
//! norm, when another optimizer takes the rest, or by the norm of the whole row, when other
//! ranks take the rest. The equations are in the contract [`gradtx_kernels::ops::AdamW`].

use super::finite_norms;
use crate::buffers::Allocator;
use crate::plan::Purpose;
use crate::{Error, Result};
use gradtx_kernels::ops::AdamWUpdate;
use gradtx_kernels::{Buffer, View, ViewMut};
use gradtx_kernels::{
    Device, Real,
    ops::{AdamW, AdamWCast, AdamWStep},
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

/// Elements of one call: in the gradients, in the moments, and in the parameters as they were given; and the rows
/// that they are of.
struct Part {
    all: Range<usize>,
    state: Range<usize>,
    params: Range<usize>,
    rows: Range<usize>,
}

impl<D: AdamW<A>, A: Real> FlatAdamW<D, A> {
    /// For `rows` independent rows of `len` values. Moments start at 0.
    pub fn new(device: &D, rows: usize, len: usize) -> Result<Self> {
        Self::allocate(&mut Allocator::new(device, Purpose::Optimizer), rows, len)
    }

    /// For these ranges of a buffer of `len` values, as one model. They must not overlap.
    pub fn over_ranges(device: &D, len: usize, ranges: Vec<Range<usize>>) -> Result<Self> {
        Self::allocate_ranges(&mut Allocator::new(device, Purpose::Optimizer), len, ranges)
    }

    /// [`Self::new`] with an allocator.
    pub fn allocate(alloc: &mut Allocator<'_, D>, rows: usize, len: usize) -> Result<Self> {
        Self::with_ranges(alloc, rows, len, std::iter::once(0..len).collect())
    }

    /// [`Self::over_ranges`] with an allocator.
    pub fn allocate_ranges(
        alloc: &mut Allocator<'_, D>,
        len: usize,
        mut ranges: Vec<Range<usize>>,
    ) -> Result<Self> {
        ranges.retain(|r| !r.is_empty());
        ranges.sort_by_key(|r| r.start);
        let apart = ranges.windows(2).all(|w| w[0].end <= w[1].start);
        if !apart || ranges.last().is_some_and(|r| r.end > len) {
            let why = format!("they overlap or end after element {len}: {ranges:?}");
            return Err(Error::invalid("ranges for AdamW", why));
        }
        Self::with_ranges(alloc, 1, len, ranges)
    }

    /// For `rows` independent rows of `len` values, of which only this range is trained.
    pub fn allocate_in_rows(
        alloc: &mut Allocator<'_, D>,
        rows: usize,
        len: usize,
        trained: Range<usize>,
    ) -> Result<Self> {
        if trained.is_empty() || trained.end > len {
            return Err(Error::invalid("range for AdamW", format!("{trained:?} of {len} values")));
        }
        Self::with_ranges(alloc, rows, len, std::iter::once(trained).collect())
    }

    fn with_ranges(
        alloc: &mut Allocator<'_, D>,
        rows: usize,
        len: usize,
        ranges: Vec<Range<usize>>,
    ) -> Result<Self> {
        let before = alloc.set_purpose(Purpose::Optimizer);
        let held = [rows, ranges.iter().map(Range::len).sum()];
        let held = if rows == 1 { &held[1..] } else { &held[..] };
        let (m, v) = (alloc.buffer("first moments", held)?, alloc.buffer("second moments", held)?);
        alloc.set_purpose(Purpose::Gradients);
        let sums = alloc.buffer("gradient norm sums", &[rows.max(ranges.len())])?;
        let scale = alloc.buffer("gradient clip scale", &[rows])?;
        alloc.set_purpose(before);
        Ok(Self { m, v, sums, scale, rows, len, ranges })
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
        params: D::ViewMut<'_, A>,
        grads: D::View<'_, A>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<Vec<f64>> {
        let (at, rows) = (format!("step {}", step.step), self.rows);
        let name = |row: usize| if rows == 1 { "the model".into() } else { format!("row {row}") };
        if self.is_whole() {
            // Norm and clipping stay on the device: the step itself refuses what is not finite.
            device.sum_squares(self.sums.view_mut(0..rows), grads, rows, self.len)?;
            self.update(device, params, grads, step, max_norm)?;
            return finite_norms(&device.to_host(self.sums.view(0..rows))?, at, name);
        }
        let sums = self.sums_of_squares(device, grads)?;
        if rows > 1 {
            let norms = finite_norms(&sums, at, name)?;
            self.update(device, params, grads, step, max_norm)?;
            return Ok(norms);
        }
        let total = A::from_f64(sums.iter().map(|s| s.to_f64()).sum());
        device.upload(self.sums.view_mut(0..1), &[total])?;
        let norms = finite_norms(&[total], at, name)?;
        self.update(device, params, grads, step, max_norm)?;
        Ok(norms)
    }

    /// Sum of squares of the gradients of all ranges, for the norm of a row of which other
    /// ranks have the rest.
    pub fn sum_squares(&mut self, device: &D, grads: D::View<'_, A>) -> Result<f64> {
        let sums = self.sums_of_squares(device, grads)?;
        Ok(sums.iter().map(|s| s.to_f64()).sum())
    }

    /// [`Self::step`] on the ranges of one row, whose gradient has `sum_squares` as its sum of
    /// squares; returns its norm. `params` may also be the ranges alone, one after the other.
    pub fn step_with(
        &mut self,
        device: &D,
        params: D::ViewMut<'_, A>,
        grads: D::View<'_, A>,
        step: AdamWStep,
        max_norm: Option<f64>,
        sum_squares: f64,
    ) -> Result<f64> {
        let norm = self.take_sum(device, step, sum_squares)?;
        self.update(device, params, grads, step, max_norm)?;
        Ok(norm)
    }

    /// [`Self::step_with`], where `params` are the masters of `values` `[len]`, which get the new ones
    /// of the ranges in the same pass, rounded to X.
    pub fn step_with_values<X: Real<Acc = A>>(
        &mut self,
        device: &D,
        mut params: D::ViewMut<'_, A>,
        mut values: D::ViewMut<'_, X>,
        grads: D::View<'_, A>,
        step: AdamWStep,
        max_norm: Option<f64>,
        sum_squares: f64,
    ) -> Result<f64>
    where
        D: AdamWCast<X>,
    {
        let norm = self.take_sum(device, step, sum_squares)?;
        self.scales(device, max_norm)?;
        for Part { all, state, params: place, rows } in self.parts(params.freeze().len()) {
            device.adamw_cast(
                values.reborrow().slice(all.clone()),
                AdamWUpdate {
                    p: params.reborrow().slice(place),
                    m: self.m.view_mut(state.clone()),
                    v: self.v.view_mut(state),
                    g: grads.slice(all.clone()),
                    scale: self.scale.view(rows.clone()),
                    rows: rows.len(),
                    len: all.len() / rows.len(),
                    step,
                },
            )?;
        }
        Ok(norm)
    }

    /// Puts the sum of squares of a row, which other ranks have contributed to, where norms are
    /// taken from; returns the norm.
    fn take_sum(&mut self, device: &D, step: AdamWStep, sum_squares: f64) -> Result<f64> {
        let sum = A::from_f64(sum_squares);
        let norms = finite_norms(&[sum], format!("step {}", step.step), |_| "the model".into())?;
        device.upload(self.sums.view_mut(0..1), &[sum])?;
        Ok(norms[0])
    }

    /// Each row's clip factor, from `sums`.
    fn scales(&mut self, device: &D, max_norm: Option<f64>) -> Result<()> {
        let sums = self.sums.view(0..self.rows);
        let most = max_norm.unwrap_or(f64::INFINITY);
        Ok(device.clip_scale(self.scale.all_mut(), sums, self.rows, most)?)
    }

    /// What one call of the operation takes, for parameters of this length.
    fn parts(&self, params: usize) -> Vec<Part> {
        let ranges_alone = params == self.m.len();
        let mut end = 0;
        let mut part = |all: Range<usize>, rows: Range<usize>| {
            let state = end..end + all.len();
            end = state.end;
            Part { params: if ranges_alone { state.clone() } else { all.clone() }, all, state, rows }
        };
        if self.is_whole() {
            return vec![part(0..self.rows * self.len, 0..self.rows)];
        }
        self.places().map(|(row, all)| part(all, row..row + 1)).collect()
    }

    /// The ranges of every row, in the matrix.
    fn places(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let of_row = |row: usize| {
            let first = row * self.len;
            self.ranges.iter().map(move |range| (row, first + range.start..first + range.end))
        };
        (0..self.rows).flat_map(of_row)
    }

    /// One step; `sums` holds each row's sum of squares.
    fn update(
        &mut self,
        device: &D,
        mut params: D::ViewMut<'_, A>,
        grads: D::View<'_, A>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<()> {
        self.scales(device, max_norm)?;
        for Part { all, state, params: place, rows } in self.parts(params.freeze().len()) {
            device.adamw(AdamWUpdate {
                p: params.reborrow().slice(place),
                m: self.m.view_mut(state.clone()),
                v: self.v.view_mut(state),
                g: grads.slice(all.clone()),
                scale: self.scale.view(rows.clone()),
                rows: rows.len(),
                len: all.len() / rows.len(),
                step,
            })?;
        }
        Ok(())
    }

    /// Whether the state is that of all values.
    fn is_whole(&self) -> bool {
        self.ranges.len() == 1 && self.ranges[0] == (0..self.len)
    }

    /// Of each row, or of each range; also left in `sums`.
    fn sums_of_squares(&mut self, device: &D, grads: D::View<'_, A>) -> Result<Vec<A>> {
        if self.is_whole() {
            let sums = self.sums.view_mut(0..self.rows);
            device.sum_squares(sums, grads, self.rows, self.len)?;
            return Ok(device.to_host(self.sums.view(0..self.rows))?);
        }
        let places: Vec<Range<usize>> = self.places().map(|(_, range)| range).collect();
        for (i, range) in places.iter().enumerate() {
            let sum = self.sums.view_mut(i..i + 1);
            device.sum_squares(sum, grads.slice(range.clone()), 1, range.len())?;
        }
        Ok(device.to_host(self.sums.view(0..places.len()))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::{cpu::Cpu, rng::Stream};

    const STEP: AdamWStep =
        AdamWStep { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };

    fn random(n: usize, key: u64) -> Vec<f64> {
        let mut stream = Stream::new(key);
        (0..n).map(|_| stream.normal()).collect()
    }

    /// One row by the equations, `steps` times with gradients of different keys.
    fn reference(p: &mut [f64], steps: u32, max_norm: f64, grad: impl Fn(u32) -> Vec<f64>) {
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        for t in 1..=steps {
            let g = grad(t);
            let norm = g.iter().map(|x| x * x).sum::<f64>().sqrt();
            let clip = (max_norm / (norm + 1e-6)).min(1.0);
            for i in 0..p.len() {
                let g = clip * g[i];
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (m, v) = (m[i] / (1.0 - 0.9f64.powi(t as i32)), v[i] / (1.0 - 0.95f64.powi(t as i32)));
                p[i] = p[i] * (1.0 - 0.01 * 0.1) - 0.01 * m / (v.sqrt() + 1e-8);
            }
        }
    }

    fn assert_near(found: &[f64], want: &[f64]) {
        let worst = found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(found.len() == want.len() && worst <= 1e-12, "largest difference {worst}");
    }

    #[test]
    fn rows_are_clipped_and_updated_each_alone() {
        let cpu = Cpu::new(2);
        let (rows, len) = (3, 123);
        let mut p = random(rows * len, 1);
        let mut want = p.clone();
        // Row 0 stays below the maximum norm, the others are clipped.
        let grad = |t: u32| -> Vec<f64> {
            let g = random(rows * len, 10 + t as u64);
            g.iter().enumerate().map(|(i, x)| if i < len { x * 1e-3 } else { *x }).collect()
        };
        let mut optimizer = FlatAdamW::<Cpu, f64>::new(&cpu, rows, len).unwrap();
        for t in 1..=4 {
            let g = grad(t);
            let norms = optimizer.step(&cpu, &mut p, &g, AdamWStep { step: t, ..STEP }, Some(1.0)).unwrap();
            let want: Vec<f64> = g.chunks(len).map(|g| g.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
            assert_near(&norms, &want);
        }
        for row in 0..rows {
            let part = row * len..(row + 1) * len;
            reference(&mut want[part.clone()], 4, 1.0, |t| grad(t)[part.clone()].to_vec());
        }
        assert_near(&p, &want);
    }

    #[test]
    fn a_range_of_every_row_is_clipped_and_updated_and_the_rest_left_alone() {
        let cpu = Cpu::new(2);
        let (rows, len, trained) = (3, 50, 20..47);
        let mut p = random(rows * len, 5);
        let mut want = p.clone();
        let mut optimizer = FlatAdamW::<Cpu, f64>::allocate_in_rows(
            &mut Allocator::new(&cpu, Purpose::Optimizer),
            rows,
            len,
            20..47,
        )
        .unwrap();
        assert_eq!(optimizer.moments().0.len(), rows * trained.len());
        let grad = |t: u32| random(rows * len, 20 + t as u64);
        for t in 1..=3 {
            let norms =
                optimizer.step(&cpu, &mut p, &grad(t), AdamWStep { step: t, ..STEP }, Some(1.0)).unwrap();
            let norm = |g: &[f64]| g[trained.clone()].iter().map(|x| x * x).sum::<f64>().sqrt();
            assert_near(&norms, &grad(t).chunks(len).map(norm).collect::<Vec<_>>());
        }
        for row in 0..rows {
            let part = row * len + trained.start..row * len + trained.end;
            reference(&mut want[part.clone()], 3, 1.0, |t| grad(t)[part.clone()].to_vec());
        }
        assert_near(&p, &want);
        let mut bad = grad(9);
        bad[2 * len + 30] = f64::NAN;
        let message = optimizer.step(&cpu, &mut p, &bad, STEP, Some(1.0)).unwrap_err().to_string();
        assert!(message.contains("row 2"), "{message}");
        assert_near(&p, &want);
        assert!(
            FlatAdamW::<Cpu, f64>::allocate_in_rows(
                &mut Allocator::new(&cpu, Purpose::Optimizer),
                1,
                5,
                2..6
            )
            .is_err()
        );
    }

    #[test]
    fn ranges_share_one_norm_and_leave_the_rest_alone() {
        let cpu = Cpu::new(1);
        let (p0, g) = (random(100, 3), random(100, 4));
        let ranges = vec![70..95, 3..20, 50..50];
        let mut p = p0.clone();
        let mut optimizer = FlatAdamW::<Cpu, f64>::over_ranges(&cpu, 100, ranges).unwrap();
        assert_eq!(optimizer.moments().0.len(), 42);
        optimizer.step(&cpu, &mut p, &g, STEP, Some(0.5)).unwrap();
        let pick = |x: &[f64]| [&x[3..20], &x[70..95]].concat();
        let mut want = pick(&p0);
        reference(&mut want, 1, 0.5, |_| pick(&g));
        assert_near(&pick(&p), &want);
        for i in (0..3).chain(20..70).chain(95..100) {
            assert_eq!(p[i], p0[i]);
        }
        // Masters of the ranges alone, clipped by a norm that others have contributed to.
        let mut held = pick(&p0);
        let mut optimizer = FlatAdamW::<Cpu, f64>::over_ranges(&cpu, 100, vec![3..20, 70..95]).unwrap();
        let own = optimizer.sum_squares(&cpu, &g).unwrap();
        assert!((own - pick(&g).iter().map(|x| x * x).sum::<f64>()).abs() <= 1e-12 * own);
        let norm = optimizer.step_with(&cpu, &mut held, &g, STEP, Some(0.5), 4.0 * own).unwrap();
        assert!((norm - 2.0 * own.sqrt()).abs() <= 1e-12 * norm);
        let mut want = pick(&p0);
        reference(&mut want, 1, 0.25, |_| pick(&g));
        // ε of the clipping is added to another norm.
        let worst = held.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst <= 1e-8, "{worst}");
        assert!(optimizer.step_with(&cpu, &mut held, &g, STEP, None, f64::NAN).is_err());
        assert!(FlatAdamW::<Cpu, f64>::over_ranges(&cpu, 10, vec![0..5, 4..6]).is_err());
        assert!(FlatAdamW::<Cpu, f64>::over_ranges(&cpu, 10, vec![0..1, 5..11]).is_err());
    }

    #[test]
    fn nan_gradients_change_nothing_and_name_their_row() {
        let cpu = Cpu::new(1);
        let mut p = vec![1.0f32; 6];
        let mut optimizer = FlatAdamW::<Cpu, f32>::new(&cpu, 2, 3).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let g = [0.1, 0.2, 0.3, 0.1, bad, 0.3];
            let step = AdamWStep { step: 7, ..STEP };
            let message = optimizer.step(&cpu, &mut p, &g, step, None).unwrap_err().to_string();
            assert!(message.contains("row 1") && message.contains("step 7"), "{message}");
        }
        assert!(p.iter().all(|&x| x == 1.0));
        assert!(optimizer.moments().0.iter().chain(&**optimizer.moments().1).all(|&x| x == 0.0));
        optimizer.step(&cpu, &mut p, &[0.1; 6], STEP, None).unwrap();
        assert!(p.iter().all(|&x| x < 1.0));
    }
}
