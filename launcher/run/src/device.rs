//! Which device a rank computes on, where the settings leave that open.
//!
//! In: the section `[device]`, the place of this rank, and for a stage its directory. Out: the
//! same section with a device and an element type that are there, which is what the stage
//! computes with and records. run.toml keeps `auto`: the next stage may run on another node.
//!
//! `auto` takes a GPU where this rank can use one, and the CPU where there is none. It does not
//! pass over GPUs that a job was given, nor continue with a directory on another kind of device.

use crate::cluster::World;
use crate::config::{Config, DeviceConfig, DeviceKind, DtypeKind};
use crate::context::Context;
use crate::failure::{refused, unusable_with};
use crate::record::{self, RECORD_FILE};
use crate::text::counted;
use anyhow::Result;
use gradtx_runtime::comm::RankInfo;
use std::path::Path;

/// Where SLURM says which GPUs a job has.
const SLURM_GPUS: [&str; 3] = ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"];
/// The NVIDIA kernel driver, where it is loaded.
const DRIVER: &str = "/proc/driver/nvidia/version";

/// A device that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// The settings, without `auto`.
    pub settings: DeviceConfig,
    /// The device, and why.
    pub what: String,
    /// What may be wrong about it.
    pub warning: Option<String>,
}

/// The name of the GPU that is a rank's own, or why there is none.
type Found = std::result::Result<String, String>;

/// The device that the settings name, or that `auto` takes.
///
/// # Errors
/// If the settings name a device that is not there; if `auto` finds GPUs that it cannot use
/// although they are there for this process.
pub fn take(settings: &DeviceConfig, place: &RankInfo) -> Result<Taken> {
    let found = match settings.kind {
        // Whatever is wrong about GPUs, they are not asked for.
        DeviceKind::Cpu => find(place).unwrap_or_else(|error| Err(error.to_string())),
        DeviceKind::Auto | DeviceKind::Cuda => find(place)?,
    };
    match (settings.kind, found) {
        (DeviceKind::Cpu, Ok(name)) => Ok(cpu(settings, &format!("as set; {name} stays idle"))),
        (DeviceKind::Cpu, Err(_)) => Ok(cpu(settings, "as set")),
        (_, Ok(name)) => Ok(gpu(settings, &name)),
        (DeviceKind::Cuda, Err(why)) => Err(no_gpu(&why)),
        (DeviceKind::Auto, Err(why)) if settings.dtype == DtypeKind::Bf16 => {
            let what = format!(
                "device.dtype is bf16, but the CPU computes in f32, and there is no GPU to use: {why}"
            );
            Err(unusable_with(what, Some("take `--dtype auto`, which is f32 on a CPU".into())))
        }
        (DeviceKind::Auto, Err(why)) => {
            let given = SLURM_GPUS.iter().find_map(|name| Some((*name, std::env::var(name).ok()?)));
            let given = given.filter(|(_, gpus)| !gpus.is_empty() && gpus != "0");
            let warning = passed_over(given, Path::new(DRIVER).exists(), &why)?;
            Ok(Taken { warning, ..cpu(settings, &why) })
        }
    }
}

/// An error, or a warning, about GPUs that `auto` would leave idle: those that SLURM gave to the
/// job, and those that the node seems to have.
fn passed_over(given: Option<(&str, String)>, has_driver: bool, why: &str) -> Result<Option<String>> {
    match (given, has_driver) {
        (Some((name, gpus)), true) => {
            let what = format!("the job has GPUs ({name}={gpus}), but none can be used: {why}");
            let hint = "`gradtx doctor` shows what is here; `--device cpu` leaves them idle";
            Err(unusable_with(what, Some(hint.into())))
        }
        (Some((name, gpus)), false) => {
            Ok(Some(format!("warning: the job has GPUs ({name}={gpus}), but computes on the CPU: {why}")))
        }
        (None, true) => Ok(Some(format!(
            "warning: this node has an NVIDIA driver, but the stage computes on the CPU: {why}"
        ))),
        (None, false) => Ok(None),
    }
}

fn cpu(settings: &DeviceConfig, why: &str) -> Taken {
    let settings = DeviceConfig { kind: DeviceKind::Cpu, dtype: DtypeKind::F32, ..settings.clone() };
    Taken { settings, what: format!("CPU ({why})"), warning: None }
}

fn gpu(settings: &DeviceConfig, name: &str) -> Taken {
    let dtype = match settings.dtype {
        DtypeKind::F32 => DtypeKind::F32,
        DtypeKind::Auto | DtypeKind::Bf16 => DtypeKind::Bf16,
    };
    let settings = DeviceConfig { kind: DeviceKind::Cuda, dtype, ..settings.clone() };
    Taken { what: format!("{name} ({})", dtype.name()), settings, warning: None }
}

