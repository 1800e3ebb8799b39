//! What settings are called elsewhere: in PEFT, TRL, transformers, axolotl, LLaMA-Factory and
//! DeepSpeed, and in gradtx before it took their names.
//!
//! A name is looked up without its section; where several sections have the setting, the one that it
//! was written in decides.

/// What becomes of a setting that has another name elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alias {
    /// The same setting with the same values. Of several names the first that the section has.
    Same(&'static [&'static str]),
    /// A setting for the same purpose, whose values mean something else.
    Like(&'static [&'static str], &'static str),
    /// Nothing is to be set.
    Nothing(&'static str),
}

use Alias::{Like, Nothing, Same};

/// What a name, without its section, is called here.
pub(super) fn alias(name: &str) -> Option<Alias> {
    all().find(|(other, _)| *other == name).map(|(_, alias)| *alias)
}

/// All names.
pub(super) fn all() -> impl Iterator<Item = &'static (&'static str, Alias)> {
    [BEFORE, ELSEWHERE, SIMILAR, UNNEEDED].into_iter().flatten()
}

/// Sections that were renamed: before, now.
pub(super) const SECTIONS: [(&str, &str); 1] = [("adapter", "lora")];

/// Names of earlier versions.
pub(super) const BEFORE: &[(&str, Alias)] = &[
    ("stream_tokens", Same(&["max_tokens_per_microbatch"])),
    ("system", Same(&["system_prompt"])),
    ("rank", Same(&["r", "lora_r"])),
    ("alpha", Same(&["lora_alpha"])),
    ("dropout", Same(&["lora_dropout", "dropout_rate"])),
    ("targets", Same(&["target_modules"])),
    ("start_tiny", Same(&["init_adapter_tiny"])),
    ("start_llm", Same(&["init_adapter_llm"])),
    ("steps", Same(&["max_steps", "steps_per_round"])),
    ("batch", Same(&["global_batch_size", "per_device_eval_batch_size"])),
    ("lr", Same(&["learning_rate"])),
    ("decay", Same(&["lr_scheduler_type"])),
    ("warmup", Same(&["warmup_steps"])),
    ("final_fraction", Same(&["min_lr_rate"])),
    ("beta1", Same(&["adam_beta1"])),
    ("beta2", Same(&["adam_beta2"])),
    ("eps", Same(&["adam_epsilon"])),
    ("max_norm", Same(&["max_grad_norm"])),
    ("normalization", Same(&["loss_reduction", "update_normalization"])),
    ("subsets", Same(&["num_subsets"])),
    ("examples", Same(&["examples_per_subset"])),
    ("mixture", Same(&["dirichlet_alpha"])),
    ("snapshots", Same(&["num_snapshots"])),
    ("every", Same(&["snapshot_steps"])),
    ("concurrent", Same(&["jobs_per_batch"])),
    ("checkpoint_minutes", Same(&["save_minutes"])),
    ("pretrained", Same(&["pretrained_path"])),
    ("heads", Same(&["num_heads"])),
    ("encoder_layers", Same(&["num_layers"])),
    ("decoder_layers", Same(&["num_decoder_layers"])),
    ("start", Same(&["decoder_start"])),
    ("micro_batch", Same(&["per_device_train_batch_size"])),
    ("validation", Same(&["val_set_size"])),
    ("validation_by", Same(&["val_split_by"])),
    ("validate_every", Same(&["eval_steps"])),
    ("patience", Same(&["early_stopping_patience"])),
    ("augment", Same(&["mixup_prob"])),
    ("augment_spread", Same(&["mixup_std"])),
    ("student_noise", Same(&["input_noise_std"])),
    ("rounds", Same(&["num_rounds"])),
    ("prompts", Same(&["num_prompts"])),
    ("least", Same(&["min_agreements"])),
    ("sure", Same(&["min_confidence"])),
    ("answer", Same(&["answer_extraction"])),
    ("rouge_tokens", Same(&["rouge_tokenizer"])),
];

/// Other names of the same settings.
const ELSEWHERE: &[(&str, Alias)] = &[
    ("lora_rank", Same(&["r"])),
    ("lora_r", Same(&["r"])),
    ("lora_target", Same(&["target_modules"])),
    ("lora_target_modules", Same(&["target_modules"])),
    ("lr_scheduler", Same(&["lr_scheduler_type"])),
    ("epochs", Same(&["num_train_epochs"])),
    ("num_epochs", Same(&["num_train_epochs"])),
    ("max_train_steps", Same(&["max_steps"])),
    ("lr_warmup_fraction", Same(&["warmup_ratio"])),
    ("num_warmup_steps", Same(&["warmup_steps"])),
    ("lr_warmup_steps", Same(&["warmup_steps"])),
    ("adam_eps", Same(&["adam_epsilon"])),
    ("epsilon", Same(&["adam_epsilon"])),
    ("clip_grad", Same(&["max_grad_norm"])),
    ("gradient_clipping", Same(&["max_grad_norm"])),
    ("gradient_clip_val", Same(&["max_grad_norm"])),
    ("train_batch_size", Same(&["global_batch_size"])),
    ("train_micro_batch_size_per_gpu", Same(&["per_device_train_batch_size"])),
    ("eval_batch_size", Same(&["per_device_eval_batch_size"])),
    ("max_seq_length", Same(&["max_length"])),
    ("max_seq_len", Same(&["max_length"])),
    ("seq_length", Same(&["max_length"])),
    ("sequence_len", Same(&["max_length"])),
    ("model_max_length", Same(&["max_length"])),
    ("cutoff_len", Same(&["max_length"])),
    ("student", Same(&["tiny"])),
    ("student_model", Same(&["tiny"])),
    ("student_model_name_or_path", Same(&["tiny"])),
    ("teacher", Same(&["llm"])),
    ("teacher_model", Same(&["llm"])),
    ("teacher_model_name_or_path", Same(&["llm"])),
    ("dataset", Same(&["public"])),
    ("train_dataset", Same(&["public"])),
    ("train_file", Same(&["public"])),
    ("data_path", Same(&["public"])),
    ("dataset_path", Same(&["public"])),
    ("default_system_message", Same(&["system_prompt"])),
    ("val_size", Same(&["val_set_size"])),
    ("eval_interval", Same(&["eval_steps"])),
    ("num_encoder_layers", Same(&["num_layers"])),
    ("num_attention_heads", Same(&["num_heads"])),
    ("random_seed", Same(&["seed"])),
    ("data_seed", Same(&["seed"])),
    ("max_tokens", Same(&["max_new_tokens"])),
];

