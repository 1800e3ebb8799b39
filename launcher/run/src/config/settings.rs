//! All settings with their defaults, as they stand in a run file.

use super::ReuseConfig;
use crate::text::today;
use clap::ValueEnum;
use gradtx_models::grad_transformer::{NormalizationMode, StartToken};
use gradtx_runtime::data::{
    Columns, Format, Instruction, OnError, PromptForm, PromptSettings, Reading, SplitChoice, TrainOn,
};
use gradtx_runtime::optim::Decay;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// All settings. Defaults are those of the method's published scripts, with steps
/// counted in optimizer steps of 16 examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Seed of every random choice: subsets, orders, dropout, initial adapters.
    pub seed: u64,
    /// The two base models.
    pub models: Models,
    /// Where to compute.
    pub device: DeviceConfig,
    /// The provider's public data, and how examples become tokens.
    pub data: DataConfig,
    /// The adapter of both models.
    pub lora: AdapterConfig,
    /// Shadow fine-tuning.
    pub curate: CurateConfig,
    /// The translator.
    pub translator: TranslatorConfig,
    /// Training of the translator.
    pub train: TrainConfig,
    /// Fine-tuning on private data.
    pub finetune: FinetuneConfig,
    /// Translation by `--method products`.
    pub translate: TranslateConfig,
    /// Refinement of translations.
    pub refine: RefineConfig,
    /// Generation and scoring.
    pub evaluate: EvaluateConfig,
    /// Results of other runs, used in the place of this run's own.
    pub reuse: ReuseConfig,
}

/// Directories of the base models, in Hugging Face form.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Models {
    /// The client's small model.
    pub tiny: PathBuf,
    /// The provider's large model.
    pub llm: PathBuf,
    /// Fields of `config.json` and `adapter_config.json` that gradtx does not know and that may
    /// be ignored all the same: set by someone who knows that they do not change the result.
    pub ignore_fields: Vec<String>,
}

/// Where to compute, and in what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceConfig {
    /// The device.
    pub kind: DeviceKind,
    /// Type of activations and frozen weights.
    pub dtype: DtypeKind,
    /// Most tokens of one packed stream: an optimizer step of more is computed in several.
    pub max_tokens_per_microbatch: usize,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self { kind: DeviceKind::Auto, dtype: DtypeKind::Auto, max_tokens_per_microbatch: 8192 }
    }
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A GPU where this rank can use one, else the processor; the stage says what it takes, and
    /// continues with it later.
    #[default]
    Auto,
    /// The host's processor.
    Cpu,
    /// NVIDIA GPUs, one per rank.
    Cuda,
}

impl DeviceKind {
    /// The name in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Types of activations and frozen weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DtypeKind {
    /// bfloat16 on GPUs, 32-bit floating point on the processor.
    #[default]
    Auto,
    /// 32-bit floating point.
    F32,
    /// bfloat16, on GPUs. Sums, losses, gradients and moments are 32 bits wide; values that are trained
    /// have masters of 32 bits.
    Bf16,
}

