//! What is known of the middle layers from public data, a file per layer: of q, k, v and of o the sums A, G and D, of the
//! MLP the terms of its channels' scores, which are all that its sums are needed for.

use super::files::{Tensors, intact, narrow, read, weight, wide, write};
use anyhow::Result;
use gradtx_models::decoder::{BlockConfig, ProductSums};
use gradtx_models::gradot::{Candidates, Term, channels, first_order_of_channels};
use gradtx_models::lora::{Module, Projection};
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::TensorFile;
use gradtx_train::model_spec::ModelSpec;
use std::path::{Path, PathBuf};

/// Where the statistics of the middle layers are, and of what.
#[derive(Clone, Copy)]
pub(super) struct Statistics<'a> {
    pub dir: &'a Path,
    pub side: &'a ModelSpec,
    /// The middle.
    pub layers: &'a [usize],
    /// Checksum of everything that they depend on.
    pub of: &'a str,
}

/// Names of products, by [`Projection`].
pub(super) const PROJECTIONS: [&str; 4] = ["qkv", "o", "gate_up", "down"];
/// The products whose sums are kept.
const ATTENTION: [Projection; 2] = [Projection::Qkv, Projection::O];

/// The sums of a layer's products.
pub(super) struct LayerSums {
    /// By [`Projection`]: means of A and G over tokens, of D over labels.
    pub products: [ProductSums; 4],
    /// The mean D of the first half of the examples alone, by [`Projection`]; empty for gate and up.
    pub first_half: [Vec<f64>; 4],
    /// Share of the examples' first tokens in the trace of A, by [`Projection`].
    pub first_position: [f64; 4],
}

/// The statistics of a layer.
pub(super) struct LayerStatistics {
    /// Of q, k, v and of o: A, G and D. Of G the blocks of the three matrices.
    pub products: [ProductSums; 2],
    /// D of the first half of the examples alone.
    pub first_half: [Vec<f64>; 2],
    /// The candidates of the MLP, and f̃ of the first half alone.
    pub channels: (Candidates, Vec<f64>),
    /// Share of the examples' first tokens in the trace of A, by [`Projection`].
    pub first_position: [f64; 4],
}

