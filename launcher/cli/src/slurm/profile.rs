//! Site profiles: what a cluster wants every job to ask for, written down once.
//!
//! In: a TOML file, by default `~/.config/gradtx/cluster.toml` if it is there. Out: a
//! [`Profile`], every value of it checked. `slurm/cluster.toml` has every key with a comment.

use super::options::{JobKind, JobOptions, Origin};
use super::words;
use anyhow::Result;
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_regular_text};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The example that is shipped; it has every key.
pub(crate) const EXAMPLE: &str = include_str!("../../../../slurm/cluster.toml");
/// The profile that is taken where none is named.
const DEFAULT: &str = "cluster";
/// In the place of a profile's name: none.
const NO_PROFILE: &str = "none";
/// The environment variable that names a profile.
pub(crate) const PROFILE_VARIABLE: &str = "GRADTX_PROFILE";

/// What starts a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerRuntime {
    /// `apptainer exec` in front of the program.
    #[default]
    Apptainer,
    /// The plugin pyxis: options of srun.
    Pyxis,
}

/// A container that the program runs in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// The image: a file, or what the runtime takes otherwise.
    pub image: String,
    /// What starts it.
    #[serde(default)]
    pub runtime: ContainerRuntime,
    /// Directories that are to be seen in it, beside those of the run, its models and data.
    #[serde(default)]
    pub mounts: Vec<PathBuf>,
    /// More options of `apptainer exec`, or of srun for pyxis.
    #[serde(default)]
    pub options: Vec<String>,
    /// The program in it.
    #[serde(default = "program_in_containers")]
    pub program: String,
}

fn program_in_containers() -> String {
    "gradtx".into()
}

/// A site profile.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    /// The GPUs' kind as `gradtx plan --gpu` has it; with it, submit takes the plan's recommendation.
    pub gpu: Option<String>,
    /// Lines of bash that a job begins with, such as `module load openmpi`.
    pub setup: Vec<String>,
    /// Environment variables of the jobs.
    pub environment: BTreeMap<String, String>,
    /// Container.
    pub container: Option<Container>,
    /// Options of all jobs.
    pub job: JobOptions,
    /// Options of curation.
    pub curate: JobOptions,
    /// Options of training.
    pub train: JobOptions,
    /// Options of the jobs that score clients.
    pub evaluate: JobOptions,
    /// Options of the report's job.
    pub report: JobOptions,
    /// Options of the job that makes an emulator.
    pub emulate: JobOptions,
    /// The file, as it is named in messages; empty without one.
    #[serde(skip)]
    pub file: String,
}