impl DtypeKind {
    /// The name in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Examples and their form as tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// The provider's public data: a JSONL, JSON, CSV, TSV or Parquet file, a directory of
    /// them, or a list of such paths. docs/data.md shows all forms.
    pub public: DataPaths,
    /// What the columns are: `auto`, known by their names and values; or `pair`, `messages`,
    /// `alpaca`, `preference`, `summary`, `aqua_rat`, `commonsense_qa`, `drop`, `dialogsum`,
    /// `samsum`, `gsm8k`.
    pub format: Format,
    /// What is put before the prompt: `published`, for published data sets the instruction of
    /// the method's authors; `none`, for models that know the task already; or a text of one's
    /// own, which stands on a line before every prompt.
    pub instruction: Instruction,
    /// Which files of a directory or a list that has train and test files: `auto`, those for
    /// training, or in `evaluate` those for testing; `train`, `test`, `validation`; or `all`.
    pub split: SplitChoice,
    /// Which answers of a conversation are learned: `last`, or `all` of the assistant's.
    pub train_on: TrainOn,
    /// Rows that cannot be used: `fail`, an error names them; `skip`, they are left out and
    /// counted, if they are at most half of all rows.
    pub on_error: OnError,
    /// MiB that the rows of a data set may take in memory. 0: 1 GiB, or 200 times the size of
    /// its files if that is more, and at most three quarters of the memory that is free.
    pub read_limit_mib: u64,
    /// How a prompt is rendered: `template`, the model's own chat template; `chatml`, the
    /// same text for every model; `plain`, prompt and response, then the model's end-of-text
    /// token. `auto`: for each of the two models the first of these that it knows.
    pub prompt: PromptForm,
    /// System message of conversations that have none. Empty: what the form puts there
    /// itself (ChatML: `You are Qwen, …`); `none`: no message.
    pub system_prompt: String,
    /// The date that chat templates take for today, `2026-11-27`. Empty: the day on which the
    /// run is made (UTC), which is kept in its run.toml.
    pub date: String,
    /// Longest example in tokens; longer ones are cut at the end.
    pub max_length: usize,
    /// Share of the labels (tokens of answers) that may be lost by cutting, from 0 to 1; more is an
    /// error before anything is trained.
    pub max_lost_labels: f64,
    /// Names of columns, for data that is none of the known forms.
    pub columns: Columns,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            public: DataPaths::default(),
            format: Format::default(),
            instruction: Instruction::Published,
            prompt: PromptForm::Auto,
            system_prompt: String::new(),
            date: String::new(),
            split: SplitChoice::Auto,
            train_on: TrainOn::Last,
            on_error: OnError::Fail,
            read_limit_mib: 0,
            max_length: 4096,
            max_lost_labels: 0.1,
            columns: Columns::default(),
        }
    }
}

impl DataConfig {
    /// How records become text. Where no run has been made yet, the date is this day's.
    pub fn prompting(&self) -> PromptSettings {
        let date = if self.date.is_empty() { today() } else { self.date.clone() };
        PromptSettings { form: self.prompt, system: self.system_prompt.clone(), date }
    }

    /// How rows become records.
    pub fn reading(&self) -> Reading {
        Reading {
            format: self.format,
            instruction: self.instruction.clone(),
            columns: self.columns.clone(),
            train_on: self.train_on,
            on_error: self.on_error,
            limit_mib: (self.read_limit_mib > 0).then_some(self.read_limit_mib),
        }
    }

    /// What of it decides which examples a file gives.
    pub fn reading_inputs(&self) -> ReadingInputs {
        let default = Self::default();
        ReadingInputs {
            columns: Some(&self.columns).filter(|columns| **columns != default.columns).cloned(),
            train_on: Some(self.train_on).filter(|train_on| *train_on != default.train_on),
            on_error: Some(self.on_error).filter(|on_error| *on_error != default.on_error),
        }
    }
}

/// Settings that decide which examples a file gives, as the records of stages have them. Only
/// what is not as by default: directories of versions that had fewer settings stay valid.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReadingInputs {
    /// Names of columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// Which answers of a conversation are learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_on: Option<TrainOn>,
    /// What is done with rows that cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
}

/// One path or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum DataPaths {
    /// One; empty when it is not set.
    One(PathBuf),
    /// Several, in this order.
    Many(Vec<PathBuf>),
}

impl Default for DataPaths {
    fn default() -> Self {
        Self::One(PathBuf::new())
    }
}

impl DataPaths {
    /// The paths.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }

    /// The paths, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [PathBuf] {
        match self {
            Self::One(path) => std::slice::from_mut(path),
            Self::Many(paths) => paths,
        }
    }
}

impl std::fmt::Display for DataPaths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<String> = self.as_slice().iter().map(|p| p.display().to_string()).collect();
        f.write_str(&paths.join(", "))
    }
}

