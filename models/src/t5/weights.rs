//! Parameters from files and from random numbers into a flat buffer, and back to the host.

use super::T5Config;
use gradtx_kernels::cpu::narrow;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{AsyncCopy, Buffer, CopyStream, Device, Elem, Real, ViewMut};
use gradtx_runtime::artifact::TensorSource;
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::{Error, Result};
use std::collections::HashSet;

/// Tensors of a Hugging Face T5 that belong to its token embedding and head. They are not
/// used where embeddings come from outside.
pub const UNUSED: [&str; 4] =
    ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"];

/// Copies f32 values to the device; `stage` is room for converting them where X is another type.
pub(crate) fn upload_f32<D: Device, X: Real>(
    dev: &D,
    place: D::ViewMut<'_, X>,
    host: &[f32],
    stage: &mut Vec<X>,
) -> Result<()> {
    if X::DTYPE == f32::DTYPE {
        return Ok(dev.upload(place, bytemuck::cast_slice(host))?);
    }
    stage.resize(host.len(), X::zero());
    narrow(stage, host);
    Ok(dev.upload(place, stage)?)
}

/// Values that are converted at a time: few enough to stay in a cache.
const PIECE: usize = 1 << 17;

/// The same beside the operations.
pub(crate) fn upload_f32_async<D: AsyncCopy, X: Real>(
    copies: &mut D::CopyStream,
    mut place: D::ViewMut<'_, X>,
    host: &[f32],
    stage: &mut Vec<X>,
) -> Result<()> {
    if X::DTYPE == f32::DTYPE {
        return Ok(copies.upload_async(place, bytemuck::cast_slice(host))?);
    }
    for (i, part) in host.chunks(PIECE).enumerate() {
        let at = i * PIECE;
        stage.resize(part.len(), X::zero());
        narrow(stage, part);
        copies.upload_async(place.reborrow().slice(at..at + part.len()), stage)?;
    }
    Ok(())
}

/// Fails unless every parameter whose name begins with `prefix` is there with its shape. Only
/// headers are read, so this comes before anything of the model's size is made.
pub(crate) fn check_shapes(layout: &ParamLayout, prefix: &str, source: &TensorSource) -> Result<()> {
    for param in layout.params() {
        let Some(name) = param.name.strip_prefix(prefix) else { continue };
        source.tensor(name)?.expect_shape(&param.shape)?;
    }
    Ok(())
}

/// Reads the parameters whose names begin with `prefix` from a file that leaves the prefix out.
///
/// # Errors
/// Names the tensor that is missing, has another shape, is not finite, or is neither a
/// parameter nor among the `unused`.
pub fn load<D: Device, X: Real>(
    dev: &D,
    values: &mut D::Buf<X>,
    layout: &ParamLayout,
    prefix: &str,
    source: &TensorSource,
    unused: &[&str],
) -> Result<()> {
    let mut known: HashSet<&str> = unused.iter().copied().collect();
    let (mut host, mut stage) = (Vec::new(), Vec::new());
    for param in layout.params() {
        let Some(name) = param.name.strip_prefix(prefix) else { continue };
        let tensor = source.tensor(name)?;
        tensor.expect_shape(&param.shape)?;
        host.resize(param.len(), 0.0);
        tensor.read_f32(&mut host)?;
        upload_f32::<D, X>(dev, values.view_mut(param.range()), &host, &mut stage)?;
        known.insert(name);
    }
    match source.names().into_iter().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(name) => {
            let why = "unknown: this model has no parameter of that name";
            Err(Error::tensor(source.origin(), name, why))
        }
    }
}

/// All values of a flat buffer on the host, as f32.
pub fn to_f32<D: Device, X: Real>(dev: &D, values: &D::Buf<X>) -> Result<Vec<f32>> {
    Ok(dev.to_host(values.all())?.iter().map(|x| x.to_f64() as f32).collect())
}

/// Draws the parameters whose names begin with `prefix` as a new T5 has them: layer norms 1;
/// the rest normal with variance 1/(values summed), the query's again divided by D, since
/// scores are not scaled. Each parameter draws from a key of its own name.
pub(crate) fn randomise<D: Device, X: Real>(
    dev: &D,
    values: &mut D::Buf<X>,
    layout: &ParamLayout,
    prefix: &str,
    config: &T5Config,
    key: u64,
) -> Result<()> {
    let mut stage = Vec::new();
    for param in layout.params().iter().filter(|p| p.name.starts_with(prefix)) {
        let host = match deviation(&param.name, config) {
            None => vec![1.0; param.len()],
            Some(std) => {
                let mut stream = Stream::new(derive_named(key, &param.name));
                (0..param.len()).map(|_| (stream.normal() * std) as f32).collect()
            }
        };
        upload_f32::<D, X>(dev, values.view_mut(param.range()), &host, &mut stage)?;
    }
    Ok(())
}

/// Standard deviation of a new parameter; none for a layer norm.
fn deviation(name: &str, config: &T5Config) -> Option<f64> {
    let summed = if name.ends_with("layer_norm.weight") {
        return None;
    } else if name.ends_with(".q.weight") {
        config.d_model * config.d_kv
    } else if name.ends_with(".o.weight") {
        config.inner()
    } else if name.ends_with(".wo.weight") {
        config.d_ff
    } else {
        config.d_model
    };
    Some((summed as f64).powf(-0.5))
}
