//! Working memory of inner loops: one buffer per thread, reused from call to call.
//!
//! Operations do not allocate on behalf of their callers. Tiles of scores or a masked
//! row are no bigger than what a few rows of the inputs hold, and live here; a thread
//! allocates when it meets a size for the first time.

use crate::Elem;
use std::cell::Cell;

thread_local! {
    static BUFFER: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// Lends `len` elements of arbitrary content to `work`. Loans may be nested (the inner one allocates).
pub(crate) fn with_scratch<X: Elem, R>(len: usize, work: impl FnOnce(&mut [X]) -> R) -> R {
    const { assert!(align_of::<X>() <= align_of::<u64>()) };
    let mut buffer = BUFFER.take();
    let words = (len * size_of::<X>()).div_ceil(size_of::<u64>());
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    let result = work(&mut bytemuck::cast_slice_mut(&mut buffer[..words])[..len]);
    BUFFER.set(buffer);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loans_have_their_length_and_nest() {
        with_scratch(5, |outer: &mut [f32]| {
            outer.fill(1.0);
            with_scratch(7, |inner: &mut [crate::Complex64]| {
                assert_eq!(inner.len(), 7);
                inner.fill(crate::Complex64::new(2.0, 3.0));
            });
            assert_eq!(outer, [1.0; 5]);
        });
    }
}
