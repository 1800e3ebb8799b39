//! The environment variables that the program, its batch scripts and its build read: the one list
//! of them, for `--help`, manual pages and docs/cli.md.

/// A variable that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it does, and what holds without it.
    pub meaning: &'static str,
}

/// Variables that a user of the program may set.
pub(crate) const VARIABLES: [Variable; 21] = [
    of("GRADTX_PROFILE", "site profile of `submit`: a name in ~/.config/gradtx, a file, or `none` (cluster)"),
    of("GRADTX_LOG", "log messages on stderr: error, warn, info, debug or trace, also per module (warn)"),
    of("NO_COLOR", "if set, no colours"),
    of("CUDA_VISIBLE_DEVICES", "the GPUs that CUDA shows to a process; SLURM sets it"),
    of("GRADTX_CUDA_LIBRARIES", "directories to search for cuBLASLt, NCCL and NVRTC, separated by colons"),
    of("GRADTX_CUBLASLT", "the library libcublasLt; `off`: matrix products by kernels of our own"),
    of(
        "GRADTX_CUBLASLT_ALGORITHMS",
        "stored choices of its algorithms, a file of `gradtx bench … --tune`; `off`: its first choices",
    ),
    of("GRADTX_NCCL", "the library libnccl; `off`: ranks exchange sums through their hosts"),
    of("GRADTX_NCCL_TIMEOUT", "seconds that a rank waits for another one before the job ends (600)"),
    of("GRADTX_NVRTC", "the library libnvrtc, which compiles kernels that the program does not have in it"),
    of("GRADTX_CUDA_CACHE", "directory of compiled kernels, searched before those in the program"),
    of("GRADTX", "batch scripts: the program (gradtx on the PATH; from `submit`: the one that submitted)"),
    of("GRADTX_MPI", "batch scripts: how srun starts MPI: pmix (Open MPI), pmi2 (MPICH) or none (pmix)"),
    of("GRADTX_SRUN", "batch scripts: more options of srun, separated by blanks"),
    of("GRADTX_RESTARTS", "batch scripts: how often a job is requeued at its time limit (20)"),
    of("GRADTX_SLURM", "batch scripts: the directory that they are in, if sbatch runs elsewhere (slurm)"),
    of("METHODS", "evaluate.sbatch: translators to score, separated by blanks (grad-transformer)"),
    of("SLURM_TMPDIR", "batch scripts: scratch of a node; curation writes there first"),
    of("XDG_CONFIG_HOME", "where the user's site profiles are, in gradtx/ (~/.config)"),
    of("XDG_CONFIG_DIRS", "where the site's profiles are, in gradtx/, separated by colons (/etc/xdg)"),
    of("GRADTX_CUBINS", "build: directory of compiled kernels to put into the program; see `make cubins`"),
];

const fn of(name: &'static str, meaning: &'static str) -> Variable {
    Variable { name, meaning }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    /// Variables that only tests, or the set-up of a machine, read.
    const OTHERS: [&str; 3] = ["GRADTX_TEST_", "GRADTX_EMULATE", "GRADTX_NO_INSTALL"];

    fn names_in(text: &str) -> impl Iterator<Item = &str> {
        text.match_indices("GRADTX_").map(|(at, _)| {
            let rest = &text[at..];
            &rest[..rest.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(rest.len())]
        })
    }

    fn read(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                read(&path, found);
            } else if path.ends_with("cli/src/environment.rs") {
                // The list itself.
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                found.extend(names_in(&text).map(String::from));
            }
        }
    }

    #[test]
    fn every_variable_that_is_read_is_in_the_list() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut found = BTreeSet::new();
        for dir in ["kernels/src", "models/src", "runtime/src", "launcher", "benches/src", "slurm"] {
            read(&root.join(dir), &mut found);
        }
        assert!(found.contains("GRADTX_NCCL_TIMEOUT"), "the sources were read: {found:?}");
        found.retain(|name| !OTHERS.iter().any(|other| name.starts_with(other)) && name != "GRADTX_");
        let known: BTreeSet<String> = VARIABLES.iter().map(|variable| variable.name.to_string()).collect();
        let missing: Vec<&String> = found.difference(&known).collect();
        assert!(missing.is_empty(), "not in the list of environment variables: {missing:?}");
        let gone: Vec<&String> = known
            .iter()
            .filter(|name| name.starts_with("GRADTX_") && *name != "GRADTX_CUBINS" && !found.contains(*name))
            .collect();
        assert!(gone.is_empty(), "in the list, but read nowhere: {gone:?}");
    }
}
