//! The parts that a middle layer can be without: components of its attention matrices, and channels of its MLP, each
//! with the terms of its score. A file per layer.

use super::files::{Tensors, intact, narrow, read, wide, write};
use super::statistics::{PROJECTIONS, Statistics, push_candidates, read_candidates};
use anyhow::Result;
use gradtx_models::decoder::{LayerShape, Ranks};
use gradtx_models::gradot::{
    Candidates, Choice, Compressed, Matrix, components, first_order_of_components, gradient_shift,
};
use gradtx_models::linalg::Svd;
use gradtx_models::lora::{Module, Projection};
use gradtx_runtime::artifact::{TensorFile, checksum};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// What a layer can be without.
pub(super) struct Parts {
    /// Of q, k, v and o.
    pub attention: [Attention; 4],
    pub channels: Candidates,
    /// f̃ of the channels by the first half of the examples alone.
    pub channels_of_first_half: Vec<f64>,
}

/// An attention matrix in components.
pub(super) struct Attention {
    rows: usize,
    cols: usize,
    pub candidates: Candidates,
    /// f̃ of the components by the first half of the examples alone.
    pub of_first_half: Vec<f64>,
}

impl Attention {
    pub fn matrix(&self, layer: usize, scores: Vec<f64>) -> Matrix {
        Matrix { layer, rows: self.rows, cols: self.cols, scores }
    }
}

fn path(statistics: &Statistics<'_>, layer: usize) -> PathBuf {
    statistics.dir.join(format!("{layer:03}.parts.safetensors"))
}

/// What the parts of a layer are of: its statistics, which have this checksum.
fn of(statistics: &Statistics<'_>, sum: &str) -> String {
    checksum(format!("{} {sum}", statistics.of).as_bytes())
}

impl Parts {
    /// Whether those of a layer are there, and of the statistics that are there.
    pub fn are_there(statistics: &Statistics<'_>, layer: usize) -> bool {
        let sum = statistics.intact(layer);
        sum.is_some_and(|sum| intact(&path(statistics, layer), &of(statistics, &sum)).is_some())
    }

    /// Makes the file of a layer whose statistics are there.
    pub fn make(statistics: &Statistics<'_>, layer: usize) -> Result<()> {
        let sum = statistics.intact(layer).unwrap_or_default();
        write(&path(statistics, layer), &of(statistics, &sum), &computed(statistics, layer)?)
    }

    /// Those of a layer.
    pub fn read(statistics: &Statistics<'_>, layer: usize) -> Result<Self> {
        let file = TensorFile::open(&path(statistics, layer))?;
        let block = &statistics.side.model.blocks()[layer];
        let of_half =
            |name: &str, count: usize| read(&file, &format!("{name}.first_of_first_half"), &[count]);
        let mut attention = vec![];
        for module in Module::ATTENTION {
            let (rows, cols) = (module.outputs(block).len(), module.fused().dims(block).0);
            let candidates = read_candidates(&file, module.name())?;
            let of_first_half = of_half(module.name(), candidates.terms.len())?;
            attention.push(Attention { rows, cols, candidates, of_first_half });
        }
        let attention = attention.try_into().ok().expect("there are four modules");
        let channels = read_candidates(&file, "mlp")?;
        let channels_of_first_half = of_half("mlp", channels.terms.len())?;
        Ok(Self { attention, channels, channels_of_first_half })
    }

    /// The shape of the layer if this stays.
    pub fn shape(&self, layer: usize, choice: &Choice) -> LayerShape {
        let rank = |module: Module| {
            let (part, kept) = (&self.attention[module as usize], &choice.components[module as usize]);
            // All of them are the matrix itself.
            let is_whole = kept.len() == part.candidates.terms.len();
            if is_whole { 0 } else { part.matrix(layer, vec![]).stored_rank(kept.len()) }
        };
        let [q, k, v, o] = Module::ATTENTION.map(rank);
        LayerShape { ranks: Ranks { q, k, v, o }, intermediate: choice.channels.len() }
    }
}

