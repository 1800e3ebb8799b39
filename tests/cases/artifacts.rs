//! Artifacts that are verified where they are used: what is damaged, of another run or incomplete
//! makes nothing. The control is [`crate::hostile`]'s intact run.

use crate::common::{Case, UPDATE};
use crate::hostile::not_translated;
use serde_json::json;

/// Flips a bit of a file of a run's artifacts; no method that reads it makes an update.
fn flipped(file: &str, place: i64, methods: &[&str]) {
    let case = Case::smoke();
    case.flip(file, place);
    methods.iter().for_each(|method| not_translated(&case, method));
}

#[test]
fn flipped_statistics() {
    flipped("a/run/translator/normalization.safetensors", -200, &["grad-transformer"]);
}

#[test]
fn a_flipped_digit_of_the_translator_s_configuration() {
    let case = Case::smoke();
    let config = case.read("a/run/translator/config.json");
    case.write("a/run/translator/config.json", config.replace("1e-6", "1e-5").replace("1e-06", "1e-05"));
    assert_ne!(case.read("a/run/translator/config.json"), config);
    not_translated(&case, "grad-transformer");
}

#[test]
fn a_flipped_initial_adapter() {
    flipped("a/run/shadow/init/teacher.safetensors", -100, &["mean", "nearest", "ridge"]);
}

#[test]
fn another_run_s_initial_adapter() {
    let case = Case::smoke();
    case.run("demo b --world smoke --seed 2").well();
    std::fs::copy(
        case.path("b/run/shadow/init/teacher.safetensors"),
        case.path("a/run/shadow/init/teacher.safetensors"),
    )
    .unwrap();
    not_translated(&case, "mean");
    not_translated(&case, "ridge");
}

#[test]
fn flipped_update_vectors() {
    let last = Case::smoke();
    let length = last.bytes(UPDATE).len() as i64;
    // In the numbers, and in the digits of the header.
    let number = last.bytes(UPDATE).windows(10).position(|w| w == b"\"examples\"").unwrap() as i64;
    for place in [-1, -4, length - 900, number + 12] {
        let case = Case::smoke();
        case.flip(UPDATE, place);
        not_translated(&case, "mean");
    }
}

#[test]
fn shards_that_changed_places() {
    let case = Case::smoke();
    let shard = |n: usize| format!("a/run/shadow/shards/{n:05}.student.safetensors");
    let (first, second) = (case.bytes(&shard(0)), case.bytes(&shard(1)));
    case.write(&shard(0), second);
    case.write(&shard(1), first);
    not_translated(&case, "nearest");
    case.remove("a/run/translator");
    case.run("train --run a/run").refused();
}

/// A pair that is missing, or there twice, is not trained on.
#[test]
fn manifests_with_missing_and_double_pairs() {
    for (name, change) in [
        (
            "missing",
            (|items: &mut Vec<serde_json::Value>| drop(items.pop())) as fn(&mut Vec<serde_json::Value>),
        ),
        ("double", |items| items.push(items[0].clone())),
        ("exchanged", |items| items[1] = items[0].clone()),
    ] {
        let case = Case::smoke();
        let mut changed = false;
        case.edit("a/run/shadow/manifest.json", |m| {
            for value in m.as_object_mut().unwrap().values_mut() {
                if let Some(items) =
                    value.as_array_mut().filter(|items| items.len() > 1 && items[0].is_object())
                {
                    change(items);
                    changed = true;
                }
            }
        });
        assert!(changed, "the manifest has a list of what it holds");
        case.remove("a/run/translator");
        case.run("train --run a/run").refused();
        assert!(!case.path("a/run/translator/model.safetensors").exists(), "{name}");
        not_translated(&case, "mean");
    }
}

#[test]
fn a_shard_that_is_missing() {
    let case = Case::smoke();
    case.remove("a/run/shadow/shards/00002.student.safetensors");
    not_translated(&case, "nearest");
    case.remove("a/run/translator");
    case.run("train --run a/run").refused().says(&["00002.student.safetensors"]);
}

#[test]
fn a_damaged_adapter_of_a_finished_stage() {
    for (file, place) in [("adapter_model.safetensors", -5), ("adapter_config.json", 0)] {
        let case = Case::smoke();
        let adapter = "a/run/clients/client-1/translated/mean/adapter";
        case.run(&format!("evaluate --run a/run --data a/world/private/client-1/test.jsonl --adapter {adapter} --out control")).well();
        if place == 0 {
            case.edit(&format!("{adapter}/{file}"), |c| c["lora_alpha"] = json!(33.0));
        } else {
            case.flip(&format!("{adapter}/{file}"), place);
        }
        for command in ["evaluate --data a/world/private/client-1/test.jsonl", "merge"] {
            case.run(&format!("{command} --run a/run --adapter {adapter} --out o")).refused();
            assert!(!case.path("o/score.json").exists() && !case.path("o/model.safetensors").exists());
        }
    }
}

#[test]
fn a_damaged_merged_model() {
    let case = Case::smoke();
    case.run("merge --run a/run --adapter a/run/clients/client-1/translated/mean/adapter --out merged")
        .well();
    let evaluate = "evaluate --run a/run --data a/world/private/client-1/test.jsonl --base merged";
    case.run(&format!("{evaluate} --out control")).well();
    case.flip("merged/model.safetensors", -3000);
    case.run(&format!("{evaluate} --out o")).refused();
}

/// A training on damaged tuples that had started before the damage.
#[test]
fn flipped_tuples_are_not_trained_on() {
    for file in
        ["shards/00003.student.safetensors", "shards/00000.teacher.safetensors", "init/student.safetensors"]
    {
        let case = Case::smoke();
        case.remove("a/run/translator");
        case.flip(&format!("a/run/shadow/{file}"), -64);
        case.run("train --run a/run").refused();
        assert!(!case.path("a/run/translator/model.safetensors").exists(), "{file}");
    }
}

/// What a result was made from stands in its record, by checksum.
#[test]
fn translations_of_another_translator_are_another() {
    let case = Case::smoke();
    let translate = format!("translate --run a/run {UPDATE} --out o");
    case.run(&translate).well();
    let record = case.read("o/record.json");
    for file in ["a/run/translator/model.safetensors", "a/run/translator/normalization.safetensors"] {
        let sum = gradtx_runtime::artifact::checksum_file(&case.path(file)).unwrap();
        assert!(record.contains(&sum), "{file} is not in the record: {record}");
    }
}
