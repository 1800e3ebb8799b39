//! [`ProductStatistics`]: sums over the tokens of streams that backward passes leave of the products of some layers.
//!
//! For a product `y = x Wᵀ`, with `g` the gradient of the loss at y, over all tokens t of all streams:
//!
//! ```text
//! inputs   += Σ x_t x_tᵀ   [in, in]      outputs += Σ g_t g_tᵀ   [out, out]      gradient += Σ g_t x_tᵀ   [out, in]
//! ```
//!
//! The first two are the Kronecker factors of the Fisher matrix (K-FAC, arXiv 1503.05671, in its form for layers that
//! are used at every token, arXiv 2311.00636), the last is the gradient of W. y is before the bias and the rotation.

use super::DecoderConfig;
use crate::lora::Projection;
use gradtx_kernels::ops::{Linear, LinearBackwardWeight, LinearDims, LoraDims, Out};
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::plan::{MemoryPlan, Purpose};

/// Of which layers what is summed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatisticsOf {
    /// Layers of the model, in order; at least one.
    pub layers: Vec<usize>,
    /// What is summed.
    pub kind: StatisticsKind,
}

/// What is summed of the products of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatisticsKind {
    /// Inputs and outputs of all products, and the gradients of all but gate and up.
    Curvature,
    /// Inputs and outputs of all products.
    Factors,
    /// The gradients of all products but gate and up.
    FirstOrder,
    /// The gradients of all products.
    Gradients,
}

impl StatisticsOf {
    /// What is summed of a product: inputs and outputs, gradient.
    fn wants(&self, projection: Projection) -> (bool, bool) {
        match self.kind {
            StatisticsKind::Curvature => (true, projection != Projection::GateUp),
            StatisticsKind::Factors => (true, false),
            StatisticsKind::FirstOrder => (false, projection != Projection::GateUp),
            StatisticsKind::Gradients => (false, true),
        }
    }
}

/// The sums, in device memory.
pub struct ProductStatistics<D: Device, A: Real> {
    of: StatisticsOf,
    /// By layer of `of`, then by [`Projection`].
    products: Vec<[Sums<D, A>; 4]>,
    /// Without elements, for what trains nothing.
    none: D::Buf<A>,
}

/// Those of one product; what is not wanted is empty.
struct Sums<D: Device, A: Real> {
    inputs: D::Buf<A>,
    outputs: D::Buf<A>,
    gradient: D::Buf<A>,
}

/// The sums of one product on the host; what was not wanted is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProductSums {
    /// `[in, in]`
    pub inputs: Vec<f64>,
    /// `[out, out]`
    pub outputs: Vec<f64>,
    /// `[out, in]`
    pub gradient: Vec<f64>,
}

impl<D: Device, A: Real> ProductStatistics<D, A> {
    /// Zeros.
    pub fn new(device: &D, config: &DecoderConfig, of: &StatisticsOf) -> Result<Self> {
        Self::allocate(&mut Allocator::new(device, Purpose::Gradients), config, of)
    }

