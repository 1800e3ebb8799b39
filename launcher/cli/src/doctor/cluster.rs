//! GPUs, MPI, their libraries, SLURM.

use super::check::Check;
use gradtx_runtime::comm::RankInfo;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Looks at what a cluster has. `place` is this process's.
pub fn checks(place: &RankInfo) -> Vec<Check> {
    let mut checks = vec![gpus()];
    checks.extend(gpus_of_rank(place));
    checks.extend(libraries());
    checks.push(nccl());
    checks.push(mpi());
    checks.push(slurm_commands());
    checks.push(slurm_job());
    checks
}

#[cfg(feature = "cuda")]
fn gpus() -> Check {
    use gradtx_runtime::plan::human_bytes;
    match gradtx_kernels::cuda::devices() {
        Err(why) => Check::note("GPU", format!("none that can be used: {why}")),
        Ok(devices) => {
            let describe = |d: &gradtx_kernels::cuda::CudaDevice| {
                let (major, minor) = d.capability;
                let memory = human_bytes(d.memory as u64);
                format!("{}: {} (sm_{major}{minor}, {memory})", d.ordinal, d.name)
            };
            let facts: Vec<serde_json::Value> = devices
                .iter()
                .map(|d| json!({ "name": d.name, "capability": [d.capability.0, d.capability.1], "memory": d.memory }))
                .collect();
            let driver = driver().map_or(String::new(), |driver| format!("; driver {driver}"));
            let names: Vec<String> = devices.iter().map(describe).collect();
            // Of libraries, only those can be used that work with the driver: a device tries them.
            match gradtx_kernels::cuda::Cuda::new(0) {
                Ok(cuda) => {
                    let products = cuda.gemm_backend();
                    let text = format!("{}{driver}; matrix products by {products}", names.join(", "));
                    Check::ok("GPU", text).facts(json!(facts))
                }
                Err(why) => {
                    Check::note("GPU", format!("{}{driver}; {why}", names.join(", "))).facts(json!(facts))
                }
            }
        }
    }
}

/// Whether this rank sees a GPU for every rank of its node.
#[cfg(feature = "cuda")]
fn gpus_of_rank(place: &RankInfo) -> Option<Check> {
    let ranks = ranks_of_node(place, |name| std::env::var(name).ok());
    let seen = gradtx_kernels::cuda::devices().map_or(0, |devices| devices.len());
    hidden_gpus(ranks, seen)
}

#[cfg(not(feature = "cuda"))]
fn gpus_of_rank(_: &RankInfo) -> Option<Check> {
    None
}

