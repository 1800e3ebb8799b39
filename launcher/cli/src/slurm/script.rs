//! A batch script's text.
//!
//! In: a [`Batch`]. Out: a script that stands alone: the `#SBATCH` lines of this job, what its
//! cluster wants before it ([`Prelude`]), its arguments, and the shipped script of the same name
//! (directory `slurm/` of the repository) with what it shares with the others put in.

use super::Dependency;
use super::options::{JobKind, JobOptions, Resolved};
use super::profile::{Container, ContainerRuntime};
use gradtx_run::text::quoted;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What the shipped scripts source.
const COMMON: &str = include_str!("../../../../slurm/common.sh");
/// The line with which they do.
const SOURCE_COMMON: &str = "source \"${GRADTX_SLURM:-slurm}/common.sh\"";
/// Longer names of runs are cut in the names of jobs.
const LONGEST_NAME: usize = 60;

/// A shipped batch script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// Curation, one job with a rank per GPU.
    Curate,
    /// Curation by a job array, one rank each.
    CurateArray,
    /// Training, one job with a rank per GPU.
    Train,
    /// An emulator, one job with a rank per GPU.
    Emulate,
    /// Clients' scores.
    Evaluate,
    /// The report.
    Report,
    /// The comparison of a sweep's runs.
    Compare,
}

impl Script {
    #[cfg(test)]
    const ALL: [Self; 7] = [
        Self::Curate,
        Self::CurateArray,
        Self::Train,
        Self::Emulate,
        Self::Evaluate,
        Self::Report,
        Self::Compare,
    ];

    /// Whether it is one job with ranks on every GPU, rather than one rank, or an array of such.
    pub fn has_ranks(self) -> bool {
        matches!(self, Self::Curate | Self::Train | Self::Emulate)
    }

    /// Whether its processes may find each other by MPI.
    fn uses_mpi(self) -> bool {
        !matches!(self, Self::CurateArray | Self::Report | Self::Compare)
    }

    /// Its text, without the `#SBATCH` lines that are examples for people.
    fn body(self) -> String {
        let text = match self {
            Self::Curate => include_str!("../../../../slurm/curate.sbatch"),
            Self::CurateArray => include_str!("../../../../slurm/curate_array.sbatch"),
            Self::Train => include_str!("../../../../slurm/train.sbatch"),
            Self::Emulate => include_str!("../../../../slurm/emulate.sbatch"),
            Self::Evaluate => include_str!("../../../../slurm/evaluate.sbatch"),
            Self::Report => include_str!("../../../../slurm/report.sbatch"),
            Self::Compare => include_str!("../../../../slurm/compare.sbatch"),
        };
        let kept = text.lines().skip(1).filter(|line| !line.starts_with("#SBATCH"));
        kept.map(|line| format!("{}\n", if line == SOURCE_COMMON { COMMON.trim_end() } else { line }))
            .collect()
    }
}

/// What comes before the stage in a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prelude {
    /// Lines of bash.
    pub setup: Vec<String>,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// A container that the program runs in.
    pub container: Option<Container>,
    /// Directories that the program needs in a container.
    pub needed: Vec<PathBuf>,
}

/// One batch job.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Run directory, absolute.
    pub run: PathBuf,
    /// The program, absolute.
    pub program: PathBuf,
    /// What it does.
    pub kind: JobKind,
    /// The script that it is made from.
    pub script: Script,
    /// Jobs of an array.
    pub array: Option<usize>,
    /// What the script is given after the run directory.
    pub arguments: Vec<String>,
    /// What it asks for.
    pub options: Resolved,
    /// What comes before the stage.
    pub prelude: Prelude,
    /// Jobs that it waits for.
    pub after: Vec<Dependency>,
}

impl Batch {
    /// Name of its script and its logs.
    pub(crate) fn log_name(&self) -> String {
        format!("gradtx-{}", self.kind.name())
    }

