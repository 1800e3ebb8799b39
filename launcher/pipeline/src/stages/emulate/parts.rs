//! The parts that a middle layer can be without: components of its attention matrices, and channels of its MLP, each
//! with the terms of its score. A file per layer.

use super::statistics::{Statistics, write_f32};
use anyhow::Result;
use gradtx_models::decoder::{LayerShape, ProductSums, Ranks};
use gradtx_models::gradot::{
    Candidates, Choice, Compressed, Matrix, Term, channels, components, gradient_shift,
};
use gradtx_models::linalg::Svd;
use gradtx_models::lora::Module;
use gradtx_runtime::artifact::{TensorFile, TensorSource};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What a layer can be without.
pub(super) struct Parts {
    /// Of q, k, v and o.
    pub attention: [Attention; 4],
    pub channels: Candidates,
}

/// An attention matrix in components.
pub(super) struct Attention {
    rows: usize,
    cols: usize,
    pub candidates: Candidates,
}

impl Attention {
    pub fn matrix(&self, layer: usize, scores: Vec<f64>) -> Matrix {
        Matrix { layer, rows: self.rows, cols: self.cols, scores }
    }
}

/// A matrix of the LLM: values by rows, and its shape.
pub(super) fn weight(
    statistics: &Statistics<'_>,
    layer: usize,
    module: Module,
) -> Result<(Vec<f32>, [usize; 2])> {
    let source = TensorSource::open(&statistics.side.dir)?;
    let name = format!("model.layers.{layer}.{}.weight", module.path());
    let tensor = source.tensor(&name)?;
    let block = &statistics.side.model.blocks()[layer];
    let shape = [module.outputs(block).len(), module.fused().dims(block).0];
    tensor.expect_shape(&shape)?;
    Ok((tensor.to_f32()?, shape))
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn path(statistics: &Statistics<'_>, layer: usize) -> PathBuf {
    statistics.dir.join(format!("{layer:03}.parts.safetensors"))
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

impl Parts {
    /// Those of a layer: from its file, which is made if it is not there.
    pub fn of_layer(statistics: &Statistics<'_>, layer: usize) -> Result<Self> {
        let path = path(statistics, layer);
        if TensorFile::open(&path).is_err() {
            write_f32(&path, &computed(statistics, layer)?)?;
        }
        let file = TensorFile::open(&path)?;
        let block = &statistics.side.model.blocks()[layer];
        let mut attention = vec![];
        for module in Module::ATTENTION {
            let (rows, cols) = (module.outputs(block).len(), module.fused().dims(block).0);
            attention.push(Attention { rows, cols, candidates: read(&file, module.name())? });
        }
        let attention = attention.try_into().ok().expect("there are four modules");
        Ok(Self { attention, channels: read(&file, "mlp")? })
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

fn read(file: &TensorFile, name: &str) -> Result<Candidates> {
    let column = |what: &str| -> Result<Vec<f64>> {
        let name = format!("{name}.{what}");
        Ok(wide(&file.tensor(&name)?.to_f32()?))
    };
    let term = |(second, first)| Term { second, first };
    Ok(Candidates {
        terms: column("second")?.into_iter().zip(column("first")?).map(term).collect(),
        magnitude: column("magnitude")?,
        activation: column("activation")?,
    })
}

fn written(tensors: &mut Tensors, name: &str, candidates: &Candidates) {
    let columns: [(&str, Vec<f64>); 4] = [
        ("second", candidates.terms.iter().map(|term| term.second).collect()),
        ("first", candidates.terms.iter().map(|term| term.first).collect()),
        ("magnitude", candidates.magnitude.clone()),
        ("activation", candidates.activation.clone()),
    ];
    for (what, values) in columns {
        tensors.push((format!("{name}.{what}"), vec![values.len()], narrow(&values)));
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

/// What the file of a layer holds.
fn computed(statistics: &Statistics<'_>, layer: usize) -> Result<Tensors> {
    let sums = statistics.read(layer)?;
    let block = &statistics.side.model.blocks()[layer];
    let mut tensors = vec![];
    for module in Module::ATTENTION {
        let (whole, [rows, cols]) = weight(statistics, layer, module)?;
        let svd = Svd::new(rows, cols, &wide(&whole))?;
        let candidates = components(&svd, &sums[module.fused() as usize], module.outputs(block));
        let (name, rank) = (module.name(), svd.values.len());
        tensors.push((format!("{name}.values"), vec![rank], narrow(&svd.values)));
        tensors.push((format!("{name}.left"), vec![rank, rows], narrow(&svd.left.concat())));
        tensors.push((format!("{name}.right"), vec![rank, cols], narrow(&svd.right.concat())));
        written(&mut tensors, name, &candidates);
    }
    let whole = |module: Module| -> Result<Vec<f64>> { Ok(wide(&weight(statistics, layer, module)?.0)) };
    let (gate, up, down) = (whole(Module::Gate)?, whole(Module::Up)?, whole(Module::Down)?);
    let [_, _, of_gate_up, of_down] = &sums;
    written(&mut tensors, "mlp", &channels([&gate, &up, &down], block.hidden, of_gate_up, of_down));
    Ok(tensors)
}

/// What a layer keeps, for the report.
pub(super) struct Summary {
    pub json: Value,
    /// Parameters of its matrices that are kept, and all.
    pub kept: usize,
    pub whole: usize,
}

/// The shape of a layer of which this stays.
pub(super) fn shape(statistics: &Statistics<'_>, layer: usize, choice: &Choice) -> Result<LayerShape> {
    let parts = Parts::of_layer(statistics, layer)?;
    let rank = |module: Module| {
        let (part, kept) = (&parts.attention[module as usize], &choice.components[module as usize]);
        // All of them are the matrix itself.
        let is_whole = kept.len() == part.candidates.terms.len();
        if is_whole { 0 } else { part.matrix(layer, vec![]).stored_rank(kept.len()) }
    };
    let [q, k, v, o] = Module::ATTENTION.map(rank);
    Ok(LayerShape { ranks: Ranks { q, k, v, o }, intermediate: choice.channels.len() })
}

/// Ranks, kept energy and the exact shift of a layer of which this stays.
pub(super) fn summary(statistics: &Statistics<'_>, layer: usize, choice: &Choice) -> Result<Summary> {
    let sums = statistics.read(layer)?;
    let block = &statistics.side.model.blocks()[layer];
    let shape = shape(statistics, layer, choice)?;
    let mut of_modules = serde_json::Map::new();
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
        of_modules.insert(
            module.name().into(),
            json!({
                "components": stays.len(),
                "of": svd.values.len(),
                "rank": stored,
                "energy": if all > 0.0 { energy(&mut stays.iter().copied()) / all } else { 1.0 },
                "gradient_shift": shift(&sums, module, block, &change),
            }),
        );
    }
    let width = block.mlp.intermediate;
    kept += 3 * choice.channels.len() * block.hidden;
    whole += 3 * width * block.hidden;
    let json = json!({
        "layer": layer,
        "attention": of_modules,
        "channels": { "kept": choice.channels.len(), "of": width },
    });
    Ok(Summary { json, kept, whole })
}

fn shift(
    sums: &[ProductSums; 4],
    module: Module,
    block: &gradtx_models::decoder::BlockConfig,
    change: &[f64],
) -> f64 {
    gradient_shift(&sums[module.fused() as usize], module.outputs(block), change)
}
