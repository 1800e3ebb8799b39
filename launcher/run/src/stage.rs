//! [`Stage`]: a step of the pipeline, and the one way to do it.
//!
//! In: a stage that is ready to work, its arguments checked and everything that it uses opened.
//! Out: the files of one directory, and the record that makes it repeatable: [`run`] opens the
//! directory with what the result depends on ([`Inputs`]), leaves alone what is finished and
//! intact, has the stage make what is missing, and notes the files and the devices. Once it is
//! clear that the directory does not belong to other settings, those of the run are stored.
//!
//! What a record says of its stage is read as the type that was written: [`Record::inputs`].

use crate::config::RunSettings;
use crate::context::Context;
use crate::failure::{failed, with_hint};
use crate::progress::host_name;
use crate::record::{self, OTHER_SETTINGS, Record, SharedState, State};
use anyhow::Result;
use gradtx_runtime::artifact::checksum;
use gradtx_runtime::comm::Comm;
use gradtx_runtime::text::shown;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::path::Path;

/// Everything that the result of a stage depends on, as its record has it.
pub trait Inputs: Serialize + DeserializeOwned {
    /// Name of the stage on the command line and in records.
    const STAGE: &'static str;

    /// As they stand in a record.
    fn value(&self) -> Result<Value> {
        Ok(serde_json::to_value(self)?)
    }
}

/// A step of the pipeline that makes the files of one directory.
pub trait Stage {
    /// What the result depends on.
    type Inputs: Inputs;
    /// What came of it.
    type Output;
    /// Name on the command line and in records.
    const NAME: &'static str = Self::Inputs::STAGE;
    /// Several processes, started by srun or mpirun, do it together.
    const HAS_RANKS: bool = false;
    /// What is done so far is kept when it is stopped: the same command resumes from there.
    const RESUMES: bool = false;

    /// The directory.
    fn dir(&self) -> &Path;

    /// What the result depends on.
    fn inputs(&self) -> Result<Self::Inputs>;

    /// What is assumed about data and models where the settings leave it open, a line each: shown when
    /// work begins, and kept in the record for the report.
    fn assumed(&self) -> Vec<String> {
        vec![]
    }

    /// The settings of the run, for a stage that works in one.
    fn settings(&self) -> Option<&RunSettings> {
        None
    }

    /// What to do where the directory holds a result of other settings or inputs.
    fn advice(&self) -> String {
        OTHER_SETTINGS.into()
    }

    /// Makes the result in the directory; returns its files, relative to that.
    fn make(&self, context: &Context) -> Result<(Vec<String>, Self::Output)>;

    /// Says what came of it, once the record is written.
    fn report(&self, context: &Context, output: &Self::Output) -> Result<()>;

    /// Says that the result was there before.
    fn was_finished(&self, context: &Context) -> Result<()> {
        let (name, dir) = (Self::NAME, self.dir());
        context.ui.done(name, dir, json!({}), format!("{name}: {} is finished", dir.display()));
        Ok(())
    }
}

/// Does a stage in this process; nothing comes of it if the result was there and intact.
pub fn run<S: Stage>(context: &Context, stage: &S) -> Result<Option<S::Output>> {
    let opened = record::open(stage.dir(), S::NAME, stage.inputs()?.value()?);
    let state = opened.map_err(|error| with_hint(error, OTHER_SETTINGS, stage.advice()))?;
    if let Some(settings) = stage.settings() {
        settings.store(&context.ui)?;
    }
    let State::Open(mut output) = state else {
        stage.was_finished(context)?;
        return Ok(None);
    };
    let context = &context.without_devices();
    output.assume(begin(context, stage)?)?;
    let made = stage.make(context);
    // Also of an attempt that was stopped, whose checkpoint others may continue with.
    output.computed_on(context.computed_on())?;
    let (files, made) = made?;
    output.finish(&files)?;
    stage.report(context, &made)?;
    Ok(Some(made))
}

/// [`run`] by all ranks together, which must have the same inputs. The files are those that
/// rank 0 returns.
pub fn run_on_ranks<S: Stage>(context: &Context, comm: &dyn Comm, stage: &S) -> Result<Option<S::Output>> {
    let opened = record::open_for_all(comm, stage.dir(), S::NAME, stage.inputs()?.value()?);
    let state = opened.map_err(|error| with_hint(error, OTHER_SETTINGS, stage.advice()))?;
    if let Some(settings) = stage.settings().filter(|_| comm.rank() == 0) {
        settings.store(&context.ui)?;
    }
    let SharedState::Open(mut handle) = state else {
        stage.was_finished(context)?;
        return Ok(None);
    };
    let context = &context.without_devices();
    handle.assume(begin(context, stage)?)?;
    let made = stage.make(context);
    handle.computed_on(context.computed_on())?;
    let (files, made) = made?;
    handle.finish(&files)?;
    stage.report(context, &made)?;
    Ok(Some(made))
}

