//! Curation by several processes without MPI that share the run directory (`--array`).

use super::collection::Collection;
use super::file_locks::{FileLocks, Position};
use super::runner::GroupRunner;
use super::shard_writer::{ShardWriter, gather_left, scratch_dir};
use super::{Curation, PARTS, forget, result_files, whole, work_of, write_start};
use crate::records::CurateInputs;
use anyhow::Result;
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{is_busy, stopped};
use gradtx_run::progress;
use gradtx_run::record::{self, State, make_dir};
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::{TupleManifest, sweep_all_temporary};
use std::time::{Duration, Instant};

/// For so long a process of several waits for one that has the directory for itself.
const MAX_ALONE: Duration = Duration::from_secs(60);

impl Curation<'_> {
    /// By one of several processes that share the directory.
    pub(super) fn run_in_array(&self, context: &Context) -> Result<()> {
        let position = Position::find();
        let (collection, settings, started) = (&self.collection, self.inputs.value()?, Instant::now());
        let is_complete = || Ok::<_, anyhow::Error>(collection.missing(self.world.comm())?.is_empty());
        loop {
            let output = match record::share(self.dir(), Self::NAME, settings.clone(), &position.name) {
                Ok(State::Open(mut output)) => {
                    self.settings.store(&context.ui)?;
                    output.assume(stage::begin(context, self)?)?;
                    output
                }
                Ok(State::Finished) => {
                    self.settings.store(&context.ui)?;
                    return self.was_finished(context);
                }
                // Somebody is alone here: to end the work of all, or to see whether that can be done.
                Err(error) if is_busy(&error) => {
                    if is_complete()? {
                        return self.report(context, &None);
                    }
                    if started.elapsed() > MAX_ALONE {
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(200));
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Some(code) = self.do_unclaimed(context, &position)? {
                return Err(stopped(code));
            }
            output.leave();
            // Whoever is the last one here is alone.
            match record::open(self.dir(), Self::NAME, settings.clone()) {
                // A process that was killed meanwhile has left work to do.
                Ok(State::Open(output)) if !is_complete()? => output.leave(),
                Ok(State::Open(mut output)) => {
                    output.assume(self.assumed())?;
                    let manifest = end_array(context, collection, &self.inputs)?;
                    output.finish(&result_files(collection))?;
                    return self.report(context, &Some(manifest));
                }
                Ok(State::Finished) => return self.was_finished(context),
                Err(error) if is_busy(&error) => return self.report(context, &None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Does what no other process does; the exit code, if it was asked to stop before the end.
    fn do_unclaimed(&self, context: &Context, position: &Position) -> Result<Option<u8>> {
        let Self { world, job, collection, .. } = self;
        write_start(collection)?;
        let scratch = job.scratch.as_ref().map(|scratch| scratch_dir(scratch, collection, &position.name));
        if let Some(scratch) = &scratch {
            gather_left(collection, scratch)?;
            make_dir(scratch)?;
        }
        let missing = collection.missing(world.comm())?;
        let (examples, work) = work_of(context, collection, &missing)?;
        let steps = work.iter().map(|w| collection.recipe(w.side).max_steps as u64).sum();
        let progress = context.ui.progress("curate", steps);
        let shard_writer = ShardWriter::start(collection.clone(), scratch.clone())?;
        let source = Box::new(FileLocks::new(collection, shard_writer, position, work, progress)?);
        let runner = GroupRunner { context, collection, examples: &examples, source };
        let asked = dispatch(&collection.config.device, context, runner)?;
        forget(scratch.as_deref());
        Ok(asked)
    }
}

/// The last of several processes ends the work for all.
fn end_array(context: &Context, collection: &Collection, inputs: &CurateInputs) -> Result<TupleManifest> {
    progress::forget_shared(&collection.dir);
    sweep_all_temporary(&collection.dir)?;
    for part in PARTS {
        // Also what was killed while this process worked.
        sweep_all_temporary(&collection.dir.join(part))?;
    }
    whole(context, collection, inputs)
}
