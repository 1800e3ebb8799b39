//! What a batch job asks SLURM for, and where each value is from.
//!
//! In: [`JobOptions`] from several places, such as a profile and the command line. Out:
//! [`Resolved`], the options of one job with the [`Origin`] of each. What is said for one job
//! takes precedence over what is said for all; the command line over the profile; both over
//! the defaults. Lists of further options are joined instead.

use super::words;
use anyhow::Result;
use clap::ValueEnum;
use gradtx_run::failure::unusable;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use toml::{Table, Value};

/// A job of the pipeline, as profiles and `JOB=VALUE` on the command line name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Collects the tuples.
    Curate,
    /// Trains the translator.
    Train,
    /// Scores clients.
    Evaluate,
    /// Writes the report.
    Report,
    /// Makes an emulator of the LLM.
    Emulate,
}

impl JobKind {
    /// All of them: the pipeline in its order, and what stands beside it.
    pub const ALL: [Self; 5] = [Self::Curate, Self::Train, Self::Evaluate, Self::Report, Self::Emulate];

    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Curate => "curate",
            Self::Train => "train",
            Self::Evaluate => "evaluate",
            Self::Report => "report",
            Self::Emulate => "emulate",
        }
    }
}

/// What a job may ask for: the keys of `[job]` and of a job's own section in a profile.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobOptions {
    /// Nodes.
    pub nodes: Option<u32>,
    /// GPUs, and ranks, of a node; 0 for one rank on the CPU.
    pub gpus_per_node: Option<u32>,
    /// GPUs of a node in the form `gpu:TYPE:COUNT`.
    pub gres: Option<String>,
    /// CPU cores of a rank.
    pub cpus_per_task: Option<u32>,
    /// Time limit.
    pub time: Option<String>,
    /// Memory of a node.
    pub mem: Option<String>,
    /// Account.
    pub account: Option<String>,
    /// Partition, or several separated by commas.
    pub partition: Option<String>,
    /// Quality of service.
    pub qos: Option<String>,
    /// Features that nodes must have.
    pub constraint: Option<String>,
    /// Reservation.
    pub reservation: Option<String>,
    /// Nodes that are not to be used.
    pub exclude: Option<String>,
    /// Whole nodes, shared with no other job.
    pub exclusive: Option<bool>,
    /// Lower priority by this much.
    pub nice: Option<i64>,
    /// Comment.
    pub comment: Option<String>,
    /// Address for mail.
    pub mail_user: Option<String>,
    /// Events that mail is sent about.
    pub mail_type: Option<String>,
    /// Seconds before the time limit at which ranks are asked to write a checkpoint.
    pub signal_seconds: Option<u32>,
    /// Most jobs of an array at once.
    pub array_limit: Option<u32>,
    /// How srun starts MPI.
    pub mpi: Option<String>,
    /// More options of sbatch.
    pub sbatch: Vec<String>,
    /// More options of srun.
    pub srun: Vec<String>,
}

/// GPUs of a node as they are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gpus {
    /// How many.
    pub per_node: u32,
    /// Their type, if they are asked for by `--gres`: empty where it has none.
    pub gres_type: Option<String>,
}

impl Gpus {
    /// Reads `gpu:COUNT` or `gpu:TYPE:COUNT`.
    ///
    /// # Errors
    /// If it is something else; `label` says where it was found.
    pub fn parse(label: &str, gres: &str) -> Result<Self> {
        let expected = || {
            let what = format!("{label} {}: expected gpu:COUNT or gpu:TYPE:COUNT", gres.escape_debug());
            unusable(format!("{what}, e.g. gpu:a100:4; other resources go in --sbatch"))
        };
        let parts: Vec<&str> = gres.split(':').collect();
        let (kind, count) = match parts[..] {
            ["gpu", count] => ("", count),
            ["gpu", kind, count] if !kind.is_empty() && !kind.contains(',') => (kind, count),
            _ => return Err(expected()),
        };
        words::check_name(label, if kind.is_empty() { "gpu" } else { kind })?;
        let per_node = count.parse().ok().filter(|n| (1..=1024).contains(n)).ok_or_else(expected)?;
        Ok(Self { per_node, gres_type: Some(kind.into()) })
    }

