//! Atomic files: written under a temporary name, synced, renamed.

use crate::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Names of temporary files begin and end like this.
const PREFIX: &str = ".gradtx-";
const SUFFIX: &str = ".tmp";
/// Directories of a stage are this deep at most, such as `checkpoints/best-000000030`.
const SWEPT_DEPTH: usize = 3;

/// Writes a file so that it is there whole or not at all, whatever happens meanwhile.
///
/// `fill` writes the content. The temporary file lies in the same directory (a rename
/// across file systems is a copy) and is removed on any error.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&mut File>) -> std::io::Result<()>,
) -> Result<()> {
    let failed = |e| Error::io("write", path, e);
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = tempfile::Builder::new()
        .prefix(PREFIX)
        .suffix(SUFFIX)
        .permissions(default_permissions())
        .tempfile_in(dir)
        .map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    fill(&mut out).and_then(|()| out.flush()).map_err(failed)?;
    drop(out);
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(path).map_err(|e| failed(e.error))?;
    // The rename itself is durable once the directory is.
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed)
}

/// What a file gets that is created the ordinary way (before the umask), not the
/// owner-only mode of temporary files: colleagues read run directories too.
fn default_permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o666)
}

/// Removes temporary files in `dir` that a process before this one left behind, and
/// returns their paths. To be called by one process when a stage starts.
///
/// A file counts as left behind when it was last written to before this process
/// started: another rank that started with us may be writing right now.
pub fn sweep_temporary(dir: &Path) -> Result<Vec<PathBuf>> {
    let started = process_start().map_err(|e| Error::io("read", Path::new("/proc"), e))?;
    sweep_older(dir, started)
}

/// Removes all temporary files in `dir`, however new. To be called by a process that knows
/// that no other writes there.
pub fn sweep_all_temporary(dir: &Path) -> Result<Vec<PathBuf>> {
    // Clocks of file servers may be ahead.
    sweep_older(dir, SystemTime::now() + Duration::from_secs(365 * 24 * 3600))
}

/// Removes all temporary files in `dir` and in the directories within it, but not in those for
/// which `is_other` says that somebody else may be writing there. Links are not followed. To be
/// called by a process that knows that no other writes to the rest.
pub fn sweep_tree(dir: &Path, is_other: &dyn Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut removed = vec![];
    let mut left = vec![(dir.to_owned(), 0)];
    while let Some((dir, depth)) = left.pop() {
        removed.extend(sweep_all_temporary(&dir)?);
        let entries = std::fs::read_dir(&dir).map_err(|e| Error::io("list", &dir, e))?;
        for entry in entries.flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_dir && depth < SWEPT_DEPTH && !is_other(&entry.path()) {
                left.push((entry.path(), depth + 1));
            }
        }
    }
    removed.sort();
    Ok(removed)
}

fn sweep_older(dir: &Path, limit: SystemTime) -> Result<Vec<PathBuf>> {
    let mut removed = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let entry = entry.map_err(|e| Error::io("list", dir, e))?;
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|n| n.starts_with(PREFIX) && n.ends_with(SUFFIX));
        let path = entry.path();
        // Gone meanwhile: someone else finished or swept it.
        let Ok(metadata) = entry.metadata() else { continue };
        let modified = metadata.modified().map_err(|e| Error::io("look at", &path, e))?;
        if ours && metadata.is_file() && modified < limit {
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path, e));
                }
                _ => removed.push(path),
            }
        }
    }
    removed.sort();
    Ok(removed)
}

/// When this process started, up to two seconds early: the kernel gives the time of
/// boot in whole seconds, and the start in ticks (of 10 ms) after it.
fn process_start() -> std::io::Result<SystemTime> {
    let odd = || std::io::Error::other("unexpected content of a file under /proc");
    let stat = std::fs::read_to_string("/proc/stat")?;
    let boot = stat.lines().find_map(|l| l.strip_prefix("btime ")).and_then(|t| t.trim().parse().ok());
    let boot: u64 = boot.ok_or_else(odd)?;
    let own = std::fs::read_to_string("/proc/self/stat")?;
    // Field 22; counting starts after the program's name, which may hold anything.
    let ticks = own.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19)?.parse().ok());
    let ticks: u64 = ticks.ok_or_else(odd)?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(boot) + Duration::from_millis(ticks * 10)
        - Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_left_behind_temporary_files_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, age: u64| {
            let path = dir.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
            path
        };
        let old = file(".gradtx-abc.tmp", 3600 * 24 * 365);
        let new = file(".gradtx-def.tmp", 0);
        let foreign = file("weights.tmp", 3600 * 24 * 365);
        assert_eq!(sweep_temporary(dir.path()).unwrap(), std::slice::from_ref(&old));
        assert!(!old.exists() && new.exists() && foreign.exists());
        assert_eq!(sweep_all_temporary(dir.path()).unwrap(), std::slice::from_ref(&new));
        assert!(!new.exists() && foreign.exists());
        assert!(sweep_temporary(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_stage_is_swept_with_what_is_within_it() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            path
        };
        let swept = ["adapter/.gradtx-a.tmp", "checkpoints/best-1/.gradtx-b.tmp", ".gradtx-c.tmp"].map(make);
        let kept = ["other/.gradtx-d.tmp", "adapter/a.tmp", "adapter/.gradtx-e.json"].map(make);
        std::os::unix::fs::symlink(dir.path(), dir.path().join("circle")).unwrap();
        assert_eq!(sweep_tree(dir.path(), &|d| d.ends_with("other")).unwrap().len(), 3);
        assert!(swept.iter().all(|path| !path.exists()) && kept.iter().all(|path| path.exists()));
    }

    #[test]
    fn this_process_started_a_moment_ago() {
        let age = SystemTime::now().duration_since(process_start().unwrap()).unwrap();
        assert!(age < Duration::from_secs(600), "{age:?}");
    }

    #[test]
    fn failed_writes_leave_the_old_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_atomic(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write_atomic(&path, |out| {
            out.write_all(b"half of the n")?;
            Err(std::io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
