//! [`PackedBatch`]: examples of one or several jobs as one token stream without
//! padding, and [`DeviceBatch`], the same on a device.
//!
//! A segment is one example. Position t predicts token t + 1 of the same segment,
//! so a segment of n tokens has at most n − 1 labels. How losses are averaged is
//! decided here, by the weight of every label: with [`PackedBatch::push`]'s
//! `weight` = 1 / (labels of the example × examples of the step) the loss is the
//! mean over examples of each one's token mean ("sequence" normalisation); with
//! 1 / (labels of the step) it is the token mean.

use crate::{Error, Result};
use gradtx_kernels::{Device, Real, ops::Segments};

/// One tokenized example: which of its tokens are trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids; at least one.
    pub tokens: Vec<u32>,
    /// `trained[i]`: token i is a target. `trained[0]` has no meaning: nothing predicts it.
    pub trained: Vec<bool>,
}

impl Example {
    /// Targets, i.e. trained tokens that have a token before them.
    pub fn labels(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&t| t).count()
    }
}

/// Whose a segment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Row of the adapter matrix.
    pub adapter: u32,
    /// Row of the gradient matrix.
    pub grad_row: u32,
    /// Key of the segment's random numbers.
    pub key: u64,
}

/// Examples packed into one stream, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedBatch {
    /// `[T]` token ids.
    pub tokens: Vec<u32>,
    /// `[T]` position within the segment, from 0.
    pub positions: Vec<u32>,
    /// `[S + 1]` first token of each segment, then T.
    pub offsets: Vec<u32>,
    /// `[S]` adapter row.
    pub adapter: Vec<u32>,
    /// `[S]` gradient row.
    pub grad_row: Vec<u32>,
    /// `[S]` random key.
    pub keys: Vec<u64>,
    /// `[M]` stream positions that predict a target, increasing.
    pub label_rows: Vec<u32>,
    /// `[M]` the targets.
    pub targets: Vec<u32>,
    /// `[M]` weight of each label's loss in the sum that is differentiated.
    pub weights: Vec<f64>,
    /// `[M]` segment of each label.
    pub label_segment: Vec<u32>,
}

impl Default for PackedBatch {
    fn default() -> Self {
        Self {
            tokens: vec![],
            positions: vec![],
            offsets: vec![0],
            adapter: vec![],
            grad_row: vec![],
            keys: vec![],
            label_rows: vec![],
            targets: vec![],
            weights: vec![],
            label_segment: vec![],
        }
    }
}

impl PackedBatch {
    /// Appends an example as one segment; `weight` is the weight of each of its labels.
    pub fn push(&mut self, example: &Example, info: SegmentInfo, weight: f64) {
        let start = self.tokens.len();
        let segment = self.segments() as u32;
        self.tokens.extend_from_slice(&example.tokens);
        self.positions.extend(0..example.tokens.len() as u32);
        self.offsets.push(self.tokens.len() as u32);
        self.adapter.push(info.adapter);
        self.grad_row.push(info.grad_row);
        self.keys.push(info.key);
        for i in 1..example.tokens.len() {
            if example.trained[i] {
                self.label_rows.push((start + i - 1) as u32);
                self.targets.push(example.tokens[i]);
                self.weights.push(weight);
                self.label_segment.push(segment);
            }
        }
    }

    /// Forgets all segments, keeping the memory.
    pub fn clear(&mut self) {
        self.offsets.truncate(1);
        self.tokens.clear();
        self.positions.clear();
        self.adapter.clear();
        self.grad_row.clear();
        self.keys.clear();
        self.label_rows.clear();
        self.targets.clear();
        self.weights.clear();
        self.label_segment.clear();
    }

    /// Segments, S.
    pub fn segments(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Tokens, T.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Labels, M.
    pub fn labels(&self) -> usize {
        self.targets.len()
    }
}

/// What a device batch has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchCapacity {
    /// Tokens of a stream.
    pub tokens: usize,
    /// Segments of a stream.
    pub segments: usize,
    /// Labels of a stream.
    pub labels: usize,
}

/// A packed batch on a device, in buffers that are allocated once.
pub struct DeviceBatch<D: Device, A: Real> {
    capacity: BatchCapacity,
    used: BatchCapacity,
    tokens: D::Buf<u32>,
    positions: D::Buf<u32>,
    offsets: D::Buf<u32>,
    adapter: D::Buf<u32>,
    grad_row: D::Buf<u32>,
    keys: D::Buf<u64>,
    label_rows: D::Buf<u32>,
    targets: D::Buf<u32>,
    weights: D::Buf<A>,
}