    /// The option of sbatch that asks for `count` of them on each node.
    pub fn option(&self, count: u32) -> String {
        match self.gres_type.as_deref() {
            None => format!("--gpus-per-node={count}"),
            Some("") => format!("--gres=gpu:{count}"),
            Some(kind) => format!("--gres=gpu:{kind}:{count}"),
        }
    }
}

impl JobOptions {
    /// Checks every value; `label` names a key the way its user wrote it, e.g. `--mem`.
    ///
    /// # Errors
    /// At the first value that sbatch would not take, or that could be read as something else.
    pub fn check(&self, label: &dyn Fn(&str) -> String) -> Result<()> {
        let whole = |key: &str, value: Option<u32>, most: u32, least: u32| match value {
            Some(n) if n < least || n > most => {
                Err(unusable(format!("{}: expected {least} to {most}, found {n}", label(key))))
            }
            _ => Ok(()),
        };
        whole("nodes", self.nodes, 100_000, 1)?;
        whole("gpus_per_node", self.gpus_per_node, 1024, 0)?;
        whole("cpus_per_task", self.cpus_per_task, 4096, 1)?;
        whole("signal_seconds", self.signal_seconds, 65_535, 10)?;
        whole("array_limit", self.array_limit, 1_000_000, 1)?;
        let each = |key: &str, value: &Option<String>, check: &dyn Fn(&str, &str) -> Result<()>| {
            value.iter().try_for_each(|value| check(&label(key), value))
        };
        each("gres", &self.gres, &|label, text| Gpus::parse(label, text).map(drop))?;
        each("time", &self.time, &words::check_time)?;
        each("mem", &self.mem, &words::check_memory)?;
        for (key, value) in [
            ("account", &self.account),
            ("partition", &self.partition),
            ("qos", &self.qos),
            ("reservation", &self.reservation),
            ("mail_user", &self.mail_user),
            ("mpi", &self.mpi),
        ] {
            each(key, value, &words::check_name)?;
        }
        each("mail_type", &self.mail_type, &words::check_mail_type)?;
        for (key, value) in
            [("constraint", &self.constraint), ("exclude", &self.exclude), ("comment", &self.comment)]
        {
            each(key, value, &words::check_value)?;
        }
        self.sbatch.iter().try_for_each(|word| words::check_sbatch(&label("sbatch"), word))?;
        self.srun.iter().try_for_each(|word| words::check_option(&label("srun"), word))
    }

    /// What of options for all jobs one job takes: only jobs with `ranks` have several nodes,
    /// and the report has no GPU.
    fn narrowed(&self, kind: JobKind, ranks: bool) -> Self {
        let mut own = self.clone();
        if !ranks {
            own.nodes = None;
        }
        if kind == JobKind::Report {
            (own.gpus_per_node, own.gres, own.exclusive) = (None, None, None);
            own.sbatch.retain(|option| !words::asks_for_gpus(option));
        }
        own
    }

    fn table(&self) -> Table {
        Table::try_from(self).expect("options have only values that TOML has")
    }
}

/// Where a value is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A profile: its file, and `None` for its section `[job]`.
    Profile(String, Option<JobKind>),
    /// The recommendation of `gradtx plan`.
    Plan,
    /// The command line; whether it was said for this job only.
    CommandLine(bool),
}

impl Origin {
    /// Whether the value was given for this job, and not for all jobs at once.
    pub(crate) fn is_of_the_job(&self) -> bool {
        matches!(self, Self::Profile(_, Some(_)) | Self::CommandLine(true))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Profile(file, kind) => write!(f, "{file} [{}]", kind.map_or("job", JobKind::name)),
            Self::Plan => f.write_str("recommended by gradtx plan"),
            Self::CommandLine(_) => f.write_str("command line"),
        }
    }
}

/// Options of one job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resolved {
    /// The values.
    pub options: JobOptions,
    origins: BTreeMap<String, Vec<Origin>>,
}

