//! Which values of settings are refused.

use super::Config;

/// What `check` says of the defaults with one setting changed; nothing where it is accepted.
fn said(set: &str) -> Option<String> {
    let config = Config::default().with_overrides(&[set.to_string()]);
    config.and_then(|config| config.check()).err().map(|error| error.to_string())
}

#[test]
fn absurd_values_are_refused_with_key_value_and_range() {
    for (key, values) in [
        ("translator.num_layers", &["0", "1000000000", "9223372036854775807"][..]),
        ("translator.d_ff", &["0", "1000000000000"]),
        ("curate.num_subsets", &["0", "1000000000000"]),
        ("curate.save_minutes", &["-1", "nan", "inf", "1e300"]),
        ("curate.tiny.learning_rate", &["0", "-1e-4", "nan", "inf", "1e300"]),
        ("curate.llm.adam_beta1", &["1", "-0.1", "nan"]),
        ("curate.llm.adam_epsilon", &["0", "-1", "nan"]),
        ("curate.llm.warmup_steps", &["88", "4294967295"]),
        ("finetune.llm.global_batch_size", &["0", "9223372036854775807"]),
        ("finetune.tiny.weight_decay", &["-1", "nan", "inf"]),
        ("lora.r", &["0", "1025", "9223372036854775807"]),
        ("lora.lora_alpha", &["0", "-16", "nan", "inf", "1e300"]),
        ("lora.lora_dropout", &["1", "-0.1", "nan"]),
        ("device.max_tokens_per_microbatch", &["0", "9223372036854775807"]),
        ("data.max_length", &["0", "1", "9223372036854775807"]),
        ("data.max_lost_labels", &["-0.1", "1.5", "nan"]),
        ("train.max_steps", &["0", "4000000000"]),
        ("train.val_set_size", &["1", "nan", "-0.1"]),
        ("train.mixup_std", &["-1", "nan", "inf"]),
        ("train.max_grad_norm", &["-1", "nan", "inf"]),
        ("translate.lora_r", &["0", "1025"]),
        ("translate.penalty", &["0", "-1", "nan", "inf"]),
        ("translate.penalty_examples", &["0"]),
        ("privacy.target_epsilon", &["-1", "nan", "1e9"]),
        ("privacy.noise_multiplier", &["0.01", "-1"]),
        ("privacy.target_delta", &["0", "0.5"]),
        ("privacy.max_grad_norm", &["0", "inf"]),
        ("refine.num_rounds", &["0", "1000"]),
        ("refine.steps_per_round", &["0", "4000000000"]),
        ("refine.min_confidence", &["-0.1", "1.1", "nan"]),
        ("evaluate.max_new_tokens", &["0", "1000000000000"]),
    ] {
        for value in values {
            let said = said(&format!("{key}={value}")).unwrap_or_else(|| panic!("{key}={value} is accepted"));
            assert!(said.contains(key) && said.contains("expected"), "{key}={value}: {said}");
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    for set in
        ["seed=-1", "seed=9223372036854775808", "curate.snapshot_steps=-1", "train.max_steps=5000000000"]
    {
        let said = said(set).unwrap_or_else(|| panic!("{set} is accepted"));
        assert!(said.contains(set.split('=').next().unwrap()), "{set}: {said}");
    }
}

#[test]
fn what_may_run_is_accepted() {
    for set in [
        "seed=9223372036854775807",
        "translator.num_layers=48",
        "curate.num_subsets=10000",
        "data.max_length=1048576",
        "train.val_set_size=0",
        "train.save_minutes=0",
        "curate.llm.warmup_steps=87",
        "train.lr_scheduler_type=\"constant\"",
        "lora.lora_dropout=0",
        "lora.lora_alpha=0.5",
        "curate.tiny.max_grad_norm=0",
        "translate.penalty=0.02",
        "translate.penalty=\"mse\"",
    ] {
        assert_eq!(said(set), None, "{set}");
    }
}
