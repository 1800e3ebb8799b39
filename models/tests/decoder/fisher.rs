//! Sums over products as factors of the Fisher matrix: exact for one token, near the Hessian for many.

use crate::common::*;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::rng::Stream;
use gradtx_models::decoder::{
    Activations, Decoder, DecoderConfig, Family, Gradients, Mode, ProductStatistics, ProductSums,
    StatisticsKind, StatisticsOf, drawn,
};
use gradtx_models::gradot::components;
use gradtx_models::linalg::Svd;
use gradtx_models::lora::{Module, Projection};
use gradtx_runtime::data::{Example, PackedBatch, SegmentInfo};

const LAYER: usize = 1;

fn packed(examples: &[(Vec<u32>, Vec<bool>)]) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for (tokens, trained) in examples {
        let example = Example { tokens: tokens.clone(), trained: trained.clone() };
        batch.push(&example, SegmentInfo::default(), 1.0);
    }
    batch
}

/// Sums of a product, of one kind.
fn sums(
    config: &DecoderConfig,
    values: &[f64],
    batch: &PackedBatch,
    kind: StatisticsKind,
    projection: Projection,
) -> ProductSums {
    let cpu = Cpu::new(1);
    let model = decoder::<f64>(&cpu, config, values);
    let of = StatisticsOf { layers: vec![LAYER], kind };
    let mut sums = ProductStatistics::new(&cpu, config, &of).unwrap();
    let mut acts = Activations::new(&model, capacity(batch), Mode::Statistics(&of)).unwrap();
    model.loss_and_gradient(&mut acts, &upload(&cpu, batch), None, Gradients::Statistics(&mut sums)).unwrap();
    sums.product(&cpu, LAYER, projection).unwrap()
}

fn probabilities(config: &DecoderConfig, values: &[f64], batch: &PackedBatch, row: u32) -> Vec<f64> {
    let cpu = Cpu::new(1);
    let model = decoder::<f64>(&cpu, config, values);
    let mut acts = Activations::new(&model, capacity(batch), Mode::Inference(None)).unwrap();
    let logits = model.logits(&mut acts, &upload(&cpu, batch), None, &[row]).unwrap();
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
    let all: f64 = weights.iter().sum();
    weights.iter().map(|x| x / all).collect()
}

/// `X [m, k] Y [k, n]`
fn times(x: &[f64], y: &[f64], k: usize) -> Vec<f64> {
    let n = y.len() / k;
    let at = |i: usize| (0..k).map(|l| x[i / n * k + l] * y[l * n + i % n]).sum();
    (0..x.len() / k * n).map(at).collect()
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    (inner(&differences, &differences) / inner(b, b)).sqrt()
}

/// Of one token, `A ⊗ G` with G over all labels by their probabilities is the generalised Gauss-Newton matrix: with
/// D_y the gradient of label y, and d_y = ⟨D_y, Δ⟩, that times Δ is Σ_y (Λ d)_y D_y, Λ = diag(p) − p pᵀ.
#[test]
fn factors_of_one_token_are_the_gauss_newton_matrix() {
    let config = config(Family::Qwen2, true);
    let values = values(&config, 1);
    let first = 7;
    // The second token, which carries the label, has no label itself and changes nothing before it.
    let with_label = |y: u32| packed(&[(vec![first, y], vec![false, true])]);
    let p = probabilities(&config, &values, &packed(&[(vec![first], vec![false])]), 0);
    for (projection, other) in [(Projection::Qkv, Projection::O), (Projection::O, Projection::Qkv)] {
        let of = |batch: &PackedBatch, kind| sums(&config, &values, batch, kind, projection);
        let alone = packed(&[(vec![first], vec![false])]);
        let a = of(&alone, StatisticsKind::Factors).inputs;
        let by_label: Vec<ProductSums> =
            (0..config.vocab as u32).map(|y| of(&with_label(y), StatisticsKind::Curvature)).collect();
        let weighted = |weights: &[f64]| {
            let mut g = vec![0.0; by_label[0].outputs.len()];
            for (weight, sums) in weights.iter().zip(&by_label) {
                g.iter_mut().zip(&sums.outputs).for_each(|(g, x)| *g += weight * x);
            }
            g
        };
        let g = weighted(&p);
        let (rows, cols) = (g.len().isqrt(), a.len().isqrt());
        let mut stream = Stream::new(3);
        let change: Vec<f64> = (0..rows * cols).map(|_| stream.normal()).collect();
        let along: Vec<f64> = by_label.iter().map(|sums| inner(&sums.gradient, &change)).collect();
        let mean = inner(&p, &along);
        let mut want = vec![0.0; rows * cols];
        for ((p, d), sums) in p.iter().zip(&along).zip(&by_label) {
            want.iter_mut().zip(&sums.gradient).for_each(|(w, x)| *w += p * (d - mean) * x);
        }
        let of_factors = |g: &[f64], a: &[f64]| times(&times(g, &change, rows), a, cols);
        assert!(far(&of_factors(&g, &a), &want) <= 1e-11, "{projection:?}");
        // Labels of the same weight, and the inputs of another product, are found.
        let flat = vec![1.0 / p.len() as f64; p.len()];
        assert!(far(&of_factors(&weighted(&flat), &a), &want) > 1e-3);
        let wrong = sums(&config, &values, &alone, StatisticsKind::Factors, other).inputs;
        assert!(far(&of_factors(&g, &wrong), &want) > 1e-3);
    }
}