impl Resolved {
    /// Joins options from several places, those with the lowest precedence first. With `ranks`,
    /// the job may have several nodes.
    ///
    /// # Errors
    /// If options do not go together.
    pub fn new(kind: JobKind, ranks: bool, places: &[(Origin, JobOptions)]) -> Result<Self> {
        let mut table = Table::new();
        let mut origins: BTreeMap<String, Vec<Origin>> = BTreeMap::new();
        for (origin, options) in places {
            let own = match origin.is_of_the_job() || matches!(origin, Origin::Default | Origin::Plan) {
                true => options.clone(),
                false => options.narrowed(kind, ranks),
            };
            if own.gres.is_some() && own.gpus_per_node.is_none() {
                // The number is part of it.
                table.remove("gpus_per_node");
                origins.remove("gpus_per_node");
            }
            for (key, value) in own.table() {
                match (table.get_mut(&key), value) {
                    (_, Value::Array(new)) if new.is_empty() => continue,
                    (Some(Value::Array(all)), Value::Array(new)) => all.extend(new),
                    (_, value) => {
                        table.insert(key.clone(), value);
                        origins.remove(&key);
                    }
                }
                origins.entry(key).or_default().push(origin.clone());
            }
        }
        let options: JobOptions = Value::Table(table).try_into()?;
        if !ranks && options.nodes.is_some_and(|nodes| nodes != 1) {
            let origin = &origins["nodes"][0];
            let what =
                format!("{origin}: nodes of the job {}: expected 1, since it is one process", kind.name());
            return Err(unusable(what));
        }
        Ok(Self { options, origins })
    }

    /// Takes another number of nodes or GPUs, as the plan recommends.
    pub fn recommended(&mut self, nodes: u32, gpus_per_node: u32) {
        if self.options.nodes.unwrap_or(1) != nodes {
            self.options.nodes = Some(nodes);
            self.origins.insert("nodes".into(), vec![Origin::Plan]);
        }
        if self.gpus().per_node != gpus_per_node {
            self.options.gpus_per_node = Some(gpus_per_node);
            self.origins.insert("gpus_per_node".into(), vec![Origin::Plan]);
        }
    }

    /// GPUs of a node.
    pub fn gpus(&self) -> Gpus {
        let gres = self.options.gres.as_deref().and_then(|gres| Gpus::parse("gres", gres).ok());
        let gpus = gres.unwrap_or_default();
        Gpus { per_node: self.options.gpus_per_node.unwrap_or(gpus.per_node), ..gpus }
    }

    /// Where the value of a key is from; the default's, if nobody set it.
    pub fn origin(&self, key: &str) -> &Origin {
        self.origins.get(key).and_then(|all| all.last()).unwrap_or(&Origin::Default)
    }

