//! Batch jobs as SLURM takes them: from a job's description to the script that is submitted.
//!
//! In: [`Batch`], what to run and on what. Out: the text of a script that stands alone: the
//! `#SBATCH` lines of this job, the arguments, and the shipped script of the same name
//! (directory `slurm/` of the repository) with what it shares with the others put in.
//! [`sbatch`] submits one. [`words`] refuses what is no plain word before it comes here.

pub mod words;

use anyhow::{Context as _, Result};
use gradtx_run::failure::{failed, unusable};
use gradtx_run::text::quoted;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// What the shipped scripts source.
const COMMON: &str = include_str!("../../../../slurm/common.sh");
/// The line with which they do.
const SOURCE_COMMON: &str = "source \"${GRADTX_SLURM:-slurm}/common.sh\"";
/// SLURM's command that submits.
const SBATCH: &str = "sbatch";

/// A shipped batch script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// Curation, one job with a rank per GPU.
    Curate,
    /// Curation by a job array, one rank each.
    CurateArray,
    /// Training, one job with a rank per GPU.
    Train,
    /// Clients' scores, or the report.
    Evaluate,
}

impl Script {
    /// File name, without its ending.
    pub fn name(self) -> &'static str {
        match self {
            Self::Curate => "curate",
            Self::CurateArray => "curate_array",
            Self::Train => "train",
            Self::Evaluate => "evaluate",
        }
    }

    /// Its text, without the `#SBATCH` lines that are examples for people.
    fn body(self) -> String {
        let text = match self {
            Self::Curate => include_str!("../../../../slurm/curate.sbatch"),
            Self::CurateArray => include_str!("../../../../slurm/curate_array.sbatch"),
            Self::Train => include_str!("../../../../slurm/train.sbatch"),
            Self::Evaluate => include_str!("../../../../slurm/evaluate.sbatch"),
        };
        let kept = text.lines().skip(1).filter(|line| !line.starts_with("#SBATCH"));
        kept.map(|line| format!("{}\n", if line == SOURCE_COMMON { COMMON.trim_end() } else { line }))
            .collect()
    }
}

/// What every job of a submission asks SLURM for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resources {
    /// GPUs of a node, and ranks on it; 0 for one rank on the CPU.
    pub gpus_per_node: usize,
    /// CPU cores of a rank.
    pub cpus_per_task: usize,
    /// Time limit.
    pub time: String,
    /// Partition, if not the cluster's default.
    pub partition: Option<String>,
    /// Account, if not the user's default.
    pub account: Option<String>,
    /// More options of sbatch.
    pub extra: Vec<String>,
}

/// One batch job.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// What it runs.
    pub script: Script,
    /// Name in the queue and of its logs.
    pub name: String,
    /// Nodes; 1 for scripts that use one rank.
    pub nodes: usize,
    /// Jobs of an array.
    pub array: Option<usize>,
    /// What the script is given after the run directory.
    pub arguments: Vec<String>,
}

impl Batch {
    /// Whether it is one job with ranks on every GPU, rather than one rank, or an array of such.
    fn has_ranks(&self) -> bool {
        matches!(self.script, Script::Curate | Script::Train)
    }

    /// The script's text. `program` and `run` are absolute paths.
    pub fn render(&self, resources: &Resources, program: &Path, run: &Path) -> String {
        let mut text = String::from("#!/bin/bash\n");
        for option in self.options(resources, run) {
            let _ = writeln!(text, "#SBATCH {option}");
        }
        let _ =
            writeln!(text, "# Written by gradtx {} submit; again: sbatch THIS", env!("CARGO_PKG_VERSION"));
        let _ =
            writeln!(text, "export GRADTX=\"${{GRADTX:-{}}}\"", in_double_quotes(&program.to_string_lossy()));
        let arguments: Vec<String> = self.arguments.iter().map(|word| quoted(word)).collect();
        let _ = writeln!(text, "set -- {} {}", quoted(&run.to_string_lossy()), arguments.join(" "));
        text + &self.script.body()
    }

    /// Options of sbatch; those of the user come last, where they overrule.
    fn options(&self, resources: &Resources, run: &Path) -> Vec<String> {
        let log = if self.array.is_some() { "%x-%A_%a.log" } else { "%x-%j.log" };
        let logs = run.join("logs").to_string_lossy().replace('%', "%%");
        let tasks = if self.has_ranks() { resources.gpus_per_node.max(1) } else { 1 };
        let mut options = vec![
            format!("--job-name={}", self.name),
            format!("--output=\"{logs}/{log}\""),
            format!("--nodes={}", self.nodes),
            format!("--ntasks-per-node={tasks}"),
            format!("--cpus-per-task={}", resources.cpus_per_task),
            format!("--time={}", resources.time),
        ];
        if resources.gpus_per_node > 0 {
            // Of the node, and not of each task: NCCL reaches only GPUs that its rank sees.
            options.push(format!("--gpus-per-node={tasks}"));
        }
        options.extend(self.array.map(|jobs| format!("--array=0-{}", jobs - 1)));
        options.extend(resources.partition.iter().map(|name| format!("--partition={name}")));
        options.extend(resources.account.iter().map(|name| format!("--account={name}")));
        options.extend(["--requeue", "--signal=B:USR1@120", "--open-mode=append"].map(String::from));
        options.extend(resources.extra.iter().cloned());
        options
    }
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

/// The options and the script with which `sbatch` is called, to start when the job `after`
/// has succeeded, and to be cancelled when it has not.
pub fn sbatch_arguments(script: &Path, after: Option<&str>) -> Vec<String> {
    let mut arguments = vec!["--parsable".to_string()];
    if let Some(id) = after {
        arguments.extend([format!("--dependency=afterok:{id}"), "--kill-on-invalid-dep=yes".into()]);
    }
    arguments.push(script.to_string_lossy().into_owned());
    arguments
}

/// Submits a script; returns the job's id.
pub fn sbatch(script: &Path, after: Option<&str>) -> Result<String> {
    let output = Command::new(SBATCH).args(sbatch_arguments(script, after)).output();
    let output = output.with_context(|| format!("{SBATCH}: cannot run"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(
            format!("{SBATCH} refused {}: {}", script.display(), said.trim()),
            "account, partition, time and GPUs are options of `gradtx submit`; others go in --extra",
        ));
    }
    // "17", or "17;cluster" where there are several.
    let said = String::from_utf8_lossy(&output.stdout);
    let id = said.trim().split(';').next().unwrap_or_default();
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) {
        return Err(unusable(format!("{SBATCH}: expected a job id, found `{}`", said.trim().escape_debug())));
    }
    Ok(id.into())
}

