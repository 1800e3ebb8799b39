//! One training on several ranks: the same losses on any number of them, the same bytes in
//! every run on as many, whatever happens in between.
//!
//! Started by `cargo test --features mpi`, this program starts itself again under `mpirun`;
//! there, each process is a rank of a training on a small store of made-up tuples.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

use gradtx_kernels::rng::Stream;
use gradtx_pipeline::records::CurateInputs;
use gradtx_pipeline::stages::train;
use gradtx_run::cluster::{self, World};
use gradtx_run::config::RunArgs;
use gradtx_run::context::Context;
use gradtx_run::failure::ErrorReport;
use gradtx_run::ui::Ui;
use gradtx_run::{interrupt, record};
use gradtx_runtime::artifact::{
    Role, StoreType, TuplePlan, UpdateSpace, assemble, checksum, checksum_file, little_endian, write_init,
    write_shard,
};
use gradtx_runtime::checkpoint::{Saved, part_path, saved};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant};

/// The run directory, in a process under `mpirun`.
const RUN: &str = "GRADTX_TEST_RUN";
/// Settings that differ, one per line.
const SET: &str = "GRADTX_TEST_SET";
/// `SIGNAL RANK STEP`: the rank gets this signal when the checkpoint of the step, or a later
/// one, is there, or (for step 0) the metrics of ten steps.
const SIGNAL: &str = "GRADTX_TEST_SIGNAL";

/// Elements of a bucket of gradients: the model has some thousands.
const BUCKET: usize = 700;

const SETTINGS: &str = r#"
seed = 5
[translator]
d_model = 16
d_ff = 24
d_kv = 8
num_heads = 2
num_layers = 2
num_decoder_layers = 1
dropout_rate = 0.1
[train]
max_steps = 40
global_batch_size = 6
per_device_train_batch_size = 2
learning_rate = 0.01
val_set_size = 0.3
eval_steps = 4
save_minutes = 0
mixup_prob = 0.4
input_noise_std = 0.1
"#;

fn main() -> ExitCode {
    if let Some(run) = std::env::var_os(RUN) {
        return ExitCode::from(be_a_rank(Path::new(&run)));
    }
    let begin = Instant::now();
    let home = Home::new(None);
    let alone = home.trained("alone", 1);
    the_losses_are_those_of_one_rank(&home, &alone);
    let four = home.trained("four", 4);
    as_many_ranks_give_the_same_bytes(&home, &four);
    killed_ranks_lose_little(&home, &alone, &four);
    a_signal_stops_all_ranks(&home, &four);
    failures(&alone);
    println!("all in {:?}", begin.elapsed());
    ExitCode::SUCCESS
}

/// What each process under `mpirun` does; its exit code.
fn be_a_rank(run: &Path) -> u8 {
    let ui = Ui::new("train", false, false);
    let report = |error: &anyhow::Error| {
        let told = ErrorReport::from(error);
        told.print(false);
        told.code
    };
    cluster::run(report, |world: &World| {
        interrupt::watch(&ui);
        if let Ok(signal) = std::env::var(SIGNAL) {
            signal_later(&signal, run, world.comm().rank());
        }
        let config = run.parent().map(|home| home.join("settings.toml"));
        let set = std::env::var(SET).unwrap_or_default().lines().map(String::from).collect();
        let args = RunArgs {
            run: run.to_owned(),
            config,
            preset: None,
            device: None,
            dtype: None,
            tuples: None,
            translator: None,
            set,
        };
        train::run_in_buckets(&Context::new(Some(1), ui.clone(), world), world, &args, BUCKET)
    })
}

/// Sends this process a signal when its time has come, if it is the one.
fn signal_later(what: &str, run: &Path, rank: usize) {
    let [signal, chosen, step] = what.split(' ').collect::<Vec<_>>()[..] else { panic!("{what}") };
    let (signal, step) = (signal.to_string(), step.parse::<u64>().unwrap());
    if rank != chosen.parse::<usize>().unwrap() {
        return;
    }
    let dir = run.join("translator");
    std::thread::spawn(move || {
        let is_time = || match step {
            0 => std::fs::read_to_string(dir.join("metrics.jsonl")).is_ok_and(|t| t.lines().count() >= 10),
            _ => saved(&dir.join("checkpoints")).unwrap().last().is_some_and(|newest| newest.step >= step),
        };
        while !is_time() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Command::new("kill").arg(signal).arg(std::process::id().to_string()).status().unwrap();
    });
}

