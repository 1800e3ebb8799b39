//! How this process was started: by mpirun, by srun, or by a person.
//!
//! In: the environment. Out: who started it, the rank and the number of ranks that the starter
//! announced, before MPI is asked; they are compared with what MPI sees.

use crate::{Error, Result};
use std::fmt;

/// A program that starts several processes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// Open MPI's mpirun.
    OpenMpi,
    /// MVAPICH's mpirun.
    Mvapich,
    /// The mpiexec of MPICH and of Intel MPI.
    Hydra,
    /// SLURM's srun.
    Srun,
    /// `flux run`.
    Flux,
    /// The mpiexec of HPE Cray's PALS.
    Pals,
    /// Cray's aprun.
    Alps,
}

impl fmt::Display for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenMpi | Self::Mvapich => "mpirun",
            Self::Hydra | Self::Pals => "mpiexec",
            Self::Srun => "srun",
            Self::Flux => "flux run",
            Self::Alps => "aprun",
        })
    }
}

impl Starter {
    /// How a program and this starter find each other.
    pub fn advice(self) -> &'static str {
        match self {
            Self::Srun => {
                "Open MPI needs `srun --mpi=pmix`, MPICH `srun --mpi=pmi2`; `srun --mpi=list` shows what is there"
            }
            Self::Flux => "Open MPI needs `flux run -o pmi=pmix`",
            Self::OpenMpi | Self::Mvapich | Self::Hydra => "start it with the mpirun of the same MPI",
            Self::Pals | Self::Alps => "build it with this system's MPI",
        }
    }
}

/// What a starter of several processes announced to this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started it.
    pub by: Starter,
    /// This process among them.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
}