    /// Name in the queue, with the run's: `gradtx-train-lr-2e-5`.
    pub fn name(&self) -> String {
        let run = self.run.file_name().unwrap_or_default().to_string_lossy();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.=+,".contains(c) { c } else { '_' };
        let run: String = run.chars().take(LONGEST_NAME).map(plain).collect();
        format!("{}-{run}", self.log_name())
    }

    /// Where its script is written.
    pub fn place(&self) -> PathBuf {
        self.run.join("slurm").join(format!("{}.sbatch", self.log_name()))
    }

    /// The script's text.
    pub fn render(&self) -> String {
        let mut text = String::from("#!/bin/bash\n");
        for option in self.header() {
            let _ = writeln!(text, "#SBATCH {option}");
        }
        let _ =
            writeln!(text, "# Written by gradtx {} submit; again: sbatch THIS", env!("CARGO_PKG_VERSION"));
        let _ = match &self.prelude.container {
            None => {
                let program = in_double_quotes(&self.program.to_string_lossy());
                writeln!(text, "export GRADTX=\"${{GRADTX:-{program}}}\"")
            }
            Some(container) => writeln!(text, "export GRADTX={}", quoted(&container.program)),
        };
        let arguments: Vec<String> = self.arguments.iter().map(|word| quoted(word)).collect();
        let _ = writeln!(text, "set -- {} {}", quoted(&self.run.to_string_lossy()), arguments.join(" "));
        text + &self.before_the_stage() + &self.script.body()
    }

