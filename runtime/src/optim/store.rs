//! [`ParamStore`]: what training keeps of a model's parameters beside their values.
//!
//! Gradients are accumulators, and so are the values that an optimizer updates. Where a model computes in a
//! narrower type, such *masters* are kept beside its values, which are their nearest ones; otherwise its values
//! are updated themselves. A store may own a part of the parameters only, some ranges of the flat buffer, where
//! other ranks own the rest: masters are of those, gradients are of all.

use crate::Result;
use crate::buffers::Allocator;
use crate::plan::Purpose;
use gradtx_kernels::cpu::narrow;
use gradtx_kernels::ops::Cast;
use gradtx_kernels::{Buffer, Device, Elem, Real};
use std::ops::Range;

/// Gradients of all parameters of a model, and masters of those that are updated here.
pub struct ParamStore<D: Device, X: Real> {
    /// The ranges of the flat buffer that are updated here.
    own: Vec<Range<usize>>,
    /// Of the own ranges, one after the other; no elements where values are accumulators themselves.
    masters: D::Buf<X::Acc>,
    /// As the values.
    grads: D::Buf<X::Acc>,
}

/// What an optimizer works on.
pub struct Trained<'a, D: Device, X: Real> {
    /// What is updated: all values, or the masters of the own ranges, one after the other.
    pub params: D::ViewMut<'a, X::Acc>,
    /// The model's values `[len]`, where `params` are their masters.
    pub values: Option<D::ViewMut<'a, X>>,
    /// `[len]`
    pub grads: D::View<'a, X::Acc>,
}

impl<D: Device, X: Real> ParamStore<D, X> {
    /// For a flat buffer of `len` values, of which these ranges are updated: disjoint, in increasing order, none
    /// empty. Gradients and masters are zero.
    pub fn allocate(alloc: &mut Allocator<'_, D>, len: usize, own: Vec<Range<usize>>) -> Result<Self> {
        let before = alloc.set_purpose(Purpose::Trained);
        let held = if Self::values_are_masters() { 0 } else { own.iter().map(Range::len).sum() };
        let masters = alloc.buffer("masters", &[held])?;
        alloc.set_purpose(Purpose::Gradients);
        let grads = alloc.buffer("gradients", &[len])?;
        alloc.set_purpose(before);
        Ok(Self { own, masters, grads })
    }

    /// Whether values of this type are their own masters.
    pub fn values_are_masters() -> bool {
        X::DTYPE == X::Acc::DTYPE
    }

    /// Masters become the model's values.
    pub fn take_masters(&mut self, device: &D, values: &D::Buf<X>) -> Result<()>
    where
        D: Cast<X, X::Acc>,
    {
        if !Self::values_are_masters() {
            for (range, place) in places(&self.own) {
                Cast::<X, X::Acc>::cast(device, self.masters.view_mut(place), values.view(range))?;
            }
        }
        Ok(())
    }

    /// The gradients summed so far, as the values lie.
    pub fn gradients(&self) -> &D::Buf<X::Acc> {
        &self.grads
    }

    /// The gradients summed so far, for writing.
    pub fn gradients_mut(&mut self) -> &mut D::Buf<X::Acc> {
        &mut self.grads
    }

    /// What an optimizer works on, of a model with these values.
    pub fn trained<'a>(&'a mut self, values: &'a mut D::Buf<X>) -> Trained<'a, D, X> {
        let grads = self.grads.all();
        match X::accumulators::<D>(values) {
            Ok(values) => Trained { params: values.all_mut(), values: None, grads },
            Err(values) => Trained { params: self.masters.all_mut(), values: Some(values.all_mut()), grads },
        }
    }