/// Ranks of this node: as they have found each other, or as srun announces them to a program that they start
/// without MPI.
#[cfg(feature = "cuda")]
fn ranks_of_node(place: &RankInfo, get: impl Fn(&str) -> Option<String>) -> usize {
    // "4", or "4(x2),3" for several nodes, of which SLURM_NODEID is this one's number.
    let counts = get("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default();
    let node: usize = get("SLURM_NODEID").and_then(|text| text.parse().ok()).unwrap_or(0);
    let of_run = |run: &str| -> Option<(usize, usize)> {
        let (tasks, times) = run.split_once("(x").unwrap_or((run, "1"));
        Some((tasks.parse().ok()?, times.trim_end_matches(')').parse().ok()?))
    };
    let mut nodes = counts.split(',').filter_map(of_run).flat_map(|(tasks, n)| std::iter::repeat_n(tasks, n));
    place.local_size.max(nodes.nth(node).unwrap_or(1))
}

#[cfg(feature = "cuda")]
fn hidden_gpus(ranks: usize, seen: usize) -> Option<Check> {
    match seen {
        0 => None,
        _ if ranks <= 1 || seen >= ranks => None,
        _ => {
            let found = format!(
                "this rank sees {seen} of them, and its node has {ranks} ranks: NCCL cannot exchange values \
                 between GPUs that are hidden from each other's ranks"
            );
            let advice =
                format!("start ranks with --gpus-per-node={ranks}, not --gpus-per-task or --gpu-bind");
            Some(Check::problem("GPUs of ranks", found).advice(advice))
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Check {
    match driver() {
        Some(driver) => Check::note(
            "GPU",
            format!("there is an NVIDIA driver ({driver}), but this build looks for no GPU"),
        )
        .advice("build with the feature `cuda` to find its devices"),
        None => Check::ok("GPU", "none; this build (without the feature `cuda`) does not look for one"),
    }
}

/// Version of the NVIDIA kernel driver, if one is loaded.
fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let digits = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    Some(text.split_whitespace().find(digits).unwrap_or("unknown version").to_string())
}

/// Libraries that are looked for by name: file names begin like this.
const LIBRARIES: [(&str, &str, &str); 3] = [
    ("CUDA driver library", "libcuda.so", "comes with the GPU's driver"),
    ("NVRTC", "libnvrtc.so", "comes with the CUDA toolkit; compiles kernels for the GPU that is there"),
    ("cuBLASLt", "libcublasLt.so", "comes with the CUDA toolkit; fast matrix products on GPUs"),
];

fn libraries() -> Vec<Check> {
    let known = loader_cache();
    let dirs = library_dirs();
    let look = |(topic, name, what): &(&str, &str, &str)| match find_library(name, &dirs, &known) {
        Some(path) => {
            Check::ok(topic, path.display().to_string()).facts(json!({ "path": path.display().to_string() }))
        }
        None => {
            // Nothing in a build without GPUs would use it.
            let missing = format!("{name} not found");
            match cfg!(feature = "cuda") {
                true => Check::note(topic, missing)
                    .advice(format!("{what}; if it is here, add its directory to LD_LIBRARY_PATH")),
                false => Check::ok(topic, format!("{missing}, and not needed by this build")),
            }
        }
    };
    LIBRARIES.iter().map(look).collect()
}

/// What training on several GPUs would find.
#[cfg(feature = "cuda")]
fn nccl() -> Check {
    match gradtx_kernels::cuda::nccl_version() {
        Ok(version) => Check::ok("NCCL", format!("{version}; sums gradients between the GPUs of a training"))
            .facts(json!({ "version": version })),
        Err(why) => Check::note("NCCL", why).advice(
            "an NVIDIA library of its own; without it GPUs sum gradients through their hosts, slowly",
        ),
    }
}

#[cfg(not(feature = "cuda"))]
fn nccl() -> Check {
    Check::ok("NCCL", "sums gradients between GPUs; not needed by this build")
}

/// Directories that the dynamic loader looks into before and after its cache.
fn library_dirs() -> Vec<PathBuf> {
    let named = ["LD_LIBRARY_PATH", "GRADTX_CUDA_LIBRARIES"];
    let paths = named.map(|name| std::env::var_os(name).unwrap_or_default());
    let mut dirs: Vec<PathBuf> = paths.iter().flat_map(std::env::split_paths).collect();
    dirs.retain(|dir| !dir.as_os_str().is_empty());
    dirs.extend(["/usr/local/cuda/lib64", "/usr/lib64", "/usr/lib", "/lib64", "/lib"].map(PathBuf::from));
    dirs
}

/// What the loader's cache lists: file name and path.
fn loader_cache() -> Vec<(String, PathBuf)> {
    let run = |program: &str| Command::new(program).arg("-p").output().ok();
    // Often not on the path of ordinary users.
    let output = run("ldconfig").or_else(|| run("/sbin/ldconfig"));
    let text = output.map_or(String::new(), |o| String::from_utf8_lossy(&o.stdout).into_owned());
    parse_cache(&text)
}

/// Lines such as `libz.so.1 (libc6,x86-64) => /lib/libz.so.1`.
fn parse_cache(text: &str) -> Vec<(String, PathBuf)> {
    let entry = |line: &str| {
        let (name, path) = line.split_once(" => ")?;
        Some((name.split_whitespace().next()?.to_string(), PathBuf::from(path.trim())))
    };
    text.lines().filter_map(entry).collect()
}

fn find_library(name: &str, dirs: &[PathBuf], cache: &[(String, PathBuf)]) -> Option<PathBuf> {
    let in_dir = |dir: &PathBuf| {
        let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name)))
            .collect();
        found.sort();
        found.into_iter().next_back()
    };
    let listed = || cache.iter().find(|(n, _)| n.starts_with(name)).map(|(_, path)| path.clone());
    dirs.iter().find_map(in_dir).or_else(listed)
}

fn mpi() -> Check {
    let found = programs(&["mpirun", "mpiexec", "srun"]);
    let starters = match found.is_empty() {
        true => "neither mpirun nor srun is on the PATH".to_string(),
        false => listed(&found),
    };
    let facts = |library: Option<String>| json!({ "library": library, "programs": found });
    #[cfg(feature = "mpi")]
    {
        let library = gradtx_runtime::comm::library_version();
        let text = format!("{library}; {starters}");
        let check = match found.is_empty() {
            true => Check::note("MPI", text).advice("several ranks need one of them to be started"),
            false => Check::ok("MPI", text),
        };
        check.facts(facts(Some(library)))
    }
    #[cfg(not(feature = "mpi"))]
    Check::ok("MPI", format!("this build is for one process (without the feature `mpi`); {starters}"))
        .facts(facts(None))
}