/// A LoRA adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    /// r.
    pub r: usize,
    /// α: the adapter's output is scaled by α/r.
    pub lora_alpha: f64,
    /// Dropout on the adapter's input while training.
    pub lora_dropout: f64,
    /// Adapted modules.
    pub target_modules: Vec<String>,
    /// PEFT directory of the adapter that the TinyLM starts from; empty for one drawn from the seed.
    pub init_adapter_tiny: PathBuf,
    /// The same for the LLM.
    pub init_adapter_llm: PathBuf,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            r: 2,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: vec!["q_proj".into(), "v_proj".into()],
            init_adapter_tiny: PathBuf::new(),
            init_adapter_llm: PathBuf::new(),
        }
    }
}

/// How a model is fine-tuned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// Optimizer steps.
    pub max_steps: u32,
    /// Examples of one optimizer step.
    pub global_batch_size: usize,
    /// Learning rate after warm-up.
    pub learning_rate: f64,
    /// How it continues from there.
    pub lr_scheduler_type: Decay,
    /// Steps of linear warm-up.
    pub warmup_steps: u32,
    /// Learning rate at the end of a linear or cosine decay, as a fraction.
    pub min_lr_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// β₁ of AdamW.
    pub adam_beta1: f64,
    /// β₂ of AdamW.
    pub adam_beta2: f64,
    /// ε of AdamW.
    pub adam_epsilon: f64,
    /// Norm that a job's gradient is clipped to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// How the losses of a step's tokens are averaged.
    pub loss_reduction: LossNormalization,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            max_steps: 137,
            global_batch_size: 16,
            learning_rate: 1e-4,
            lr_scheduler_type: Decay::Constant,
            warmup_steps: 0,
            min_lr_rate: 0.0,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            loss_reduction: LossNormalization::Sequence,
        }
    }
}

/// How the losses of a step's tokens are averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossNormalization {
    /// The mean over examples of each one's mean.
    Sequence,
    /// The mean over all tokens.
    Token,
}

/// Shadow fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CurateConfig {
    /// Shadow subsets, K.
    pub num_subsets: usize,
    /// Examples of one subset.
    pub examples_per_subset: usize,
    /// Which examples a subset may hold: "random", any of the public data; or the name of
    /// a column of the data: rows with one value of it, each value in turn. "task" also
    /// distinguishes data sets without such a column.
    pub group_by: String,
    /// 0: a subset holds one group only. α > 0: it holds all groups, in proportions drawn
    /// for each subset from Dirichlet(α).
    pub dirichlet_alpha: f64,
    /// Snapshots of each job's update, i.e. tuples of one subset.
    pub num_snapshots: usize,
    /// Optimizer steps from one snapshot to the next; the last is of the last step.
    pub snapshot_steps: u32,
    /// Jobs of one model that share a packed stream. 0: as many as fit into memory and into
    /// one stream, decided when the first process begins, and kept from then on.
    pub jobs_per_batch: usize,
    /// Minutes between two checkpoints of a group of jobs; 0: after
    /// every step.
    pub save_minutes: f64,
    /// Fine-tuning of the TinyLM.
    pub tiny: Recipe,
    /// Fine-tuning of the LLM.
    pub llm: Recipe,
}

/// The value of `group_by` that groups nothing.
pub const RANDOM_SUBSETS: &str = "random";

/// More jobs than this share no stream, unless the settings say so.
const MAX_AT_ONCE: usize = 8;

impl CurateConfig {
    /// Jobs that share a packed stream, at most: as set, or what may be decided where it is not.
    pub fn most_at_once(&self) -> usize {
        let set = if self.jobs_per_batch == 0 { MAX_AT_ONCE } else { self.jobs_per_batch };
        set.min(self.num_subsets)
    }
}

impl Default for CurateConfig {
    fn default() -> Self {
        Self {
            num_subsets: 300,
            examples_per_subset: 1024,
            group_by: RANDOM_SUBSETS.into(),
            dirichlet_alpha: 0.0,
            num_snapshots: 13,
            snapshot_steps: 1,
            jobs_per_batch: 8,
            save_minutes: 10.0,
            tiny: Recipe::default(),
            llm: Recipe { max_steps: 87, ..Recipe::default() },
        }
    }
}

