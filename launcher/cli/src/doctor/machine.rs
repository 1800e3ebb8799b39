//! The program, and the machine that it runs on.

use super::check::Check;
use gradtx_kernels::cpu::simd;
use gradtx_run::progress::host_name;
use gradtx_runtime::plan::{available_memory, human_bytes, memory_limit};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Looks at program, processor, memory, and the disks of these directories (or of the one
/// that this process is in).
pub fn checks(threads: usize, runs: &[PathBuf]) -> Vec<Check> {
    let mut checks = vec![program(), processor(threads), instructions(), huge_pages(), memory()];
    let here = [PathBuf::from(".")];
    checks.extend((if runs.is_empty() { &here[..] } else { runs }).iter().map(|dir| disk(dir)));
    checks
}

fn program() -> Check {
    let features: Vec<&str> = [("mpi", cfg!(feature = "mpi")), ("cuda", cfg!(feature = "cuda"))]
        .into_iter()
        .filter_map(|(name, on)| on.then_some(name))
        .collect();
    let with = match features.is_empty() {
        true => "no features".into(),
        false => format!("features {}", features.join(", ")),
    };
    let version = env!("CARGO_PKG_VERSION");
    let found = format!("gradtx {version}, {with}, on {} ({})", host_name(), std::env::consts::ARCH);
    let facts = json!({ "version": version, "features": features, "host": host_name() });
    if cfg!(debug_assertions) {
        let check = Check::note("program", format!("{found}, built with checks that cost time"));
        return check.advice("build with --release for real work").facts(facts);
    }
    Check::ok("program", found).facts(facts)
}

fn processor(threads: usize) -> Check {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find(|line| line.starts_with("model name"));
    let model =
        model.and_then(|line| line.split_once(':')).map_or("unknown processor", |(_, name)| name.trim());
    let all = text.lines().filter(|line| line.starts_with("processor")).count();
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    let found = format!("{model}, {allowed} of {all} cores allowed, {threads} threads");
    let facts = json!({ "model": model, "cores": all, "allowed": allowed, "threads": threads });
    let check = match (threads > allowed, allowed < all) {
        (true, _) => Check::note("processor", found)
            .advice("more threads than allowed cores take turns: leave out --threads, or lower it"),
        (false, true) => Check::note("processor", found).advice(
            "affinity or a control group keeps this process from the others (SLURM: --cpus-per-task)",
        ),
        (false, false) => Check::ok("processor", found),
    };
    check.facts(facts)
}

fn instructions() -> Check {
    #[cfg(target_arch = "x86_64")]
    let has = [
        ("SSE4.2", is_x86_feature_detected!("sse4.2")),
        ("AVX", is_x86_feature_detected!("avx")),
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512F", is_x86_feature_detected!("avx512f")),
        ("AVX-512VL", is_x86_feature_detected!("avx512vl")),
        ("AVX-512BW", is_x86_feature_detected!("avx512bw")),
        ("AVX-512DQ", is_x86_feature_detected!("avx512dq")),
        ("AVX-512-BF16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let has: [(&str, bool); 0] = [];
    let names: Vec<&str> = has.into_iter().filter_map(|(name, on)| on.then_some(name)).collect();
    let used = simd::widest();
    let found = format!("{}; used: {used}", if names.is_empty() { "-".into() } else { names.join(" ") });
    let facts = json!({ "found": names, "used": used });
    let wide = used.starts_with("AVX");
    if wide { Check::ok("instructions", found) } else { Check::note("instructions", found) }.facts(facts)
}

fn huge_pages() -> Check {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mode = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("unknown", |(m, _)| m);
    let check = match mode {
        "always" | "madvise" => Check::ok("huge pages", mode),
        _ => Check::note("huge pages", mode)
            .advice(format!("large matrices are slower without them; as root: echo madvise > {path}")),
    };
    check.facts(json!({ "mode": mode }))
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let total = kilobytes("MemTotal:").map_or(0, |k| k * 1024);
    let available = match available_memory() {
        Ok(bytes) => bytes,
        Err(error) => return Check::note("memory", error.to_string()),
    };
    let limit = memory_limit();
    let mut found = format!("{} available of {}", human_bytes(available), human_bytes(total));
    if let Some(limit) = limit {
        let (used, all) = (human_bytes(limit.used), human_bytes(limit.limit));
        found += &format!("; a control group (container or job) allows {all}, {used} of it are used");
    }
    let facts = json!({
        "total": total, "available": available, "limit": limit.map(|l| l.limit), "used": limit.map(|l| l.used),
    });
    Check::ok("memory", found).facts(facts)
}

/// File systems that several hosts share, whose locks may be missing or may be local.
const SHARED: [&str; 8] = ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p"];
/// Less free space than this is worth a note.
const LITTLE: u64 = 5 << 30;

fn disk(path: &Path) -> Check {
    let topic = format!("disk of {}", path.display());
    // A run directory may not be there yet: then the one above it that is.
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let Some(dir) = absolute.ancestors().find(|dir| dir.is_dir()) else {
        return Check::problem(&topic, "there is no such directory");
    };
    let (free, total) = match rustix::fs::statvfs(dir) {
        Ok(stat) => (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize),
        Err(error) => return Check::problem(&topic, format!("cannot be read: {error}")),
    };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let kind = file_system(&mounts, dir).unwrap_or("unknown").to_string();
    let found = format!("{} free of {}, {kind}", human_bytes(free), human_bytes(total));
    let facts = json!({ "free": free, "total": total, "type": kind, "dir": dir.display().to_string() });
    let check = if rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_err() {
        Check::problem(&topic, format!("{found}; this user may not write to {}", dir.display()))
            .advice("choose another directory, or ask for the permission")
    } else if free < LITTLE {
        Check::note(&topic, found)
            .advice("a full disk ends a stage; the same command resumes it once there is room")
    } else if SHARED.contains(&kind.as_str()) {
        Check::note(&topic, found).advice(
            "a file system of several hosts: start a stage on one of them only, for its locks may be local",
        )
    } else {
        Check::ok(&topic, found)
    };
    check.facts(facts)
}

/// The type of the file system that a directory is on: that of the longest mount point above it.
fn file_system<'a>(mounts: &'a str, dir: &Path) -> Option<&'a str> {
    let point_and_kind = |line: &'a str| {
        let (place, source) = line.split_once(" - ")?;
        // Blanks in paths stand there as \040.
        let point = place.split_whitespace().nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(point), source.split_whitespace().next()?))
    };
    let found = mounts.lines().filter_map(point_and_kind).filter(|(point, _)| dir.starts_with(point));
    // Of mounts on the same point the last one counts, which `max_by_key` returns.
    found.max_by_key(|(point, _)| point.components().count()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_mount_point_counts() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:4 / /scratch rw shared:1 - lustre x rw\n\
                      3 1 0:5 / /scratch/my\\040dir rw - tmpfs none rw\n";
        let kind = |dir: &str| file_system(mounts, Path::new(dir)).unwrap();
        assert_eq!(kind("/home/me"), "ext4");
        assert_eq!(kind("/scratch/run"), "lustre");
        assert_eq!(kind("/scratchy"), "ext4");
        assert_eq!(kind("/scratch/my dir/run"), "tmpfs");
    }
}
