//! [`ShardWriter`]: writes what is finished, on a thread of its own, while the next group is trained.
//!
//! In: finished groups. Out: their files in the tuple store, by way of a scratch directory if
//! there is one: a node's own disk takes the shard at once, and the shared file system gets
//! one long copy. What a process before this one left there is gathered first.

use super::collection::{Collection, Finished};
use anyhow::{Context as _, Result, bail};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::sweep_tree;
use gradtx_train::lora::schedule::JobGroup;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Groups that wait to be written, before whoever brings the next has to wait.
const WAITING: usize = 2;

/// A thread that writes. When it is dropped, what it was given is still written.
pub struct ShardWriter {
    /// None at the end.
    brought: Option<SyncSender<Finished>>,
    /// None once it has failed.
    thread: Option<JoinHandle<Result<()>>>,
}

impl ShardWriter {
    /// Starts the thread.
    pub fn start(collection: Arc<Collection>, scratch: Option<PathBuf>) -> Result<Self> {
        let (brought, wanted) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("shards".into())
            .spawn(move || keep(&collection, scratch.as_deref(), &wanted))?;
        Ok(Self { brought: Some(brought), thread: Some(thread) })
    }

    /// Hands over a group. Fails if an earlier one could not be written.
    pub fn give(&mut self, finished: Finished) -> Result<()> {
        if self.brought.as_ref().is_some_and(|brought| brought.send(finished).is_ok()) {
            return Ok(());
        }
        // It takes nothing more, since it has failed.
        self.join()?;
        bail!("the thread that writes shards has ended")
    }

    /// Returns when everything is written.
    pub fn end(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.brought = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            Some(Ok(result)) => result,
            None => Ok(()),
        }
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        self.brought = None;
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            tracing::warn!("{error:#}");
        }
    }
}

fn keep(collection: &Collection, scratch: Option<&Path>, wanted: &Receiver<Finished>) -> Result<()> {
    for finished in wanted {
        let JobGroup { side, group, .. } = finished.work;
        // First: once its shards are there, a group is not trained again.
        collection.write_events(&finished)?;
        match scratch {
            Some(scratch) => {
                collection.write(scratch, &finished)?;
                collection.gather(scratch, &collection.dir, &finished.work)?;
            }
            None => collection.write(&collection.dir, &finished)?,
        }
        // Only now: until here it is what a kill would leave to continue from.
        let checkpoint = collection.checkpoint(side, &collection.groups()[group]).path;
        match std::fs::remove_file(&checkpoint) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("{}: cannot remove", checkpoint.display()));
            }
            _ => tracing::debug!("{} group {group}: written", side.name()),
        }
    }
    Ok(())
}

/// A directory within `scratch` for this process's part of this run, which no other process
/// of the node uses.
pub(crate) fn scratch_dir(scratch: &Path, collection: &Collection, place: &str) -> PathBuf {
    scratch.join(format!("gradtx-{}-{place}", &collection.identity[..16]))
}

/// Takes over the groups that are whole in a scratch directory.
pub(crate) fn gather_left(collection: &Collection, scratch: &Path) -> Result<()> {
    if !scratch.is_dir() {
        return Ok(());
    }
    // The directory is this process's own: whatever is half written there is of one before it.
    sweep_tree(scratch, &|_| false)?;
    let groups = collection.groups();
    for side in [Role::Llm, Role::Tiny] {
        for (number, group) in groups.iter().enumerate() {
            if collection.is_done(scratch, side, group) {
                collection.gather(scratch, &collection.dir, &JobGroup { side, group: number, cost: 0.0 })?;
                tracing::info!("{} group {number}: was in {}", side.name(), scratch.display());
            }
        }
    }
    Ok(())
}