/// Who alone sets which variable, and where rank and size are then.
type Variables = (Starter, &'static str, &'static str, &'static str);

/// Starters that may themselves have been started by srun, and whose announcement then counts.
const INNER: [Variables; 5] = [
    (Starter::OpenMpi, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    (Starter::Mvapich, "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    (Starter::Flux, "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    (Starter::Hydra, "HYDI_CONTROL_FD", "PMI_RANK", "PMI_SIZE"),
    (Starter::Hydra, "MPI_LOCALNRANKS", "PMI_RANK", "PMI_SIZE"),
];

/// Starters that use the variables of PMI, which srun sets too.
const PMI: [Variables; 3] = [
    (Starter::Pals, "PALS_RANKID", "PMI_RANK", "PMI_SIZE"),
    (Starter::Alps, "ALPS_APP_PE", "PMI_RANK", "PMI_SIZE"),
    (Starter::Hydra, "PMI_SIZE", "PMI_RANK", "PMI_SIZE"),
];

/// Steps of SLURM from here on are its own: the batch script, the shell of salloc.
const FIRST_INTERNAL_STEP: u64 = 0xffff_fff0;

impl Launch {
    /// From this process's environment; nothing if it was started alone.
    pub fn find() -> Option<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    /// From the variables that `get` knows.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let first = |starters: &[Variables]| {
            starters.iter().find_map(|&(by, marker, rank, size)| {
                get(marker)?;
                Some(Self { by, rank: number(&get, rank)?, size: number(&get, size)? })
            })
        };
        let inner = first(&INNER);
        if inner.is_some() {
            return inner;
        }
        match (Self::slurm_step(&get), first(&PMI)) {
            // With `--mpi=pmi2`, srun announces the same again in the variables of PMI; others are
            // those of an mpiexec that runs within the step.
            (Some(step), Some(pmi)) if (step.rank, step.size) != (pmi.rank, pmi.size) => Some(pmi),
            (Some(step), _) => Some(step),
            (None, pmi) => pmi,
        }
    }

    /// What srun announced. A batch script and an allocation's shell have a number of tasks too,
    /// but no step of their own.
    fn slurm_step(get: &impl Fn(&str) -> Option<String>) -> Option<Self> {
        if number(get, "SLURM_STEP_ID")? as u64 >= FIRST_INTERNAL_STEP {
            return None;
        }
        let size = number(get, "SLURM_STEP_NUM_TASKS").or_else(|| number(get, "SLURM_NTASKS"))?;
        Some(Self { by: Starter::Srun, rank: number(get, "SLURM_PROCID")?, size })
    }

    /// Fails if srun started several processes without a way for MPI to find the others, as
    /// with `--mpi=none`: Open MPI would end each of them with a page of its own, and any other
    /// take each for a whole job. `is_set` says whether there is a variable whose name begins so.
    pub fn check_wires(&self, is_set: impl Fn(&str) -> bool) -> Result<()> {
        if self.by != Starter::Srun || self.size == 1 || is_set("PMI") || is_set("PALS_") {
            return Ok(());
        }
        let advice = self.by.advice();
        let why = format!("srun started {} processes, but told MPI of none: {advice}", self.size);
        Err(Error::invalid("number of ranks", why))
    }

    /// Fails if MPI, which calls itself `library`, sees another number of ranks: then every
    /// process would take itself for a whole job.
    pub fn check(&self, seen: usize, library: &str) -> Result<()> {
        let Self { by, size, .. } = self;
        if seen == *size {
            return Ok(());
        }
        let advice = by.advice();
        let why = format!(
            "{by} started {size} processes, but MPI sees {seen}; this program's MPI is {library}: {advice}"
        );
        Err(Error::invalid("number of ranks", why))
    }
}

/// A number in a variable.
fn number(get: &impl Fn(&str) -> Option<String>, name: &str) -> Option<usize> {
    get(name)?.trim().parse().ok()
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
        assert_eq!(read(&slurm), Some(Launch { by: Starter::Srun, rank: 3, size: 4 }));
        let step = [&slurm[..], &[("SLURM_STEP_NUM_TASKS", "8")]].concat();
        assert_eq!(read(&step).map(|l| l.size), Some(8));
        let ompi = [&slurm[..], &[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]].concat();
        assert_eq!(read(&ompi), Some(Launch { by: Starter::OpenMpi, rank: 1, size: 2 }));
        assert_eq!(read(&[("PMI_RANK", "0"), ("PMI_SIZE", "1")]).map(|l| l.size), Some(1));
    }

    #[test]
    fn one_process_of_a_batch_script_is_alone() {
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), None);
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("PMI_RANK", "x"), ("PMI_SIZE", "1")]), None);
    }

    #[test]
    fn unreachable_processes_are_refused_before_mpi() {
        let check = |by, size, set: &[&str]| {
            let is_set = |start: &str| set.iter().any(|name| name.starts_with(start));
            Launch { by, rank: 0, size }.check_wires(is_set).map_err(|error| error.to_string())
        };
        let message = check(Starter::Srun, 4, &["PATH", "SLURM_MPI_TYPE"]).unwrap_err();
        assert!(message.contains("srun started 4") && message.contains("--mpi=pmix"), "{message}");
        assert_eq!(check(Starter::Srun, 1, &[]), Ok(()));
        assert_eq!(check(Starter::Srun, 4, &["PMIX_RANK"]), Ok(()));
        assert_eq!(check(Starter::OpenMpi, 4, &[]), Ok(()));
    }

    #[test]
    fn another_number_of_ranks_is_an_error_with_advice() {
        let launch = Launch { by: Starter::Srun, rank: 0, size: 4 };
        assert!(launch.check(4, "Open MPI").is_ok());
        let message = launch.check(1, "MPICH 4.0").unwrap_err().to_string();
        for part in ["srun started 4", "sees 1", "MPICH 4.0", "--mpi=pmix", "--mpi=pmi2"] {
            assert!(message.contains(part), "{message}");
        }
    }

    /// One task of four that srun started, with more variables.
    fn step<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let step = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "2"), ("SLURM_NTASKS", "4")];
        [&step[..], &[("SLURM_STEP_NUM_TASKS", "4")], more].concat()
    }

    #[test]
    fn whoever_started_it_is_named() {
        let pmi = [("PMI_RANK", "2"), ("PMI_SIZE", "4")];
        let with_pmi = |more: &[(&'static str, &'static str)]| [&pmi[..], more].concat();
        for (variables, by) in [
            (step(&[]), Starter::Srun),
            (step(&pmi), Starter::Srun),
            (step(&[("PMIX_RANK", "2"), ("PMIX_NAMESPACE", "slurm.pmix.7.0")]), Starter::Srun),
            (step(&with_pmi(&[("PALS_RANKID", "2")])), Starter::Srun),
            (step(&with_pmi(&[("HYDI_CONTROL_FD", "7")])), Starter::Hydra),
            (with_pmi(&[]), Starter::Hydra),
            (with_pmi(&[("MPI_LOCALNRANKS", "4")]), Starter::Hydra),
            (with_pmi(&[("FLUX_JOB_SIZE", "4"), ("FLUX_TASK_RANK", "2")]), Starter::Flux),
            (with_pmi(&[("PALS_RANKID", "2")]), Starter::Pals),
            (with_pmi(&[("ALPS_APP_PE", "2")]), Starter::Alps),
        ] {
            assert_eq!(read(&variables), Some(Launch { by, rank: 2, size: 4 }), "{variables:?}");
        }
        // An mpiexec whose helper on this node is the step's task: 16 ranks, and not the step's 4.
        let inner = step(&[("PMI_RANK", "9"), ("PMI_SIZE", "16")]);
        assert_eq!(read(&inner), Some(Launch { by: Starter::Hydra, rank: 9, size: 16 }));
    }

    #[test]
    fn a_shell_of_salloc_is_alone() {
        let shell = [("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_NUM_NODES", "2")];
        assert_eq!(read(&shell), None);
        // Where SLURM runs that shell in a step of its own, or a batch script in another.
        for id in ["4294967290", "4294967291"] {
            let step = [&shell[..], &[("SLURM_STEP_ID", id), ("SLURM_PROCID", "0")]].concat();
            assert_eq!(read(&step), None, "{id}");
        }
    }

    #[test]
    fn advice_fits_who_started_it() {
        let advice = |by| Launch { by, rank: 0, size: 4 }.check(1, "Open MPI v4").unwrap_err().to_string();
        let srun = advice(Starter::Srun);
        assert!(srun.contains("--mpi=list") && !srun.contains("mpirun"), "{srun}");
        assert!(advice(Starter::Hydra).contains("mpiexec started 4 processes, but MPI sees 1"));
        assert!(advice(Starter::Hydra).contains("mpirun of the same MPI"));
        assert!(advice(Starter::Flux).contains("flux run -o pmi=pmix"));
        assert!(advice(Starter::Alps).contains("this system's MPI"));
    }
}
