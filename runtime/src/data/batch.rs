//! [`PackedBatch`]: examples of one or several jobs as one token stream without
//! padding, and [`DeviceBatch`], the same on a device.
//!
//! A segment is one example. Position t predicts token t + 1 of the same segment,
//! so a segment of n tokens has at most n − 1 labels. How losses are averaged is
//! decided here, by the weight of every label: with [`PackedBatch::push`]'s
//! `weight` = 1 / (labels of the example × examples of the step) the loss is the
//! mean over examples of each one's token mean ("sequence" normalisation); with
//! 1 / (labels of the step) it is the token mean.

use crate::buffers::Allocator;
use crate::plan::Purpose;
use crate::{Error, Result};
use gradtx_kernels::{Buffer, Device, Elem, Real, ops::Segments};
use std::ops::Range;

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

impl BatchCapacity {
    /// Room for the largest of these streams.
    pub fn of<'a>(streams: impl IntoIterator<Item = &'a PackedBatch>) -> Self {
        streams.into_iter().fold(Self::default(), |room, stream| {
            let (tokens, segments, labels) = (stream.len(), stream.segments(), stream.labels());
            room.max(Self { tokens, segments, labels })
        })
    }

    /// Room for what either has room for.
    pub fn max(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            segments: self.segments.max(other.segments),
            labels: self.labels.max(other.labels),
        }
    }
}

/// Arrays of whole numbers of 32 bits, in their order within the one buffer that holds them all.
#[derive(Clone, Copy)]
enum Array {
    Tokens,
    Positions,
    Offsets,
    Adapter,
    GradRow,
    LabelRows,
    Targets,
    Slots,
    Last,
}

const ARRAYS: usize = Array::Last as usize + 1;
/// Every array begins at a multiple of so many elements: of 128 bytes.
const ALIGN: usize = 32;

/// A packed batch on a device, in buffers that are allocated once.
///
/// All whole numbers of 32 bits go there in one copy, for a copy has a cost of its own; what has not
/// changed since the last batch, of keys and weights, does not go there again.
pub struct DeviceBatch<D: Device, A: Real> {
    capacity: BatchCapacity,
    used: BatchCapacity,
    numbers: D::Buf<u32>,
    /// Where each array begins, and how long it is.
    places: [Range<usize>; ARRAYS],
    /// The numbers on the host, on their way.
    packed: Vec<u32>,
    keys: Held<D, u64>,
    weights: Held<D, A>,
}

/// Values on the device, and what they are.
struct Held<D: Device, T: Elem> {
    there: D::Buf<T>,
    values: Vec<T>,
}

impl<D: Device, T: Elem> Held<D, T> {
    fn allocate(alloc: &mut Allocator<'_, D>, name: &str, len: usize) -> Result<Self> {
        Ok(Self { there: alloc.buffer(name, &[len])?, values: vec![] })
    }

    fn set(&mut self, device: &D, values: impl ExactSizeIterator<Item = T> + Clone) -> Result<()> {
        if self.values.iter().copied().eq(values.clone()) {
            return Ok(());
        }
        // Should the copy fail, what is there is unknown.
        self.values.clear();
        let new: Vec<T> = values.collect();
        device.upload(self.there.view_mut(0..new.len()), &new)?;
        self.values = new;
        Ok(())
    }
}

impl<D: Device, A: Real> DeviceBatch<D, A> {
    /// Empty, with room for `capacity`.
    pub fn new(device: &D, capacity: BatchCapacity) -> Result<Self> {
        Self::allocate(&mut Allocator::new(device, Purpose::Batch), capacity)
    }

    /// [`Self::new`] with an allocator.
    pub fn allocate(alloc: &mut Allocator<'_, D>, capacity: BatchCapacity) -> Result<Self> {
        let before = alloc.set_purpose(Purpose::Batch);
        let BatchCapacity { tokens, segments, labels } = capacity;
        let room =
            places([tokens, tokens, segments + 1, segments, segments, labels, labels, segments, segments]);
        let batch = Self {
            capacity,
            used: BatchCapacity::default(),
            numbers: alloc.buffer("tokens", &[room[ARRAYS - 1].end])?,
            places: places([0; ARRAYS]),
            packed: vec![],
            keys: Held::allocate(alloc, "segment keys", segments)?,
            weights: Held::allocate(alloc, "label weights", labels)?,
        };
        alloc.set_purpose(before);
        Ok(batch)
    }

    /// Copies a batch to the device.
    pub fn load(&mut self, device: &D, batch: &PackedBatch) -> Result<()> {
        self.load_for_cache(device, batch, &[], &[])
    }

