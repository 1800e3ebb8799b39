//! What stages record that later ones and reports read: the inputs of each, as the type that
//! was written. The fields and their order are those of `settings` in record.json.

use crate::aggregate::{AggregationInputs, Combine};
use crate::variant::Variant;
use gradtx_models::grad_transformer::Targets;
use gradtx_run::config::{
    AnswerForm, CurateConfig, DeviceConfig, EmulatorConfig, EvaluateConfig, Fisher, MetricChoice,
    PenaltyChoice, PenaltyRule, PrivacyConfig, ReadingInputs, Recipe, RefineConfig, RougeTokens, TrainConfig,
    TranslatorConfig,
};
use gradtx_run::role::Role;
use gradtx_run::stage::Inputs;
use gradtx_runtime::artifact::UpdateSpace;
use gradtx_train::baselines::Method;
use gradtx_train::examples::DataInputs;
use gradtx_train::model_spec::AdapterInputs;
use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

/// What a tuple store depends on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CurateInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// The public data.
    #[serde(flatten)]
    pub data: DataInputs,
    /// Longest example in tokens.
    pub max_length: usize,
    /// The adapters of both models.
    #[serde(rename = "lora")]
    pub adapter: AdapterInputs,
    /// The settings, with the number of jobs that share a stream as it was decided.
    pub curate: CurateConfig,
    /// The device.
    pub device: DeviceConfig,
    /// Fingerprint of the TinyLM.
    pub tiny: String,
    /// Fingerprint of the LLM.
    pub llm: String,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

impl Inputs for CurateInputs {
    const STAGE: &'static str = "curate";
}

impl CurateInputs {
    /// Fingerprint of a model.
    pub fn model(&self, role: Role) -> &str {
        match role {
            Role::Tiny => &self.tiny,
            Role::Llm => &self.llm,
        }
    }
}

/// What a translator depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// Checksum of the tuple store's manifest.
    pub tuples: String,
    /// Of the tuples.
    pub spaces: Spaces,
    /// Shadow pairs that were left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<usize>,
    /// The settings of its shape; not where the weights lie that it starts from.
    pub translator: TranslatorConfig,
    /// Fingerprint of the weights that it starts from.
    pub pretrained: Option<String>,
    /// The settings of training.
    #[serde(serialize_with = "training_settings")]
    pub train: TrainConfig,
    /// The device.
    pub device: DeviceConfig,
    /// What coordinates of products depend on, where these are predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coordinates: Option<CoordinateInputs>,
}

/// Without the settings of coordinates where none are predicted.
fn training_settings<S: Serializer>(train: &TrainConfig, to: S) -> Result<S::Ok, S::Error> {
    let mut settings = serde_json::to_value(train).map_err(S::Error::custom)?;
    if let (Targets::Factors, Some(settings)) = (train.targets, settings.as_object_mut()) {
        settings.shift_remove("targets");
        settings.shift_remove("max_components");
    }
    settings.serialize(to)
}

/// What the coordinates depend on that a Grad-Transformer predicts, apart from tuples and settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoordinateInputs {
    /// Group of every shadow pair, where the store gives.
    pub groups: Option<Vec<usize>>,
    /// The penalty of the regression whose residuals are predicted, or how it is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub penalty: Option<PenaltyInputs>,
}

impl Inputs for TrainInputs {
    const STAGE: &'static str = "train";
}

/// The spaces of both sides of a tuple.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spaces {
    /// Of the TinyLM's updates.
    pub student: UpdateSpace,
    /// Of the LLM's updates.
    pub teacher: UpdateSpace,
}

/// What a client's update depends on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FinetuneInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// The private data.
    #[serde(flatten)]
    pub data: DataInputs,
    /// Longest example in tokens.
    pub max_length: usize,
    /// The adapter.
    #[serde(rename = "lora")]
    pub adapter: AdapterInputs,
    /// How it is trained.
    pub recipe: Recipe,
    /// The device.
    pub device: DeviceConfig,
    /// Fingerprint of the base model.
    pub model: String,
    /// The adapter is also written in PEFT form.
    pub peft: bool,
    /// `allowed`, if the client agrees to refinement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refinement: Option<String>,
    /// Differential privacy, if it is trained with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub privacy: Option<PrivacyConfig>,
    /// Layers whose full weights are trained, in the place of an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

impl Inputs for FinetuneInputs {
    const STAGE: &'static str = "finetune";
}

