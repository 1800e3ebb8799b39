//! Which distances from the shadow updates are usual: [`Calibration`], from left-out groups of shadows.
//!
//! In: the tuple store that a run uses. Out: `RUN/distances/calibration.json`. It depends on the tuples
//! alone, so it is computed for the first client and kept.

use crate::artifacts::Tuples;
use anyhow::{Context as _, Result};
use gradtx_run::context::Context;
use gradtx_run::failure::is_busy;
use gradtx_run::paths::DISTANCES_DIR;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{Role, read_json, write_json};
use gradtx_train::products::{Groups, Kernel};
use gradtx_train::shadows::Calibration;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The file in its directory.
const CALIBRATION_FILE: &str = "calibration.json";

/// What is usual depends on this.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationInputs {
    /// Checksum of the tuple store's manifest.
    pub tuples: String,
    /// Group of every shadow pair.
    pub groups: Vec<usize>,
}

impl Inputs for CalibrationInputs {
    const STAGE: &'static str = "calibrate";
}

/// A calibration that is ready to begin.
pub struct Calibrating<'a> {
    tuples: &'a Tuples,
    groups: Vec<usize>,
    /// Inner products of the students, `[K, K]`.
    students: &'a [Vec<f64>],
    dir: PathBuf,
}

/// The calibration of a run's tuples: what is there, or made now. None where there are too few groups
/// of shadows. `students` are the inner products of the TinyLM's shadow updates.
///
/// # Errors
/// When the shadow updates cannot be read, or are all the same.
pub fn of(
    context: &Context,
    run: &Path,
    tuples: &Tuples,
    students: &[Vec<f64>],
) -> Result<Option<Calibration>> {
    let dir = run.join(DISTANCES_DIR);
    let stage = Calibrating { tuples, groups: group_labels(tuples)?, students, dir };
    match stage::run(context, &stage) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => {
            let path = stage.dir.join(CALIBRATION_FILE);
            serde_json::from_value(read_json(&path)?)
                .with_context(|| format!("{}: not a calibration", path.display()))
        }
        // Another process is at it, for another client.
        Err(error) if is_busy(&error) => stage.calibration(),
        Err(error) => Err(error),
    }
}

/// Group of every pair; in a store that does not tell, each pair is its own.
pub fn group_labels(tuples: &Tuples) -> Result<Vec<usize>> {
    Ok(tuples.groups()?.unwrap_or_else(|| (0..tuples.store.pairs()).collect()))
}

/// Every pair as a group of its own.
pub fn single_pairs(tuples: &Tuples) -> Groups {
    Groups::new(&(0..tuples.store.pairs()).collect::<Vec<_>>())
}

impl Calibrating<'_> {
    fn calibration(&self) -> Result<Option<Calibration>> {
        self.tuples.verify_shards(Role::Teacher)?;
        let teachers =
            Kernel::read_role(&self.tuples.store, Role::Teacher, &single_pairs(self.tuples), &[])?.groups;
        Calibration::of(self.students, &teachers, &Groups::new(&self.groups))
    }
}

impl Stage for Calibrating<'_> {
    type Inputs = CalibrationInputs;
    type Output = Option<Calibration>;

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn advice(&self) -> String {
        format!("remove {} to calibrate the distances again", quoted(&self.dir.to_string_lossy()))
    }

    fn inputs(&self) -> Result<CalibrationInputs> {
        Ok(CalibrationInputs { tuples: self.tuples.manifest.clone(), groups: self.groups.clone() })
    }

    fn make(&self, _: &Context) -> Result<(Vec<String>, Self::Output)> {
        let found = self.calibration()?;
        write_json(&self.dir.join(CALIBRATION_FILE), &found)?;
        Ok((vec![CALIBRATION_FILE.into()], found))
    }

    /// The translation says what it is compared with.
    fn report(&self, _: &Context, _: &Self::Output) -> Result<()> {
        Ok(())
    }

    fn was_finished(&self, _: &Context) -> Result<()> {
        Ok(())
    }
}
