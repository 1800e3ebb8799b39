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

mod shard;
#[cfg(test)]
mod tests;

pub use shard::{ShardState, check_shard, init_path, read_init, shard_path, write_init, write_shard};

use super::space::UpdateSpace;
use super::{TensorData, TensorFile, checksum_file, json};
use crate::{Error, Result};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shard::{UPDATES, open_shard};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "gradtx.tuples";
const VERSION: u64 = 1;

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

impl TupleManifest {
    /// Reads the manifest of a store, whatever files it lists.
    pub fn read(dir: &Path) -> Result<Self> {
        json::read_versioned(&dir.join(MANIFEST), FORMAT, VERSION)
    }

    /// Says what is wrong unless it lists every shadow pair of its plan once, and the plan has
    /// sizes. Only what is listed is gone through, however many pairs the plan claims.
    pub fn check_complete(&self) -> std::result::Result<(), String> {
        let TuplePlan { shadows, steps, .. } = self.plan;
        let spaces = Role::BOTH.map(|role| self.plan.space(role).values());
        if shadows == 0 || steps == 0 || spaces.contains(&0) {
            return Err(format!("a store of {shadows} shadow pairs and {steps} steps holds no tuples"));
        }
        let mut seen = BTreeSet::new();
        for ShardRecord { shadow, .. } in &self.shards {
            if *shadow >= shadows {
                return Err(format!("lists shadow pair {shadow}, but the store is of {shadows}, from 0"));
            }
            if !seen.insert(*shadow) {
                return Err(format!("lists shadow pair {shadow} twice"));
            }
        }
        match (0..shadows).find(|shadow| !seen.contains(shadow)) {
            None => Ok(()),
            Some(missing) => {
                let listed = seen.len();
                Err(format!(
                    "lists {listed} of {shadows} shadow pairs; the first that is missing is {missing}"
                ))
            }
        }
    }

    /// The files that it lists, relative to the store, with their checksums.
    pub fn files(&self) -> impl Iterator<Item = (PathBuf, &FileRecord)> {
        let none = Path::new("");
        self.shards.iter().flat_map(move |record| {
            [
                (shard_path(none, Role::Student, record.shadow), &record.student),
                (shard_path(none, Role::Teacher, record.shadow), &record.teacher),
            ]
        })
    }
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
    json::write_versioned(&dir.join(MANIFEST), FORMAT, VERSION, &manifest)?;
    Ok(Assembled { manifest, missing, damaged })
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
    /// Reads the manifest and maps every file that it lists: every shadow pair of the plan, once.
    /// Each must be there with the size, shape and type that the manifest says. Values are not
    /// read: [`Self::verify`] does that.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = TupleManifest::read(dir)?;
        manifest.check_complete().map_err(|why| Error::file(&dir.join(MANIFEST), why))?;
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
        Ok(Self { dir: dir.to_owned(), manifest, files })
    }

    /// True if a directory looks like a tuple store.
    pub fn recognises(dir: &Path) -> bool {
        let format = json::read_json(&dir.join(MANIFEST));
        format.is_ok_and(|value| value["format"] == FORMAT)
    }

    /// The same without these shadow pairs, by shadow index: for translators that must not see them.
    pub fn without(mut self, shadows: &[usize]) -> Self {
        let kept: Vec<bool> =
            self.manifest.shards.iter().map(|record| !shadows.contains(&record.shadow)).collect();
        let mut is_kept = kept.iter();
        self.files.retain(|_| is_kept.next().copied().unwrap_or(true));
        let mut is_kept = kept.iter();
        self.manifest.shards.retain(|_| is_kept.next().copied().unwrap_or(true));
        self
    }

    /// The manifest.
    pub fn manifest(&self) -> &TupleManifest {
        &self.manifest
    }

    /// Shadow pairs in the store. `pair` arguments count these; [`Self::shadow`] gives
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
        self.update(role, pair, step)?.read_f32(out)
    }

    /// The same of as many values of the update as `out` has room for, from value `from` on.
    ///
    /// # Panics
    /// When `pair`, `step` or the values are out of range.
    pub fn read_part(
        &self,
        role: Role,
        pair: usize,
        step: usize,
        from: usize,
        out: &mut [f32],
    ) -> Result<()> {
        self.update(role, pair, step)?.read_f32_from(from, out)
    }

    fn update(&self, role: Role, pair: usize, step: usize) -> Result<TensorData<'_>> {
        assert!(step < self.steps(), "step {step} of {}", self.steps());
        let all = self.files[pair][role as usize].tensor(UPDATES)?;
        let size = all.bytes.len() / self.steps();
        let bytes = &all.bytes[step * size..(step + 1) * size];
        Ok(TensorData { bytes, shape: &all.shape[1..], ..all })
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
