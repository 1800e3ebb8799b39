//! What stays of every middle layer, by the settings.

use super::parts::Parts;
use gradtx_kernels::rng::derive;
use gradtx_models::decoder::LayerShape;
use gradtx_models::gradot::{Candidates, Choice, choose_channels, choose_components, correlation, lambda};
use gradtx_run::config::EmulatorConfig;

/// What stays.
pub(super) struct Chosen {
    /// Of every middle layer.
    pub choices: Vec<Choice>,
    /// Its shape.
    pub shapes: Vec<LayerShape>,
    /// λ of attention and of MLPs.
    pub lambdas: [f64; 2],
}

/// The choice among the parts of these layers.
pub(super) fn choose(settings: &EmulatorConfig, seed: u64, layers: &[usize], parts: &[Parts]) -> Chosen {
    let given = settings.lambdas();
    let lambdas = match settings.lambda_absolute {
        true => given,
        false => [lambda(given[0], attention(parts)), lambda(given[1], parts.iter().map(|p| &p.channels))],
    };
    let mut matrices = vec![];
    let mut channels = vec![];
    for (&layer, parts) in layers.iter().zip(parts) {
        let key = derive(seed, layer as u64);
        for (i, attention) in parts.attention.iter().enumerate() {
            let scores = attention.candidates.scores(settings.score, lambdas[0], derive(key, 1 + i as u64));
            matrices.push(attention.matrix(layer, scores));
        }
        channels.push(parts.channels.scores(settings.score, lambdas[1], key));
    }
    let [of_attention, of_mlp] = settings.ratios();
    let kept = choose_components(&matrices, of_attention, settings.keep, settings.allocate);
    let channels = choose_channels(&channels, of_mlp, settings.keep, settings.allocate);
    let of_layer = |(kept, channels): (&[Vec<usize>], Vec<usize>)| Choice {
        components: std::array::from_fn(|i| kept[i].clone()),
        channels,
    };
    let choices: Vec<Choice> = kept.chunks_exact(4).zip(channels).map(of_layer).collect();
    let all = layers.iter().zip(parts).zip(&choices);
    let shapes = all.map(|((&layer, parts), choice)| parts.shape(layer, choice)).collect();
    Chosen { choices, shapes, lambdas }
}

fn attention(parts: &[Parts]) -> impl Iterator<Item = &Candidates> {
    parts.iter().flat_map(|parts| &parts.attention).map(|attention| &attention.candidates)
}

/// Correlation of the first-order terms by the two halves of the examples, which have so many labels: of attention, of
/// MLPs. None where they do not vary.
pub(super) fn agreement(parts: &[Parts], labels: [usize; 2]) -> [Option<f64>; 2] {
    let [first, second] = labels.map(|labels| labels as f64);
    let halves = |whole: f64, half: f64| (half, ((first + second) * whole - first * half) / second.max(1.0));
    let pairs = |candidates: &Candidates, of_half: &[f64]| -> Vec<(f64, f64)> {
        candidates.terms.iter().zip(of_half).map(|(term, half)| halves(term.first, *half)).collect()
    };
    let of_attention = parts.iter().flat_map(|parts| &parts.attention);
    let of_attention: Vec<_> = of_attention.flat_map(|a| pairs(&a.candidates, &a.of_first_half)).collect();
    let of_mlp = parts.iter().flat_map(|parts| pairs(&parts.channels, &parts.channels_of_first_half));
    let of_mlp: Vec<_> = of_mlp.collect();
    [correlation(of_attention.into_iter()), correlation(of_mlp.into_iter())]
}
