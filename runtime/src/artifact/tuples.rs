//! [`TupleStore`]: the update vectors of all shadow pairs, memory-mapped.
//!
//! A directory:
//!
//! ```text
//! manifest.json                      what is here: shapes, models, every shard's size and checksum
//! init/{student,teacher}.safetensors the adapters that all shadow jobs started from, [L, d]
//! shards/NNNNN.{student,teacher}.safetensors   updates [steps, L, d] of one shadow job
//! ```
//!
//! One file per shadow job and role: hundreds of files, not one per step. A tuple is
//! student and teacher update of the same (shadow index, step).
//!
//! Shadow jobs write shards ([`write_shard`]) without knowing of each other; a shard
//! says in its metadata what it is and carries a checksum of its values. At the end
//! [`assemble`] reads every file that should be there and lists what is really
//! whole; what is not is reported by name and done again, never believed.

use super::update::UpdateSpace;
use super::{TensorData, TensorFile, checksum, checksum_file, json, write_tensors};
use crate::{Error, Result};
use half::{bf16, slice::HalfFloatSliceExt};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

const FORMAT: &str = "gradtx.tuples";
const SHARD_FORMAT: &str = "gradtx.shard";
const VERSION: u64 = 1;
const UPDATES: &str = "updates";
const ADAPTER: &str = "adapter";

/// Whose update: the small model's or the large one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The TinyLM, whose updates are translated.
    Student,
    /// The LLM, whose updates are generated.
    Teacher,
}

impl Role {
    /// Both roles.
    pub const BOTH: [Self; 2] = [Self::Student, Self::Teacher];

    /// `student` or `teacher`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Student => "student",
            Self::Teacher => "teacher",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Element type of stored updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreType {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16: half the size, 8 bits of precision.
    Bf16,
}

impl StoreType {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// What a store is meant to hold; fixed before the first shard is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuplePlan {
    /// K, shadow subsets.
    pub shadows: usize,
    /// Updates of each shadow job.
    pub steps: usize,
    /// Element type of the shards.
    pub dtype: StoreType,
    /// The student's side.
    pub student: UpdateSpace,
    /// The teacher's side.
    pub teacher: UpdateSpace,
}

impl TuplePlan {
    /// One side.
    pub fn space(&self, role: Role) -> &UpdateSpace {
        match role {
            Role::Student => &self.student,
            Role::Teacher => &self.teacher,
        }
    }
}

/// A file as it was when the manifest was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Bytes.
    pub bytes: u64,
    /// XXH3-128 of them, in hex.
    pub xxh3: String,
}

/// One shadow pair in a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// Shadow index.
    pub shadow: usize,
    /// The student's file.
    pub student: FileRecord,
    /// The teacher's file.
    pub teacher: FileRecord,
}

/// What a tuple store holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TupleManifest {
    /// Sizes and models.
    #[serde(flatten)]
    pub plan: TuplePlan,
    /// The pairs that are there and whole, by shadow index.
    pub shards: Vec<ShardRecord>,
    /// How they were made; free form.
    pub provenance: Value,
}

/// State of a file that should be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// Whole, and what was asked for.
    Intact(FileRecord),
    /// Not there.
    Missing,
    /// There, but not usable: the error says why.
    Damaged(String),
}

/// Path of a shard.
pub fn shard_path(dir: &Path, role: Role, shadow: usize) -> PathBuf {
    dir.join("shards").join(format!("{shadow:05}.{role}.safetensors"))
}

fn init_path(dir: &Path, role: Role) -> PathBuf {
    dir.join("init").join(format!("{role}.safetensors"))
}

/// Writes the initial adapter of a role, `[L, d]`.
pub fn write_init(dir: &Path, role: Role, space: &UpdateSpace, adapter: &[f32]) -> Result<()> {
    let path = init_path(dir, role);
    let bytes = super::little_endian(adapter);
    if checksum(&bytes) != space.init {
        return Err(Error::file(&path, "the adapter is not the one whose checksum the update space names"));
    }
    create_dir(&dir.join("init"))?;
    let shape = vec![space.blocks, space.width];
    write_tensors(&path, &[(ADAPTER.into(), Dtype::F32, shape, &bytes)], &BTreeMap::new())
}