/// A directory with settings and a store of tuples.
struct Home {
    dir: tempfile::TempDir,
}

/// What a finished training leaves.
struct Trained {
    dir: PathBuf,
    said: String,
}

impl Home {
    /// Teachers are a linear function of students, nearly. In `bad`, a (shadow, snapshot), the
    /// teacher's values are so large that their squares are not numbers any more.
    fn new(bad: Option<(usize, usize)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("settings.toml"), SETTINGS).unwrap();
        let store = dir.path().join("shadow");
        let init = |blocks: usize, width: usize| vec![0.25f32; blocks * width];
        let space = |blocks: usize, width: usize| UpdateSpace {
            blocks,
            width,
            layout: "made-up".into(),
            base_model: "made-up".into(),
            targets: vec!["q_proj".into()],
            rank: 2,
            alpha: 32.0,
            freeze_a: false,
            init: checksum(&little_endian(&init(blocks, width))),
        };
        let (student, teacher) = (space(2, 7), space(3, 11));
        let plan = TuplePlan { shadows: 7, steps: 3, dtype: StoreType::F32, student, teacher };
        for role in Role::BOTH {
            let UpdateSpace { blocks, width, .. } = *plan.space(role);
            write_init(&store, role, plan.space(role), &init(blocks, width)).unwrap();
        }
        let mut random = Stream::new(1);
        let map: Vec<f64> = (0..14 * 33).map(|_| random.normal()).collect();
        for shadow in 0..plan.shadows {
            let (mut students, mut teachers) = (vec![], vec![]);
            for step in 0..plan.steps {
                let x: Vec<f64> = (0..14).map(|_| 1e-3 * random.normal()).collect();
                let size = if bad == Some((shadow, step)) { 1e30 } else { 1.0 };
                teachers.extend(map.chunks(14).map(|row| {
                    let y: f64 = row.iter().zip(&x).map(|(a, b)| a * b).sum();
                    (size * (y + 1e-4 * random.normal())) as f32
                }));
                students.extend(x.into_iter().map(|x| x as f32));
            }
            write_shard(&store, &plan, Role::Student, shadow, &students).unwrap();
            write_shard(&store, &plan, Role::Teacher, shadow, &teachers).unwrap();
        }
        let manifest = assemble(&store, &plan, json!({})).unwrap().manifest;
        let record::State::Open(output) =
            record::open(&store, "curate", json!(CurateInputs::default())).unwrap()
        else {
            panic!("a new store is not finished");
        };
        let files = manifest.files().map(|(name, _)| name.to_string_lossy().into_owned());
        let init = ["student", "teacher"].map(|role| format!("init/{role}.safetensors"));
        output.finish(&files.chain(init).chain(["manifest.json".into()]).collect::<Vec<_>>()).unwrap();
        Self { dir }
    }

    /// Runs a training in the run directory `name`, which begins with the store of this home.
    fn train(&self, name: &str, ranks: usize, signal: Option<&str>, set: &[&str]) -> Output {
        let run = self.dir.path().join(name);
        if !run.exists() {
            std::fs::create_dir(&run).unwrap();
            std::os::unix::fs::symlink(self.dir.path().join("shadow"), run.join("shadow")).unwrap();
        }
        let mut command = Command::new("mpirun");
        command
            .args(["-n", &ranks.to_string()])
            .arg(std::env::current_exe().unwrap())
            // A container's only user.
            .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
            // Fewer cores than ranks.
            .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_mpi_yield_when_idle", "1")])
            .env("OMPI_MCA_hwloc_base_binding_policy", "none")
            .env(RUN, &run)
            .env(SET, set.join("\n"));
        signal.map(|signal| command.env(SIGNAL, signal));
        command.output().expect("mpirun is installed where this test is asked for")
    }

    /// The same, to the end.
    fn trained(&self, name: &str, ranks: usize) -> Trained {
        let output = self.train(name, ranks, None, &[]);
        assert!(output.status.success(), "{name} on {ranks} ranks: {output:?}");
        let dir = self.dir.path().join(name).join("translator");
        assert!(!dir.join("checkpoints").exists(), "{name}: a finished training needs none");
        let names = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        assert!(left.is_empty(), "{name}: temporary files {left:?}");
        Trained { dir, said: String::from_utf8_lossy(&output.stdout).into_owned() }
    }

    fn checkpoints(&self, name: &str) -> PathBuf {
        self.dir.path().join(name).join("translator/checkpoints")
    }
}

