//! What steps of DP-SGD cost, and how much noise a cost needs.

use super::mechanism::SampledGaussian;
use super::pld;
use super::rdp::Rdp;
use gradtx_run::config::Accountant;

/// Noise multipliers that are searched.
const NOISE: [f64; 2] = [0.05, 1e6];
/// The noise that is found is above the least one by this part at most.
const TOLERANCE: f64 = 1e-3;

/// ε of so many steps, by an accountant.
pub fn epsilon(accountant: Accountant, mechanism: &SampledGaussian, steps: u64, delta: f64) -> f64 {
    match accountant {
        Accountant::Pld => pld::epsilon(mechanism, steps, delta),
        Accountant::Rdp => Rdp::new(mechanism).epsilon(steps, delta),
    }
}

/// The least noise multiplier with which so many steps cost at most ε, rounded up to four digits; none if no noise
/// that is searched is enough.
pub fn noise_for(
    accountant: Accountant,
    sampling_rate: f64,
    steps: u64,
    target: f64,
    delta: f64,
) -> Option<f64> {
    let of = |noise_multiplier| SampledGaussian { sampling_rate, noise_multiplier };
    let by_rdp = |noise| Rdp::new(&of(noise)).epsilon(steps, delta) <= target;
    // RDP is quick, and its noise is enough; the tight one is not far below.
    let bracket = bisect(NOISE[0], NOISE[1], by_rdp)?;
    let noise = match accountant {
        Accountant::Rdp => bracket,
        Accountant::Pld => {
            let cost = |noise: f64| pld::epsilon(&of(noise), steps, delta);
            interpolate((0.6 * bracket).max(NOISE[0]), bracket, target, cost)?
        }
    };
    Some(rounded_up(noise))
}

/// The least number of an interval that is enough, up to the tolerance; none if its end is not.
fn bisect(mut low: f64, mut high: f64, is_enough: impl Fn(f64) -> bool) -> Option<f64> {
    if !is_enough(high) {
        return None;
    }
    if is_enough(low) {
        return Some(low);
    }
    while high > low * (1.0 + TOLERANCE) {
        let middle = (low * high).sqrt();
        *(if is_enough(middle) { &mut high } else { &mut low }) = middle;
    }
    Some(high)
}

/// The least noise that costs at most `target`, up to the tolerance, by interpolation between logarithms (the Illinois
/// method), since an evaluation takes long. It is looked for between `low` and `high`, or below; none if `high` is not enough.
fn interpolate(low: f64, high: f64, target: f64, cost: impl Fn(f64) -> f64) -> Option<f64> {
    let excess = |noise: f64| (cost(noise) / target).ln();
    let (mut low, mut high) = ((low.ln(), excess(low)), (high.ln(), excess(high)));
    if high.1 > 0.0 {
        return None;
    }
    // Step by step: far below, losses are so large that an evaluation takes minutes.
    while low.1 <= 0.0 && low.0 > NOISE[0].ln() {
        high = low;
        let noise = (0.6 * low.0.exp()).max(NOISE[0]);
        low = (noise.ln(), excess(noise));
    }
    if low.1 <= 0.0 {
        return Some(low.0.exp());
    }
    // A cost in the middle of what is accepted, so that the noise is enough and not only almost.
    let aim = -0.5 * TOLERANCE;
    // Distances from it, of which that of an end that stays twice is halved: it would stay forever.
    let (mut above, mut below) = (low.1 - aim, high.1 - aim);
    let mut was_enough = None;
    while high.0 - low.0 > TOLERANCE && high.1 < -TOLERANCE {
        let part = above / (above - below);
        let part = if part > 0.0 && part < 1.0 { part } else { 0.5 };
        let middle = low.0 + part * (high.0 - low.0);
        let found = excess(middle.exp());
        let is_enough = found <= 0.0;
        let stays = was_enough == Some(is_enough);
        if is_enough {
            (high, below) = ((middle, found), found - aim);
            above *= if stays { 0.5 } else { 1.0 };
        } else {
            (low, above) = ((middle, found), found - aim);
            below *= if stays { 0.5 } else { 1.0 };
        }
        was_enough = Some(is_enough);
    }
    Some(high.0.exp())
}

