//! Results of other runs that a run uses in the place of its own: the section `[reuse]`.

use crate::paths::{SHADOW_DIR, TRANSLATOR_DIR};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Results of other runs, used in the place of this run's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReuseConfig {
    /// Run directory whose tuples are used, so that nothing has to be curated here; the same as
    /// `--tuples`. Empty: this run's own tuples.
    pub tuples: PathBuf,
    /// Checksum of the manifest of these tuples; filled in when they are first used. Tuples with
    /// another one are refused.
    pub tuples_checksum: String,
    /// Run directory whose translator is used, so that nothing has to be trained here; the same
    /// as `--translator`. Empty: this run's own translator.
    pub translator: PathBuf,
    /// Checksum of the weights of this translator; filled in when it is first used. A translator
    /// with another one is refused.
    pub translator_checksum: String,
}

impl ReuseConfig {
    /// Directory of the tuple store that a run uses.
    pub fn tuples_dir(&self, run: &Path) -> PathBuf {
        run_of(&self.tuples, run).join(SHADOW_DIR)
    }

    /// Directory of the translator that a run uses.
    pub fn translator_dir(&self, run: &Path) -> PathBuf {
        run_of(&self.translator, run).join(TRANSLATOR_DIR)
    }
}

/// The other run where one is set, else this one.
fn run_of<'a>(other: &'a Path, run: &'a Path) -> &'a Path {
    if other.as_os_str().is_empty() { run } else { other }
}