#[test]
fn kinds_of_sums_are_parts_of_curvature() {
    let config = config(Family::Qwen3, true);
    let values = values(&config, 1);
    let batch = batch(&config, &[5, 9, 4], &[0; 3], 3);
    for projection in Projection::ALL {
        let of = |kind| sums(&config, &values, &batch, kind, projection);
        let all = of(StatisticsKind::Curvature);
        let (factors, first) = (of(StatisticsKind::Factors), of(StatisticsKind::FirstOrder));
        assert_eq!((factors.inputs, factors.outputs), (all.inputs, all.outputs));
        assert_eq!(first.gradient, all.gradient);
        assert!(factors.gradient.is_empty() && first.inputs.is_empty());
    }
}

/// The same example, with labels drawn from the model's own probabilities.
fn with_drawn_labels(config: &DecoderConfig, values: &[f64], mut batch: PackedBatch) -> PackedBatch {
    let cpu = Cpu::new(1);
    let model = decoder::<f64>(&cpu, config, values);
    let mut acts = Activations::new(&model, capacity(&batch), Mode::Inference(None)).unwrap();
    let mut stream = Stream::new(11);
    let mut labels = vec![];
    let mut each = |_, logits: &[f64]| {
        labels.extend(logits.chunks_exact(config.vocab).map(|logits| drawn(logits, stream.uniform())));
    };
    model.each_logits(&mut acts, &upload(&cpu, &batch), None, &batch.label_rows, &mut each).unwrap();
    batch.targets = labels;
    batch
}

/// ‖H δ‖₁ of the components of q_proj, H by differences of the gradient, against the score's σ ‖G u‖₁ ‖A v‖₁.
#[test]
fn scores_are_near_the_hessian_s_own_block() {
    let config = config(Family::Qwen2, true);
    let mut values = values(&config, 1);
    let layout = Decoder::<Cpu, f64>::layout_of(&config);
    let name = config.family.tensor(LAYER, Module::Q, ".weight");
    let at = layout.get(&name).unwrap().range();
    let (rows, cols) = (24, 24);
    // Singular values that fall, as those of trained matrices do.
    let svd = Svd::new(rows, cols, &values[at.clone()]).unwrap();
    let part = |svd: &Svd, k: usize, i: usize| svd.values[k] * svd.left[k][i / cols] * svd.right[k][i % cols];
    for k in 0..svd.values.len() {
        let less = 1.0 - (-0.2 * k as f64).exp();
        values[at.clone()].iter_mut().enumerate().for_each(|(i, w)| *w -= less * part(&svd, k, i));
    }
    let mut lengths = batch(&config, &[12; 24], &[0; 24], 3);
    lengths.weights.fill(1.0);
    let batch = with_drawn_labels(&config, &values, lengths);
    let (tokens, labels) = (batch.len() as f64, batch.labels() as f64);
    let svd = Svd::new(rows, cols, &values[at.clone()]).unwrap();
    let outputs = Module::Q.outputs(&config.block());
    let mut found = sums(&config, &values, &batch, StatisticsKind::Curvature, Projection::Qkv);
    found.inputs.iter_mut().chain(&mut found.outputs).for_each(|x| *x /= tokens);
    let predicted = components(&svd, &found, outputs.clone());
    let gradient = |sign: f64, k: usize| {
        let mut changed = values.clone();
        changed[at.clone()].iter_mut().enumerate().for_each(|(i, w)| *w -= sign * 1e-4 * part(&svd, k, i));
        let sums = sums(&config, &changed, &batch, StatisticsKind::FirstOrder, Projection::Qkv);
        sums.gradient[outputs.start * cols..outputs.end * cols].to_vec()
    };
    let of = |k: usize| {
        let (more, less) = (gradient(1.0, k), gradient(-1.0, k));
        let sum: f64 = more.iter().zip(&less).map(|(a, b)| ((a - b) / 2e-4).abs()).sum();
        sum / labels
    };
    let exact: Vec<f64> = (0..svd.values.len()).map(of).collect();
    let scores: Vec<f64> = predicted.terms.iter().map(|term| tokens / labels * term.second).collect();
    let correlation = rank_correlation(&exact, &scores);
    assert!(correlation >= 0.8, "{correlation}");
    let mut ratios: Vec<f64> = scores.iter().zip(&exact).map(|(score, exact)| score / exact).collect();
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    assert!((0.3..3.0).contains(&median), "{median} in {ratios:?}");
}

/// Spearman's rank correlation.
fn rank_correlation(x: &[f64], y: &[f64]) -> f64 {
    let ranks = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
        let mut ranks = vec![0.0; values.len()];
        order.into_iter().enumerate().for_each(|(rank, i)| ranks[i] = rank as f64);
        ranks
    };
    let (x, y, n) = (ranks(x), ranks(y), x.len() as f64);
    1.0 - 6.0 * x.iter().zip(&y).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / (n * (n * n - 1.0))
}
