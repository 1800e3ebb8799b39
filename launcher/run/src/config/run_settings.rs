//! [`RunSettings`]: the settings that a stage works with, and what the run's run.toml has.
//!
//! In: the run directory and `--config`, `--preset`, `--set`, `--tuples` as typed. Out: the
//! resolved settings. Those of a run may change from stage to stage, for every result is
//! compared with the settings that it depends on ([`crate::record`]), and with no others: a
//! stage that is refused changes nothing, and one that may begin stores its settings in run.toml
//! and says what is different from before.

use super::{Config, RUN_FILE, ReuseConfig, RunArgs, Table, diff, run_dir};
use crate::cluster::World;
use crate::failure::{refused, unusable_with};
use crate::paths::SHADOW_DIR;
use crate::text::{quoted, today};
use crate::ui::Ui;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// The settings of a run as a stage was given them.
#[derive(Clone, Debug)]
pub struct RunSettings {
    run: PathBuf,
    config: Config,
    /// What run.toml has.
    stored: Option<Config>,
}

impl RunSettings {
    /// Resolves the settings and checks them. Writes nothing.
    ///
    /// `--config`, or else the run's run.toml, with `--preset`, `--device` and `--set` in the place
    /// of what stands there. A new run that takes `--tuples` or `--translator` from another one
    /// begins with the settings of that run.
    ///
    /// # Errors
    /// For a directory that is no run, without `--config`: says what it is.
    pub fn open(args: &RunArgs) -> Result<Self> {
        let path = args.run.join(RUN_FILE);
        let stored = if path.is_file() { Some(Config::read(&path)?) } else { None };
        let mut config = base(args, stored.as_ref())?;
        if let Some(preset) = args.preset {
            config = config.with_preset(preset);
        }
        config.device.kind = args.device.unwrap_or(config.device.kind);
        config.device.dtype = args.dtype.unwrap_or(config.device.dtype);
        config = config.with_overrides(&args.set)?;
        config.check()?;
        let known = stored.as_ref().map(|stored| stored.reuse.clone()).unwrap_or_default();
        config.reuse = Reuse { args, known }.resolve(config.reuse)?;
        if config.data.date.is_empty() {
            config.data.date = date(stored.as_ref(), &config.reuse);
        }
        gradtx_models::ignore_fields(&config.models.ignore_fields);
        Ok(Self { run: args.run.clone(), config, stored })
    }

    /// The same on all ranks of a world: fails unless they have the same settings. Paths may
    /// differ, for nodes may keep their files in different places.
    pub fn open_on_ranks(args: &RunArgs, world: &World) -> Result<Self> {
        let comm = world.comm();
        let mut settings = Self::open(args)?;
        let config = &mut settings.config;
        let mut first = config.without_places().table().to_string().into_bytes();
        comm.broadcast_bytes(0, &mut first)?;
        let first: Table = String::from_utf8(first)?.parse()?;
        // Ranks that begin at midnight find different days.
        if settings.stored.is_none()
            && let Some(date) = first.get("data").and_then(|data| data.get("date")?.as_str())
        {
            config.data.date = date.into();
        }
        let own = config.without_places().table();
        if first != own {
            let what = "this rank has another configuration than rank 0";
            let hint = "start all ranks with the same arguments and the same run file";
            return Err(refused(what, diff(&first, &own), hint));
        }
        Ok(settings)
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Directory of the tuple store that the run uses.
    pub fn tuples_dir(&self) -> PathBuf {
        self.config.reuse.tuples_dir(&self.run)
    }

    /// Directory of the translator that the run uses.
    pub fn translator_dir(&self) -> PathBuf {
        self.config.reuse.translator_dir(&self.run)
    }

    /// The tuples of another run were opened: from now on this run uses these and no others.
    pub fn uses_tuples(&mut self, checksum: &str) {
        if !self.config.reuse.tuples.as_os_str().is_empty() {
            self.config.reuse.tuples_checksum = checksum.into();
        }
    }

    /// The translator of another run was opened: from now on this run uses this and no other.
    pub fn uses_translator(&mut self, checksum: &str) {
        if !self.config.reuse.translator.as_os_str().is_empty() {
            self.config.reuse.translator_checksum = checksum.into();
        }
    }

    /// Stores the settings in run.toml, if it has others, and says what changes there.
    pub fn store(&self, ui: &Ui) -> Result<()> {
        if self.stored.as_ref() == Some(&self.config) {
            return Ok(());
        }
        let path = self.run.join(RUN_FILE);
        self.config.store(&path)?;
        if let Some(stored) = &self.stored {
            let lines = diff(&stored.table(), &self.config.table());
            ui.line(format!("settings: changed in {}\n{}", path.display(), lines.trim_end()));
        }
        Ok(())
    }
}

/// The settings that `--preset` and `--set` are applied to.
fn base(args: &RunArgs, stored: Option<&Config>) -> Result<Config> {
    let other = args.translator.as_ref().or(args.tuples.as_ref());
    match (&args.config, stored, other) {
        (Some(path), stored, _) => {
            let mut config = Config::read(path)?;
            // Where results are is known here, and says nothing about how they are made.
            if let Some(stored) = stored
                && config.reuse == ReuseConfig::default()
            {
                config.reuse = stored.reuse.clone();
            }
            Ok(config)
        }
        (None, Some(stored), _) => Ok(stored.clone()),
        (None, None, Some(other)) => read_run(other),
        (None, None, None) => {
            // A mistake in the settings as typed is not hidden by another one.
            Config::default().with_overrides(&args.set)?.check()?;
            Err(run_dir::no_run(&args.run))
        }
    }
}

/// The settings of another run.
fn read_run(dir: &Path) -> Result<Config> {
    let path = dir.join(RUN_FILE);
    if path.is_file() { Config::read(&path) } else { Err(run_dir::no_run(dir)) }
}

/// The day that chat templates take for today: that of the run, or of the run that its tuples
/// are from, or this one.
fn date(stored: Option<&Config>, reuse: &ReuseConfig) -> String {
    if let Some(stored) = stored {
        return stored.data.date.clone();
    }
    let other = Some(&reuse.tuples).filter(|dir| !dir.as_os_str().is_empty());
    let other = other.and_then(|dir| read_run(dir).ok()).map(|other| other.data.date);
    other.filter(|date| !date.is_empty()).unwrap_or_else(today)
}

/// Resolves the section `[reuse]`.
struct Reuse<'a> {
    args: &'a RunArgs,
    /// As run.toml has it.
    known: ReuseConfig,
}