/// Shows that work begins, and what is assumed; returns that.
pub fn begin<S: Stage>(context: &Context, stage: &S) -> Result<Vec<String>> {
    let inputs = stage.inputs()?.value()?;
    let device = match (inputs["device"]["kind"].as_str(), inputs["device"]["dtype"].as_str()) {
        (Some(kind), Some(dtype)) => format!(", {kind} {dtype}"),
        _ => String::new(),
    };
    let settings = checksum(inputs.to_string().as_bytes());
    context.ui.line(format!(
        "{}: begins on {}{device}, gradtx {}, settings {}",
        S::NAME,
        host_name(),
        env!("CARGO_PKG_VERSION"),
        &settings[..12]
    ));
    let assumed = stage.assumed();
    if !assumed.is_empty() {
        context.ui.line(format!("{}: assumed, `gradtx preview` shows examples:", S::NAME));
        assumed.iter().for_each(|line| context.ui.line(format!("  {line}")));
    }
    Ok(assumed)
}

/// What is known of a stage without doing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Name on the command line and in records.
    pub name: &'static str,
    /// See [`Stage::HAS_RANKS`].
    pub has_ranks: bool,
    /// See [`Stage::RESUMES`].
    pub resumes: bool,
}

impl Facts {
    /// Of a stage.
    pub const fn of<S: Stage>() -> Self {
        Self { name: S::NAME, has_ranks: S::HAS_RANKS, resumes: S::RESUMES }
    }
}

impl Record {
    /// What the result depends on, if it is one of the stage with these inputs.
    ///
    /// # Errors
    /// When it is of that stage, but does not say what this version of gradtx writes.
    pub fn inputs<I: Inputs>(&self, dir: &Path) -> Result<Option<I>> {
        if self.stage != I::STAGE {
            return Ok(None);
        }
        serde_json::from_value(self.settings.clone()).map(Some).map_err(|error| {
            let what = format!(
                "{}: the record of `{}` has other settings than this version: {error}",
                shown(dir),
                I::STAGE
            );
            failed(what, "use the version of gradtx that wrote it, or run the stage in another directory")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::World;
    use crate::ui::Ui;
    use serde::Deserialize;
    use std::cell::Cell;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Number {
        n: u64,
    }

    impl Inputs for Number {
        const STAGE: &'static str = "count";
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Renamed {
        m: u64,
    }

    impl Inputs for Renamed {
        const STAGE: &'static str = "count";
    }

    struct Count<'a> {
        dir: &'a Path,
        made: Cell<usize>,
    }

    impl Stage for Count<'_> {
        type Inputs = Number;
        type Output = u64;

        fn dir(&self) -> &Path {
            self.dir
        }

        fn inputs(&self) -> Result<Number> {
            Ok(Number { n: 3 })
        }

        fn assumed(&self) -> Vec<String> {
            vec!["numbers: from 1".into()]
        }

        fn make(&self, _: &Context) -> Result<(Vec<String>, u64)> {
            self.made.set(self.made.get() + 1);
            std::fs::write(self.dir.join("n"), "3")?;
            Ok((vec!["n".into()], 3))
        }

        fn report(&self, _: &Context, _: &u64) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn stages_are_done_once_and_read_back_as_written() {
        let home = tempfile::tempdir().unwrap();
        let context = Context::new(Some(1), Ui::new("count", true, false), &World::alone());
        let stage = Count { dir: home.path(), made: Cell::new(0) };
        assert_eq!(run(&context, &stage).unwrap(), Some(3));
        assert_eq!(run(&context, &stage).unwrap(), None);
        assert_eq!(run_on_ranks(&context, World::alone().comm(), &stage).unwrap(), None);
        assert_eq!(stage.made.get(), 1);
        let record = record::read(&home.path().join(record::RECORD_FILE)).unwrap();
        assert_eq!(record.inputs::<Number>(home.path()).unwrap(), Some(Number { n: 3 }));
        assert_eq!(record.assumed, ["numbers: from 1"]);
        // A field that was renamed is an error, and not an empty page.
        let error = record.inputs::<Renamed>(home.path()).unwrap_err().to_string();
        assert!(error.contains("missing field `m`"), "{error}");
    }
}