    /// A line for every value that is set: `nodes = 8 (command line)`.
    pub fn lines(&self) -> Vec<String> {
        let line = |(key, value): (String, Value)| {
            let from: Vec<String> = self.origins.get(&key)?.iter().map(Origin::to_string).collect();
            Some(format!("{key} = {value} ({})", from.join(", ")))
        };
        self.options.table().into_iter().filter_map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> JobOptions {
        toml::from_str(text).unwrap()
    }

    fn profile(kind: Option<JobKind>) -> Origin {
        Origin::Profile("cluster.toml".into(), kind)
    }

    #[test]
    fn job_options_go_before_common_ones_and_profiles() {
        let places = [
            (Origin::Default, options("nodes = 1\ntime = '12:00:00'\ngpus_per_node = 4")),
            (profile(None), options("nodes = 2\naccount = 'lab'\nsbatch = ['--hint=nomultithread']")),
            (profile(Some(JobKind::Train)), options("time = '1-0'\nmem = '64G'")),
            (Origin::CommandLine(false), options("mem = '32G'\nsbatch = ['--spread-job']")),
            (Origin::CommandLine(true), options("nodes = 8")),
        ];
        let found = Resolved::new(JobKind::Train, true, &places).unwrap();
        let lines = found.lines();
        for wanted in [
            "nodes = 8 (command line)",
            "account = \"lab\" (cluster.toml [job])",
            "time = \"1-0\" (cluster.toml [train])",
            "mem = \"32G\" (command line)",
            "gpus_per_node = 4 (default)",
            "sbatch = [\"--hint=nomultithread\", \"--spread-job\"] (cluster.toml [job], command line)",
        ] {
            assert!(lines.iter().any(|line| line == wanted), "no `{wanted}` in {lines:#?}");
        }
        assert_eq!(lines.len(), 6, "{lines:#?}");
    }

    #[test]
    fn report_jobs_take_no_gpus_and_nodes_of_all() {
        let all =
            options("nodes = 8\ngres = 'gpu:a100:4'\nexclusive = true\nsbatch = ['--gpus=3', '--qos=x']");
        let places = [
            (Origin::Default, options("nodes = 1\ngpus_per_node = 0")),
            (profile(None), all.clone()),
            (Origin::CommandLine(false), options("gpus_per_node = 4")),
        ];
        let found = Resolved::new(JobKind::Report, false, &places).unwrap();
        assert_eq!((found.gpus().per_node, found.options.nodes), (0, Some(1)));
        assert_eq!(
            (found.options.exclusive, &found.options.sbatch[..]),
            (None, &["--qos=x".to_string()][..])
        );
        let own = [(profile(Some(JobKind::Report)), options("nodes = 2"))];
        let message = Resolved::new(JobKind::Report, false, &own).unwrap_err().to_string();
        assert_eq!(
            message,
            "cluster.toml [report]: nodes of the job report: expected 1, since it is one process"
        );
    }

    #[test]
    fn gpus_have_a_type_where_it_is_given() {
        let typed = (profile(None), options("gres = 'gpu:a100:4'"));
        let default = (Origin::Default, options("gpus_per_node = 8"));
        let found = Resolved::new(JobKind::Curate, true, &[default.clone(), typed.clone()]).unwrap();
        assert_eq!(found.gpus().option(found.gpus().per_node), "--gres=gpu:a100:4");
        let fewer = (Origin::CommandLine(false), options("gpus_per_node = 2"));
        let found = Resolved::new(JobKind::Curate, true, &[default.clone(), typed, fewer]).unwrap();
        assert_eq!(found.gpus().option(found.gpus().per_node), "--gres=gpu:a100:2");
        let found = Resolved::new(JobKind::Curate, true, &[default]).unwrap();
        assert_eq!(found.gpus().option(1), "--gpus-per-node=1");
        assert_eq!(Gpus::parse("gres", "gpu:3").unwrap().option(2), "--gres=gpu:2");
        for wrong in ["gpu", "a100:4", "gpu::4", "gpu:a100:0", "gpu:a b:1", "gpu:4,nvme:1", "gpu:a100:4:x"] {
            let message = Gpus::parse("--gres", wrong).unwrap_err().to_string();
            assert!(message.starts_with("--gres "), "{message}");
        }
    }

    #[test]
    fn a_bad_value_is_named_by_its_key_as_it_was_written() {
        let label = |key: &str| format!("cluster.toml [job] {key}");
        for (text, wanted) in [
            ("nodes = 0", "cluster.toml [job] nodes: expected 1 to 100000, found 0"),
            ("signal_seconds = 1", "expected 10 to 65535"),
            ("time = '1h'", "[job] time 1h: expected minutes"),
            ("mem = '12 GB'", "[job] mem 12 GB: expected"),
            ("partition = 'a b'", "[job] partition a b: expected a name"),
            ("mail_type = 'ALWAYS'", "[job] mail_type ALWAYS: expected"),
            ("comment = \"it's\"", "[job] comment"),
            ("sbatch = ['--array=0-3']", "[job] sbatch --array=0-3: "),
            ("srun = ['oops']", "[job] srun oops: expected"),
        ] {
            let message = options(text).check(&label).unwrap_err().to_string();
            assert!(message.contains(wanted), "no `{wanted}` in: {message}");
        }
        options("mem = '0'\nexclude = 'node[1-3]'\nmail_type = 'END,FAIL'\nnice = -5").check(&label).unwrap();
    }
}
