//! [`Fold`]: shadow pairs that are left out of a translator, to play clients.

use gradtx_models::grad_transformer::Targets;
use gradtx_run::paths::{PRODUCTS_DIR, TRANSLATOR_DIR};
use std::path::{Path, PathBuf};

/// Shadow pairs that a translator must not see, and where what is made without them lies.
#[derive(Clone, Debug)]
pub struct Fold {
    /// Shadow indices, ascending.
    pub held_out: Vec<usize>,
    /// Rows of the public data that belong to them: not asked in a refinement either.
    pub rows: Vec<usize>,
    /// Directory of the translators.
    pub dir: PathBuf,
}

impl Fold {
    /// The shadow indices that are left out; none of them where there is no fold.
    pub fn held_out(fold: Option<&Self>) -> Vec<usize> {
        fold.map_or(vec![], |fold| fold.held_out.clone())
    }

    /// Directory of its Grad-Transformer with these targets; without, of the one that the run's settings
    /// ask for.
    pub fn translator_dir(&self, targets: Option<Targets>) -> PathBuf {
        self.dir.join(match targets {
            None => TRANSLATOR_DIR.to_owned(),
            Some(targets) => format!("{TRANSLATOR_DIR}-{}", targets.name()),
        })
    }

    /// Directory of the penalty of [`crate::products`]: the run's own, or the fold's.
    pub(crate) fn products_dir(fold: Option<&Self>, run: &Path) -> PathBuf {
        fold.map_or(run, |fold| &fold.dir).join(PRODUCTS_DIR)
    }
}