impl Profile {
    /// The profile of this name or file; without one, that of the environment or the default
    /// one, if it is there.
    ///
    /// # Errors
    /// If what is named is not there, or is no profile.
    pub fn find(name: Option<&str>) -> Result<Self> {
        let of_environment = std::env::var(PROFILE_VARIABLE).ok().filter(|name| !name.is_empty());
        let (name, by) = match (name, &of_environment) {
            (Some(name), _) => (name, format!("--profile {name}")),
            (None, Some(name)) => (name.as_str(), format!("{PROFILE_VARIABLE}={name}")),
            (None, None) => (DEFAULT, String::new()),
        };
        if name == NO_PROFILE {
            return Ok(Self::default());
        }
        if name.contains('/') || name.ends_with(".toml") {
            return Self::read(Path::new(name));
        }
        let places: Vec<PathBuf> =
            directories().into_iter().map(|dir| dir.join("gradtx").join(format!("{name}.toml"))).collect();
        match places.iter().find(|path| path.exists()) {
            Some(path) => Self::read(path),
            None if by.is_empty() => Ok(Self::default()),
            None => {
                let places: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
                let hint = format!("name a file, `{NO_PROFILE}`, or a profile in one of these places");
                let what = format!("{by}: no such profile; expected {}", places.join(" or "));
                Err(unusable_with(what, Some(hint)))
            }
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, has an unknown key, or a value that a job cannot have.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_regular_text(path, MAX_CONFIG_BYTES).map_err(|e| {
            unusable_with(e.to_string(), Some("expected a site profile (TOML), see docs/slurm.md".into()))
        })?;
        let mut found: Self = toml::from_str(&text).map_err(|e| {
            let what = format!("{}: {}", path.display(), e.to_string().trim_end());
            unusable_with(what, unknown_key(&text).map(|(wrong, known)| suggestion(&wrong, &known)))
        })?;
        found.file = path.display().to_string();
        found.check()?;
        Ok(found)
    }

    fn check(&self) -> Result<()> {
        let file = &self.file;
        for (section, options) in
            [("job", &self.job)].into_iter().chain(JobKind::ALL.map(|kind| (kind.name(), self.of(kind))))
        {
            options.check(&|key| format!("{file}: [{section}] {key}"))?;
        }
        if let Some(line) = self.setup.iter().find(|line| line.chars().any(|c| c.is_control() && c != '\t')) {
            let what =
                format!("{file}: setup: expected lines of bash, one each, found `{}`", line.escape_debug());
            return Err(unusable(what));
        }
        for (name, value) in &self.environment {
            check_variable(&format!("{file}: [environment]"), name, value)?;
        }
        self.container.iter().try_for_each(|container| container.check(&format!("{file}: [container]")))
    }

    /// The options of one kind of job.
    pub fn of(&self, kind: JobKind) -> &JobOptions {
        match kind {
            JobKind::Curate => &self.curate,
            JobKind::Train => &self.train,
            JobKind::Evaluate => &self.evaluate,
            JobKind::Report => &self.report,
            JobKind::Emulate => &self.emulate,
        }
    }

    /// Its options for a kind of job, with their origins: those for all jobs, then its own.
    pub fn layers(&self, kind: JobKind) -> [(Origin, JobOptions); 2] {
        let origin = |kind| Origin::Profile(self.file.clone(), kind);
        [(origin(None), self.job.clone()), (origin(Some(kind)), self.of(kind).clone())]
    }
}

impl Container {
    /// Checks what will stand in the batch scripts.
    ///
    /// # Errors
    /// If something could be read as more than one word.
    pub fn check(&self, label: &str) -> Result<()> {
        let word = |key: &str, text: &str| match !text.is_empty() && !text.chars().any(char::is_control) {
            true => Ok(()),
            false => {
                Err(unusable(format!("{label} {key}: expected a word, found `{}`", text.escape_debug())))
            }
        };
        word("image", &self.image)?;
        word("program", &self.program)?;
        self.options.iter().try_for_each(|option| word("options", option))?;
        self.mounts.iter().try_for_each(|dir| words::check_mount(&format!("{label} mounts"), dir))
    }
}

/// Checks an environment variable of the jobs.
///
/// # Errors
/// If its name is none, or its value has control characters.
pub(crate) fn check_variable(label: &str, name: &str, value: &str) -> Result<()> {
    let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !is_name {
        return Err(unusable(format!("{label} {}: expected a variable's name", name.escape_debug())));
    }
    match value.chars().any(char::is_control) {
        true => Err(unusable(format!("{label} {name}: the value has a line break or a control character"))),
        false => Ok(()),
    }
}

/// Where profiles are looked for: the user's directory of settings, then the site's.
fn directories() -> Vec<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let user = match (set("XDG_CONFIG_HOME"), set("HOME")) {
        (Some(dir), _) => Some(PathBuf::from(dir)),
        (None, Some(home)) => Some(PathBuf::from(home).join(".config")),
        (None, None) => None,
    };
    let site = set("XDG_CONFIG_DIRS").unwrap_or_else(|| "/etc/xdg".into());
    user.into_iter().chain(std::env::split_paths(&site)).collect()
}

/// The first key of a profile that is none, and the keys that are known; dotted.
fn unknown_key(text: &str) -> Option<(String, Vec<String>)> {
    let free = |mut table: Table| {
        // Its keys are the user's own.
        table.remove("environment");
        table
    };
    let keys = |table: &Table| {
        table.iter().fold(vec![], |mut keys: Vec<String>, (key, value)| {
            keys.push(key.clone());
            if let Value::Table(inner) = value {
                keys.extend(inner.keys().map(|name| format!("{key}.{name}")));
            }
            keys
        })
    };
    let mut example: Table = EXAMPLE.parse().ok()?;
    // Every key of a job may stand in each of their sections.
    let mut job = Table::new();
    for section in ["job"].into_iter().chain(JobKind::ALL.map(JobKind::name)) {
        job.extend(example.get(section).and_then(Value::as_table).cloned().unwrap_or_default());
    }
    for section in ["job"].into_iter().chain(JobKind::ALL.map(JobKind::name)) {
        example.insert(section.into(), Value::Table(job.clone()));
    }
    let mut known = keys(&free(example));
    // Of several that are as near, the one for all jobs.
    known.sort_by_key(|key| !key.starts_with("job"));
    let found = keys(&free(text.parse().ok()?));
    let wrong = found.into_iter().find(|key| !known.contains(key) && key != "environment")?;
    Some((wrong, known))
}