fn no_gpu(why: &str) -> anyhow::Error {
    let hint = match cfg!(feature = "cuda") {
        true => "`gradtx doctor` shows what is here; `--device cpu` works everywhere",
        false => "build it with `--features cuda`, or take `--device cpu`",
    };
    unusable_with(format!("device.kind is cuda, but {why}"), Some(hint.into()))
}

#[cfg(feature = "cuda")]
fn find(place: &RankInfo) -> Result<Found> {
    match gradtx_kernels::cuda::devices() {
        Err(why) => Ok(Err(why)),
        Ok(devices) => {
            let ordinal = ordinal(place, devices.len())
                .map_err(|why| unusable_with(why, Some("`gradtx doctor` shows what is here".into())))?;
            Ok(Ok(devices[ordinal].name.clone()))
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn find(_: &RankInfo) -> Result<Found> {
    Ok(Err("this program was built without CUDA".into()))
}

/// Which of `shown` devices is the one of a rank; or why none is.
#[cfg(feature = "cuda")]
pub(crate) fn ordinal(place: &RankInfo, shown: usize) -> std::result::Result<usize, String> {
    let RankInfo { node, local_rank, local_size } = place;
    match shown {
        // SLURM binds ranks to GPUs: each sees its own as the first.
        1 => Ok(0),
        _ if *local_rank < shown => Ok(*local_rank),
        _ => Err(format!(
            "{node} has {local_size} ranks, but shows {shown} CUDA devices: start one rank for each"
        )),
    }
}

/// What a stage's directory was started on.
struct Begun {
    kind: DeviceKind,
    dtype: DtypeKind,
    is_finished: bool,
}

impl Begun {
    /// From the record; nothing where there is none that names a device.
    fn of(dir: &Path) -> Option<Self> {
        let record = record::read(&dir.join(RECORD_FILE)).ok()?;
        let device = serde_json::from_value::<DeviceConfig>(record.settings.get("device")?.clone()).ok()?;
        Some(Self { kind: device.kind, dtype: device.dtype, is_finished: !record.outputs.is_empty() })
    }
}

impl Config {
    /// With the device that a stage computes on, which it says in one line. `dir` is the stage's
    /// directory: one that is finished needs no device, and one that was started needs the same.
    ///
    /// # Errors
    /// Those of [`take`]; and if the directory was started on another kind of device.
    pub fn on_device(self, context: &Context, dir: &Path) -> Result<Self> {
        let started = Begun::of(dir);
        let is_open = |asked: &DeviceConfig| {
            let same_kind = |started: &&Begun| asked.kind == DeviceKind::Auto || asked.kind == started.kind;
            let same_type = |started: &&Begun| asked.dtype == DtypeKind::Auto || asked.dtype == started.dtype;
            started.as_ref().filter(same_kind).filter(same_type)
        };
        let device = match is_open(&self.device) {
            Some(Begun { kind, dtype, is_finished: true }) => {
                DeviceConfig { kind: *kind, dtype: *dtype, ..self.device.clone() }
            }
            started => {
                let taken =
                    take(&self.device, &context.place).map_err(|error| begun_on(started, dir, error))?;
                if let Some(started) = started {
                    started.check_same(&taken, dir)?;
                }
                taken.say(context);
                taken.settings
            }
        };
        Ok(Self { device, ..self })
    }

    /// The same on all ranks of a world.
    ///
    /// # Errors
    /// The same on all of them, also if some ranks find a GPU and others do not.
    pub fn on_device_of_ranks(self, context: &Context, world: &World, dir: &Path) -> Result<Self> {
        let config = self.on_device(context, dir)?;
        let device = format!("{} ({})", config.device.kind.name(), config.device.dtype.name());
        world.agree("device", &device).map_err(|error| {
            let hint = "start ranks on nodes of one kind only, or set --device for all of them";
            unusable_with(format!("{error:#}"), Some(hint.into()))
        })?;
        Ok(config)
    }
}

impl Taken {
    /// Says which device it is.
    pub fn say(&self, context: &Context) {
        let threads = match self.settings.kind {
            DeviceKind::Cpu => format!(", {}", counted(context.threads, "thread")),
            DeviceKind::Auto | DeviceKind::Cuda => String::new(),
        };
        context.ui.line(format!("device: {}{threads}", self.what));
        if let Some(warning) = &self.warning {
            context.ui.notice(warning);
        }
    }
}

impl Begun {
    /// Fails if a stage would continue with a directory on another device: its numbers would be of two.
    fn check_same(&self, taken: &Taken, dir: &Path) -> Result<()> {
        let now = &taken.settings;
        if (self.kind, self.dtype) == (now.kind, now.dtype) {
            return Ok(());
        }
        let what = format!("{}: began on another device", dir.display());
        let (kind, dtype) = (self.kind.name(), self.dtype.name());
        let mut lines = String::new();
        for (key, before, after) in
            [("device.kind", kind, now.kind.name()), ("device.dtype", dtype, now.dtype.name())]
        {
            if before != after {
                lines += &format!("  - {key} = {before}\n  + {key} = {after}\n");
            }
        }
        let hint = format!(
            "began on {kind} ({dtype}); here: {}. Go on where it began, with --device {kind} --dtype {dtype}, or \
             remove the directory to start over",
            taken.what
        );
        Err(refused(what, lines, &hint))
    }
}

/// The error about a missing device, with what the directory needs it for.
fn begun_on(started: Option<&Begun>, dir: &Path, error: anyhow::Error) -> anyhow::Error {
    match started {
        Some(Begun { kind, .. }) => error.context(format!("{}: began on {}", dir.display(), kind.name())),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{self, State};
    use serde_json::json;

    #[cfg(not(feature = "cuda"))]
    fn place() -> RankInfo {
        RankInfo { node: "n1".into(), local_rank: 0, local_size: 1 }
    }

    fn settings(kind: DeviceKind, dtype: DtypeKind) -> DeviceConfig {
        DeviceConfig { kind, dtype, ..DeviceConfig::default() }
    }

    #[test]
    fn gpus_of_a_job_are_not_passed_over() {
        let given = || Some(("SLURM_JOB_GPUS", "0,1".to_string()));
        let message = passed_over(given(), true, "no CUDA").unwrap_err().to_string();
        assert!(message.contains("SLURM_JOB_GPUS=0,1") && message.contains("no CUDA"), "{message}");
        assert!(passed_over(given(), false, "no CUDA").unwrap().unwrap().contains("SLURM_JOB_GPUS=0,1"));
        assert!(passed_over(None, true, "no CUDA").unwrap().unwrap().contains("driver"));
        assert_eq!(passed_over(None, false, "no CUDA").unwrap(), None);
    }

    #[test]
    fn what_is_taken_is_named_and_never_auto() {
        let taken = gpu(&settings(DeviceKind::Auto, DtypeKind::Auto), "NVIDIA H100");
        assert_eq!((taken.settings.kind, taken.settings.dtype), (DeviceKind::Cuda, DtypeKind::Bf16));
        assert_eq!(taken.what, "NVIDIA H100 (bf16)");
        assert_eq!(gpu(&settings(DeviceKind::Cuda, DtypeKind::F32), "x").settings.dtype, DtypeKind::F32);
        let taken = cpu(&settings(DeviceKind::Auto, DtypeKind::Auto), "no driver");
        assert_eq!((taken.settings.kind, taken.settings.dtype), (DeviceKind::Cpu, DtypeKind::F32));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn auto_without_cuda_is_the_cpu_or_an_error() {
        let what = |kind, dtype| take(&settings(kind, dtype), &place()).map(|taken| taken.what);
        for kind in [DeviceKind::Auto, DeviceKind::Cpu] {
            assert!(what(kind, DtypeKind::Auto).unwrap().starts_with("CPU"));
        }
        for (kind, dtype) in [(DeviceKind::Cuda, DtypeKind::Auto), (DeviceKind::Auto, DtypeKind::Bf16)] {
            let message = what(kind, dtype).unwrap_err().to_string();
            assert!(message.contains("without CUDA") && message.contains("device."), "{message}");
        }
    }

    #[test]
    fn a_directory_resumes_where_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let record = |files: &[String]| {
            let device = settings(DeviceKind::Cuda, DtypeKind::Bf16);
            let state = record::open(dir.path(), "train", json!({ "device": device })).unwrap();
            let State::Open(output) = state else { panic!("nothing is finished yet") };
            match files {
                [] => drop(output),
                files => output.finish(files).unwrap(),
            }
            Begun::of(dir.path()).unwrap()
        };
        let started = record(&[]);
        let here = cpu(&settings(DeviceKind::Auto, DtypeKind::Auto), "no driver");
        let message = started.check_same(&here, dir.path()).unwrap_err().to_string();
        assert!(message.contains("- device.kind = cuda\n  + device.kind = cpu"), "{message}");
        started.check_same(&gpu(&settings(DeviceKind::Auto, DtypeKind::Auto), "x"), dir.path()).unwrap();
        std::fs::write(dir.path().join("a"), "b").unwrap();
        assert!(!started.is_finished && record(&["a".into()]).is_finished);
        assert!(Begun::of(Path::new("nowhere")).is_none());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn ranks_have_the_gpu_of_their_number_or_the_only_one() {
        let place = |local_rank| RankInfo { node: "n1".into(), local_rank, local_size: 4 };
        assert_eq!(ordinal(&place(3), 1), Ok(0));
        assert_eq!(ordinal(&place(3), 4), Ok(3));
        assert_eq!(ordinal(&place(1), 8), Ok(1));
        let why = ordinal(&place(2), 2).unwrap_err();
        assert!(why.contains("4 ranks") && why.contains("2 CUDA devices"), "{why}");
    }
}
