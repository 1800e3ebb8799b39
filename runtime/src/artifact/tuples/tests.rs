//! Tuple stores: what is written is read back, and what is damaged is named.

use super::*;
use crate::artifact::space::tests::space;
use crate::artifact::{checksum, little_endian};
use gradtx_kernels::rng::Stream;

fn random(n: usize, key: u64) -> Vec<f32> {
    let mut stream = Stream::new(key);
    (0..n).map(|_| stream.normal() as f32).collect()
}

fn adapter(role: Role) -> Vec<f32> {
    random(if role == Role::Student { 15 } else { 22 }, role as u64)
}

fn plan(dtype: StoreType) -> TuplePlan {
    let side = |role, blocks, width| UpdateSpace {
        init: checksum(&little_endian(&adapter(role))),
        ..space(blocks, width)
    };
    let (student, teacher) = (side(Role::Student, 3, 5), side(Role::Teacher, 2, 11));
    TuplePlan { shadows: 3, steps: 4, dtype, student, teacher }
}

fn updates(plan: &TuplePlan, role: Role, shadow: usize) -> Vec<f32> {
    random(plan.steps * plan.space(role).values(), 100 + 2 * shadow as u64 + role as u64)
}

/// A store with all shards written and no manifest yet.
fn written(dtype: StoreType) -> (tempfile::TempDir, TuplePlan) {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(dtype);
    for role in Role::BOTH {
        write_init(dir.path(), role, plan.space(role), &adapter(role)).unwrap();
        for shadow in 0..plan.shadows {
            write_shard(dir.path(), &plan, role, shadow, &updates(&plan, role, shadow)).unwrap();
        }
    }
    (dir, plan)
}

#[test]
fn pairs_come_back_by_shadow_and_step() {
    for (dtype, tolerance) in [(StoreType::F32, 0.0), (StoreType::Bf16, 1.0 / 256.0)] {
        let (dir, plan) = written(dtype);
        let made = serde_json::json!({"seed": 7});
        let assembled = assemble(dir.path(), &plan, made.clone()).unwrap();
        assert!(assembled.missing.is_empty() && assembled.damaged.is_empty());
        let store = TupleStore::open(dir.path()).unwrap();
        assert_eq!((store.pairs(), store.steps()), (3, 4));
        assert_eq!(store.manifest().provenance, made);
        assert_eq!(store.manifest(), &assembled.manifest);
        assert!(TupleStore::recognises(dir.path()) && store.verify().is_empty());
        let (mut student, mut teacher) = ([0.0; 15], [0.0; 22]);
        for (pair, step) in [(0, 0), (1, 3), (2, 2)] {
            for (role, found) in Role::BOTH.into_iter().zip([&mut student[..], &mut teacher[..]]) {
                store.read(role, pair, step, found).unwrap();
                let all = updates(&plan, role, store.shadow(pair));
                let want = &all[step * found.len()..];
                for (f, w) in found.iter().zip(want) {
                    assert!((f - w).abs() <= tolerance * w.abs(), "{f} is not {w}");
                }
            }
        }
        let mut part = [0.0; 7];
        store.read_part(Role::Teacher, 2, 2, 9, &mut part).unwrap();
        assert_eq!(part, teacher[9..16]);
        assert_eq!(store.init(Role::Teacher).unwrap(), adapter(Role::Teacher));
    }
}

#[test]
fn a_manifest_lists_only_what_is_whole() {
    let (dir, plan) = written(StoreType::F32);
    std::fs::remove_file(shard_path(dir.path(), Role::Teacher, 0)).unwrap();
    let path = shard_path(dir.path(), Role::Student, 2);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 3;
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let found = assemble(dir.path(), &plan, Value::Null).unwrap();
    assert_eq!(found.missing, [(0, Role::Teacher)]);
    assert_eq!(found.damaged.len(), 1);
    assert!(found.damaged[0].2.contains("00002.student"), "{:?}", found.damaged);
    assert_eq!(found.manifest.shards.len(), 1);
    assert_eq!(found.manifest.shards[0].shadow, 1);
    let message = TupleStore::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("1 of 3 shadow pairs") && message.contains("missing is 0"), "{message}");
}