    /// Master values of the own ranges on the host, one after the other, of a model with these values.
    pub fn master_values(&self, device: &D, values: &D::Buf<X>) -> Result<Vec<f32>> {
        if !Self::values_are_masters() {
            return Ok(to_f32(&device.to_host(self.masters.all())?).collect());
        }
        let mut all = Vec::with_capacity(self.own.iter().map(Range::len).sum());
        for range in &self.own {
            all.extend(to_f32(&device.to_host(values.view(range.clone()))?));
        }
        Ok(all)
    }

    /// Sets master values of the own ranges, and the model's values there with them.
    pub fn set_master_values(&mut self, device: &D, values: &mut D::Buf<X>, masters: &[f32]) -> Result<()> {
        if !Self::values_are_masters() {
            device.upload(self.masters.all_mut(), &nearest::<X::Acc>(masters))?;
        }
        for (range, place) in places(&self.own) {
            device.upload(values.view_mut(range), &nearest::<X>(&masters[place]))?;
        }
        Ok(())
    }
}

fn to_f32<A: Real>(values: &[A]) -> impl Iterator<Item = f32> {
    values.iter().map(|x| x.to_f64() as f32)
}

fn nearest<X: Real>(values: &[f32]) -> Vec<X> {
    let mut out = vec![X::zero(); values.len()];
    narrow(&mut out, values);
    out
}

/// Every range, and where it lies when they stand one after the other.
fn places(ranges: &[Range<usize>]) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    ranges.iter().scan(0, |end, range| {
        *end += range.len();
        Some((range.clone(), *end - range.len()..*end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::FlatAdamW;
    use gradtx_kernels::bf16;
    use gradtx_kernels::cpu::Cpu;
    use gradtx_kernels::ops::AdamWStep;

    const STEP: AdamWStep =
        AdamWStep { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };

    fn store<X: Real>(cpu: &Cpu, own: Vec<Range<usize>>) -> ParamStore<Cpu, X> {
        ParamStore::allocate(&mut Allocator::new(cpu, Purpose::Trained), 10, own).unwrap()
    }

    #[test]
    fn narrow_values_follow_masters_of_the_own_ranges() {
        let cpu = Cpu::new(1);
        let mut values = cpu.buffer_from(&[bf16::from_f64(1.0); 10]).unwrap();
        let mut store = store::<bf16>(&cpu, vec![2..4, 7..10]);
        store.take_masters(&cpu, &values).unwrap();
        assert_eq!(store.master_values(&cpu, &values).unwrap(), [1.0; 5]);
        store.gradients_mut().fill(1.0);
        let mut adamw = FlatAdamW::<Cpu, f32>::over_ranges(&cpu, 10, vec![2..4, 7..10]).unwrap();
        let Trained { params, values: narrow, grads } = store.trained(&mut values);
        assert!(narrow.is_some());
        adamw.step_with(&cpu, params, grads, STEP, None, 10.0).unwrap();
        // Steps that are too small for values of 16 bits.
        let masters = store.master_values(&cpu, &values).unwrap();
        assert!(masters.iter().all(|&x| x < 1.0 && x > 0.9998), "{masters:?}");
        store.set_master_values(&cpu, &mut values, &[2.0, 3.0, 4.0, 5.0, 6.001]).unwrap();
        assert_eq!(store.master_values(&cpu, &values).unwrap(), [2.0, 3.0, 4.0, 5.0, 6.001]);
        let found: Vec<f64> = values.iter().map(|x| x.to_f64()).collect();
        assert_eq!(found, [1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn values_that_are_accumulators_are_their_own_masters() {
        let cpu = Cpu::new(1);
        let mut values = cpu.buffer_from(&[1.0f32; 10]).unwrap();
        let mut store = store::<f32>(&cpu, std::iter::once(2..4).collect());
        store.set_master_values(&cpu, &mut values, &[2.0, 3.0]).unwrap();
        let trained = store.trained(&mut values);
        assert!(trained.values.is_none());
        trained.params[9] = 7.0;
        assert_eq!(store.master_values(&cpu, &values).unwrap(), [2.0, 3.0]);
        assert_eq!(values[9], 7.0);
    }
}