/// Takes back jobs whose chain could not be submitted to its end.
pub fn scancel(ids: &[String]) -> Result<()> {
    let status = Command::new("scancel").args(ids).status().context("scancel: cannot run")?;
    anyhow::ensure!(status.success(), "scancel {}: {status}", ids.join(" "));
    Ok(())
}

/// Fails where there is no `sbatch`.
pub fn find_sbatch() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(SBATCH).is_file()) {
        return Ok(());
    }
    Err(failed(
        format!("{SBATCH}: not on the PATH; there is no SLURM on this machine"),
        "submit from a login node of the cluster, or see the scripts with --dry-run",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources() -> Resources {
        Resources {
            gpus_per_node: 4,
            cpus_per_task: 8,
            time: "1-0".into(),
            partition: Some("a100".into()),
            account: None,
            extra: vec!["--qos=high".into()],
        }
    }

    fn batch(script: Script, array: Option<usize>) -> Batch {
        Batch { script, name: "gradtx-x".into(), nodes: 2, array, arguments: vec!["it's".into()] }
    }

    fn rendered(script: Script, array: Option<usize>) -> String {
        batch(script, array).render(&resources(), Path::new("/opt/a b/gradtx"), Path::new("/runs/50%"))
    }

    #[test]
    fn the_header_is_of_the_job_and_the_rest_of_the_shipped_script() {
        let text = rendered(Script::Train, None);
        let header: Vec<&str> = text.lines().filter(|line| line.starts_with("#SBATCH")).collect();
        assert_eq!(
            header,
            [
                "#SBATCH --job-name=gradtx-x",
                "#SBATCH --output=\"/runs/50%%/logs/%x-%j.log\"",
                "#SBATCH --nodes=2",
                "#SBATCH --ntasks-per-node=4",
                "#SBATCH --cpus-per-task=8",
                "#SBATCH --time=1-0",
                "#SBATCH --gpus-per-node=4",
                "#SBATCH --partition=a100",
                "#SBATCH --requeue",
                "#SBATCH --signal=B:USR1@120",
                "#SBATCH --open-mode=append",
                "#SBATCH --qos=high",
            ]
        );
        assert!(text.starts_with("#!/bin/bash\n#SBATCH"), "SLURM reads options up to the first command");
        assert!(text.contains("export GRADTX=\"${GRADTX:-/opt/a b/gradtx}\"\nset -- /runs/50% 'it'\\''s'\n"));
        assert!(text.contains("ranks train --run \"$RUN\" \"$@\""));
    }

    #[test]
    fn every_script_stands_alone() {
        for script in [Script::Curate, Script::CurateArray, Script::Train, Script::Evaluate] {
            let text = rendered(script, None);
            assert!(!text.contains(SOURCE_COMMON), "{script:?} sources a file");
            assert!(text.contains("trap 'finish $?' EXIT"), "{script:?} has what it shares");
        }
    }

    #[test]
    fn arrays_have_one_rank_each_and_logs_of_their_own() {
        let text = rendered(Script::CurateArray, Some(32));
        assert!(text.contains("#SBATCH --array=0-31\n"));
        assert!(text.contains("#SBATCH --ntasks-per-node=1\n"));
        assert!(text.contains("#SBATCH --gpus-per-node=1\n") && !text.contains("--gpu-bind"), "{text}");
        assert!(text.contains("/logs/%x-%A_%a.log\"\n"));
    }

    /// A rank that sees only its own GPU cannot exchange values with the others.
    #[test]
    fn no_script_hides_gpus_from_ranks() {
        for script in [Script::Curate, Script::CurateArray, Script::Train, Script::Evaluate] {
            let text = rendered(script, None);
            assert!(!text.contains("gpus-per-task"), "{script:?}: {text}");
        }
        for shipped in
            [include_str!("../../../../slurm/curate.sbatch"), include_str!("../../../../slurm/train.sbatch")]
        {
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
        let none = Resources { gpus_per_node: 0, ..resources() };
        let text = batch(Script::Curate, None).render(&none, Path::new("/gradtx"), Path::new("/run"));
        let header: Vec<&str> = text.lines().filter(|line| line.starts_with("#SBATCH")).collect();
        assert!(!header.iter().any(|line| line.contains("gpu")), "{header:?}");
        assert!(header.contains(&"#SBATCH --ntasks-per-node=1"));
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

    #[test]
    fn a_job_follows_another() {
        let script = Path::new("/run/slurm/train.sbatch");
        assert_eq!(sbatch_arguments(script, None), ["--parsable", "/run/slurm/train.sbatch"]);
        assert_eq!(
            sbatch_arguments(script, Some("17"))[1..3],
            ["--dependency=afterok:17", "--kill-on-invalid-dep=yes"]
        );
    }
}