/// Reads the initial adapter of a role, and checks that it is the one of the space.
pub fn read_init(dir: &Path, role: Role, space: &UpdateSpace) -> Result<Vec<f32>> {
    let path = init_path(dir, role);
    let file = TensorFile::open(&path)?;
    let tensor = file.tensor(ADAPTER)?;
    tensor.expect_shape(&[space.blocks, space.width])?;
    if tensor.dtype != Dtype::F32 || checksum(tensor.bytes) != space.init {
        return Err(Error::file(&path, "not the initial adapter that the updates are counted from"));
    }
    tensor.to_f32()
}

/// Writes the updates `[steps, L, d]` of one shadow job, whole or not at all.
pub fn write_shard(dir: &Path, plan: &TuplePlan, role: Role, shadow: usize, updates: &[f32]) -> Result<()> {
    let path = shard_path(dir, role, shadow);
    let space = plan.space(role);
    let want = plan.steps * space.values();
    if updates.len() != want {
        let why = format!("expected {want} values for {:?}, got {}", shape(plan, role), updates.len());
        return Err(Error::tensor(&path, UPDATES, why));
    }
    if let Some(at) = updates.iter().position(|x| !x.is_finite()) {
        let (step, block) = (at / space.values(), at % space.values() / space.width);
        let why = format!("value {} at step {step}, block {block} is not a finite number", updates[at]);
        return Err(Error::tensor(&path, UPDATES, why));
    }
    create_dir(&dir.join("shards"))?;
    let bytes = match plan.dtype {
        StoreType::F32 => super::little_endian(updates),
        StoreType::Bf16 => {
            let mut halves = vec![bf16::ZERO; updates.len()];
            halves.convert_from_f32_slice(updates);
            Cow::Owned(halves.iter().flat_map(|h| h.to_le_bytes()).collect())
        }
    };
    let tensor = (UPDATES.into(), plan.dtype.dtype(), shape(plan, role).to_vec(), &bytes[..]);
    write_tensors(&path, &[tensor], &shard_metadata(plan, role, shadow, checksum(&bytes)))
}

fn shape(plan: &TuplePlan, role: Role) -> [usize; 3] {
    let space = plan.space(role);
    [plan.steps, space.blocks, space.width]
}

fn shard_metadata(plan: &TuplePlan, role: Role, shadow: usize, values: String) -> BTreeMap<String, String> {
    let space = plan.space(role);
    let entries = [
        ("format", SHARD_FORMAT.into()),
        ("version", VERSION.to_string()),
        ("role", role.to_string()),
        ("shadow", shadow.to_string()),
        ("layout", space.layout.clone()),
        ("base_model", space.base_model.clone()),
        ("init", space.init.clone()),
        ("values_xxh3", values),
    ];
    entries.map(|(k, v)| (k.to_owned(), v)).into()
}

/// Looks at one shard: is it there, of this plan, and are its values what was written?
pub fn check_shard(dir: &Path, plan: &TuplePlan, role: Role, shadow: usize) -> ShardState {
    let path = shard_path(dir, role, shadow);
    if !path.exists() {
        return ShardState::Missing;
    }
    let look = || -> Result<FileRecord> {
        let file = open_shard(&path, plan, role, shadow)?;
        let tensor = file.tensor(UPDATES)?;
        let values = checksum(tensor.bytes);
        let metadata = shard_metadata(plan, role, shadow, values);
        for (key, want) in &metadata {
            let found = file.metadata(key).unwrap_or("nothing");
            if found != want {
                return Err(Error::file(&path, format!("`{key}` should be {want}, the file says {found}")));
            }
        }
        Ok(FileRecord { bytes: file.size() as u64, xxh3: checksum(file.bytes()) })
    };
    look().map_or_else(|e| ShardState::Damaged(e.to_string()), ShardState::Intact)
}

