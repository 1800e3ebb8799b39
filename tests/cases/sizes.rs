//! Sizes that files and settings claim: compared before they are believed. Every command ends
//! soon, in bounded memory, by itself.

use crate::common::{Case, UPDATE};
use serde_json::{Value, json};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(15);

fn refused_soon(case: &Case, line: &str) {
    let end = case.run(line).refused();
    assert!(end.took < SOON, "{end:#?}");
}

/// Replaces the value of the innermost object that has the key.
fn set(value: &mut Value, key: &str, to: &Value) -> bool {
    match value {
        Value::Object(map) => {
            if let Some(old) = map.get_mut(key) {
                *old = to.clone();
                return true;
            }
            map.values_mut().any(|inner| set(inner, key, to))
        }
        Value::Array(items) => items.iter_mut().any(|inner| set(inner, key, to)),
        _ => false,
    }
}

#[test]
fn models_of_absurd_sizes() {
    let case = Case::new();
    let keys = [
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "vocab_size",
        "head_dim",
    ];
    for key in keys {
        for value in
            [json!(0), json!(-1), json!(1u64 << 40), json!(u64::MAX), json!(1e300), json!("7"), json!([1])]
        {
            case.copy("base", "m");
            case.edit("m/config.json", |c| c[key] = value.clone());
            let end = case.run("inspect m").refused();
            assert!(end.took < SOON, "{key}={value}: {end:#?}");
            end.says(&["config.json|model.safetensors"]);
        }
        case.edit("m/config.json", |c| c[key] = json!(1u64 << 40));
        refused_soon(&case, "doctor --model m");
        refused_soon(
            &case,
            &format!(
                "evaluate --run r-{key} --config run.toml --model tiny --data one.jsonl --base m --out o"
            ),
        );
    }
}

#[test]
fn numbers_of_models_that_cannot_be() {
    let case = Case::new();
    for (key, values) in [
        ("rms_norm_eps", [json!(-1e-6), json!(1e300), json!("x")]),
        ("rope_theta", [json!(0.0), json!(-1.0), json!(null)]),
        ("max_position_embeddings", [json!(0), json!(-1), json!(1.5)]),
    ] {
        for value in values {
            case.copy("base", "m");
            case.edit("m/config.json", |c| c[key] = value.clone());
            let end = case.run("inspect m");
            // Null is nothing: the family's default may stand for it.
            assert!(
                value.is_null() && end.code == Some(0) || matches!(end.code, Some(1 | 2)),
                "{key}={value}: {end:#?}"
            );
        }
    }
}

#[test]
fn adapters_of_absurd_sizes() {
    let case = Case::new();
    for (key, value) in [
        ("r", json!(0)),
        ("r", json!(1u64 << 60)),
        ("r", json!(-3)),
        ("lora_alpha", json!(1e308)),
        ("lora_alpha", json!(-1e308)),
        ("lora_alpha", json!("12")),
    ] {
        case.copy("adapter", "a");
        case.edit("a/adapter_config.json", |c| c[key] = value.clone());
        let end = case.evaluate(&format!("o-{key}-{}", value.to_string().len()), &["--adapter", "a"]);
        assert!(matches!(end.code, Some(1 | 2)), "{key}={value}: {end:#?}");
    }
}

#[test]
fn translators_of_absurd_sizes() {
    let case = Case::smoke();
    let before = case.bytes("a/run/translator/config.json");
    for key in [
        "student_width",
        "student_blocks",
        "teacher_width",
        "teacher_blocks",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ] {
        for value in [json!(0), json!(1u64 << 33), json!(i64::MAX), json!(u64::MAX), json!(-1)] {
            case.write("a/run/translator/config.json", &before);
            case.edit("a/run/translator/config.json", |c| assert!(set(c, key, &value), "{key}"));
            refused_soon(&case, "inspect a/run/translator");
        }
        refused_soon(&case, &format!("translate --run a/run {UPDATE} --out o"));
    }
}

#[test]
fn manifests_of_absurd_sizes() {
    let case = Case::smoke();
    let before = case.bytes("a/run/shadow/manifest.json");
    for key in ["shadows", "steps", "blocks", "width", "bytes", "rank"] {
        for value in [json!(0), json!(1u64 << 62), json!(u64::MAX), json!(-1), json!(1e30)] {
            case.write("a/run/shadow/manifest.json", &before);
            case.edit("a/run/shadow/manifest.json", |m| assert!(set(m, key, &value), "{key}"));
            refused_soon(&case, "inspect a/run/shadow");
        }
        refused_soon(&case, &format!("translate --run a/run {UPDATE} --method mean --out o"));
    }
}

