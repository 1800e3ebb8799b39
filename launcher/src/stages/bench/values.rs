//! Random values on a device without making each of them on the host.
//!
//! About a million normal values are made and uploaded, and copied on the device until the
//! buffer is full. Never zeros: power, and so clock rates, depend on the bits that move. The
//! number of values is a prime, so rows of a matrix differ.

use anyhow::Result;
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Device, Real};

/// Values that are made; a prime.
const MADE: usize = 1_000_003;

/// `len` values of a normal distribution, of mean 0 and this standard deviation.
pub fn random<D: Device, T: Real>(device: &D, len: usize, std: f64, key: u64) -> Result<D::Buf<T>> {
    let mut buf = device.zeros(len)?;
    fill::<D, T>(device, D::all_mut(&mut buf), std, key)?;
    Ok(buf)
}

/// The same into a view.
pub fn fill<D: Device, T: Real>(device: &D, mut view: D::ViewMut<'_, T>, std: f64, key: u64) -> Result<()> {
    let len = D::view_len(D::freeze(&view));
    let mut stream = Stream::new(key);
    let made: Vec<T> = (0..len.min(MADE)).map(|_| T::from_f64(std * stream.normal())).collect();
    device.upload(D::slice_mut(D::reborrow(&mut view), 0..made.len()), &made)?;
    let mut filled = made.len();
    while filled < len {
        let (from, to) = D::split_mut(D::reborrow(&mut view), filled);
        let more = filled.min(len - filled);
        device.copy(D::slice_mut(to, 0..more), D::slice(D::freeze(&from), 0..more))?;
        filled += more;
    }
    Ok(())
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
    fn long_buffers_repeat_what_was_made_and_hold_no_zeros() {
        let cpu = Cpu::new(1);
        for len in [1, MADE, 2 * MADE + 5, 3 * MADE] {
            let values = random::<Cpu, f32>(&cpu, len, 0.5, 7).unwrap();
            assert!(values.iter().all(|x| x.is_finite() && *x != 0.0), "{len}");
            assert!((MADE..len).all(|i| values[i] == values[i - MADE]), "{len}");
        }
        let values = random::<Cpu, f32>(&cpu, MADE, 0.5, 7).unwrap();
        let square = values.iter().map(|x| (x * x) as f64).sum::<f64>() / MADE as f64;
        assert!((square - 0.25).abs() < 0.01, "{square}");
    }
}