impl Statistics<'_> {
    /// The file of a layer.
    pub fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("{layer:03}.safetensors"))
    }

    /// The checksum of a layer's statistics, if they are there and intact.
    pub fn intact(&self, layer: usize) -> Option<String> {
        intact(&self.path(layer), self.of)
    }

    /// A matrix of the LLM: values by rows, and its shape.
    pub fn weight(&self, layer: usize, module: Module) -> Result<(Vec<f32>, [usize; 2])> {
        let block = &self.side.model.blocks()[layer];
        let shape = [module.outputs(block).len(), module.fused().dims(block).0];
        let name = self.side.model.family.tensor(layer, module, ".weight");
        Ok((weight(&self.side.dir, &name, shape)?, shape))
    }

    /// The statistics of a layer.
    pub fn read(&self, layer: usize) -> Result<LayerStatistics> {
        let file = TensorFile::open(&self.path(layer))?;
        let block = &self.side.model.blocks()[layer];
        let mut products: [ProductSums; 2] = Default::default();
        let mut first_half: [Vec<f64>; 2] = Default::default();
        for (i, projection) in ATTENTION.into_iter().enumerate() {
            let ((inputs, outputs), name) = (projection.dims(block), PROJECTIONS[projection as usize]);
            let of = |what: &str, shape: &[usize]| read(&file, &format!("{name}.{what}"), shape);
            let mut all = vec![0.0; outputs * outputs];
            for module in projection.modules(block) {
                let own = module.outputs(block);
                let values = read(&file, &format!("{}.outputs", module.name()), &[own.len(), own.len()])?;
                for (row, values) in own.clone().zip(values.chunks_exact(own.len())) {
                    all[row * outputs..][own.clone()].copy_from_slice(values);
                }
            }
            let gradient = of("gradient", &[outputs, inputs])?;
            products[i] = ProductSums { inputs: of("inputs", &[inputs, inputs])?, outputs: all, gradient };
            first_half[i] = of("gradient_of_first_half", &[outputs, inputs])?;
        }
        let channels = read_candidates(&file, "mlp")?;
        let of_half = read(&file, "mlp.first_of_first_half", &[channels.terms.len()])?;
        let shares = read(&file, "first_position", &[4])?;
        let first_position = std::array::from_fn(|i| shares[i]);
        Ok(LayerStatistics { products, first_half, channels: (channels, of_half), first_position })
    }

    /// Writes the statistics of a layer.
    ///
    /// # Errors
    /// When sums are not finite: names the layer, the product and the sum.
    pub fn write(&self, layer: usize, sums: &LayerSums) -> Result<()> {
        self.expect_finite(layer, sums)?;
        let block = &self.side.model.blocks()[layer];
        let mut tensors: Tensors = vec![];
        for projection in ATTENTION {
            let ((inputs, outputs), name) = (projection.dims(block), PROJECTIONS[projection as usize]);
            let ProductSums { inputs: a, outputs: g, gradient } = &sums.products[projection as usize];
            tensors.push((format!("{name}.inputs"), vec![inputs, inputs], narrow(a)));
            for module in projection.modules(block) {
                let own = module.outputs(block);
                let rows = own.clone().flat_map(|row| &g[row * outputs..][own.clone()]);
                let values: Vec<f32> = rows.map(|x| *x as f32).collect();
                tensors.push((format!("{}.outputs", module.name()), vec![own.len(), own.len()], values));
            }
            tensors.push((format!("{name}.gradient"), vec![outputs, inputs], narrow(gradient)));
            let half = narrow(&sums.first_half[projection as usize]);
            tensors.push((format!("{name}.gradient_of_first_half"), vec![outputs, inputs], half));
        }
        let (candidates, of_half) = self.channels(layer, block, sums)?;
        push_candidates(&mut tensors, "mlp", &candidates);
        tensors.push(("mlp.first_of_first_half".into(), vec![of_half.len()], narrow(&of_half)));
        tensors.push(("first_position".into(), vec![4], narrow(&sums.first_position)));
        write(&self.path(layer), self.of, &tensors)
    }

    /// The candidates of a layer's MLP, and f̃ of the first half of the examples.
    fn channels(
        &self,
        layer: usize,
        block: &BlockConfig,
        sums: &LayerSums,
    ) -> Result<(Candidates, Vec<f64>)> {
        let whole = |module: Module| -> Result<Vec<f64>> { Ok(wide(&self.weight(layer, module)?.0)) };
        let (gate, up, down) = (whole(Module::Gate)?, whole(Module::Up)?, whole(Module::Down)?);
        let [_, _, of_gate_up, of_down] = &sums.products;
        let candidates = channels([&gate, &up, &down], block.hidden, of_gate_up, of_down);
        let of_half = &sums.first_half[Projection::Down as usize];
        Ok((candidates, first_order_of_channels(&down, of_half, block.mlp.intermediate)))
    }

    fn expect_finite(&self, layer: usize, sums: &LayerSums) -> Result<()> {
        for projection in Projection::ALL {
            let ProductSums { inputs, outputs, gradient } = &sums.products[projection as usize];
            let all = [("inputs", inputs), ("gradients of outputs", outputs), ("gradient", gradient)];
            if let Some((what, _)) = all.iter().find(|(_, values)| values.iter().any(|x| !x.is_finite())) {
                let product = PROJECTIONS[projection as usize];
                let what = format!(
                    "{}: layer {layer}, product {product}: the sums of {what} over public data are not finite",
                    self.side.dir.display()
                );
                let hint = "the LLM's activations or gradients overflow: look at the model with `gradtx inspect`, and \
                            set device.dtype = \"f32\" if it is another";
                return Err(failed(what, hint));
            }
        }
        Ok(())
    }
}

/// Reads candidates that [`push_candidates`] wrote.
pub(super) fn read_candidates(file: &TensorFile, name: &str) -> Result<Candidates> {
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

/// Adds candidates to the tensors of a file.
pub(super) fn push_candidates(tensors: &mut Tensors, name: &str, candidates: &Candidates) {
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
