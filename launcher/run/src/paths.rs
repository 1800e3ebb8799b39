//! Names of files and directories in a run directory and beside it.

/// Directory of the tuple store in a run directory.
pub const SHADOW_DIR: &str = "shadow";
/// Which rows each shadow subset has, in the directory of the tuple store.
pub const SUBSETS_FILE: &str = "subsets.json";
/// Which shadow subsets are of one group, beside it.
pub const GROUPS_FILE: &str = "groups.json";
/// Directory of what `translate` by products finds out about a run, in a run directory.
pub const PRODUCTS_DIR: &str = "products";
/// Directory of what is usual among the shadow updates, in a run directory.
pub const DISTANCES_DIR: &str = "distances";
/// Directory of the emulator, with its statistics, in a run directory.
pub const EMULATOR_DIR: &str = "emulator";
/// The emulator itself in its directory: what clients get.
pub const EMULATOR_MODEL_DIR: &str = "model";
/// Directory of the translator in a run directory.
pub const TRANSLATOR_DIR: &str = "translator";
/// Directory of what stages make for single clients, in a run directory.
pub const CLIENTS_DIR: &str = "clients";
/// File name of an update vector in a stage's directory.
pub const UPDATE_FILE: &str = "update.safetensors";
/// Directory of the PEFT adapter in a stage's directory.
pub const ADAPTER_DIR: &str = "adapter";
/// Directory of the shared curations of a sweep, in its directory.
pub const CURATIONS_DIR: &str = "curations";
/// Name of the list of runs.
pub const INDEX_FILE: &str = "sweep.json";
/// The run file in the world's directory.
pub const RUN_FILE_OF_WORLD: &str = "settings.toml";