impl Reuse<'_> {
    fn resolve(&self, mut reuse: ReuseConfig) -> Result<ReuseConfig> {
        let Self { args, known } = self;
        if let Some(dir) = &args.tuples {
            reuse.tuples = std::path::absolute(dir)?;
        }
        if let Some(dir) = &args.translator {
            reuse.translator = std::path::absolute(dir)?;
            // Its tuples go with it, where the run has none.
            if reuse.tuples.as_os_str().is_empty() && !args.run.join(SHADOW_DIR).exists() {
                reuse.tuples.clone_from(&reuse.translator);
            }
        }
        if reuse.tuples != known.tuples || args.tuples.is_some() {
            reuse.tuples = self.source(&reuse.tuples, |other| &other.tuples)?;
            reuse.tuples_checksum.clear();
        }
        if reuse.translator != known.translator || args.translator.is_some() {
            reuse.translator = self.source(&reuse.translator, |other| &other.translator)?;
            reuse.translator_checksum.clear();
        }
        Ok(reuse)
    }

    /// The run that a result comes from: the one that is named, or the one where that takes it
    /// from; nothing for this run itself.
    fn source(&self, dir: &Path, from: fn(&ReuseConfig) -> &PathBuf) -> Result<PathBuf> {
        let is_own = |source: &Path| match (source.canonicalize(), self.args.run.canonicalize()) {
            (Ok(source), Ok(run)) => source == run,
            _ => false,
        };
        // A run that is named to itself makes its own, whatever it took from others before.
        if dir.as_os_str().is_empty() || is_own(dir) {
            return Ok(PathBuf::new());
        }
        let other = read_run(dir)?.reuse;
        let source = Some(from(&other)).filter(|path| !path.as_os_str().is_empty());
        let source = source.map_or(dir, PathBuf::as_path);
        Ok(if is_own(source) { PathBuf::new() } else { source.to_owned() })
    }
}

/// The error for a stage that would make what the run takes from another one.
pub fn is_reused(run: &Path, other: &Path, what: &str, stage: &str) -> anyhow::Error {
    let [other_dir, run_dir] = [other, run].map(|dir| quoted(&dir.to_string_lossy()));
    let hint = format!(
        "to make them there: gradtx {stage} --run {other_dir}; to make its own: gradtx {stage} --run {run_dir} \
         --{what} {run_dir}"
    );
    unusable_with(
        format!("{}: takes its {what} from {} (reuse.{what})", run.display(), other.display()),
        Some(hint),
    )
}
