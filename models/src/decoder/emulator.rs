//! [`Emulator`]: what the configuration of a compressed LLM has beyond that of its family, the `gradot` object of
//! `config.json`.
//!
//! An emulator (GradOT) has all layers of an LLM. The first and the last ones, its edge, are the LLM's own; in the
//! layers between, the middle, q, k, v and o may be products of two thin matrices, and MLPs may be narrower.

use super::config_fields::{ARCHITECTURE, FIELD, MODEL_TYPE, emulator_architecture};
use super::{DecoderConfig, Family, Module, Ranks};
use crate::fields::Fields;
use gradtx_runtime::artifact::write_atomic;
use gradtx_runtime::{Error, Result};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// The file beside `config.json` that transformers takes the model's code from.
const CODE: &str = "modeling_gradot";
const CODE_TEXT: &str = include_str!("modeling_gradot.py");
/// Version of the object.
const VERSION: u64 = 1;

/// How an emulator differs from the LLM that it was made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Emulator {
    /// First and last layers that are the LLM's own.
    pub edge: [usize; 2],
    /// Share of the middle's parameters that was to be kept.
    pub ratio: f64,
    /// Of every layer, edge included.
    pub layers: Vec<LayerShape>,
    /// Fingerprint of the LLM.
    pub base_fingerprint: String,
    /// Prompt form of the public examples that it was made by, as in the settings; none if it does not say.
    pub prompt: Option<String>,
}

/// Sizes of one layer of an emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Ranks of the attention's products.
    pub ranks: Ranks,
    /// Width of the MLP.
    pub intermediate: usize,
}

impl Emulator {
    /// What the `model_type` of an emulator begins with; the family's own follows.
    pub const MODEL_TYPE: &str = MODEL_TYPE;

    /// Layers of the edge, in order.
    pub fn edge_layers(&self) -> Vec<usize> {
        let [first, last] = self.edge;
        let layers = self.layers.len();
        (0..first).chain(layers - last..layers).collect()
    }

    /// Layers between, in order.
    pub fn middle_layers(&self) -> std::ops::Range<usize> {
        self.edge[0]..self.layers.len() - self.edge[1]
    }

