//! How this process was started: by mpirun, by srun, or by a person.
//!
//! In: the environment. Out: the rank and the number of ranks that the starter had in
//! mind, before MPI is asked; they are held against what MPI sees.

use crate::{Error, Result};

/// What a starter of several processes told this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started it: `mpirun`, or `srun`.
    pub by: &'static str,
    /// This process among them.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
}

/// Who sets which variables: rank, size, and one without which they mean nothing. The first
/// that is complete counts: within a SLURM job, mpirun's word is the nearer one.
const STARTERS: [(&str, &str, &str, &str); 5] = [
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "PMI_SIZE"),
    // A batch script and an allocation's shell have a number of tasks too, but no step.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"),
];

/// How srun and MPI find each other.
const SRUN_ADVICE: &str = "Open MPI needs `srun --mpi=pmix`, MPICH `srun --mpi=pmi2`";

impl Launch {
    /// From this process's environment; nothing if it was started alone.
    pub fn find() -> Option<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    /// From the variables that `get` knows.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let number = |name: &str| get(name)?.trim().parse().ok();
        STARTERS.iter().find_map(|&(by, rank, size, needed)| {
            get(needed)?;
            Some(Self { by, rank: number(rank)?, size: number(size)? })
        })
    }

    /// Fails if srun started several processes without a way for MPI to find the others, as
    /// with `--mpi=none`: Open MPI would end each of them with a page of its own, and any other
    /// take each for a whole job. `is_set` tells whether there is a variable whose name begins so.
    pub fn check_wires(&self, is_set: impl Fn(&str) -> bool) -> Result<()> {
        if self.by != "srun" || self.size == 1 || is_set("PMI") || is_set("PALS_") {
            return Ok(());
        }
        let why = format!("srun started {} processes, but told MPI of none: {SRUN_ADVICE}", self.size);
        Err(Error::invalid("number of ranks", why))
    }

    /// Fails if MPI, which calls itself `library`, sees another number of ranks: then every
    /// process would take itself for a whole job.
    pub fn check(&self, seen: usize, library: &str) -> Result<()> {
        let Self { by, size, .. } = self;
        if seen == *size {
            return Ok(());
        }
        let advice = match *by {
            "srun" => SRUN_ADVICE,
            _ => "start it with the mpirun of the same MPI",
        };
        let why = format!(
            "{by} started {size} processes, but MPI sees {seen}; this program's MPI is {library}: {advice}"
        );
        Err(Error::invalid("number of ranks", why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Option<Launch> {
        Launch::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn the_nearest_starter_counts() {
        let slurm = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4")];
        assert_eq!(read(&slurm), Some(Launch { by: "srun", rank: 3, size: 4 }));
        let step = [&slurm[..], &[("SLURM_STEP_NUM_TASKS", "8")]].concat();
        assert_eq!(read(&step).map(|l| l.size), Some(8));
        let ompi = [&slurm[..], &[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]].concat();
        assert_eq!(read(&ompi), Some(Launch { by: "mpirun", rank: 1, size: 2 }));
        assert_eq!(read(&[("PMI_RANK", "0"), ("PMI_SIZE", "1")]).map(|l| l.size), Some(1));
    }

    #[test]
    fn one_process_of_a_batch_script_is_alone() {
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), None);
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("PMI_RANK", "x"), ("PMI_SIZE", "1")]), None);
    }

    #[test]
    fn processes_that_mpi_cannot_find_are_refused_before_it_tries() {
        let check = |by, size, set: &[&str]| {
            let is_set = |start: &str| set.iter().any(|name| name.starts_with(start));
            Launch { by, rank: 0, size }.check_wires(is_set).map_err(|error| error.to_string())
        };
        let message = check("srun", 4, &["PATH", "SLURM_MPI_TYPE"]).unwrap_err();
        assert!(message.contains("srun started 4") && message.contains("--mpi=pmix"), "{message}");
        assert_eq!(check("srun", 1, &[]), Ok(()));
        assert_eq!(check("srun", 4, &["PMIX_RANK"]), Ok(()));
        assert_eq!(check("mpirun", 4, &[]), Ok(()));
    }

    #[test]
    fn another_number_of_ranks_is_an_error_with_advice() {
        let launch = Launch { by: "srun", rank: 0, size: 4 };
        assert!(launch.check(4, "Open MPI").is_ok());
        let message = launch.check(1, "MPICH 4.0").unwrap_err().to_string();
        for part in ["srun started 4", "sees 1", "MPICH 4.0", "--mpi=pmix", "--mpi=pmi2"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