impl<D: Device, A: Real> DeviceBatch<D, A> {
    /// Empty, with room for `capacity`.
    pub fn new(device: &D, capacity: BatchCapacity) -> Result<Self> {
        Ok(Self {
            capacity,
            used: BatchCapacity::default(),
            tokens: device.zeros(capacity.tokens)?,
            positions: device.zeros(capacity.tokens)?,
            offsets: device.zeros(capacity.segments + 1)?,
            adapter: device.zeros(capacity.segments)?,
            grad_row: device.zeros(capacity.segments)?,
            keys: device.zeros(capacity.segments)?,
            label_rows: device.zeros(capacity.labels)?,
            targets: device.zeros(capacity.labels)?,
            weights: device.zeros(capacity.labels)?,
        })
    }

    /// Copies a batch to the device.
    pub fn load(&mut self, device: &D, batch: &PackedBatch) -> Result<()> {
        let want = BatchCapacity { tokens: batch.len(), segments: batch.segments(), labels: batch.labels() };
        let room = self.capacity;
        if want.tokens > room.tokens || want.segments > room.segments || want.labels > room.labels {
            let why = format!("it needs {want:?}, the memory plan has room for {room:?}");
            return Err(Error::invalid("packed batch", why));
        }
        let weights: Vec<A> = batch.weights.iter().map(|&w| A::from_f64(w)).collect();
        put(device, &mut self.tokens, &batch.tokens)?;
        put(device, &mut self.positions, &batch.positions)?;
        put(device, &mut self.offsets, &batch.offsets)?;
        put(device, &mut self.adapter, &batch.adapter)?;
        put(device, &mut self.grad_row, &batch.grad_row)?;
        put(device, &mut self.keys, &batch.keys)?;
        put(device, &mut self.label_rows, &batch.label_rows)?;
        put(device, &mut self.targets, &batch.targets)?;
        put(device, &mut self.weights, &weights)?;
        self.used = want;
        Ok(())
    }

    /// Tokens, segments and labels of the batch that was loaded last.
    pub fn used(&self) -> BatchCapacity {
        self.used
    }

    /// Room of the buffers.
    pub fn capacity(&self) -> BatchCapacity {
        self.capacity
    }

    /// `[T]` token ids.
    pub fn tokens(&self) -> D::View<'_, u32> {
        D::view(&self.tokens, 0..self.used.tokens)
    }

    /// `[T]` positions.
    pub fn positions(&self) -> D::View<'_, u32> {
        D::view(&self.positions, 0..self.used.tokens)
    }

    /// The segments.
    pub fn segments(&self) -> Segments<'_, D> {
        let count = self.used.segments;
        Segments {
            offsets: D::view(&self.offsets, 0..count + 1),
            adapter: D::view(&self.adapter, 0..count),
            grad_row: D::view(&self.grad_row, 0..count),
            keys: D::view(&self.keys, 0..count),
            count,
        }
    }

    /// `[M]` stream positions that predict a target.
    pub fn label_rows(&self) -> D::View<'_, u32> {
        D::view(&self.label_rows, 0..self.used.labels)
    }

    /// `[M]` targets.
    pub fn targets(&self) -> D::View<'_, u32> {
        D::view(&self.targets, 0..self.used.labels)
    }

    /// `[M]` label weights.
    pub fn weights(&self) -> D::View<'_, A> {
        D::view(&self.weights, 0..self.used.labels)
    }
}

fn put<D: Device, T: gradtx_kernels::Elem>(device: &D, buf: &mut D::Buf<T>, values: &[T]) -> Result<()> {
    Ok(device.upload(D::view_mut(buf, 0..values.len()), values)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;

    fn example(n: u32) -> Example {
        Example { tokens: (10..10 + n).collect(), trained: (0..n).map(|i| i >= 2).collect() }
    }

    #[test]
    fn labels_are_the_next_token_of_the_same_segment() {
        let mut batch = PackedBatch::default();
        batch.push(&example(4), SegmentInfo { adapter: 1, grad_row: 0, key: 9 }, 0.5);
        batch.push(&example(3), SegmentInfo::default(), 1.0);
        assert_eq!(batch.offsets, [0, 4, 7]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!(batch.label_rows, [1, 2, 5]);
        assert_eq!(batch.targets, [12, 13, 12]);
        assert_eq!(batch.weights, [0.5, 0.5, 1.0]);
        assert_eq!(batch.label_segment, [0, 0, 1]);
        batch.clear();
        assert_eq!(batch, PackedBatch::default());
    }

    #[test]
    fn a_device_batch_refuses_more_than_its_room() {
        let cpu = Cpu::new(1);
        let mut batch = PackedBatch::default();
        batch.push(&example(4), SegmentInfo::default(), 1.0);
        let room = BatchCapacity { tokens: 4, segments: 1, labels: 2 };
        let mut on_device = DeviceBatch::<Cpu, f32>::new(&cpu, room).unwrap();
        on_device.load(&cpu, &batch).unwrap();
        assert_eq!(on_device.tokens(), [10, 11, 12, 13]);
        assert_eq!(on_device.segments().offsets, [0, 4]);
        batch.push(&example(1), SegmentInfo::default(), 1.0);
        assert!(on_device.load(&cpu, &batch).is_err());
    }
}
