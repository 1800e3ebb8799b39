//! [`ClippedSum`]: a sum of gradients to which no example contributes more than a norm of C.

/// Clipped gradients are shorter than C by this part, so that rounding never makes them longer.
const MARGIN: f64 = 1e-9;

/// The sum of the clipped gradients of a step.
pub struct ClippedSum {
    sum: Vec<f64>,
    max_norm: f64,
    /// Gradients that were clipped.
    pub clipped: usize,
    /// Gradients that were not finite, and count as zero.
    pub dropped: usize,
}

impl ClippedSum {
    /// Zero, of gradients of `len` values.
    pub fn new(len: usize, max_norm: f64) -> Self {
        Self { sum: vec![0.0; len], max_norm, clipped: 0, dropped: 0 }
    }

    /// Adds an example's gradient `[len]`, scaled to a norm of at most `max_norm`.
    pub fn add(&mut self, gradient: &[f32]) {
        // Squares of f32 do not overflow f64.
        let norm = gradient.iter().map(|&x| (x as f64).powi(2)).sum::<f64>().sqrt();
        if !norm.is_finite() {
            self.dropped += 1;
            return;
        }
        let scale = if norm > self.max_norm * (1.0 - MARGIN) {
            self.clipped += 1;
            self.max_norm * (1.0 - MARGIN) / norm
        } else {
            1.0
        };
        self.sum.iter_mut().zip(gradient).for_each(|(sum, &x)| *sum += scale * x as f64);
    }

    /// The sum.
    pub fn into_sum(self) -> Vec<f64> {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn norm(values: &[f64]) -> f64 {
        values.iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    #[test]
    fn no_gradient_adds_more_than_its_norm() {
        let mut stream = Stream::new(1);
        for case in 0..500 {
            let len = 1 + stream.below(40);
            let size = 10f64.powf(80.0 * stream.uniform() - 40.0);
            let max_norm = 10f64.powf(8.0 * stream.uniform() - 4.0);
            let mut gradient: Vec<f32> = (0..len).map(|_| (size * stream.normal()) as f32).collect();
            match case % 7 {
                0 => gradient[0] = f32::NAN,
                1 => gradient[len - 1] = f32::INFINITY,
                2 => gradient.fill(0.0),
                3 => gradient[0] = f32::MAX,
                4 => gradient[0] = f32::MIN_POSITIVE / 2.0,
                _ => {}
            }
            // Beside what others have added.
            let others = ClippedSum::new(len, max_norm);
            let mut sum = ClippedSum::new(len, max_norm);
            sum.add(&gradient);
            let (is_finite, clipped) = (gradient.iter().all(|x| x.is_finite()), sum.clipped);
            assert_eq!(sum.dropped, !is_finite as usize);
            let change: Vec<f64> = sum.into_sum().iter().zip(others.into_sum()).map(|(a, b)| a - b).collect();
            assert!(norm(&change) <= max_norm, "{} of {max_norm}", norm(&change));
            let before = norm(&gradient.iter().map(|&x| x as f64).collect::<Vec<_>>());
            if is_finite && clipped == 0 {
                assert_eq!(change, gradient.iter().map(|&x| x as f64).collect::<Vec<_>>());
            }
            assert_eq!(clipped == 1, is_finite && before > max_norm * (1.0 - MARGIN));
        }
    }

    #[test]
    fn gradients_keep_their_direction() {
        let mut sum = ClippedSum::new(2, 1.0);
        sum.add(&[30.0, 40.0]);
        sum.add(&[0.3, 0.4]);
        let found = sum.into_sum();
        assert!((found[0] - 0.9).abs() < 1e-8 && (found[1] - 1.2).abs() < 1e-8, "{found:?}");
    }
}