/// Shape of the Grad-Transformer. Defaults: Flan-T5-Large.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TranslatorConfig {
    /// Directory of a T5 v1.1 checkpoint to start from; its shape replaces the one given
    /// here. Empty: random weights of this shape.
    pub pretrained_path: PathBuf,
    /// Width.
    pub d_model: usize,
    /// Width of the feed-forward layers.
    pub d_ff: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Heads.
    pub num_heads: usize,
    /// Layers of the encoder.
    pub num_layers: usize,
    /// Layers of the decoder.
    pub num_decoder_layers: usize,
    /// Dropout.
    pub dropout_rate: f64,
    /// What the decoder starts from: `embedded`, the embedding of a zero block; `released`,
    /// that in training and a zero vector in generation, as the method's published code
    /// does; `zero`, a zero vector in both.
    pub decoder_start: String,
    /// Units of the updates inside the translator: `none`; `scalar`, divided by one number;
    /// less their mean, and divided by one number (`scalar_centred`), one for each block
    /// (`block`), or one for each coordinate (`coordinate`).
    pub update_normalization: String,
}

impl Default for TranslatorConfig {
    fn default() -> Self {
        Self {
            pretrained_path: PathBuf::new(),
            d_model: 1024,
            d_ff: 2816,
            d_kv: 64,
            num_heads: 16,
            num_layers: 24,
            num_decoder_layers: 24,
            dropout_rate: 0.1,
            decoder_start: StartToken::Embedded.name().into(),
            update_normalization: NormalizationMode::ScalarCentred.name().into(),
        }
    }
}

/// Training of the translator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub max_steps: u32,
    /// Tuples of one step.
    pub global_batch_size: usize,
    /// Tuples computed at once.
    pub per_device_train_batch_size: usize,
    /// Learning rate after warm-up.
    pub learning_rate: f64,
    /// How it continues from there.
    pub lr_scheduler_type: Decay,
    /// Steps of linear warm-up.
    pub warmup_steps: u32,
    /// Learning rate at the end of a linear or cosine decay, as a fraction.
    pub min_lr_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// ε of AdamW.
    pub adam_epsilon: f64,
    /// Norm that the gradient is clipped to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Part that is held out for validation.
    pub val_set_size: f64,
    /// Part of what: `subset`, of the shadow subsets, which says how well unseen updates are
    /// translated; `tuple`, of the tuples, near duplicates of which are then trained on.
    pub val_split_by: ValidationSplit,
    /// Steps from one validation to the next.
    pub eval_steps: u32,
    /// Validations without a smaller error after which training stops; 0 for never.
    pub early_stopping_patience: u32,
    /// Minutes from one checkpoint to the next; 0 for one after every step.
    pub save_minutes: f64,
    /// Share of a step's tuples that are affine combinations of three.
    pub mixup_prob: f64,
    /// Standard deviation of the weights of combinations.
    pub mixup_std: f64,
    /// Standard deviation of noise on the students, in the translator's units.
    pub input_noise_std: f64,
}

/// What validation holds out a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValidationSplit {
    /// Shadow subsets, with all of their tuples.
    Subset,
    /// Tuples.
    Tuple,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            max_steps: 3656,
            global_batch_size: 32,
            per_device_train_batch_size: 32,
            learning_rate: 4e-5,
            lr_scheduler_type: Decay::Constant,
            warmup_steps: 0,
            min_lr_rate: 0.0,
            weight_decay: 0.0,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            val_set_size: 0.05,
            val_split_by: ValidationSplit::Subset,
            eval_steps: 122,
            early_stopping_patience: 0,
            save_minutes: 10.0,
            mixup_prob: 0.0,
            mixup_std: 0.6,
            input_noise_std: 0.0,
        }
    }
}

/// Fine-tuning on private data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FinetuneConfig {
    /// Fine-tuning of the TinyLM.
    pub tiny: Recipe,
    /// Fine-tuning of the LLM, for comparison.
    pub llm: Recipe,
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        let client = Recipe {
            max_steps: 1250,
            learning_rate: 4e-5,
            lr_scheduler_type: Decay::Linear,
            ..Recipe::default()
        };
        Self { tiny: client.clone(), llm: client }
    }
}