impl Trained {
    fn metrics(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The loss of every step and the errors of every validation; or the gradients' norms.
    fn numbers(&self, norms: bool) -> Vec<f64> {
        let of_step = |line: &Value| {
            let validation = &line["validation"];
            let errors = vec![&line["loss"], &validation["mse"], &validation["relative_error"]];
            let all = if norms { vec![&line["grad_norm"]] } else { errors };
            all.iter().filter_map(|number| number.as_f64()).collect::<Vec<_>>()
        };
        self.metrics().iter().flat_map(of_step).collect()
    }

    /// Checksums of what it is made for.
    fn sums(&self) -> Vec<String> {
        let files = ["metrics.jsonl", "model.safetensors", "validation.json", "normalization.safetensors"];
        files.map(|name| checksum_file(&self.dir.join(name)).unwrap()).into()
    }

    /// The step that it went on after.
    fn went_on_after(&self) -> u64 {
        let after = self.said.split("going on after step ").nth(1);
        let step = after.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        step.unwrap_or_else(|| panic!("it started over: {}", self.said))
    }

    /// Relative differences of the losses and errors, and of the gradients' norms, at most.
    fn difference(&self, other: &Self) -> [f64; 2] {
        [(false, 40 + 2 * 10), (true, 40)].map(|(norms, count)| {
            let (a, b) = (self.numbers(norms), other.numbers(norms));
            assert!(a.len() == count && b.len() == count, "{} and {} numbers", a.len(), b.len());
            let differences = a.iter().zip(&b).map(|(a, b)| (a - b).abs() / b.abs());
            differences.map(|d| if d.is_nan() { f64::INFINITY } else { d }).fold(0.0, f64::max)
        })
    }

    fn assert_near(&self, other: &Self) {
        let [losses, norms] = self.difference(other);
        let dir = self.dir.display();
        assert!(losses <= 1e-5, "{dir}: losses differ by {losses:e}");
        // Small gradients count as much as large ones in them, so they depend more on rounding.
        assert!(norms <= 1e-4, "{dir}: norms differ by {norms:e}");
    }
}

fn the_losses_are_those_of_one_rank(home: &Home, alone: &Trained) {
    for ranks in [2, 3, 6] {
        home.trained(&format!("on {ranks}"), ranks).assert_near(alone);
    }
    let throughput =
        std::fs::read_to_string(home.dir.path().join("on 3/translator/throughput.jsonl")).unwrap();
    let last: Value = serde_json::from_str(throughput.lines().last().unwrap()).unwrap();
    let seconds = |of: &str| last["seconds"][of].as_f64().unwrap();
    assert!(last["ranks"] == 3 && seconds("compute") > 0.0 && seconds("communication") > 0.0, "{last}");
    assert!(seconds("data") >= 0.0, "{last}");
    // Another order of tuples is found out.
    let other = home.train("other", 2, None, &["seed=6"]);
    assert!(other.status.success(), "{other:?}");
    let other = Trained { dir: home.dir.path().join("other/translator"), said: String::new() };
    assert!(other.difference(alone).iter().all(|d| *d > 1e-2), "another seed must give other losses");
    println!("1, 2, 3 and 6 ranks have the same losses: ok");
}

fn as_many_ranks_give_the_same_bytes(home: &Home, four: &Trained) {
    let again = home.trained("four again", 4);
    four.assert_near(&home.trained("alone", 1));
    assert_eq!(again.sums(), four.sums());
    let alone = ["alone", "alone again"].map(|name| home.trained(name, 1));
    assert!(alone[0].said.contains("is finished"), "{}", alone[0].said);
    assert_eq!(alone[0].sums(), alone[1].sums());
    assert_ne!(alone[0].sums(), four.sums(), "if these were equal, nothing would have been compared");
    println!("two runs, the same bytes: ok");
}

fn killed_ranks_lose_little(home: &Home, alone: &Trained, four: &Trained) {
    // Killed three times, and each time nearly nothing is done again.
    for (signal, least) in [("-9 1 7", 7), ("-9 0 15", 15), ("-9 3 26", 26)] {
        let output = home.train("killed", 4, Some(signal), &[]);
        assert_eq!(output.status.code(), Some(137), "{signal}: {output:?}");
        let newest = saved(&home.checkpoints("killed")).unwrap().pop().unwrap();
        assert!(newest.step >= least && newest.parts == 4, "{newest:?}");
    }
    let before = saved(&home.checkpoints("killed")).unwrap().pop().unwrap();
    // Others continue from there, too.
    copy_run(home, "killed", "fewer");
    copy_run(home, "killed", "one");
    copy_run(home, "killed", "damaged");
    let killed = home.trained("killed", 4);
    assert_eq!(killed.went_on_after(), before.step);
    assert_eq!(killed.sums(), four.sums());
    for (name, ranks) in [("fewer", 2), ("one", 1)] {
        let fewer = home.trained(name, ranks);
        assert_eq!(fewer.went_on_after(), before.step);
        fewer.assert_near(alone);
    }
    // The newest is damaged in one part: the one before it is there.
    let path = part_path(&home.checkpoints("damaged"), before, 2);
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 5;
    bytes[end] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = home.trained("damaged", 4);
    assert!((1..before.step).contains(&damaged.went_on_after()), "{}", damaged.said);
    assert_eq!(damaged.sums(), four.sums());
    println!("killed, and gone on with 4, 2 and 1 ranks: ok");
}

fn copy_run(home: &Home, from: &str, to: &str) {
    let at = |name: &str| home.dir.path().join(name);
    let done = Command::new("cp").arg("-a").args([at(from), at(to)]).status().unwrap();
    assert!(done.success());
}

fn a_signal_stops_all_ranks(home: &Home, four: &Trained) {
    // Only one rank is asked, and no checkpoint is due for long.
    let output = home.train("stopped", 4, Some("-USR1 2 0"), &["train.save_minutes=100"]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{output:?}");
    assert_eq!(err.matches("stopped as asked").count(), 1, "{err}");
    let list = saved(&home.checkpoints("stopped")).unwrap();
    assert!(matches!(list[..], [Saved { step: 10.., parts: 4 }]), "{list:?}");
    let lines = std::fs::read_to_string(home.dir.path().join("stopped/translator/metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().count() as u64, list[0].step, "the metrics are as far as the checkpoint");
    let output = home.train("stopped", 4, None, &["train.save_minutes=100"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let stopped = Trained { dir: home.dir.path().join("stopped/translator"), said };
    assert_eq!(stopped.went_on_after(), list[0].step);
    assert_eq!(stopped.sums(), four.sums());
    println!("stopped by a signal to one rank: ok");
}

/// One error on one rank, with its exit code.
fn failures(alone: &Trained) {
    let report = std::fs::read_to_string(alone.dir.join("validation.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let held_out = report["held_out"].as_array().unwrap();
    let bad = (0..7).find(|shadow| held_out.iter().all(|tuple| tuple[0] != *shadow)).unwrap();
    let home = Home::new(Some((bad, 1)));
    let tuple = format!(", tuple {bad}/1: gradient");
    let raw = ["translator.update_normalization=none", "train.mixup_prob=0.0"];
    let few = ["train.global_batch_size=2"];
    for (name, ranks, set, code, words) in [
        ("bad", 4, &raw[..], 1, [&*tuple, "nothing was updated"]),
        ("bad alone", 1, &raw[..], 1, [&*tuple, "nothing was updated"]),
        ("too many", 3, &few[..], 2, ["train.global_batch_size is 2", "3 were started"]),
    ] {
        let begin = Instant::now();
        let output = home.train(name, ranks, None, set);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{name}: {output:?}");
        assert!(words.iter().all(|word| err.contains(word)), "{name}: {words:?} in {err}");
        assert_eq!(err.matches("error: ").count(), 1, "{name}: {err}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{name}: {:?}", begin.elapsed());
        println!("{name}: ok");
    }
}