/// Opens a shard and checks its header against the plan; does not read the values.
fn open_shard(path: &Path, plan: &TuplePlan, role: Role, shadow: usize) -> Result<TensorFile> {
    let file = TensorFile::open(path)?;
    if file.metadata("format") != Some(SHARD_FORMAT) {
        return Err(Error::file(path, "not a shard of a tuple store"));
    }
    let tensor = file.tensor(UPDATES)?;
    tensor.expect_shape(&shape(plan, role))?;
    if tensor.dtype != plan.dtype.dtype() {
        let why = format!("expected {:?}, found {:?}", plan.dtype.dtype(), tensor.dtype);
        return Err(Error::tensor(path, UPDATES, why));
    }
    let (shadow, role) = (shadow.to_string(), role.name());
    if (file.metadata("shadow"), file.metadata("role")) != (Some(&shadow), Some(role)) {
        return Err(Error::file(path, format!("its metadata does not say shadow {shadow}, {role}")));
    }
    Ok(file)
}

/// What [`assemble`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Assembled {
    /// The manifest that was written: pairs of which both files are whole.
    pub manifest: TupleManifest,
    /// Shadow jobs whose file is not there.
    pub missing: Vec<(usize, Role)>,
    /// Shadow jobs whose file is there but not usable, and why.
    pub damaged: Vec<(usize, Role, String)>,
}

/// Reads every shard that the plan wants, and writes the manifest of those that are whole.
pub fn assemble(dir: &Path, plan: &TuplePlan, provenance: Value) -> Result<Assembled> {
    for role in Role::BOTH {
        read_init(dir, role, plan.space(role))?;
    }
    let (mut missing, mut damaged, mut shards) = (vec![], vec![], vec![]);
    for shadow in 0..plan.shadows {
        let [student, teacher] = Role::BOTH.map(|role| match check_shard(dir, plan, role, shadow) {
            ShardState::Intact(record) => Some(record),
            ShardState::Missing => {
                missing.push((shadow, role));
                None
            }
            ShardState::Damaged(why) => {
                damaged.push((shadow, role, why));
                None
            }
        });
        if let (Some(student), Some(teacher)) = (student, teacher) {
            shards.push(ShardRecord { shadow, student, teacher });
        }
    }
    let manifest = TupleManifest { plan: plan.clone(), shards, provenance };
    json::write_versioned(&dir.join("manifest.json"), FORMAT, VERSION, &manifest)?;
    Ok(Assembled { manifest, missing, damaged })
}

fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))
}

/// A tuple store, open for reading.
#[derive(Debug)]
pub struct TupleStore {
    dir: PathBuf,
    manifest: TupleManifest,
    /// Student and teacher file of each pair.
    files: Vec<[TensorFile; 2]>,
}

