//! Aggregation: no client's update is believed, and what is refused leaves nothing behind.

use crate::common::{Case, UPDATE};

/// Writes a copy of the client's update whose numbers are changed. Files with a checksum of their
/// values are recognised as damaged; what matters is that none is used.
fn changed(case: &Case, name: &str, change: impl Fn(f32) -> f32) {
    let mut bytes = case.bytes(UPDATE);
    let begin = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for four in bytes[begin..].chunks_exact_mut(4) {
        let x = f32::from_le_bytes(four.try_into().unwrap());
        four.copy_from_slice(&change(x).to_le_bytes());
    }
    case.write(name, bytes);
}

/// The same with the library, as a client would who means it: the file is intact.
fn rewritten(case: &Case, name: &str, change: impl Fn(f32) -> f32) {
    let mut update = gradtx_runtime::artifact::UpdateVector::read(&case.path(UPDATE)).unwrap();
    update.values.iter_mut().for_each(|x| *x = change(*x));
    update.write(&case.path(name)).unwrap();
}

fn refused(case: &Case, updates: &str, words: &[&str]) {
    for method in ["grad-transformer", "mean"] {
        case.run(&format!("translate --run a/run {updates} --method {method} --out o")).refused().says(words);
        assert!(
            !case.path("o/update.safetensors").exists() && !case.path("o/adapter").exists(),
            "nothing half-written"
        );
    }
}

#[test]
fn numbers_that_are_none_are_named() {
    let case = Case::smoke();
    changed(&case, "client-7.safetensors", |x| if x > 0.0 { f32::NAN } else { x });
    refused(&case, &format!("{UPDATE} client-7.safetensors"), &["client-7"]);
    changed(&case, "client-8.safetensors", |_| f32::INFINITY);
    refused(&case, &format!("{UPDATE} client-8.safetensors"), &["client-8"]);
}

#[test]
fn norms_beyond_all_shadows_are_named() {
    let case = Case::smoke();
    for (name, factor) in [("client-loud", 1e4), ("client-giant", 1e30), ("client-quiet", 1e-4)] {
        rewritten(&case, &format!("{name}.safetensors"), |x| x * factor);
        let end = case.run(&format!("translate --run a/run {UPDATE} {name}.safetensors --out o"));
        assert!(end.has(name), "{end:#?}");
        assert!(end.code != Some(0) || end.has("warning"), "{end:#?}");
        if end.code != Some(0) {
            assert!(!case.path("o/update.safetensors").exists());
        } else {
            case.remove("o");
        }
    }
}

#[test]
fn an_update_of_nothing_is_named() {
    let case = Case::smoke();
    rewritten(&case, "client-zero.safetensors", |_| 0.0);
    let end = case.run(&format!("translate --run a/run {UPDATE} client-zero.safetensors --out o"));
    assert!(end.code != Some(0) && end.has("client-zero"), "{end:#?}");
}

#[test]
fn the_same_update_twice_is_refused() {
    let case = Case::smoke();
    std::fs::copy(case.path(UPDATE), case.path("client-2.safetensors")).unwrap();
    refused(&case, &format!("{UPDATE} client-2.safetensors"), &["client-2", "same|twice|duplicate"]);
    refused(&case, &format!("{UPDATE} {UPDATE}"), &["same|twice|duplicate"]);
}

#[test]
fn sums_that_overflow_are_refused() {
    let case = Case::smoke();
    rewritten(&case, "client-2.safetensors", |x| x.signum() * 3e38);
    rewritten(&case, "client-3.safetensors", |x| x.signum() * 2.9e38);
    let end = case
        .run("translate --run a/run client-2.safetensors client-3.safetensors --combine sum --out o")
        .refused();
    assert!(!case.path("o/update.safetensors").exists(), "{end:#?}");
}

/// A client that began from another initial adapter: with the way to mend it.
#[test]
fn an_update_of_another_seed_has_a_hint() {
    let case = Case::smoke();
    case.run("demo b --world smoke --seed 2").well();
    let other = UPDATE.replacen("a/", "b/", 1);
    refused(&case, &other, &[&other, "run.toml|seed"]);
}

/// The control: two different clients.
#[test]
fn two_clients_are_combined() {
    let case = Case::smoke();
    rewritten(&case, "client-2.safetensors", |x| x * 1.5);
    for combine in ["mean", "sum"] {
        case.run(&format!(
            "translate --run a/run {UPDATE} client-2.safetensors --combine {combine} --out o-{combine}"
        ))
        .well();
    }
}
