//! One file of a tuple store: a shadow job's updates, or an initial adapter.

use super::{FileRecord, Role, StoreType, TuplePlan};
use crate::artifact::{TensorFile, UpdateSpace, checksum, little_endian, write_tensors};
use crate::{Error, Result};
use half::{bf16, slice::HalfFloatSliceExt};
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const FORMAT: &str = "gradtx.shard";
const VERSION: u64 = 1;
pub(super) const UPDATES: &str = "updates";
const ADAPTER: &str = "adapter";
/// Checksum of the values alone, in the file's own metadata.
const VALUES: &str = "values_xxh3";

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

/// Path of the initial adapter of a role.
pub fn init_path(dir: &Path, role: Role) -> PathBuf {
    dir.join("init").join(format!("{role}.safetensors"))
}

/// Writes the initial adapter of a role: `[L, d]`, or where A is frozen all its values, A first.
pub fn write_init(dir: &Path, role: Role, space: &UpdateSpace, adapter: &[f32]) -> Result<()> {
    let path = init_path(dir, role);
    let bytes = little_endian(adapter);
    if checksum(&bytes) != space.init {
        return Err(Error::file(&path, "the adapter is not the one whose checksum the update space names"));
    }
    create_dir(&dir.join("init"))?;
    let shape = if space.freeze_a { vec![adapter.len()] } else { vec![space.blocks, space.width] };
    write_tensors(&path, &[(ADAPTER.into(), Dtype::F32, shape, &bytes)], &BTreeMap::new())
}

/// Reads the initial adapter of a role, and checks that it is the one of the space.
pub fn read_init(dir: &Path, role: Role, space: &UpdateSpace) -> Result<Vec<f32>> {
    let path = init_path(dir, role);
    let file = TensorFile::open(&path)?;
    let tensor = file.tensor(ADAPTER)?;
    if !space.freeze_a {
        tensor.expect_shape(&[space.blocks, space.width])?;
    }
    if tensor.dtype != Dtype::F32 || checksum(tensor.bytes) != space.init {
        return Err(Error::file(&path, "not the initial adapter that the updates are counted from"));
    }
    tensor.to_f32()
}

/// Writes the updates `[steps, L, d]` of one shadow job, whole or not at all.
pub fn write_shard(dir: &Path, plan: &TuplePlan, role: Role, shadow: usize, updates: &[f32]) -> Result<()> {
    let path = shard_path(dir, role, shadow);
    let space = plan.space(role);
    let want = plan.steps.saturating_mul(space.values());
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
        StoreType::F32 => little_endian(updates),
        StoreType::Bf16 => {
            let mut halves = vec![bf16::ZERO; updates.len()];
            halves.convert_from_f32_slice(updates);
            Cow::Owned(halves.iter().flat_map(|h| h.to_le_bytes()).collect())
        }
    };
    let tensor = (UPDATES.into(), plan.dtype.dtype(), shape(plan, role).to_vec(), &bytes[..]);
    let mut metadata = identity(plan, role, shadow);
    metadata.insert(VALUES.into(), checksum(&bytes));
    write_tensors(&path, &[tensor], &metadata)
}

fn shape(plan: &TuplePlan, role: Role) -> [usize; 3] {
    let space = plan.space(role);
    [plan.steps, space.blocks, space.width]
}

/// What a shard says about itself, apart from the checksum of its values.
fn identity(plan: &TuplePlan, role: Role, shadow: usize) -> BTreeMap<String, String> {
    let space = plan.space(role);
    let entries = [
        ("format", FORMAT.into()),
        ("version", VERSION.to_string()),
        ("role", role.to_string()),
        ("shadow", shadow.to_string()),
        ("layout", space.layout.clone()),
        ("base_model", space.base_model.clone()),
        ("init", space.init.clone()),
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
        expect_metadata(&file, VALUES, &checksum(file.tensor(UPDATES)?.bytes))?;
        Ok(FileRecord { bytes: file.size() as u64, xxh3: checksum(file.bytes()) })
    };
    look().map_or_else(|e| ShardState::Damaged(e.to_string()), ShardState::Intact)
}

/// Opens a shard and checks that its header is what the plan wants; does not read the values.
pub(super) fn open_shard(path: &Path, plan: &TuplePlan, role: Role, shadow: usize) -> Result<TensorFile> {
    // Mapped, since a store has thousands of shards open.
    let file = TensorFile::map(path)?;
    for (key, want) in identity(plan, role, shadow) {
        expect_metadata(&file, &key, &want)?;
    }
    let tensor = file.tensor(UPDATES)?;
    tensor.expect_shape(&shape(plan, role))?;
    if tensor.dtype != plan.dtype.dtype() {
        let why = format!("expected {:?}, found {:?}", plan.dtype.dtype(), tensor.dtype);
        return Err(Error::tensor(path, UPDATES, why));
    }
    Ok(file)
}
fn expect_metadata(file: &TensorFile, key: &str, want: &str) -> Result<()> {
    let found = file.metadata(key).unwrap_or("nothing");
    if found == want {
        return Ok(());
    }
    let why = format!("not the shard that belongs here: `{key}` should be {want}, the file says {found}");
    Err(Error::file(file.path(), why))
}

fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))
}