fn slurm_commands() -> Check {
    let found = programs(&["sbatch", "srun", "squeue", "scontrol"]);
    let text = if found.is_empty() { "not found; not needed on one machine".into() } else { listed(&found) };
    Check::ok("SLURM", text).facts(json!(found))
}

fn slurm_job() -> Check {
    let names = [
        ("job", "SLURM_JOB_ID"),
        ("nodes", "SLURM_JOB_NUM_NODES"),
        ("tasks", "SLURM_NTASKS"),
        ("rank", "SLURM_PROCID"),
        ("cores per task", "SLURM_CPUS_PER_TASK"),
        ("MiB per node", "SLURM_MEM_PER_NODE"),
        ("GPUs", "SLURM_JOB_GPUS"),
        ("GPUs on this node", "SLURM_GPUS_ON_NODE"),
        ("list of nodes", "SLURM_JOB_NODELIST"),
    ];
    let found: BTreeMap<&str, String> =
        names.iter().filter_map(|(_, name)| Some((*name, std::env::var(name).ok()?))).collect();
    if !found.contains_key("SLURM_JOB_ID") {
        return Check::ok("SLURM job", "not inside one");
    }
    let say = |(what, name): &(&str, &str)| found.get(name).map(|value| format!("{what} {value}"));
    let text: Vec<String> = names.iter().filter_map(say).collect();
    Check::ok("SLURM job", text.join(", ")).facts(json!(found))
}

/// Programs that are on the PATH, and where.
fn programs(names: &[&str]) -> BTreeMap<String, PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let find = |name: &&str| {
        let runs = |path: &PathBuf| is_program(path);
        let found = dirs.iter().map(|dir| dir.join(name)).find(runs)?;
        Some((name.to_string(), found))
    };
    names.iter().filter_map(find).collect()
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn listed(found: &BTreeMap<String, PathBuf>) -> String {
    found.values().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_directories_and_cache() {
        let cache = parse_cache(
            "2 libs found in cache\n\tlibnccl.so.2 (libc6,x86-64) => /opt/lib/libnccl.so.2\n\tlibz.so.1 (libc6) => /z\n",
        );
        assert_eq!(find_library("libnccl.so", &[], &cache).unwrap(), Path::new("/opt/lib/libnccl.so.2"));
        assert_eq!(find_library("libcuda.so", &[], &cache), None);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libnccl.so.2.1"), "").unwrap();
        let found = find_library("libnccl.so", &[dir.path().to_owned()], &cache);
        assert_eq!(found.unwrap(), dir.path().join("libnccl.so.2.1"), "the loader looks there first");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn hidden_gpus_are_a_problem() {
        let found = hidden_gpus(4, 1).expect("three are hidden");
        assert!(found.found.contains("sees 1") && found.found.contains("4 ranks"), "{found:?}");
        let advice = found.advice.unwrap();
        assert!(advice.contains("--gpus-per-node=4, not --gpus-per-task"), "{advice}");
        for (ranks, seen) in [(1, 1), (4, 4), (2, 8), (4, 0)] {
            assert!(hidden_gpus(ranks, seen).is_none(), "{ranks} ranks, {seen} GPUs");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn ranks_of_a_node_are_those_that_srun_announces() {
        let alone = RankInfo { node: "n1".into(), local_rank: 0, local_size: 1 };
        let ranks = |counts: &str, node: &str| {
            ranks_of_node(&alone, |name| match name {
                "SLURM_STEP_TASKS_PER_NODE" => Some(counts.to_string()),
                "SLURM_NODEID" => Some(node.to_string()),
                _ => None,
            })
        };
        assert_eq!(
            [ranks("4(x2),3", "1"), ranks("4(x2),3", "2"), ranks("8", "0"), ranks("x", "0")],
            [4, 3, 8, 1]
        );
        assert_eq!(ranks_of_node(&RankInfo { local_size: 2, ..alone.clone() }, |_| None), 2);
    }

    #[test]
    fn programs_must_be_executable() {
        assert!(is_program(Path::new("/bin/sh")));
        assert!(!is_program(Path::new("/etc/passwd")) && !is_program(Path::new("/bin")));
    }
}
