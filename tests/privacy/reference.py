"""Privacy accounting by reference implementations: writes reference.json beside this file.

    pip install opacus==1.6.0 dp-accounting==0.6.0 mpmath
    python reference.py

For settings of DP-SGD (sampling rate q, noise multiplier, steps, delta) it states

* `moments`: Rényi divergences of one step at some orders, by the binomial sum or as an integral, in many digits;
* `opacus_rdp`, `google_rdp`: epsilon by RDP with the orders that Opacus uses by default; the second leaves out
  orders whose series does not converge;
* `opacus_prv`: lower bound, estimate and upper bound of epsilon by composed privacy loss variables;
* `google_pld`: pessimistic epsilon by composed privacy loss distributions, with chords between the points of the grid.

A bound that takes too much memory is null.
"""

import json
import math
import pathlib
import warnings

import mpmath
from dp_accounting import dp_event, rdp as google_rdp
from dp_accounting.pld import privacy_loss_distribution
from opacus.accountants.analysis import rdp as opacus_rdp
from opacus.accountants.analysis.prv import (
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    compute_safe_domain_size,
    discretize,
)

ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
MOMENT_ORDERS = [2, 3, 8, 32, 100]
FRACTIONAL_ORDERS = [1.1, 1.5, 2.7, 9.3]
RATES = [1e-4, 1e-3, 4e-3, 0.02, 0.1, 0.5]
NOISES = [0.3, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0]
STEPS = [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]
DELTAS = [1e-3, 1e-5, 1e-7, 1e-9]
MOST_POINTS = 4_000_000


def settings():
    """Some seventy of all combinations: those whose epsilon is neither nothing nor meaningless."""
    found = []
    for i, q in enumerate(RATES):
        for j, noise in enumerate(NOISES):
            for k, steps in enumerate(STEPS):
                delta = DELTAS[(i + 2 * j + 3 * k) % len(DELTAS)]
                if not 0.02 <= rdp_epsilon(q, noise, steps, delta) <= 60:
                    continue
                if (3 * i + j + 5 * k) % 4 in [0, 3] and (i + j + k) % 2 == 0:
                    found.append((q, noise, steps, delta))
    return found


def rdp_epsilon(q, noise, steps, delta):
    rdp = opacus_rdp.compute_rdp(q=q, noise_multiplier=noise, steps=steps, orders=ORDERS)
    return opacus_rdp.get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)[0]


def google_rdp_epsilon(q, noise, steps, delta):
    accountant = google_rdp.RdpAccountant(orders=ORDERS)
    gaussian = dp_event.GaussianDpEvent(noise)
    accountant.compose(dp_event.PoissonSampledDpEvent(q, gaussian), steps)
    return accountant.get_epsilon(delta)


def moment(q, noise, order):
    """Rényi divergence of a whole order in 60 digits."""
    with mpmath.workdps(60):
        q, variance = mpmath.mpf(q), mpmath.mpf(noise) ** 2
        terms = (
            mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp((k * k - k) / (2 * variance))
            for k in range(order + 1)
        )
        return float(mpmath.log(mpmath.fsum(terms)) / (order - 1))


def fractional_moment(q, noise, order):
    """Rényi divergence of any order in 30 digits, by an even sum: the integrand is analytic and falls off fast."""
    with mpmath.workdps(30):
        spacing = min(noise / 12, noise**2 / 6)
        total = mpmath.mpf(0)
        for i in range(math.floor(-14 * noise / spacing), math.ceil((order + 14 * noise) / spacing) + 1):
            x = mpmath.mpf(i) * spacing
            ratio = 1 - q + q * mpmath.exp((2 * x - 1) / (2 * mpmath.mpf(noise) ** 2))
            total += mpmath.npdf(x, 0, noise) * ratio**order
        return float(mpmath.log(total * spacing) / (order - 1))


def prv(q, noise, steps, delta, about):
    error, delta_error = 3e-3 * about, delta / 1000
    loss = PoissonSubsampledGaussianPRV(q, noise)
    reach = compute_safe_domain_size(
        prvs=[loss], max_self_compositions=[steps], eps_error=error, delta_error=delta_error
    )
    mesh = error / math.sqrt(steps * math.log(12 / delta_error) / 2)
    if 2 * reach / mesh > MOST_POINTS:
        return None
    domain = Domain.create_aligned(-reach, reach, mesh)
    one = discretize(TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain)
    composed = compose_heterogeneous(dprvs=[one], num_self_compositions=[steps])
    return [float(x) for x in composed.compute_epsilon(delta, delta_error, error)]


def pld(q, noise, steps, delta, about):
    largest = (20 * noise + 1) / (2 * noise * noise)
    spread = q * math.sqrt(math.expm1(1 / noise**2))
    interval = max(min(about * 1e-4, spread / 30), 2 * largest / MOST_POINTS)
    one = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=q, value_discretization_interval=interval, use_connect_dots=True
    )
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def main():
    warnings.simplefilter("ignore")
    cases = []
    for q, noise, steps, delta in settings():
        about = rdp_epsilon(q, noise, steps, delta)
        case = {"sampling_rate": q, "noise_multiplier": noise, "steps": steps, "delta": delta}
        case["opacus_rdp"] = float(about)
        case["google_rdp"] = float(google_rdp_epsilon(q, noise, steps, delta))
        for name, method in [("opacus_prv", prv), ("google_pld", pld)]:
            try:
                case[name] = method(q, noise, steps, delta, about)
            except (RuntimeError, ValueError, MemoryError) as error:
                print(f"{name}: {case}: {error}")
                case[name] = None
        cases.append(case)
        print(json.dumps(case), flush=True)
    moments = [
        [q, noise, order, moment(q, noise, order)] for q in RATES for noise in NOISES for order in MOMENT_ORDERS
    ]
    moments += [
        [q, noise, order, fractional_moment(q, noise, order)]
        for q in RATES
        for noise in NOISES
        for order in FRACTIONAL_ORDERS
    ]
    text = json.dumps({"orders": ORDERS, "moments": moments, "cases": cases}, indent=1)
    pathlib.Path(__file__).with_name("reference.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
