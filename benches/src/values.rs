//! Random values, drawn where they are needed: on the device, by a counter generator, the same ones on
//! every device. Never zeros: power, and so clock rates, depend on the bits that move.

use gradtx_kernels::ops::{Elementwise, RandomRows};
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Buffer, Real, Result, View, ViewMut};

/// `len` bell-shaped values of mean 0 and this standard deviation.
pub fn random<D: Elementwise<T>, T: Real>(device: &D, len: usize, std: f64, key: u64) -> Result<D::Buf<T>> {
    let mut buf = device.zeros(len)?;
    fill::<D, T>(device, buf.all_mut(), std, key)?;
    Ok(buf)
}

/// The same into a view.
pub fn fill<D: Elementwise<T>, T: Real>(
    device: &D,
    view: D::ViewMut<'_, T>,
    std: f64,
    key: u64,
) -> Result<()> {
    let cols = view.freeze().len();
    device.random_rows(view, RandomRows { rows: 1, cols, stride: cols, key, std })
}

/// The same into rows of `cols` values that are `stride` apart.
pub(crate) fn fill_rows<D: Elementwise<T>, T: Real>(
    device: &D,
    view: D::ViewMut<'_, T>,
    (cols, stride): (usize, usize),
    std: f64,
    key: u64,
) -> Result<()> {
    if cols == stride {
        return fill::<D, T>(device, view, std, key);
    }
    let rows = view.freeze().len() / stride;
    device.random_rows(view, RandomRows { rows, cols, stride, key, std })
}

/// Token ids below `below`.
pub fn tokens(count: usize, below: usize, key: u64) -> Vec<u32> {
    let mut stream = Stream::new(key);
    (0..count).map(|_| stream.below(below) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;

    #[test]
    fn random_buffers_have_the_spread_and_no_zeros() {
        for (len, threads) in [(1, 1), (1000, 1), (1_000_003, 2)] {
            let values = random::<Cpu, f32>(&Cpu::new(threads), len, 0.5, 7).unwrap();
            assert!(values.iter().all(|x| x.is_finite() && *x != 0.0), "{len}");
        }
        let values = random::<Cpu, f32>(&Cpu::new(2), 1_000_003, 0.5, 7).unwrap();
        let square = values.iter().map(|x| (x * x) as f64).sum::<f64>() / values.len() as f64;
        assert!((square - 0.25).abs() < 0.01, "{square}");
        assert_eq!(values[..], random::<Cpu, f32>(&Cpu::new(1), 1_000_003, 0.5, 7).unwrap()[..], "threads");
        assert_ne!(values[..100], random::<Cpu, f32>(&Cpu::new(1), 100, 0.5, 8).unwrap()[..], "keys");
    }

    #[test]
    fn random_rows_leave_the_gaps_between_them() {
        let cpu = Cpu::new(1);
        let flat = random::<Cpu, f32>(&cpu, 15, 2.0, 3).unwrap();
        let mut rows = vec![9.0f32; 21];
        fill_rows::<Cpu, f32>(&cpu, &mut rows, (5, 7), 2.0, 3).unwrap();
        for (row, wanted) in rows.chunks(7).zip(flat.chunks(5)) {
            assert_eq!((&row[..5], &row[5..]), (wanted, &[9.0, 9.0][..]));
        }
    }
}
