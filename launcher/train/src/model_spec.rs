//! [`ModelSpec`]: one of the two models together with the space that its updates live in.
//!
//! In: the settings and a model directory. Out: adapter layout, initial adapter, and the
//! [`UpdateSpace`] that goes into every artifact. No weights are read here except for
//! the fingerprint.

use anyhow::{Context as _, Result};
use gradtx_kernels::rng::derive_named;
use gradtx_models::decoder::{DecoderConfig, LayerParams};
use gradtx_models::lora::{
    BlockLayout, LoraConfig, PeftAdapter, initial_adapter, read_peft, write_peft_with_notes,
};
use gradtx_run::config::{AdapterConfig, Config};
use gradtx_run::failure::{failed, unusable, unusable_with};
use gradtx_run::paths::ADAPTER_DIR;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{
    TensorSource, UpdateMeta, UpdateSpace, UpdateVector, checksum, fingerprint, little_endian, not_a_model,
    public_name,
};
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Notes in what clients trained through an emulator, adapters and layers: fingerprint of its LLM, of itself, its edge,
/// examples that it was trained on. Nothing else of the client's is in them.
pub const NOTE_BASE: &str = "gradtx_base_fingerprint";
/// See [`NOTE_BASE`].
pub const NOTE_EMULATOR: &str = "gradtx_emulator_fingerprint";
/// See [`NOTE_BASE`].
pub const NOTE_EDGE: &str = "gradtx_edge";
/// See [`NOTE_BASE`].
pub const NOTE_EXAMPLES: &str = "gradtx_examples";

/// A model and its adapters.
#[derive(Clone)]
pub struct ModelSpec {
    /// Which of the two.
    pub role: Role,
    /// Its directory.
    pub dir: PathBuf,
    /// Sizes of the model.
    pub model: DecoderConfig,
    /// Places of adapter matrices.
    pub layout: BlockLayout,
    /// The adapter that all training starts from, as `layout` says.
    pub init: Vec<f32>,
    /// What updates of this side have in common.
    pub space: UpdateSpace,
}

impl ModelSpec {
    /// One side of a run.
    pub fn new(config: &Config, role: Role, threads: usize) -> Result<Self> {
        let dir = model_dir(config, role)?;
        let model = DecoderConfig::read(dir)?;
        model.check_weights(&TensorSource::open(dir)?)?;
        let layout = adapter_layout(&model, &config.lora)?;
        let base_model = fingerprint(dir, threads)?;
        let init = initial(config, role, &model, &layout)?;
        let space = UpdateSpace {
            blocks: layout.blocks(),
            width: layout.width(),
            layout: layout.hash(),
            base_model,
            targets: layout.lora().targets.iter().map(|t| t.name().to_string()).collect(),
            rank: config.lora.r,
            alpha: config.lora.lora_alpha,
            freeze_a: layout.freezes_a(),
            init: checksum(&little_endian(&init)),
        };
        Ok(Self { role, dir: dir.to_owned(), model, layout, init, space })
    }

    /// The same model with adapters of another rank and the same α/r, which start from nothing: their
    /// updates are the factors themselves.
    pub fn of_rank(&self, rank: usize) -> Result<Self> {
        let lora = self.layout.lora();
        let alpha = lora.scale() * rank as f64;
        let layout = BlockLayout::new(&self.model, &LoraConfig { rank, alpha, ..lora.clone() })?;
        let init = vec![0.0; layout.total()];
        let space = UpdateSpace {
            width: layout.width(),
            layout: layout.hash(),
            rank,
            alpha,
            freeze_a: false,
            init: checksum(&little_endian(&init)),
            ..self.space.clone()
        };
        Ok(Self { role: self.role, dir: self.dir.clone(), model: self.model.clone(), layout, init, space })
    }

    /// The same model with the same adapters, of which A is trained too.
    pub fn with_trained_a(&self) -> Result<Self> {
        let layout = BlockLayout::new(&self.model, self.layout.lora())?;
        let init = self.layout.reordered(&self.init, &layout)?;
        let space = UpdateSpace {
            width: layout.width(),
            layout: layout.hash(),
            freeze_a: false,
            init: checksum(&little_endian(&init)),
            ..self.space.clone()
        };
        Ok(Self { layout, init, space, ..self.clone() })
    }

    /// The adapter that an update `[L, d]` of this side makes.
    pub fn adapter_of(&self, update: &[f32]) -> Vec<f32> {
        let mut adapter = self.init.clone();
        adapter[self.layout.trained()].iter_mut().zip(update).for_each(|(value, change)| *value += change);
        adapter
    }