    /// The same, with the cache's slot of each segment and the stream position whose logits are
    /// wanted of each: as many of both, at most one per segment that there is room for.
    pub fn load_for_cache(
        &mut self,
        device: &D,
        batch: &PackedBatch,
        slots: &[u32],
        last: &[u32],
    ) -> Result<()> {
        let want = BatchCapacity::of([batch]);
        let room = self.capacity;
        if room.max(want) != room || slots.len() > room.segments || slots.len() != last.len() {
            let why = format!(
                "it needs {want:?} and {} slots, the memory plan has room for {room:?}",
                slots.len().max(last.len())
            );
            return Err(Error::invalid("packed batch", why));
        }
        let arrays: [&[u32]; ARRAYS] = [
            &batch.tokens,
            &batch.positions,
            &batch.offsets,
            &batch.adapter,
            &batch.grad_row,
            &batch.label_rows,
            &batch.targets,
            slots,
            last,
        ];
        self.places = places(arrays.map(<[u32]>::len));
        self.packed.clear();
        self.packed.resize(self.places[ARRAYS - 1].end, 0);
        for (place, array) in self.places.iter().zip(arrays) {
            self.packed[place.clone()].copy_from_slice(array);
        }
        device.upload(self.numbers.view_mut(0..self.packed.len()), &self.packed)?;
        self.keys.set(device, batch.keys.iter().copied())?;
        self.weights.set(device, batch.weights.iter().map(|&w| A::from_f64(w)))?;
        self.used = want;
        Ok(())
    }

    fn array(&self, array: Array) -> D::View<'_, u32> {
        self.numbers.view(self.places[array as usize].clone())
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
        self.array(Array::Tokens)
    }

    /// `[T]` positions.
    pub fn positions(&self) -> D::View<'_, u32> {
        self.array(Array::Positions)
    }

    /// The segments.
    pub fn segments(&self) -> Segments<'_, D> {
        let count = self.used.segments;
        Segments {
            offsets: self.array(Array::Offsets),
            adapter: self.array(Array::Adapter),
            grad_row: self.array(Array::GradRow),
            keys: self.keys.there.view(0..count),
            count,
        }
    }

    /// `[M]` stream positions that predict a target.
    pub fn label_rows(&self) -> D::View<'_, u32> {
        self.array(Array::LabelRows)
    }

    /// `[M]` targets.
    pub fn targets(&self) -> D::View<'_, u32> {
        self.array(Array::Targets)
    }

    /// `[M]` label weights.
    pub fn weights(&self) -> D::View<'_, A> {
        self.weights.there.view(0..self.used.labels)
    }

    /// The cache's slots that came with the batch.
    pub fn slots(&self) -> D::View<'_, u32> {
        self.array(Array::Slots)
    }

    /// The stream positions whose logits are wanted.
    pub fn last_rows(&self) -> D::View<'_, u32> {
        self.array(Array::Last)
    }
}

/// Where arrays of these lengths lie one after the other.
fn places(lengths: [usize; ARRAYS]) -> [Range<usize>; ARRAYS] {
    let mut end = 0usize;
    lengths.map(|len| {
        let start = end.next_multiple_of(ALIGN);
        end = start + len;
        start..end
    })
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
    fn device_keys_and_weights_are_of_the_last_batch() {
        let cpu = Cpu::new(1);
        let room = BatchCapacity { tokens: 8, segments: 2, labels: 8 };
        let mut on_device = DeviceBatch::<Cpu, f32>::new(&cpu, room).unwrap();
        for (weight, keys) in
            [(0.5, vec![3]), (0.5, vec![3]), (0.25, vec![3, 0]), (0.25, vec![4]), (1.0, vec![4])]
        {
            let mut batch = PackedBatch::default();
            for &key in &keys {
                batch.push(&example(4), SegmentInfo { key, ..SegmentInfo::default() }, weight);
            }
            on_device.load(&cpu, &batch).unwrap();
            assert_eq!(on_device.segments().keys, keys);
            assert_eq!(on_device.weights(), vec![weight as f32; 2 * keys.len()]);
        }
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
        assert_eq!((on_device.label_rows(), on_device.targets()), (&[1, 2][..], &[12, 13][..]));
        on_device.load_for_cache(&cpu, &batch, &[7], &[3]).unwrap();
        assert_eq!((on_device.slots(), on_device.last_rows()), (&[7][..], &[3][..]));
        assert!(on_device.load_for_cache(&cpu, &batch, &[7, 8], &[3, 3]).is_err());
        batch.push(&example(1), SegmentInfo::default(), 1.0);
        assert!(on_device.load(&cpu, &batch).is_err());
    }
}