impl TupleStore {
    /// Reads the manifest and maps every file that it lists; each must be there with
    /// the size, shape and type that the manifest says. Values are not read:
    /// [`Self::verify`] does that.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("manifest.json");
        let manifest: TupleManifest = json::read_versioned(&path, FORMAT, VERSION)?;
        let mut files = Vec::with_capacity(manifest.shards.len());
        for record in &manifest.shards {
            let open = |role, want: &FileRecord| -> Result<TensorFile> {
                let file =
                    open_shard(&shard_path(dir, role, record.shadow), &manifest.plan, role, record.shadow)?;
                if file.size() as u64 != want.bytes {
                    let why = format!("the manifest says {} bytes, found {}", want.bytes, file.size());
                    return Err(Error::file(file.path(), why));
                }
                Ok(file)
            };
            files.push([open(Role::Student, &record.student)?, open(Role::Teacher, &record.teacher)?]);
        }
        if files.is_empty() {
            return Err(Error::file(&path, "the store holds no shadow pair"));
        }
        Ok(Self { dir: dir.to_owned(), manifest, files })
    }

    /// True if a directory looks like a tuple store.
    pub fn recognises(dir: &Path) -> bool {
        let format = json::read_json(&dir.join("manifest.json"));
        format.is_ok_and(|value| value["format"] == FORMAT)
    }

    /// The manifest.
    pub fn manifest(&self) -> &TupleManifest {
        &self.manifest
    }

    /// Shadow pairs in the store. `pair` arguments count these; [`Self::shadow`] tells
    /// the shadow index.
    pub fn pairs(&self) -> usize {
        self.files.len()
    }

    /// Updates of each pair.
    pub fn steps(&self) -> usize {
        self.manifest.plan.steps
    }

    /// Shadow index of a pair.
    pub fn shadow(&self, pair: usize) -> usize {
        self.manifest.shards[pair].shadow
    }

    /// One side's shapes and models.
    pub fn space(&self, role: Role) -> &UpdateSpace {
        self.manifest.plan.space(role)
    }

    /// The initial adapter of a role, `[L, d]`.
    pub fn init(&self, role: Role) -> Result<Vec<f32>> {
        read_init(&self.dir, role, self.space(role))
    }

    /// Reads one update `[L, d]` into `out`. Fails on a value that is not finite.
    ///
    /// # Panics
    /// When `pair` or `step` is out of range.
    pub fn read(&self, role: Role, pair: usize, step: usize, out: &mut [f32]) -> Result<()> {
        assert!(step < self.steps(), "step {step} of {}", self.steps());
        let file = &self.files[pair][role as usize];
        let all = file.tensor(UPDATES)?;
        let size = all.bytes.len() / self.steps();
        let bytes = &all.bytes[step * size..(step + 1) * size];
        TensorData { bytes, shape: &all.shape[1..], ..all.clone() }.read_f32(out)
    }

    /// Reads a tuple: both updates of the same shadow pair and step.
    pub fn read_pair(
        &self,
        pair: usize,
        step: usize,
        student: &mut [f32],
        teacher: &mut [f32],
    ) -> Result<()> {
        self.read(Role::Student, pair, step, student)?;
        self.read(Role::Teacher, pair, step, teacher)
    }

    /// Reads everything: checksums as in the manifest, and every value a finite number.
    /// Returns one message per damaged file.
    pub fn verify(&self) -> Vec<String> {
        let mut problems = vec![];
        for role in Role::BOTH {
            problems.extend(self.init(role).err().map(|e| e.to_string()));
        }
        for (pair, files) in self.files.iter().enumerate() {
            let record = &self.manifest.shards[pair];
            for (role, want) in Role::BOTH.into_iter().zip([&record.student, &record.teacher]) {
                let path = files[role as usize].path();
                let found = checksum_file(path).and_then(|found| {
                    if found != want.xxh3 {
                        let why = format!("its checksum is {found}, the manifest says {}", want.xxh3);
                        return Err(Error::file(path, why));
                    }
                    let mut update = vec![0.0; self.space(role).values()];
                    (0..self.steps()).try_for_each(|step| self.read(role, pair, step, &mut update))
                });
                problems.extend(found.err().map(|e| e.to_string()));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::super::update::tests::space;
    use super::*;
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
            init: checksum(&super::super::little_endian(&adapter(role))),
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
                store.read_pair(pair, step, &mut student, &mut teacher).unwrap();
                for (role, found) in Role::BOTH.into_iter().zip([&student[..], &teacher[..]]) {
                    let all = updates(&plan, role, store.shadow(pair));
                    let want = &all[step * found.len()..];
                    for (f, w) in found.iter().zip(want) {
                        assert!((f - w).abs() <= tolerance * w.abs(), "{f} is not {w}");
                    }
                }
            }
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
        let store = TupleStore::open(dir.path()).unwrap();
        assert_eq!((store.pairs(), store.shadow(0)), (1, 1));
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
        assert!(damaged(&plan, 1).contains("shadow 1"));
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
}