#[test]
fn a_manifest_lists_every_pair_once() {
    let (dir, plan) = written(StoreType::F32);
    let manifest = assemble(dir.path(), &plan, Value::Null).unwrap().manifest;
    let refused = |say: &str, change: &dyn Fn(&mut TupleManifest)| {
        let mut other = manifest.clone();
        change(&mut other);
        json::write_versioned(&dir.path().join(MANIFEST), FORMAT, VERSION, &other).unwrap();
        let message = TupleStore::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains(say), "{message}");
    };
    refused("missing is 1", &|m| _ = m.shards.remove(1));
    refused("pair 0 twice", &|m| m.shards[1].shadow = 0);
    refused("pair 3, but the store is of 3", &|m| m.shards[2].shadow = 3);
    refused("pair 2 twice", &|m| m.shards.push(m.shards[2].clone()));
    refused("holds no tuples", &|m| m.plan.steps = 0);
    refused("holds no tuples", &|m| m.plan.teacher.width = 0);
    refused("expected shape", &|m| m.plan.steps = 3);
    refused("expected shape", &|m| m.plan.steps = usize::MAX);
    refused("expected shape", &|m| m.plan.student.blocks = usize::MAX / 2);
    // Only what is there is gone through.
    refused("missing is 3", &|m| m.plan.shadows = 1_000_000_000_000_000_000);
    json::write_versioned(&dir.path().join(MANIFEST), FORMAT, VERSION, &manifest).unwrap();
    let store = TupleStore::open(dir.path()).unwrap();
    assert_eq!(store.manifest().files().count(), 6);
    assert!(store.manifest().files().all(|(name, _)| dir.path().join(name).is_file()));
}

#[test]
fn shards_of_other_jobs_and_cut_shards_are_damaged() {
    let (dir, plan) = written(StoreType::F32);
    let (a, b) = (shard_path(dir.path(), Role::Student, 0), shard_path(dir.path(), Role::Student, 1));
    std::fs::copy(&a, &b).unwrap();
    let damaged = |plan: &TuplePlan, shadow| match check_shard(dir.path(), plan, Role::Student, shadow) {
        ShardState::Damaged(why) => why,
        other => panic!("{other:?}"),
    };
    assert!(damaged(&plan, 1).contains("`shadow` should be 1"));
    let bytes = std::fs::read(&a).unwrap();
    std::fs::write(&a, &bytes[..bytes.len() - 7]).unwrap();
    assert!(damaged(&plan, 0).contains("truncated"));
    let mut other = plan.clone();
    other.student.base_model = "another".into();
    assert!(damaged(&other, 2).contains("base_model"));
    let other = TuplePlan { steps: 5, ..plan.clone() };
    assert!(damaged(&other, 2).contains("shape"));
    let other = TuplePlan { dtype: StoreType::Bf16, ..plan.clone() };
    assert!(damaged(&other, 2).contains("BF16"));
    assert_eq!(check_shard(dir.path(), &plan, Role::Student, 9), ShardState::Missing);
    assert!(matches!(check_shard(dir.path(), &plan, Role::Student, 2), ShardState::Intact(_)));
}

#[test]
fn an_open_store_is_what_its_manifest_says() {
    let open = |dir: &Path| TupleStore::open(dir).unwrap_err().to_string();
    let (dir, plan) = written(StoreType::F32);
    assert!(open(dir.path()).contains("manifest.json"));
    assemble(dir.path(), &plan, Value::Null).unwrap();
    let manifest = dir.path().join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
    assert!(open(dir.path()).contains("version 2"));
    std::fs::write(&manifest, text.replace("gradtx.tuples", "other")).unwrap();
    assert!(open(dir.path()).contains("other"));
    std::fs::write(&manifest, &text).unwrap();

    // A changed value is not seen when opening, but by verification.
    let path = shard_path(dir.path(), Role::Teacher, 1);
    let whole = std::fs::read(&path).unwrap();
    let mut nan = whole.clone();
    let at = nan.len() - 4;
    nan[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, &nan).unwrap();
    let store = TupleStore::open(dir.path()).unwrap();
    let problems = store.verify();
    assert!(problems.len() == 1 && problems[0].contains("00001.teacher"), "{problems:?}");
    let read = store.read(Role::Teacher, 1, 3, &mut [0.0; 22]).unwrap_err().to_string();
    assert!(read.contains("finite"), "{read}");
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(open(dir.path()).contains("00001.teacher"));
    std::fs::remove_file(&path).unwrap();
    assert!(open(dir.path()).contains("00001.teacher"));
}

#[test]
fn what_must_not_be_stored_is_refused() {
    let (dir, plan) = (tempfile::tempdir().unwrap(), plan(StoreType::F32));
    let mut bad = updates(&plan, Role::Student, 0);
    bad[17] = f32::INFINITY;
    let message = write_shard(dir.path(), &plan, Role::Student, 0, &bad).unwrap_err().to_string();
    assert!(message.contains("step 1") && message.contains("block 0"), "{message}");
    assert!(write_shard(dir.path(), &plan, Role::Student, 0, &bad[1..]).is_err());
    assert!(write_init(dir.path(), Role::Student, &plan.student, &adapter(Role::Teacher)[..15]).is_err());
    assert!(assemble(dir.path(), &plan, Value::Null).is_err(), "no initial adapter is there");
}