/// A header that states another size than the file has, for every kind of safetensors file.
#[test]
fn headers_that_state_other_sizes() {
    let case = Case::smoke();
    for length in [0u64, 1, 7, 1 << 20, 1 << 40, u64::MAX, u64::MAX - 7] {
        let mut bytes = case.bytes(UPDATE);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        case.write("u.safetensors", bytes);
        refused_soon(&case, "inspect u.safetensors");
        refused_soon(&case, "translate --run a/run u.safetensors --out o");
    }
}

#[test]
fn settings_that_are_absurd() {
    let case = Case::smoke();
    let settings = [
        "curate.num_subsets=0",
        "curate.num_subsets=9223372036854775807",
        "curate.examples_per_subset=0",
        "curate.examples_per_subset=1000000000000000",
        "curate.num_snapshots=0",
        "curate.num_snapshots=4000000000000",
        "curate.snapshot_steps=0",
        "curate.tiny.global_batch_size=0",
        "curate.tiny.global_batch_size=9223372036854775807",
        "curate.tiny.learning_rate=nan",
        "curate.tiny.learning_rate=inf",
        "curate.tiny.learning_rate=-1.0",
        "curate.save_minutes=nan",
        "curate.save_minutes=-1.0",
        "lora.r=0",
        "lora.r=9223372036854775807",
        "lora.lora_alpha=nan",
        "lora.lora_alpha=inf",
        "lora.lora_dropout=1.0",
        "lora.lora_dropout=-0.1",
        "translator.d_model=9223372036854775807",
        "translator.num_heads=0",
        "translator.d_kv=1000000000000",
        "translator.num_decoder_layers=1000000000",
        "translator.dropout_rate=nan",
        "train.max_steps=0",
        "train.global_batch_size=0",
        "train.per_device_train_batch_size=9223372036854775807",
        "train.learning_rate=nan",
        "train.val_set_size=nan",
        "train.val_set_size=1.0",
        "train.eval_steps=0",
        "train.warmup_steps=4294967295",
        "device.max_tokens_per_microbatch=0",
        "device.max_tokens_per_microbatch=9223372036854775807",
        "data.max_length=0",
        "data.max_length=9223372036854775807",
        "evaluate.per_device_eval_batch_size=0",
        "evaluate.max_new_tokens=9223372036854775807",
        "seed=-1",
        "seed=99999999999999999999",
    ];
    for setting in settings {
        let end = case.words(&[
            "plan",
            "--config",
            "a/run/run.toml",
            "--gpu",
            "cpu",
            "--tokens-per-example",
            "10",
            "--set",
            setting,
        ]);
        assert!(matches!(end.code, Some(1 | 2)), "{end:#?}");
        assert!(end.took < SOON, "{end:#?}");
        let key = setting.split('=').next().unwrap();
        end.says(&[key]);
    }
    case.run("plan --config a/run/run.toml --gpu cpu --tokens-per-example 10").well();
}

#[test]
fn machines_that_are_absurd() {
    let case = Case::smoke();
    for words in [
        "--nodes 0",
        "--nodes 18446744073709551615",
        "--gpus-per-node 18446744073709551615",
        "--nodes 4294967296 --gpus-per-node 4294967296",
        "--clients 18446744073709551615",
        "--tokens-per-example 18446744073709551615",
        "--tokens-per-example 1000000000000000000",
        "--labels-per-example 18446744073709551615",
    ] {
        let tokens = if words.contains("tokens") { "" } else { " --tokens-per-example 10" };
        let end = case.run(&format!(
            "plan --config a/run/run.toml --gpu a100-80g --set device.kind=cpu {words}{tokens}"
        ));
        assert!(matches!(end.code, Some(0..=2)), "{end:#?}");
        assert!(end.took < SOON, "{end:#?}");
    }
}

#[test]
fn sweeps_of_very_many_runs() {
    let case = Case::smoke();
    let list = (1..=10_000).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
    case.write("a/run/sweep.toml", format!("[[sweep]]\nbase = \"run.toml\"\nseed = [{list}]\ntrain.max_steps = [{list}]\ntrain.global_batch_size = [{list}]\n"));
    refused_soon(&case, "sweep --list --out o a/run/sweep.toml");
}

/// Compressed rows that grow: a gigabyte of one letter, in a file of a megabyte.
#[test]
fn rows_that_grow() {
    let case = Case::new();
    let row = format!("{{\"prompt\": \"{}\", \"response\": \"b\"}}", "a".repeat(200 << 20));
    case.write("long.jsonl", row);
    let end = case.run("split --data long.jsonl --out o --clients 1").ended();
    assert!(end.took < Duration::from_secs(40), "{end:#?}");
    case.write(
        "deep.jsonl",
        format!("{{\"prompt\": {}1{}, \"response\": \"b\"}}\n", "[".repeat(1_000_000), "]".repeat(1_000_000)),
    );
    refused_soon(&case, "split --data deep.jsonl --out o --clients 1");
}