/// What a translated update depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TranslateInputs {
    /// The translator.
    pub method: Method,
    /// How several updates became one.
    pub combine: Combine,
    /// What of that is not as by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<AggregationInputs>,
    /// Noise was put in the place of the update.
    pub random_student: bool,
    /// Checksums of the updates.
    pub updates: Vec<String>,
    /// Checksums of what it was translated with, by file.
    pub with: Map<String, Value>,
    /// Fingerprint of the LLM.
    pub llm: String,
    /// The device.
    pub device: DeviceConfig,
    /// Shadow pairs that were left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<usize>,
    /// How it was translated by products, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub products: Option<ProductsInputs>,
    /// Rank of the adapter that predicted coordinates are read out as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_r: Option<usize>,
}

/// The settings that a translation by products depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProductsInputs {
    /// Rank of the adapter, where it is not the shadows'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_r: Option<usize>,
    /// The penalty, or how it is chosen.
    pub penalty: PenaltyInputs,
}

/// A penalty or how it is chosen, with what the choice depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PenaltyInputs {
    /// By the loss on so many examples of every group.
    ByLoss {
        /// The loss.
        by: PenaltyRule,
        /// Examples of a group.
        examples: usize,
    },
    /// What is set says it all.
    Choice(PenaltyChoice),
}

impl Inputs for TranslateInputs {
    const STAGE: &'static str = "translate";
}

/// What a refined translation depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefineInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// The public data.
    #[serde(flatten)]
    pub data: DataInputs,
    /// Longest example in tokens.
    pub max_length: usize,
    /// The settings of refinement.
    #[serde(serialize_with = "refine_settings")]
    pub refine: RefineConfig,
    /// How the adapter is trained.
    pub recipe: Recipe,
    /// How answers are generated and compared.
    pub evaluate: EvaluateConfig,
    /// Checksums of the updates.
    pub updates: Vec<String>,
    /// Checksums of the translation's adapter.
    pub translated: Vec<String>,
    /// Shadow pairs whose prompts were not asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<usize>,
    /// The translator.
    pub method: Option<Method>,
    /// Fingerprint of the TinyLM.
    pub tiny: String,
    /// Fingerprint of the LLM.
    pub llm: String,
    /// The adapters of both models.
    #[serde(rename = "lora")]
    pub adapter: AdapterInputs,
    /// The device.
    pub device: DeviceConfig,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

/// Without the number of prompts that the LLM writes where it writes none, as before there was one.
fn refine_settings<S: serde::Serializer>(config: &RefineConfig, to: S) -> Result<S::Ok, S::Error> {
    let mut value = serde_json::to_value(config).map_err(serde::ser::Error::custom)?;
    if let (0, Some(settings)) = (config.synthetic_prompts, value.as_object_mut()) {
        settings.shift_remove("synthetic_prompts");
    }
    value.serialize(to)
}

impl Inputs for RefineInputs {
    const STAGE: &'static str = "refine";
}

/// What a shadow pair's update, taken for a client's, depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShadowClientInputs {
    /// Checksum of the tuple store's manifest.
    pub tuples: String,
    /// Shadow index.
    pub shadow: usize,
    /// Which of the two models.
    pub role: Role,
    /// Fingerprint of the base model.
    pub model: String,
}

impl Inputs for ShadowClientInputs {
    const STAGE: &'static str = "shadow-client";
}

/// What the update of a client depends on that differs from its shadow pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientVariantInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// Checksum of the tuple store's manifest.
    pub tuples: String,
    /// Shadow index.
    pub shadow: usize,
    /// Which of the two models.
    pub role: Role,
    /// Fingerprint of the base model.
    pub model: String,
    /// How it differs.
    pub variant: Variant,
    /// Rows of the public data that it is trained on, if it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<usize>,
    /// How it is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Recipe>,
    /// What is added to the shadow's update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<Noise>,
    /// The device.
    pub device: DeviceConfig,
}

/// Normal noise on an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// Its standard deviation in those of the shadows' updates.
    pub deviations: f64,
    /// Shadows whose updates are not counted.
    pub held_out: Vec<usize>,
}

impl Inputs for ClientVariantInputs {
    const STAGE: &'static str = "client-variant";
}