    /// The update `[L, d]` that makes an adapter, whose values are in the order of this side's layout.
    pub fn update_of(&self, adapter: &[f32]) -> Vec<f32> {
        let trained = self.layout.trained();
        adapter[trained.clone()].iter().zip(&self.init[trained]).map(|(value, start)| value - start).collect()
    }

    /// The update that makes the adapter of a PEFT directory.
    ///
    /// # Errors
    /// When it is of another rank, scale or modules; or of another A, where A is frozen.
    pub fn update_of_peft(&self, dir: &Path, adapter: &PeftAdapter) -> Result<Vec<f32>> {
        let (expected, found) = (self.layout.kind(), adapter.layout.kind());
        if expected != found {
            let hint = "an update vector has the rank, alpha and modules of the adapter that training started from: \
                        use the run with these settings, or --init";
            return Err(failed(
                format!("{}: expected an adapter of {expected}; found {found}", shown(dir)),
                hint,
            ));
        }
        let values = adapter.layout.reordered(&adapter.values, &self.layout)?;
        let frozen = self.layout.trained().start;
        if let Some(at) = (0..frozen).find(|&i| values[i].to_bits() != self.init[i].to_bits()) {
            let of_block = frozen / self.layout.blocks();
            let what = format!(
                "{}: A of block {} is not that of the initial adapter, and this run trains B alone (lora.freeze_a = \
                 true)",
                shown(dir),
                at / of_block
            );
            let hint = "train from the initial adapter (`gradtx convert --initial`) with every lora_A frozen; or use \
                        a run with lora.freeze_a = false";
            return Err(failed(what, hint));
        }
        Ok(self.update_of(&values))
    }

    /// What a stage's results depend on: the adapter's form and start, not where its files lie.
    pub fn adapter_inputs(config: &AdapterConfig, sides: &[&Self]) -> AdapterInputs {
        let AdapterConfig {
            r,
            lora_alpha,
            lora_dropout,
            ref target_modules,
            ref layers_to_transform,
            freeze_a,
            ..
        } = *config;
        let init = sides.iter().map(|side| side.space.init.clone()).collect();
        let (target_modules, layers_to_transform) = (target_modules.names(), layers_to_transform.clone());
        AdapterInputs { r, lora_alpha, lora_dropout, target_modules, layers_to_transform, freeze_a, init }
    }

    /// An update of this side as an artifact.
    pub fn update(&self, values: Vec<f32>, examples: u64) -> UpdateVector {
        let privacy = gradtx_runtime::artifact::Privacy::None;
        let meta = UpdateMeta { space: self.space.clone(), examples, privacy, refinement: false };
        UpdateVector { meta, values }
    }

    /// Writes the adapter that an update makes, in PEFT form, into `out/adapter`; returns
    /// its files, relative to `out`.
    pub fn write_peft(&self, out: &Path, update: &[f32]) -> Result<Vec<String>> {
        self.write_peft_noting(out, update, &BTreeMap::new())
    }

    /// The same of an adapter that was trained on so many examples. One of an emulator says of which, and of which LLM,
    /// so that `gradtx plugin` takes it for no other.
    pub fn write_trained_peft(&self, out: &Path, update: &[f32], examples: usize) -> Result<Vec<String>> {
        self.write_peft_noting(out, update, &self.notes(examples))
    }

    /// Notes of what was trained on so many examples; none but of an emulator.
    pub fn notes(&self, examples: usize) -> BTreeMap<String, String> {
        let Some(emulator) = &self.model.emulator else { return BTreeMap::new() };
        let edge = emulator.edge.map(|layers| layers.to_string()).join(" ");
        let notes = [
            (NOTE_BASE, emulator.base_fingerprint.clone()),
            (NOTE_EMULATOR, self.space.base_model.clone()),
            (NOTE_EDGE, edge),
            (NOTE_EXAMPLES, examples.to_string()),
        ];
        notes.map(|(key, value)| (key.to_owned(), value)).into()
    }

    fn write_peft_noting(
        &self,
        out: &Path,
        update: &[f32],
        notes: &BTreeMap<String, String>,
    ) -> Result<Vec<String>> {
        let dir = out.join(ADAPTER_DIR);
        std::fs::create_dir_all(&dir).with_context(|| format!("{}: cannot make", dir.display()))?;
        let (adapter, base) = (self.adapter_of(update), public_name(&self.dir));
        write_peft_with_notes(&dir, &self.layout, &adapter, &base, notes)?;
        Ok(["adapter_config.json", "adapter_model.safetensors"].map(|f| format!("{ADAPTER_DIR}/{f}")).into())
    }
}