    /// The buffers that [`Self::new`] takes.
    pub fn plan(config: &DecoderConfig, of: &StatisticsOf) -> MemoryPlan {
        Allocator::plan_sizes(Purpose::Gradients, |alloc: &mut Allocator<'_, D>| {
            Self::allocate(alloc, config, of)
        })
    }

    fn allocate(alloc: &mut Allocator<'_, D>, config: &DecoderConfig, of: &StatisticsOf) -> Result<Self> {
        let blocks = config.blocks();
        let mut products = Vec::with_capacity(of.layers.len());
        for &layer in &of.layers {
            let mut sums = |projection: Projection| -> Result<Sums<D, A>> {
                let ((inputs, outputs), wants) = (projection.dims(&blocks[layer]), of.wants(projection));
                let mut buffer = |name: &str, is_wanted: bool, rows, cols| -> Result<D::Buf<A>> {
                    if is_wanted { alloc.buffer(name, &[rows, cols]) } else { Ok(D::Buf::default()) }
                };
                Ok(Sums {
                    inputs: buffer("sums of inputs", wants.0, inputs, inputs)?,
                    outputs: buffer("sums of outputs", wants.0, outputs, outputs)?,
                    gradient: buffer("sums of gradients", wants.1, outputs, inputs)?,
                })
            };
            let [qkv, o, gate_up, down] = Projection::ALL;
            products.push([sums(qkv)?, sums(o)?, sums(gate_up)?, sums(down)?]);
        }
        Ok(Self { of: of.clone(), products, none: D::Buf::default() })
    }

    /// Of which layers what is summed.
    pub fn of(&self) -> &StatisticsOf {
        &self.of
    }

    /// The first layer: backward passes end there.
    pub(super) fn first_layer(&self) -> usize {
        self.of.layers[0]
    }

    /// A view without elements.
    pub(super) fn none(&mut self) -> D::ViewMut<'_, A> {
        self.none.all_mut()
    }

    /// The sums of a product of a layer, which must be one of those that are summed.
    pub fn product(&self, device: &D, layer: usize, projection: Projection) -> Result<ProductSums> {
        let sums = self.sums(layer, projection)?;
        let host = |buffer: &D::Buf<A>| -> Result<Vec<f64>> {
            Ok(device.to_host(buffer.all())?.iter().map(|x| x.to_f64()).collect())
        };
        Ok(ProductSums {
            inputs: host(&sums.inputs)?,
            outputs: host(&sums.outputs)?,
            gradient: host(&sums.gradient)?,
        })
    }

    /// The sum of gradients of a product so far, `[out, in]`; empty where it is not wanted.
    pub fn gradient(&self, device: &D, layer: usize, projection: Projection) -> Result<Vec<A>> {
        Ok(device.to_host(self.sums(layer, projection)?.gradient.all())?)
    }

    /// The diagonal of the sum of inputs of a product so far, `[in]`.
    pub fn input_squares(&self, device: &D, layer: usize, projection: Projection) -> Result<Vec<f64>> {
        let inputs = device.to_host(self.sums(layer, projection)?.inputs.all())?;
        let next = inputs.len().isqrt() + 1;
        Ok(inputs.iter().step_by(next).map(|x| x.to_f64()).collect())
    }

    fn sums(&self, layer: usize, projection: Projection) -> Result<&Sums<D, A>> {
        let at = self.of.layers.binary_search(&layer);
        let at = at.map_err(|_| gradtx_runtime::Error::invalid("layer of statistics", layer.to_string()))?;
        Ok(&self.products[at][projection as usize])
    }

    /// Adds what the tokens of a stream give: `x` `[T, in]`, the rows of a product's input without adapters, and
    /// `dy` `[T, out]`.
    pub(super) fn add<X: Real<Acc = A>>(
        &mut self,
        device: &D,
        (layer, projection): (usize, Projection),
        dims: &LoraDims<'_>,
        x: D::View<'_, X>,
        dy: D::View<'_, X>,
    ) -> Result<()>
    where
        D: Backend<X>,
    {
        let Ok(at) = self.of.layers.binary_search(&layer) else { return Ok(()) };
        let Sums { inputs, outputs, gradient } = &mut self.products[at][projection as usize];
        let (x, dy) = ((x, dims.in_dim), (dy, dims.out_dim));
        add_product::<D, X>(device, dims.tokens, inputs, x, x)?;
        add_product::<D, X>(device, dims.tokens, outputs, dy, dy)?;
        add_product::<D, X>(device, dims.tokens, gradient, dy, x)
    }
}

/// `sum += dyᵀ x` of rows of so many columns, unless the sum is not wanted.
fn add_product<D: Backend<X>, X: Real>(
    device: &D,
    tokens: usize,
    sum: &mut D::Buf<X::Acc>,
    (dy, rows): (D::View<'_, X>, usize),
    (x, cols): (D::View<'_, X>, usize),
) -> Result<()> {
    if sum.len() == 0 {
        return Ok(());
    }
    let (dw, dims) = (sum.all_mut(), LinearDims::new(tokens, cols, rows));
    let product = LinearBackwardWeight { dw, dbias: None, dy, x, dims, out: Out::Add };
    Ok(Linear::<X>::linear_backward_weight(device, product)?)
}