/// What statistics for emulators depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatisticsInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// The public data.
    #[serde(flatten)]
    pub data: DataInputs,
    /// Longest example in tokens.
    pub max_length: usize,
    /// First and last layers that are left out.
    pub edge: [usize; 2],
    /// Tokens of public examples.
    pub num_tokens: usize,
    /// Where labels are from.
    pub fisher: Fisher,
    /// The device.
    pub device: DeviceConfig,
    /// Fingerprint of the LLM.
    pub llm: String,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

impl Inputs for StatisticsInputs {
    const STAGE: &'static str = "statistics";
}

/// What an emulator depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmulateInputs {
    /// Seed of every random choice.
    pub seed: u64,
    /// The public data.
    #[serde(flatten)]
    pub data: DataInputs,
    /// Longest example in tokens.
    pub max_length: usize,
    /// How it is compressed.
    pub emulator: EmulatorConfig,
    /// Whether its matrices are whole.
    pub dense: bool,
    /// The device.
    pub device: DeviceConfig,
    /// Fingerprint of the LLM.
    pub llm: String,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

impl Inputs for EmulateInputs {
    const STAGE: &'static str = "emulate";
}

/// What an LLM with a trained edge depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PluginInputs {
    /// Fingerprint of the LLM.
    pub llm: String,
    /// Of every adapter: checksums of its files.
    pub adapters: Vec<Vec<String>>,
    /// Its share in the average.
    pub weights: Vec<f64>,
}

impl Inputs for PluginInputs {
    const STAGE: &'static str = "plugin";
}

/// What a merged model depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeInputs {
    /// Which of the two models.
    pub role: Role,
    /// Fingerprint of the base model.
    pub model: String,
    /// How the adapter came to be.
    pub lineage: Lineage,
    /// Checksums of the adapter's files.
    pub adapter: Vec<String>,
    /// Tokens that end answers, where the model's own files do not name them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stops: Option<Vec<u32>>,
}

impl Inputs for MergeInputs {
    const STAGE: &'static str = "merge";
}

/// What a score depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluateInputs {
    /// The test data.
    #[serde(flatten)]
    pub data: DataInputs,
    /// How answers are generated and scored.
    pub evaluate: ScoringInputs,
    /// Which of the two models.
    pub role: Role,
    /// Fingerprint of the model.
    pub model: String,
    /// Checksums of the adapter's files.
    pub adapter: Option<Vec<String>>,
    /// How the model came to be.
    pub lineage: Lineage,
    /// The device.
    pub device: DeviceConfig,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

impl Inputs for EvaluateInputs {
    const STAGE: &'static str = "evaluate";
}

/// The settings that scores depend on; the tokens of ROUGE-1 where they are not the usual ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoringInputs {
    /// Which number is the score.
    pub metric: MetricChoice,
    /// Which part of a text is the answer.
    pub answer_extraction: AnswerForm,
    /// What ROUGE-1 takes for a word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rouge_tokenizer: Option<RougeTokens>,
    /// Examples generated at once.
    pub per_device_eval_batch_size: usize,
    /// Most tokens generated for one example.
    pub max_new_tokens: usize,
}

impl From<&EvaluateConfig> for ScoringInputs {
    fn from(config: &EvaluateConfig) -> Self {
        let &EvaluateConfig {
            metric,
            answer_extraction,
            rouge_tokenizer,
            max_new_tokens,
            per_device_eval_batch_size,
        } = config;
        let rouge_tokenizer = Some(rouge_tokenizer).filter(|tokenizer| *tokenizer != RougeTokens::default());
        Self { metric, answer_extraction, rouge_tokenizer, per_device_eval_batch_size, max_new_tokens }
    }
}

/// How a model came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// As it was given.
    Base,
    /// With an adapter that `finetune` or a shadow job trained.
    Finetuned,
    /// With an adapter that `translate` made.
    Translated,
    /// With an adapter from elsewhere.
    Adapter,
    /// With an edge that clients trained through an emulator.
    PluggedIn,
}

/// What was done to a base model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// How it came to be.
    pub kind: Kind,
    /// The translator, for [`Kind::Translated`].
    pub method: Option<Method>,
    /// The translator was given noise in the place of an update.
    pub random_student: bool,
    /// The translation was refined.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refined: bool,
    /// It is an emulator of the LLM, and not the LLM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub emulator: bool,
    /// All layers of the emulator were fine-tuned before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub healed: bool,
    /// The adapter is of some layers alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub edge: bool,
}