/// What may have been meant by a key that does not exist.
fn suggestion(wrong: &str, known: &[String]) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().replace('-', "_");
    // A key of sbatch's name in the wrong section is a near miss too.
    let far = |key: &&String| match last(key) == last(wrong) {
        true => 0,
        false => strsim::osa_distance(wrong, key),
    };
    match known.iter().min_by_key(far).filter(|key| far(key) <= (last(wrong).chars().count() / 3).max(1)) {
        Some(key) => format!("did you mean `{key}`?"),
        None => "keys are listed in docs/slurm.md; other options of sbatch go in job.sbatch".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Profile> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.toml");
        std::fs::write(&path, text).unwrap();
        Profile::read(&path)
    }

    fn error(text: &str) -> String {
        format!("{:?}", gradtx_run::failure::ErrorReport::from(&read(text).unwrap_err()))
    }

    #[test]
    fn the_example_is_a_profile_and_has_every_key() {
        let example = read(EXAMPLE).unwrap();
        let table = |options: &JobOptions| Table::try_from(options).unwrap();
        let mut all = table(&example.job);
        let JobOptions { nodes: Some(_), .. } = example.curate else { panic!("nodes are per job") };
        for kind in JobKind::ALL {
            all.extend(table(example.of(kind)));
        }
        let every = JobOptions {
            nodes: Some(1),
            gpus_per_node: Some(1),
            gres: Some("gpu:1".into()),
            cpus_per_task: Some(1),
            time: Some("1".into()),
            mem: Some("1".into()),
            account: Some("a".into()),
            partition: Some("a".into()),
            qos: Some("a".into()),
            constraint: Some("a".into()),
            reservation: Some("a".into()),
            exclude: Some("a".into()),
            exclusive: Some(true),
            nice: Some(1),
            comment: Some("a".into()),
            mail_user: Some("a".into()),
            mail_type: Some("END".into()),
            signal_seconds: Some(60),
            array_limit: Some(1),
            mpi: Some("a".into()),
            sbatch: vec![],
            srun: vec![],
        };
        let mut missing = table(&every);
        missing.retain(|key, _| !all.contains_key(key));
        assert!(missing.is_empty(), "not in slurm/cluster.toml: {missing}");
        assert!(example.gpu.is_some() && !example.setup.is_empty() && !example.environment.is_empty());
        assert!(example.container.is_some());
    }

    #[test]
    fn mistyped_keys_are_named_with_file_and_suggestion() {
        for (text, wanted) in [
            ("[job]\npartion = 'a'", "did you mean `job.partition`?"),
            ("[job]\nmail-user = 'a'", "did you mean `job.mail_user`?"),
            ("partition = 'a'", "partition`?"),
            ("[trian]\nnodes = 1", "did you mean `train`?"),
            ("[container]\nimage = 'x'\nmount = ['/a']", "did you mean `container.mounts`?"),
            ("[job]\nflavour = 3", "job.sbatch"),
            ("[environment]\nA = 'x'\n[job]\nnode = 1", "did you mean `job.nodes`?"),
        ] {
            let said = error(text);
            assert!(said.contains(wanted) && said.contains("cluster.toml"), "no `{wanted}` in: {said}");
        }
    }

    #[test]
    fn values_are_checked_where_they_stand() {
        for (text, wanted) in [
            ("[job]\npartition = 'a b'", "cluster.toml: [job] partition a b: expected"),
            ("[report]\nmem = 'lots'", "cluster.toml: [report] mem lots: expected"),
            ("[job]\nnodes = 'two'", "nodes"),
            ("setup = [\"a\\nb\"]", "cluster.toml: setup: expected lines"),
            ("[environment]\n\"A-B\" = 'x'", "[environment] A-B: expected"),
            ("[environment]\nA = \"x\\ny\"", "[environment] A: the value"),
            ("[container]\nruntime = 'pyxis'", "image"),
            ("[container]\nimage = 'x'\nruntime = 'docker'", "docker"),
            ("[container]\nimage = 'x'\nmounts = ['a']", "[container] mounts a: expected an absolute path"),
        ] {
            let said = error(text);
            assert!(said.contains(wanted), "no `{wanted}` in: {said}");
        }
    }
}