const GLOBAL: &str = "it counts the examples of one optimizer step on all devices together: \
                      per_device_train_batch_size × gradient_accumulation_steps × devices";
const PAIR: &str = "there are two models, the small one and the large one";
const ADAPTERS: &str = "there is one for each of the two models";
const DTYPE: &str = "its values are auto, bf16 and f32";

/// Settings for the same purpose whose values differ.
const SIMILAR: &[(&str, Alias)] = &[
    ("batch_size", Like(&["global_batch_size"], GLOBAL)),
    ("micro_batch_size", Like(&["per_device_train_batch_size", "global_batch_size"], GLOBAL)),
    ("per_device_train_batch_size", Like(&["global_batch_size"], GLOBAL)),
    ("gradient_accumulation_steps", Like(&["global_batch_size"], GLOBAL)),
    ("base_model", Like(&["tiny", "llm"], PAIR)),
    ("model_name_or_path", Like(&["tiny", "llm"], PAIR)),
    ("pretrained_model_name_or_path", Like(&["pretrained_path", "tiny", "llm"], PAIR)),
    ("adapter_name_or_path", Like(&["init_adapter_tiny", "init_adapter_llm"], ADAPTERS)),
    ("lora_model_dir", Like(&["init_adapter_tiny", "init_adapter_llm"], ADAPTERS)),
    ("datasets", Like(&["public"], "it is a path, or a list of paths, of files or directories")),
    ("dataset_name", Like(&["public"], "it is a path; `hf download` fetches data sets of the hub")),
    ("chat_template", Like(&["prompt"], "its values are auto, template, chatml and plain")),
    ("torch_dtype", Like(&["dtype"], DTYPE)),
    ("precision", Like(&["dtype"], DTYPE)),
    ("mixed_precision", Like(&["dtype"], DTYPE)),
    ("bf16", Like(&["dtype"], "device.dtype = \"bf16\"")),
    ("fp16", Like(&["dtype"], "16-bit floating point is bfloat16 here: device.dtype = \"bf16\"")),
    ("save_steps", Like(&["save_minutes"], "checkpoints are written by time")),
    ("train_on_inputs", Like(&["train_on"], "prompts are never trained on")),
    ("assistant_only_loss", Like(&["train_on"], "prompts are never trained on")),
    ("completion_only_loss", Like(&["train_on"], "prompts are never trained on")),
];

/// Settings that have no counterpart.
const UNNEEDED: &[(&str, Alias)] = &[
    ("output_dir", Nothing("results go where --run and --out say")),
    ("logging_dir", Nothing("metrics.jsonl stands beside the results")),
    ("logging_steps", Nothing("metrics.jsonl has every step")),
    ("resume_from_checkpoint", Nothing("the same command resumes")),
    ("save_strategy", Nothing("checkpoints are written by time; see save_minutes")),
    ("save_total_limit", Nothing("old checkpoints are removed")),
    ("optim", Nothing("models are trained with AdamW")),
    ("optimizer", Nothing("models are trained with AdamW")),
    ("packing", Nothing("examples are always packed")),
    ("sample_packing", Nothing("examples are always packed")),
    ("group_by_length", Nothing("examples are always packed")),
    ("gradient_checkpointing", Nothing("it is not needed: see device.max_tokens_per_microbatch for memory")),
    ("load_in_4bit", Nothing("models are not quantised")),
    ("load_in_8bit", Nothing("models are not quantised")),
    ("use_rslora", Nothing("updates are scaled by lora_alpha / r")),
    ("use_dora", Nothing("adapters are plain LoRA")),
    ("bias", Nothing("biases are never trained")),
    ("modules_to_save", Nothing("only adapters are trained")),
    ("task_type", Nothing("models are causal language models")),
    ("eval_dataset", Nothing("`gradtx evaluate --data FILE` takes test data")),
    ("do_sample", Nothing("answers are generated greedily")),
    ("temperature", Nothing("answers are generated greedily")),
    ("top_p", Nothing("answers are generated greedily")),
    ("num_beams", Nothing("answers are generated greedily")),
];