/// To four digits.
fn rounded_up(x: f64) -> f64 {
    let unit = 10f64.powi(x.log10().floor() as i32 - 3);
    let digits = (x / unit).ceil();
    // As it is written in decimal, so that it is the number that people see.
    format!("{:.*}", (-(unit.log10().round() as i32)).max(0) as usize, digits * unit).parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::cell::Cell;

    #[derive(Deserialize)]
    struct Case {
        sampling_rate: f64,
        noise_multiplier: f64,
        steps: u64,
        delta: f64,
        opacus_rdp: f64,
        google_rdp: f64,
        /// Lower bound, estimate, upper bound.
        opacus_prv: Option<[f64; 3]>,
        /// Pessimistic.
        google_pld: Option<f64>,
    }

    #[derive(Deserialize)]
    struct Reference {
        orders: Vec<f64>,
        /// q, σ, order, divergence
        moments: Vec<[f64; 4]>,
        cases: Vec<Case>,
    }

    /// What other implementations find: tests/privacy/reference.py.
    fn reference() -> Reference {
        serde_json::from_str(include_str!("../../../../tests/privacy/reference.json")).unwrap()
    }

    impl Case {
        fn mechanism(&self) -> SampledGaussian {
            SampledGaussian { sampling_rate: self.sampling_rate, noise_multiplier: self.noise_multiplier }
        }

        fn name(&self) -> String {
            let Self { sampling_rate, noise_multiplier, steps, delta, .. } = self;
            format!("q {sampling_rate}, σ {noise_multiplier}, {steps} steps, δ {delta}")
        }
    }

    #[test]
    fn divergences_are_those_of_other_programs() {
        let Reference { moments, .. } = reference();
        assert!(moments.len() > 300);
        for [q, sigma, order, want] in moments {
            let mechanism = SampledGaussian { sampling_rate: q, noise_multiplier: sigma };
            let found = super::super::rdp::divergence(&mechanism, order);
            assert!((found - want).abs() <= 1e-9 * want, "q {q} σ {sigma} α {order}: {found} {want}");
        }
    }

    #[test]
    fn rdp_is_that_of_other_programs() {
        let Reference { orders, cases, .. } = reference();
        assert!(cases.len() >= 60);
        for case in cases {
            let rdp = Rdp::at(&case.mechanism(), orders.clone());
            let found = rdp.epsilon(case.steps, case.delta);
            // Opacus does not see that δ alone is enough, and Google's leaves out orders.
            let want = if case.google_rdp == 0.0 { 0.0 } else { case.opacus_rdp };
            assert!((found - want).abs() <= 1e-6 * want, "{}: {found} {want}", case.name());
            assert!(found <= case.google_rdp * (1.0 + 1e-6), "{}: {found}", case.name());
            assert!(Rdp::new(&case.mechanism()).epsilon(case.steps, case.delta) <= found * (1.0 + 1e-12));
        }
    }

    #[test]
    fn pld_is_tight_and_never_below_a_lower_bound() {
        let mut compared = 0;
        for case in reference().cases {
            let found = epsilon(Accountant::Pld, &case.mechanism(), case.steps, case.delta);
            let [lower, estimate, upper] = case.opacus_prv.unwrap_or([0.0, f64::NAN, f64::INFINITY]);
            let pessimistic = case.google_pld.unwrap_or(f64::INFINITY);
            assert!(found >= lower, "{}: {found}, at least {lower}", case.name());
            // Bounds below 0 say that ε is 0.
            let most = pessimistic.min(upper.max(0.0));
            // The grid is no finer than an ε that is as good as none.
            assert!(found <= 1.01 * most + 1e-3, "{}: {found}, at most {most}", case.name());
            // An estimate whose own bounds are apart says little.
            let estimate = if upper - lower < 0.02 * estimate { estimate } else { f64::NAN };
            for want in [estimate, pessimistic].into_iter().filter(|want| want.is_finite() && *want > 1e-3) {
                compared += 1;
                assert!((found / want - 1.0).abs() < 0.01, "{}: {found} {want}", case.name());
            }
        }
        assert!(compared >= 100, "{compared}");
    }

    #[test]
    fn noise_is_the_least_that_keeps_a_promise() {
        for accountant in [Accountant::Pld, Accountant::Rdp] {
            for (q, steps, target) in [(0.01, 1000, 1.0), (0.2, 50, 0.1), (1.0, 10, 8.0)] {
                let noise = noise_for(accountant, q, steps, target, 1e-5).unwrap();
                let of = |noise_multiplier| {
                    let mechanism = SampledGaussian { sampling_rate: q, noise_multiplier };
                    epsilon(accountant, &mechanism, steps, 1e-5)
                };
                assert!(
                    of(noise) <= target && of(noise * 0.995) > target,
                    "{accountant:?} {q} {steps}: {noise}"
                );
            }
        }
        assert_eq!(noise_for(Accountant::Rdp, 1.0, 1_000_000, 1e-9, 1e-9), None);
        // Where any noise is enough, the least that is searched.
        assert!(noise_for(Accountant::Rdp, 1e-4, 1, 1e4, 1e-2).is_some_and(|noise| noise < 0.051));
    }

    #[test]
    fn a_search_takes_few_evaluations() {
        // Almost straight, bent to either side, and without a finite end.
        let costs: [fn(f64) -> f64; 4] = [
            |noise| 4.3 / noise.powf(1.0 + 1e-6 * noise),
            |noise| (30.0 / noise).exp(),
            |noise| (1.0 / noise).ln_1p(),
            |noise| if noise < 2.0 { f64::INFINITY } else { 1.0 / noise },
        ];
        for (i, cost) in costs.into_iter().enumerate() {
            for least in [2.1, 29.0, 43.0] {
                let evaluations = Cell::new(0);
                let counted = |noise| {
                    evaluations.set(evaluations.get() + 1);
                    assert!(evaluations.get() <= 20, "cost {i}, least {least}");
                    cost(noise)
                };
                let found = interpolate(0.6 * least, 1.3 * least, cost(least), counted).unwrap();
                assert!(cost(found) <= cost(least), "cost {i}: {found} is not enough, {least} is");
                assert!(found <= least * (1.0 + 2.0 * TOLERANCE), "cost {i}: {found}, {least} is enough");
            }
        }
    }

    #[test]
    fn numbers_are_rounded_up_to_four_digits() {
        assert_eq!([1.23401, 0.051234, 1234.2, 2.0].map(rounded_up), [1.235, 0.05124, 1235.0, 2.0]);
    }
}