/// The singular vectors of an attention matrix, as its layer's file has them.
pub(super) fn decomposition(statistics: &Statistics<'_>, layer: usize, module: Module) -> Result<Svd> {
    let file = TensorFile::open(&path(statistics, layer))?;
    let read = |what: &str| -> Result<(Vec<f64>, usize)> {
        let name = format!("{}.{what}", module.name());
        let tensor = file.tensor(&name)?;
        Ok((wide(&tensor.to_f32()?), tensor.shape.last().copied().unwrap_or(0)))
    };
    let rows =
        |(values, cols): (Vec<f64>, usize)| values.chunks_exact(cols.max(1)).map(<[f64]>::to_vec).collect();
    Ok(Svd { values: read("values")?.0, left: rows(read("left")?), right: rows(read("right")?) })
}

/// What the file of a layer holds.
fn computed(statistics: &Statistics<'_>, layer: usize) -> Result<Tensors> {
    let known = statistics.read(layer)?;
    let block = &statistics.side.model.blocks()[layer];
    let of_module = |module: Module| -> Result<Tensors> {
        let (whole, [rows, cols]) = statistics.weight(layer, module)?;
        let (outputs, product) = (module.outputs(block), module.fused() as usize);
        let svd = Svd::new(rows, cols, &wide(&whole))?;
        let candidates = components(&svd, &known.products[product], outputs.clone());
        let own = &known.first_half[product][outputs.start * cols..outputs.end * cols];
        let of_half = first_order_of_components(&svd, own);
        let (name, rank) = (module.name(), svd.values.len());
        let mut tensors = vec![
            (format!("{name}.values"), vec![rank], narrow(&svd.values)),
            (format!("{name}.left"), vec![rank, rows], narrow(&svd.left.concat())),
            (format!("{name}.right"), vec![rank, cols], narrow(&svd.right.concat())),
        ];
        push_candidates(&mut tensors, name, &candidates);
        tensors.push((format!("{name}.first_of_first_half"), vec![rank], narrow(&of_half)));
        Ok(tensors)
    };
    let of_modules: Vec<Tensors> = Module::ATTENTION.into_par_iter().map(of_module).collect::<Result<_>>()?;
    let mut tensors = of_modules.concat();
    let (candidates, of_half) = &known.channels;
    push_candidates(&mut tensors, "mlp", candidates);
    tensors.push(("mlp.first_of_first_half".into(), vec![of_half.len()], narrow(of_half)));
    Ok(tensors)
}

/// What a layer keeps, for the report.
pub(super) struct Summary {
    pub json: Value,
    /// Parameters of its matrices that are kept, and all.
    pub kept: usize,
    pub whole: usize,
}

/// Ranks, kept energy and the exact shift of a layer of which this stays, in this shape.
pub(super) fn summary(
    statistics: &Statistics<'_>,
    layer: usize,
    choice: &Choice,
    shape: &LayerShape,
) -> Result<Summary> {
    let known = statistics.read(layer)?;
    let block = &statistics.side.model.blocks()[layer];
    let mut of_modules = Map::new();
    let (mut kept, mut whole) = (0, 0);
    for module in Module::ATTENTION {
        let svd = decomposition(statistics, layer, module)?;
        let (rows, cols) = (module.outputs(block).len(), module.fused().dims(block).0);
        let stays = &choice.components[module as usize];
        let energy = |of: &mut dyn Iterator<Item = usize>| of.map(|k| svd.values[k].powi(2)).sum::<f64>();
        let all = energy(&mut (0..svd.values.len()));
        let change = Compressed::change(&svd, stays, rows, cols);
        let stored = module.rank(&shape.ranks);
        kept += if stored > 0 { stored * (rows + cols) } else { rows * cols };
        whole += rows * cols;
        let sums = &known.products[module.fused() as usize];
        of_modules.insert(
            module.name().into(),
            json!({
                "components": stays.len(),
                "of": svd.values.len(),
                "rank": stored,
                "energy": if all > 0.0 { energy(&mut stays.iter().copied()) / all } else { 1.0 },
                "gradient_shift": gradient_shift(sums, module.outputs(block), &change),
            }),
        );
    }
    let width = block.mlp.intermediate;
    kept += 3 * choice.channels.len() * block.hidden;
    whole += 3 * width * block.hidden;
    let shares = |projection: Projection| {
        let at = projection as usize;
        (PROJECTIONS[at].to_owned(), json!(known.first_position[at]))
    };
    let json = json!({
        "layer": layer,
        "attention": of_modules,
        "channels": { "kept": choice.channels.len(), "of": width },
        "first_position_share": Map::from_iter(Projection::ALL.map(shares)),
    });
    Ok(Summary { json, kept, whole })
}