    /// Takes the object of a `config.json`.
    pub(super) fn read(fields: &mut Fields) -> Result<Self> {
        let Some(mut own) = fields.object(FIELD)? else {
            return Err(fields.missing(FIELD));
        };
        own.only("version", &json!(VERSION))?;
        own.take("base_model_type");
        let size =
            |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n < 1 << 31);
        let edge = own.take("edge").ok_or_else(|| own.missing("edge"))?;
        let edge = own.read("edge", &edge, "two numbers of layers", |value| {
            let [first, last] = value.as_array()?.as_slice() else { return None };
            Some([size(first)?, size(last)?])
        })?;
        let ratio = own.positive("ratio")?.ok_or_else(|| own.missing("ratio"))?;
        let layers = own.take("layers").ok_or_else(|| own.missing("layers"))?;
        let want =
            "a list of objects with `q`, `k`, `v`, `o` (a rank, or 0) and `intermediate`, one for each layer";
        let layers = own.read("layers", &layers, want, |value| {
            let layer = |value: &Value| {
                let entries = value.as_object().filter(|entries| entries.len() == 5)?;
                let of = |name: &str| size(entries.get(name)?);
                let ranks = Ranks { q: of("q")?, k: of("k")?, v: of("v")?, o: of("o")? };
                Some(LayerShape { ranks, intermediate: of("intermediate")? })
            };
            value.as_array()?.iter().map(layer).collect::<Option<Vec<_>>>()
        })?;
        let base_fingerprint =
            own.text("base_fingerprint")?.ok_or_else(|| own.missing("base_fingerprint"))?;
        let prompt = own.text("prompt")?;
        own.finish(&[])?;
        Ok(Self { edge, ratio, layers, base_fingerprint, prompt })
    }

    /// Fails, saying why, unless its shapes are those of a compressed model of these sizes.
    pub(super) fn check(&self, model: &DecoderConfig) -> std::result::Result<(), String> {
        let (layers, [first, last]) = (model.layers, self.edge);
        if self.layers.len() != layers {
            return Err(format!(
                "`{FIELD}.layers` has {} entries; expected one for each of `num_hidden_layers` = {layers}",
                self.layers.len()
            ));
        }
        if first.saturating_add(last) >= layers {
            return Err(format!("`{FIELD}.edge` = [{first}, {last}] leaves no middle of {layers} layers"));
        }
        if !(self.ratio > 0.0 && self.ratio <= 1.0) {
            return Err(format!("`{FIELD}.ratio` = {}; expected a number above 0 and at most 1", self.ratio));
        }
        let whole = LayerShape { ranks: Ranks::default(), intermediate: model.intermediate };
        let block = model.block();
        for (layer, shape) in self.layers.iter().enumerate() {
            let is_edge = !self.middle_layers().contains(&layer);
            if is_edge && *shape != whole {
                return Err(format!(
                    "`{FIELD}.layers[{layer}]` is compressed, but it is one of the edge's; expected ranks of 0 and \
                     `intermediate` = {}",
                    whole.intermediate
                ));
            }
            if shape.intermediate == 0 || shape.intermediate > whole.intermediate {
                return Err(format!(
                    "`{FIELD}.layers[{layer}].intermediate` = {}; expected 1 to `intermediate_size` = {}",
                    shape.intermediate, whole.intermediate
                ));
            }
            for module in Module::ATTENTION {
                let (inputs, _) = module.fused().dims(&block);
                let (rank, most) = (module.rank(&shape.ranks), inputs.min(module.outputs(&block).len()));
                if rank > most {
                    let name = model.family.module_name(module);
                    return Err(format!(
                        "`{FIELD}.layers[{layer}]`: rank {rank} of {name}; a matrix of its shape has at most {most}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Makes the configuration of an uncompressed model that of this emulator.
    pub(super) fn write(&self, model: &DecoderConfig, config: &mut Value) {
        let family = model.family;
        let architecture = emulator_architecture(family);
        config["model_type"] = json!(format!("{MODEL_TYPE}{}", family.model_type()));
        config["auto_map"] = json!({
            "AutoConfig": format!("{CODE}.{ARCHITECTURE}{}Config", family.code_name()),
            "AutoModelForCausalLM": format!("{CODE}.{architecture}"),
        });
        config["architectures"] = json!([architecture]);
        let layer = |shape: &LayerShape| {
            let LayerShape { ranks: Ranks { q, k, v, o }, intermediate } = shape;
            json!({"q": q, "k": k, "v": v, "o": o, "intermediate": intermediate})
        };
        config[FIELD] = json!({
            "version": VERSION,
            "base_model_type": family.model_type(),
            "edge": self.edge,
            "ratio": self.ratio,
            "layers": self.layers.iter().map(layer).collect::<Vec<_>>(),
            "base_fingerprint": self.base_fingerprint,
        });
        if let Some(prompt) = &self.prompt {
            config[FIELD]["prompt"] = json!(prompt);
        }
    }
}

impl DecoderConfig {
    /// Writes `config.json` into a directory that exists, and for an emulator the code that transformers opens it
    /// with; `dtype` is the one of the weights, e.g. "float32". Returns the names of the files.
    pub fn write(&self, dir: &Path, dtype: &str) -> Result<Vec<String>> {
        let mut files = vec![("config.json".to_owned(), format!("{:#}\n", self.to_json(dtype)))];
        if self.emulator.is_some() {
            files.push((format!("{CODE}.py"), CODE_TEXT.to_owned()));
        }
        for (name, text) in &files {
            write_atomic(&dir.join(name), |out| out.write_all(text.as_bytes()))?;
        }
        Ok(files.into_iter().map(|(name, _)| name).collect())
    }

    /// Fails unless an emulator can be made of the model: a whole one, whose MLPs have a gate.
    ///
    /// # Errors
    /// Says what was found, and what to do.
    pub fn expect_compressible(&self, what: &str) -> Result<()> {
        self.expect_whole(what)?;
        if self.block().has(Module::Gate) {
            return Ok(());
        }
        let known: Vec<&str> =
            Family::ALL.into_iter().filter(|f| f.has(Module::Gate)).map(Family::model_type).collect();
        let why = format!(
            "expected an LLM with a gated MLP, of type {}; found type {}, of which no emulator can be made yet",
            known.join(", "),
            self.family.model_type()
        );
        Err(Error::invalid(what.to_owned(), why))
    }

    /// Fails unless the model is whole: an LLM that others are made of, not an emulator of one.
    ///
    /// # Errors
    /// Says what the emulator is of, and what to do.
    pub fn expect_whole(&self, what: &str) -> Result<()> {
        match &self.emulator {
            None => Ok(()),
            Some(emulator) => {
                let kept = 100.0 * emulator.ratio;
                let why = format!(
                    "expected a whole model; found a GradOT emulator with {kept:.0} % of the middle of the LLM with \
                     fingerprint {}; name that LLM's directory",
                    emulator.base_fingerprint
                );
                Err(Error::invalid(what.to_owned(), why))
            }
        }
    }
}