    /// What the shipped part reads: set-up, environment, how a step is started.
    fn before_the_stage(&self) -> String {
        let Prelude { setup, environment, container, needed } = &self.prelude;
        let mut lines = vec![format!("LOG_NAME={}", self.log_name())];
        lines.extend(setup.iter().cloned());
        lines.extend(environment.iter().map(|(name, value)| format!("export {name}={}", quoted(value))));
        if let Some(mpi) = self.options.options.mpi.as_ref().filter(|_| self.script.uses_mpi()) {
            lines.push(format!("export GRADTX_MPI=\"${{GRADTX_MPI:-{mpi}}}\""));
        }
        let mut srun = self.options.options.srun.clone();
        if let Some(container) = container {
            let has_gpus = self.options.gpus().per_node > 0;
            let (options, launcher) = container.words(needed, has_gpus);
            srun.extend(options);
            lines.push("CONTAINER=1".into());
            if !launcher.is_empty() {
                lines.push(format!("LAUNCHER=({})", shell_words(&launcher)));
            }
        }
        if !srun.is_empty() {
            lines.push(format!("SRUN_OPTIONS=({})", shell_words(&srun)));
        }
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Options of sbatch; those of the user come last, where they overrule.
    fn header(&self) -> Vec<String> {
        let asked = &self.options.options;
        let log = if self.array.is_some() { "%A_%a.log" } else { "%j.log" };
        let logs = self.run.join("logs").to_string_lossy().replace('%', "%%");
        let gpus = self.options.gpus();
        let tasks = if self.script.has_ranks() { gpus.per_node.max(1) } else { 1 };
        let mut header = vec![
            format!("--job-name={}", self.name()),
            format!("--output=\"{logs}/{}-{log}\"", self.log_name()),
            format!("--nodes={}", asked.nodes.unwrap_or(1)),
            format!("--ntasks-per-node={tasks}"),
        ];
        header.extend(asked.cpus_per_task.map(|cores| format!("--cpus-per-task={cores}")));
        header.extend(asked.time.iter().map(|time| format!("--time={time}")));
        if gpus.per_node > 0 {
            // Of the node, and not of each task: NCCL reaches only GPUs that its rank sees.
            header.push(gpus.option(tasks));
        }
        header.extend(self.array.map(|jobs| {
            let limit = asked.array_limit.map_or(String::new(), |limit| format!("%{limit}"));
            format!("--array=0-{}{limit}", jobs - 1)
        }));
        header.extend(plain_options(asked));
        let signal = asked.signal_seconds.unwrap_or(120);
        header.extend(["--requeue".into(), format!("--signal=B:USR1@{signal}"), "--open-mode=append".into()]);
        header.extend(asked.sbatch.iter().cloned());
        header
    }
}

/// Options that are passed on as they are.
fn plain_options(asked: &JobOptions) -> Vec<String> {
    let texts = [
        ("partition", &asked.partition),
        ("account", &asked.account),
        ("qos", &asked.qos),
        ("mem", &asked.mem),
        ("constraint", &asked.constraint),
        ("reservation", &asked.reservation),
        ("exclude", &asked.exclude),
        ("comment", &asked.comment),
        ("mail-user", &asked.mail_user),
        ("mail-type", &asked.mail_type),
    ];
    let of_text = |(name, value): (&str, &Option<String>)| Some(format!("--{name}={}", value.as_ref()?));
    let mut options: Vec<String> = texts.into_iter().filter_map(of_text).collect();
    options.extend(asked.nice.map(|nice| format!("--nice={nice}")));
    options.extend(asked.exclusive.filter(|whole| *whole).map(|_| "--exclusive".to_string()));
    options
}

impl Container {
    /// More options of srun, and words in front of the program; `needed` are directories that
    /// it must see.
    fn words(&self, needed: &[PathBuf], has_gpus: bool) -> (Vec<String>, Vec<String>) {
        let mut dirs: Vec<&Path> = self.mounts.iter().chain(needed).map(PathBuf::as_path).collect();
        dirs.sort();
        // A directory comes with all that is below it.
        dirs.dedup_by(|below, above| below.starts_with(above));
        let names: Vec<String> = dirs.iter().map(|dir| dir.to_string_lossy().into_owned()).collect();
        match self.runtime {
            ContainerRuntime::Pyxis => {
                let mounts: Vec<String> = names.iter().map(|dir| format!("{dir}:{dir}")).collect();
                let mut options = vec![format!("--container-image={}", self.image)];
                options.push(format!("--container-mounts={}", mounts.join(",")));
                options.extend(self.options.iter().cloned());
                (options, vec![])
            }
            ContainerRuntime::Apptainer => {
                let mut words = vec!["apptainer".to_string(), "exec".into()];
                words.extend(has_gpus.then(|| "--nv".to_string()));
                words.extend(["--bind".into(), names.join(",")]);
                words.extend(self.options.iter().cloned());
                words.push(self.image.clone());
                (vec![], words)
            }
        }
    }
}

/// Elements of an array in bash.
fn shell_words(words: &[String]) -> String {
    // In quotes also where a comma could be taken for what separates elements.
    let one = |word: &String| match quoted(word) {
        plain if plain == *word && plain.contains(',') => format!("'{plain}'"),
        quoted => quoted,
    };
    words.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// A text as it stands between the shell's double quotes.
fn in_double_quotes(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        if "\\\"$`".contains(c) {
            out.push('\\');
        }
        out.push(c);
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slurm::options::Origin;
    use std::process::Command;

    fn options(text: &str) -> Resolved {
        let options: JobOptions = toml::from_str(text).unwrap();
        Resolved::new(JobKind::Train, true, &[(Origin::CommandLine(true), options)]).unwrap()
    }

    const ASKED: &str = "nodes = 2\ngpus_per_node = 4\ncpus_per_task = 8\ntime = '1-0'\npartition = 'a100'\n\
                         sbatch = ['--spread-job']";

    fn batch(script: Script, array: Option<usize>) -> Batch {
        Batch {
            run: "/runs/50%".into(),
            program: "/opt/a b/gradtx".into(),
            kind: JobKind::Train,
            script,
            array,
            arguments: vec!["it's".into()],
            options: options(ASKED),
            prelude: Prelude::default(),
            after: vec![],
        }
    }

    fn header(text: &str) -> Vec<&str> {
        text.lines().filter(|line| line.starts_with("#SBATCH")).collect()
    }

    #[test]
    fn scripts_are_the_shipped_one_behind_a_header() {
        let text = batch(Script::Train, None).render();
        assert_eq!(
            header(&text),
            [
                "#SBATCH --job-name=gradtx-train-50_",
                "#SBATCH --output=\"/runs/50%%/logs/gradtx-train-%j.log\"",
                "#SBATCH --nodes=2",
                "#SBATCH --ntasks-per-node=4",
                "#SBATCH --cpus-per-task=8",
                "#SBATCH --time=1-0",
                "#SBATCH --gpus-per-node=4",
                "#SBATCH --partition=a100",
                "#SBATCH --requeue",
                "#SBATCH --signal=B:USR1@120",
                "#SBATCH --open-mode=append",
                "#SBATCH --spread-job",
            ]
        );
        assert!(text.starts_with("#!/bin/bash\n#SBATCH"), "SLURM reads options up to the first command");
        assert!(text.contains("export GRADTX=\"${GRADTX:-/opt/a b/gradtx}\"\nset -- /runs/50% 'it'\\''s'\n"));
        assert!(text.contains("ranks train --run \"$RUN\" \"$@\""));
    }

    #[test]
    fn every_option_reaches_the_header() {
        let asked = "nodes = 1\ngres = 'gpu:a100:4'\nmem = '480G'\naccount = 'lab'\nqos = 'high'\n\
                     constraint = 'a100&nvlink'\nreservation = 'spring'\nexclude = 'node[07-08]'\n\
                     exclusive = true\nnice = 10\ncomment = 'x'\nmail_user = 'ada@example.org'\n\
                     mail_type = 'END,FAIL'\nsignal_seconds = 300";
        let text = Batch { options: options(asked), ..batch(Script::Train, None) }.render();
        let header = header(&text);
        for wanted in [
            "--gres=gpu:a100:4",
            "--mem=480G",
            "--account=lab",
            "--qos=high",
            "--constraint=a100&nvlink",
            "--reservation=spring",
            "--exclude=node[07-08]",
            "--exclusive",
            "--nice=10",
            "--comment=x",
            "--mail-user=ada@example.org",
            "--mail-type=END,FAIL",
            "--signal=B:USR1@300",
        ] {
            assert!(header.contains(&&*format!("#SBATCH {wanted}")), "no {wanted} in {header:#?}");
        }
        assert!(!text.contains("--gpus-per-node"), "GPUs are asked for once");
    }

    #[test]
    fn every_script_stands_alone() {
        for script in Script::ALL {
            let text = batch(script, None).render();
            assert!(!text.contains(SOURCE_COMMON), "{script:?} sources a file");
            assert!(text.contains("trap 'finish $?' EXIT"), "{script:?} has what it shares");
        }
    }

    #[test]
    fn arrays_have_one_rank_each_and_logs_of_their_own() {
        let text = batch(Script::CurateArray, Some(32)).render();
        assert!(text.contains("#SBATCH --array=0-31\n"));
        assert!(text.contains("#SBATCH --ntasks-per-node=1\n"));
        assert!(text.contains("#SBATCH --gpus-per-node=1\n") && !text.contains("--gpu-bind"), "{text}");
        assert!(text.contains("/logs/gradtx-train-%A_%a.log\"\n"));
        let limited = options(&format!("array_limit = 8\n{ASKED}"));
        let text = Batch { options: limited, ..batch(Script::CurateArray, Some(32)) }.render();
        assert!(text.contains("#SBATCH --array=0-31%8\n"), "{text}");
    }

    /// A rank that sees only its own GPU cannot exchange values with the others.
    #[test]
    fn no_script_hides_gpus_from_ranks() {
        for script in Script::ALL {
            let text = batch(script, None).render();
            assert!(!text.contains("gpus-per-task"), "{script:?}: {text}");
        }
        for shipped in [
            include_str!("../../../../slurm/curate.sbatch"),
            include_str!("../../../../slurm/train.sbatch"),
            include_str!("../../../../slurm/emulate.sbatch"),
        ] {
            let of = |name: &str| {
                shipped.lines().find_map(|line| line.strip_prefix(&format!("#SBATCH --{name}=")))
            };
            assert_eq!(of("gpus-per-node"), of("ntasks-per-node"), "a GPU for every rank");
            // Without a binding CUDA_VISIBLE_DEVICES has all GPUs of the job's node; `none` leaves it empty (SLURM 22.05).
            assert_eq!((of("gpus-per-task"), of("gpu-bind")), (None, None));
        }
    }

    #[test]
    fn without_gpus_none_are_asked_for() {
        let none = options(&ASKED.replace("gpus_per_node = 4", "gpus_per_node = 0"));
        let text = Batch { options: none, ..batch(Script::Curate, None) }.render();
        let header = header(&text);
        assert!(!header.iter().any(|line| line.contains("gpu")), "{header:?}");
        assert!(header.contains(&"#SBATCH --ntasks-per-node=1"));
    }

    #[test]
    fn what_the_cluster_wants_comes_before_the_stage() {
        let container = Container {
            image: "/images/gradtx 1.sif".into(),
            mounts: vec!["/scratch".into()],
            options: vec!["--cleanenv".into()],
            program: "gradtx".into(),
            ..Container::default()
        };
        let prelude = Prelude {
            setup: vec!["module load openmpi".into()],
            environment: [("A".to_string(), "it's".to_string())].into(),
            container: Some(container.clone()),
            needed: vec!["/scratch/run".into(), "/models/7b".into()],
        };
        let asked = options(&format!("{ASKED}\nmpi = 'pmi2'").replace("sbatch", "srun = ['--x']\nsbatch"));
        let train = Batch { options: asked, prelude, ..batch(Script::Train, None) };
        let text = train.render();
        let start = text.find("LOG_NAME=").unwrap();
        let lines: Vec<&str> = text[start..].lines().take(7).collect();
        assert_eq!(
            lines,
            [
                "LOG_NAME=gradtx-train",
                "module load openmpi",
                "export A='it'\\''s'",
                "export GRADTX_MPI=\"${GRADTX_MPI:-pmi2}\"",
                "CONTAINER=1",
                "LAUNCHER=(apptainer exec --nv --bind '/models/7b,/scratch' --cleanenv '/images/gradtx 1.sif')",
                "SRUN_OPTIONS=(--x)",
            ]
        );
        assert!(text.contains("\nexport GRADTX=gradtx\n"), "the host's program is not in the container");
        let array = Batch { script: Script::CurateArray, ..train.clone() }.render();
        assert!(!array.contains("GRADTX_MPI:-pmi2"), "an array needs no MPI");
        let mut pyxis = train;
        pyxis.prelude.container = Some(Container { runtime: ContainerRuntime::Pyxis, ..container });
        let text = pyxis.render();
        assert!(
            text.contains(
                "SRUN_OPTIONS=(--x '--container-image=/images/gradtx 1.sif' \
                 '--container-mounts=/models/7b:/models/7b,/scratch:/scratch' --cleanenv)\n"
            ) && !text.contains("LAUNCHER=("),
            "{text}"
        );
    }

    #[test]
    fn the_shell_reads_back_what_was_quoted() {
        for word in ["", "plain", "a b", "it's", "$HOME", "`x`", "a\"b\\", "*", "a\nb'\\c\x1b[0m"] {
            for text in [quoted(word), format!("\"{}\"", in_double_quotes(word))] {
                let output =
                    Command::new("bash").args(["-c", &format!("printf %s {text}")]).output().unwrap();
                assert_eq!(String::from_utf8(output.stdout).unwrap(), word, "{text}");
            }
        }
    }
}