/// An adapter's form and start, as the records of stages have it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AdapterInputs {
    /// r.
    pub r: usize,
    /// α.
    pub lora_alpha: f64,
    /// Dropout on the adapter's input while training.
    pub lora_dropout: f64,
    /// Adapted modules.
    pub target_modules: Vec<String>,
    /// Adapted layers; none for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers_to_transform: Vec<usize>,
    /// B alone is trained.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze_a: bool,
    /// Checksums of the adapters that training starts from, one for each model.
    pub init: Vec<String>,
}

/// Directory of a model of the run; it is there, and looks like one.
pub fn model_dir(config: &Config, role: Role) -> Result<&Path> {
    let dir = match role {
        Role::Tiny => &config.models.tiny,
        Role::Llm => &config.models.llm,
    };
    let hint = "a Hugging Face directory with config.json, model.safetensors and tokenizer.json";
    let unusable =
        |why: String| Err(unusable_with(format!("models.{}: {why}", role.name()), Some(hint.into())));
    if dir.as_os_str().is_empty() {
        return unusable("not set; expected a model directory".into());
    }
    match dir.join("config.json").is_file() {
        true => Ok(dir),
        false => unusable(not_a_model(dir).to_string()),
    }
}

/// The adapter that training starts from: a PEFT directory's, or one drawn from the seed.
fn initial(config: &Config, role: Role, model: &DecoderConfig, layout: &BlockLayout) -> Result<Vec<f32>> {
    let Some(dir) = start_dir(config, role) else {
        let key = derive_named(derive_named(config.seed, "initial adapter"), role.name());
        return Ok(initial_adapter(layout, key));
    };
    let start = read_peft(dir, model)?;
    if start.layout.kind() != layout.kind() {
        let describe = |layout: &BlockLayout| {
            let lora = layout.lora();
            let targets = layout.target_names().join(" and ");
            format!("rank {}, alpha {}, {targets}", lora.rank, lora.alpha)
        };
        let (wanted, found) = (describe(layout), describe(&start.layout));
        return Err(unusable(format!("{}: expected an adapter of {wanted}; found {found}", dir.display())));
    }
    Ok(start.layout.reordered(&start.values, layout)?)
}

/// The PEFT directory that a model's training starts from; none if its adapter is drawn.
pub fn start_dir(config: &Config, role: Role) -> Option<&Path> {
    let dir = match role {
        Role::Tiny => &config.lora.init_adapter_tiny,
        Role::Llm => &config.lora.init_adapter_llm,
    };
    Some(dir.as_path()).filter(|dir| !dir.as_os_str().is_empty())
}

/// Where the values of adapters of these settings lie.
pub fn adapter_layout(model: &DecoderConfig, adapter: &AdapterConfig) -> Result<BlockLayout> {
    let lora = lora_config(model, adapter);
    if let Some(emulator) = &model.emulator
        && let Some(layer) = lora.layers.iter().find(|layer| emulator.middle_layers().contains(layer))
    {
        return Err(unusable(format!(
            "lora.layers_to_transform: layer {layer} is of the emulator's middle, which stays as it is; expected layers \
             of its edge, {:?}",
            emulator.edge_layers()
        )));
    }
    Ok(match adapter.freeze_a {
        true => BlockLayout::with_frozen_a(model, &lora)?,
        false => BlockLayout::new(model, &lora)?,
    })
}

/// The layers that these settings adapt, none for all. Of an emulator they are those of its edge, where the settings
/// name none.
pub fn adapted_layers(model: &DecoderConfig, adapter: &AdapterConfig) -> Vec<usize> {
    match (adapter.layers_to_transform.as_slice(), &model.emulator) {
        ([], Some(emulator)) => emulator.edge_layers(),
        (named, _) => named.to_vec(),
    }
}

/// The parameters that these settings train where full weights are trained: of the layers that would be adapted.
pub fn layer_params(model: &DecoderConfig, adapter: &AdapterConfig) -> Result<LayerParams> {
    let mut layers = adapted_layers(model, adapter);
    if layers.is_empty() {
        layers = (0..model.layers).collect();
    }
    layers.sort_unstable();
    layers.dedup();
    Ok(LayerParams::new(model, &layers)?)
}

/// The adapter settings as the models know them.
fn lora_config(model: &DecoderConfig, adapter: &AdapterConfig) -> LoraConfig {
    LoraConfig {
        rank: adapter.r,
        alpha: adapter.lora_alpha,
        dropout: adapter.lora_dropout,
        targets: adapter.target_modules.modules().to_vec(),
        layers: adapted_layers(model, adapter),
    }
}