/// Translation by `--method products`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TranslateConfig {
    /// Rank of the LLM's adapter that a weighted sum of products is read out as.
    pub lora_r: usize,
    /// Penalty of the regression: a number, as a multiple of the mean square of the shadow groups'
    /// students less their mean; or how one is chosen: `loss`, by the LLM's loss on public examples of
    /// groups that are left out; `mse`, by the squared error of their products.
    pub penalty: PenaltyChoice,
    /// Public examples of a left-out group that the loss is measured on.
    pub penalty_examples: usize,
}

impl Default for TranslateConfig {
    fn default() -> Self {
        Self { lora_r: 16, penalty: PenaltyChoice::By(PenaltyRule::Loss), penalty_examples: 24 }
    }
}

/// Refinement of translations on public prompts. The LLM trains as the shadows' does
/// (`curate.llm`), without dropout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RefineConfig {
    /// Rounds: answers of both models, training on those that agree.
    pub num_rounds: usize,
    /// Public prompts that are answered.
    pub num_prompts: usize,
    /// Optimizer steps of one round.
    pub steps_per_round: u32,
    /// Examples of one step, drawn with replacement.
    pub global_batch_size: usize,
    /// With fewer answers that agree there is no training.
    pub min_agreements: usize,
    /// Where too few agree, the first round is trained on the half of the TinyLM's answers that it is surest
    /// of, if their mean probability is at least this; 1 for never.
    pub min_confidence: f64,
}

impl Default for RefineConfig {
    fn default() -> Self {
        Self {
            num_rounds: 2,
            num_prompts: 384,
            steps_per_round: 40,
            global_batch_size: 16,
            min_agreements: 16,
            min_confidence: 0.3,
        }
    }
}

/// A penalty, or how it is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "translate.penalty: expected \"loss\", \"mse\" or a number")]
pub enum PenaltyChoice {
    /// This one.
    Fixed(f64),
    /// The best of several, by this measure.
    By(PenaltyRule),
}

/// What a penalty is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PenaltyRule {
    /// The LLM's loss.
    Loss,
    /// The squared error of products.
    Mse,
}

/// Generation and scoring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// Which number is the score; both are always computed.
    pub metric: MetricChoice,
    /// Which part of a text is the answer.
    pub answer_extraction: AnswerForm,
    /// What ROUGE-1 takes for a word: `rouge_score`, runs of a–z and 0–9, as the Python
    /// package does; `unicode`, runs of letters and digits of any script, and single
    /// characters of scripts that put no spaces between words.
    pub rouge_tokenizer: RougeTokens,
    /// Most tokens generated for one example.
    pub max_new_tokens: usize,
    /// Examples generated at once.
    pub per_device_eval_batch_size: usize,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            metric: MetricChoice::Auto,
            answer_extraction: AnswerForm::AfterHashes,
            rouge_tokenizer: RougeTokens::default(),
            max_new_tokens: 512,
            per_device_eval_batch_size: 32,
        }
    }
}

/// Which number is the score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MetricChoice {
    /// ROUGE-1 for summaries of dialogues, exact match for everything else.
    Auto,
    /// Right answers as a part of all.
    ExactMatch,
    /// Mean ROUGE-1 F1.
    Rouge1,
}

/// What ROUGE-1 takes for a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RougeTokens {
    /// Runs of a–z and 0–9.
    #[default]
    RougeScore,
    /// Letters and digits of any script.
    Unicode,
}

/// Which part of a text is the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerForm {
    /// What follows the last `####`.
    AfterHashes,
    /// All of it.
    Whole,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 1,
            models: Models::default(),
            device: DeviceConfig::default(),
            data: DataConfig::default(),
            lora: AdapterConfig::default(),
            curate: CurateConfig::default(),
            translator: TranslatorConfig::default(),
            train: TrainConfig::default(),
            finetune: FinetuneConfig::default(),
            translate: TranslateConfig::default(),
            refine: RefineConfig::default(),
            evaluate: EvaluateConfig::default(),
            reuse: ReuseConfig::default(),
        }
    }
}
