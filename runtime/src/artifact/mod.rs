//! What is on disk: read by memory map, written atomically, checksummed, never pickled.
//!
//! * tensors: safetensors files; source: models made of them; mapped: how their bytes are held.
//! * update: [`UpdateVector`], what one model learned; space: which models it fits; privacy: what protects its examples.
//! * tuples: [`TupleStore`], the updates of all shadow pairs.
//! * checksum: checksums of files, fingerprints of models.
//! * json: JSON files of ours, with format and version.
//! * model_dir: directories in the Hugging Face layout.
//! * describe: what a path is that was given as a model or an adapter.
//! * read: regular files of bounded size, and what stands there instead.

mod atomic;
mod checksum;
mod describe;
mod json;
mod mapped;
mod model_dir;
mod privacy;
mod read;
mod source;
mod space;
mod tensors;
mod tuples;
mod update;

pub use atomic::{sweep_all_temporary, sweep_temporary, sweep_tree, write_atomic};
pub use checksum::{checksum, checksum_file, checksum_files, copy_checked, fingerprint};
pub(crate) use describe::no_tokenizer;
pub use describe::{Directory, DirectoryKind, describe, not_a_model, not_an_adapter, public_name};
pub use json::{read_json, read_versioned, write_json, write_versioned};
pub use model_dir::{copy_licences, copy_tokenizer, is_model_dir, write_params};
pub use privacy::{Generator, Neighbours, Privacy};
pub(crate) use read::MAX_TOKENIZER_BYTES;
pub use read::{
    MAX_CONFIG_BYTES, MAX_LINES_BYTES, open_file, open_regular, read_file, read_regular, read_regular_text,
    read_text,
};
pub use source::TensorSource;
pub use space::UpdateSpace;
pub use tensors::{NewTensor, TensorData, TensorFile, write_tensors};
pub use tuples::{
    Assembled, FileRecord, MANIFEST, Role, ShardRecord, ShardState, StoreType, TupleManifest, TuplePlan,
    TupleStore, assemble, check_shard, init_path, read_init, shard_path, write_init, write_shard,
};
pub use update::{UpdateFile, UpdateMeta, UpdateVector};

use std::borrow::Cow;

/// The bytes of these values as files hold them: little-endian.
pub fn little_endian(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}
