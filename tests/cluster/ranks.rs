//! Curation by several ranks and by several processes: the same bytes as by one, whoever did
//! what, and however often it was stopped; and what goes wrong ends all ranks with one error.

#![allow(clippy::unwrap_used)]

use gradtx_tests::miniature::{self, checksums};
use gradtx_tests::ranks::{End, children, end_of, mpirun, signal};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");
/// A world that fails must end within this time, `mpirun`'s start included.
const SOON: Duration = Duration::from_secs(20);
/// Settings with which curation takes so long that it can be stopped on its way.
const LONG: [&str; 4] = ["--set", "curate.tiny.max_steps=3000", "--set", "curate.llm.max_steps=2000"];

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        miniature::write(dir.path());
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `mpirun -n size gradtx stage --run run …`
    fn ranks(&self, size: usize, stage: &str, run: &str, more: &[&str]) -> Command {
        let words = words(stage, run, more);
        mpirun(self.0.path(), &[(size, &words)])
    }

    fn alone(&self, stage: &str, run: &str, more: &[&str]) -> Command {
        let words = words(stage, run, more);
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(self.0.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Files of a run, by their place in it, without what reports times.
    fn files(&self, run: &str) -> Vec<(PathBuf, String)> {
        let dir = self.path(run);
        let sums = checksums(&dir);
        sums.into_iter().map(|(path, sum)| (path.strip_prefix(&dir).unwrap().to_owned(), sum)).collect()
    }

    fn status(&self, run: &str) -> Value {
        let end = end_of({
            let mut command = Command::new(PROGRAM);
            command.args(["status", run, "--json"]).current_dir(self.0.path());
            command
        });
        // There may be no run yet.
        let Some(line) = end.out.lines().last() else { return Value::Null };
        let stages = serde_json::from_str::<Value>(line).unwrap()["stages"].take();
        let rows = stages.as_array().unwrap().clone();
        rows.into_iter().find(|row| row["stage"] == "curate").unwrap_or(Value::Null)
    }
}

fn words<'a>(stage: &'a str, run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[PROGRAM, stage, "--run", run, "--config", "settings.toml", "--threads", "1"], more].concat()
}

/// A file that no finished directory may hold.
fn left_behind(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let odd = |n: &String| {
        n.starts_with('.')
            || n.starts_with("progress")
            || n == "failed.json"
            || n == "checkpoints"
            || n == "claims"
    };
    names.filter(odd).collect()
}

#[test]
fn any_number_of_ranks_gives_the_same_bytes() {
    let home = Home::new();
    end_of(home.alone("curate", "one", &[])).well();
    let wanted = home.files("one");
    assert!(wanted.len() > 20, "{wanted:?}");
    let scratch = home.path("scratch").display().to_string();
    let ways: [(usize, &[&str]); 5] = [(1, &[]), (2, &[]), (3, &[]), (4, &[]), (2, &["--scratch", &scratch])];
    for (size, more) in ways {
        let run = format!("run-{size}-{}", more.len());
        let end = end_of(home.ranks(size, "curate", &run, more)).well();
        assert_eq!(end.out.matches("shadow pairs").count(), 1, "one rank speaks: {end:?}");
        assert_eq!(home.files(&run), wanted, "{size} ranks {more:?}");
        assert_eq!(left_behind(&home.path(&run).join("shadow")), [""; 0]);
    }
    assert_eq!(std::fs::read_dir(scratch).unwrap().count(), 0);
    // The comparison sees what it should see.
    end_of(home.alone("curate", "other", &["--set", "curate.tiny.learning_rate=0.03"])).well();
    assert_ne!(home.files("other"), wanted);
}

#[test]
fn how_many_jobs_share_a_stream_is_decided_once() {
    let home = Home::new();
    let decide = ["--set", "curate.jobs_per_batch=0"];
    end_of(home.ranks(3, "curate", "run", &decide)).well();
    let record = std::fs::read_to_string(home.path("run/shadow/record.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["settings"]["curate"]["jobs_per_batch"], 5, "all that there are");
    let before = home.files("run");
    std::fs::remove_file(home.path("run/shadow/shards/00003.student.safetensors")).unwrap();
    end_of(home.alone("curate", "run", &decide)).well();
    assert_eq!(home.files("run"), before);
}

#[test]
fn processes_of_one_directory_do_everything_once() {
    let home = Home::new();
    end_of(home.alone("curate", "one", &[])).well();
    let start = |id: usize| -> Child {
        let mut command = home.alone("curate", "run", &["--array"]);
        command.env("SLURM_ARRAY_TASK_ID", id.to_string()).env("SLURM_ARRAY_TASK_COUNT", "3");
        command.spawn().unwrap()
    };
    let processes: Vec<Child> = (0..3).map(start).collect();
    for process in processes {
        let began = Instant::now();
        End::of(process.wait_with_output().unwrap(), began).well();
    }
    assert_eq!(home.files("run"), home.files("one"));
    assert_eq!(left_behind(&home.path("run/shadow")), [""; 0]);
    // Every group was trained by one of them.
    let mut groups = vec![];
    for entry in std::fs::read_dir(home.path("run/shadow")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("throughput-") {
            for line in std::fs::read_to_string(path).unwrap().lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                groups.push((name.split('.').next().unwrap().to_string(), line["group"].as_u64().unwrap()));
            }
        }
    }
    groups.sort();
    let mut once = groups.clone();
    once.dedup();
    assert!(groups.len() == 6 && once.len() == 6, "{groups:?}");
}

#[test]
fn killed_array_process_s_work_is_done_by_the_next() {
    let home = Home::new();
    let long = [&LONG[..], &["--array"]].concat();
    let start = || home.alone("curate", "run", &long).spawn().unwrap();
    let (mut first, second) = (start(), start());
    let started = || home.status("run")["processes"].as_array().is_some_and(|all| all.len() == 2);
    wait_until(started);
    // Alone would be somebody else's business.
    let refused = end_of(home.alone("curate", "run", &LONG));
    assert_eq!(refused.code, Some(4), "{refused:?}");
    first.kill().unwrap();
    first.wait().unwrap();
    let began = Instant::now();
    End::of(second.wait_with_output().unwrap(), began).well();
    assert_eq!(home.status("run")["state"], "finished");
    end_of(home.alone("curate", "one", &LONG)).well();
    assert_eq!(home.files("run"), home.files("one"));
}

#[test]
fn ranks_make_the_emulator_of_one_also_after_a_kill() {
    let home = Home::new();
    let set = ["--set", "emulator.edge=[1,0]", "--set", "emulator.num_tokens=300"];
    end_of(home.alone("emulate", "one", &set)).well();
    let wanted = home.files("one");
    assert!(wanted.iter().any(|(path, _)| path.ends_with("model/model.safetensors")), "{wanted:?}");
    for size in [1, 2, 3] {
        let run = format!("run-{size}");
        let end = end_of(home.ranks(size, "emulate", &run, &set)).well();
        assert_eq!(end.out.matches("cosine of the edge's gradient").count(), 1, "one rank speaks: {end:?}");
        assert_eq!(home.files(&run), wanted, "{size} ranks");
    }
    for milliseconds in [300, 600, 900] {
        let mut ranks = home.ranks(2, "emulate", "killed", &set).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        ranks.kill().unwrap();
        ranks.wait().unwrap();
    }
    // Ranks end when their starter is gone.
    wait_until(|| end_of(home.ranks(2, "emulate", "killed", &set)).code == Some(0));
    assert_eq!(home.files("killed"), wanted);
}

fn wait_until(mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(60), "it never happened");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_signal_to_one_rank_stops_all_and_nothing_is_lost() {
    let home = Home::new();
    let child = home.ranks(3, "curate", "run", &LONG).spawn().unwrap();
    let working = || {
        let row = home.status("run");
        let ranks = row["progress"]["ranks"].as_array().cloned().unwrap_or_default();
        ranks.len() == 3 && ranks.iter().all(|rank| rank["done"].as_u64() > Some(0))
    };
    wait_until(working);
    let ranks = home.status("run")["progress"]["ranks"].clone();
    let pid = ranks[2]["pid"].as_u64().unwrap() as u32;
    assert!(children(&child).contains(&pid), "{ranks}");
    signal(pid, "USR1");
    let began = Instant::now();
    let end = End::of(child.wait_with_output().unwrap(), began);
    assert!(end.code == Some(75) && end.took < SOON, "{end:?}");
    assert_eq!(end.err.matches("stopped as asked").count(), 1, "{end:?}");
    assert_eq!(home.status("run")["state"], "stopped");
    let aside = std::fs::read_dir(home.path("run/shadow/checkpoints")).unwrap().count();
    assert!(aside >= 1, "what the ranks were at is kept");

    // On fewer ranks, from where it stopped.
    end_of(home.ranks(2, "curate", "run", &LONG)).well();
    end_of(home.alone("curate", "one", &LONG)).well();
    assert_eq!(home.files("run"), home.files("one"));
    assert_eq!(left_behind(&home.path("run/shadow")), [""; 0]);
}

/// One error of one rank, with these words, and all ranks gone.
fn one_error(end: &End, code: i32, words: &[&str]) {
    assert!(end.code == Some(code) && end.took < SOON, "{end:?}");
    assert_eq!(end.err.matches("error: ").count(), 1, "{end:?}");
    for word in words {
        assert!(end.err.contains(word), "no `{word}` in {end:?}");
    }
}

#[test]
fn what_is_wrong_on_one_rank_ends_all() {
    let home = Home::new();
    let with = |more: &[&'static str]| words("curate", "run", more);
    let two = |other: &[&'static str]| end_of(mpirun(home.0.path(), &[(1, &with(&[])), (2, &with(other))]));
    // A base model that one node lacks, or that is another one there.
    let end = two(&["--set", "models.llm=gone"]);
    one_error(&end, 2, &["rank 1 of 3 on ", "models.llm", "gone: there is no such directory"]);
    let end = two(&["--set", "models.llm=tiny"]);
    one_error(&end, 3, &["rank 1 of 3 on ", "other inputs than rank 0", "llm = "]);
    // Other settings.
    let end = two(&["--set", "curate.llm.learning_rate=0.5"]);
    one_error(
        &end,
        3,
        &["rank 1 of 3 on ", "- curate.llm.learning_rate = 0.02", "+ curate.llm.learning_rate = 0.5"],
    );
    assert!(!home.path("run/shadow").exists(), "nothing is started before all agree");
    // A directory that cannot be written to, and one that is full.
    let end = end_of(home.ranks(3, "curate", "/sys/run", &[]));
    one_error(&end, 1, &["rank 0 of 3 on ", "/sys/run"]);
    let large = [
        "curate.num_snapshots=40",
        "curate.snapshot_steps=1",
        "curate.tiny.max_steps=40",
        "curate.llm.max_steps=40",
    ];
    let large = large.map(|set| ["--set", set]).concat();
    // Shards are larger than 4 KiB; the record and the error are not.
    let line = format!("ulimit -f 8; exec {}", words("curate", "full", &large).join(" "));
    let mut limited = mpirun(home.0.path(), &[(3, &["sh", "-c", &line])]);
    // MPI's own files, in shared memory, would be too large as well.
    limited.envs([("OMPI_MCA_btl", "self,tcp"), ("PMIX_MCA_gds", "hash")]);
    let end = end_of(limited);
    one_error(&end, 1, &["of 3 on ", "full/shadow/", "too large", "same command resumes"]);
    let state = home.status("full");
    assert_eq!(state["state"], "failed", "{state}");
    end_of(home.ranks(2, "curate", "full", &large)).well();
    // A shard that was damaged since.
    let shard = home.path("full/shadow/shards/00002.teacher.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let end = end_of(home.ranks(2, "train", "full", &large));
    one_error(&end, 1, &["of 2 on ", "00002.teacher.safetensors", "gradtx curate"]);
}

#[test]
fn stages_of_one_process_refuse_several() {
    let home = Home::new();
    let end = end_of(home.ranks(3, "finetune", "run", &["--data", "private.jsonl", "--out", "client"]));
    one_error(&end, 2, &["`gradtx finetune` works in one process, but mpirun started 3"]);
    // Four tasks of which MPI is told nothing: one of them says so.
    let task = |rank: &str| {
        let mut command = home.alone("curate", "run", &[]);
        command.envs([("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", rank)]);
        end_of(command)
    };
    one_error(&task("0"), 1, &["srun started 4 processes, but told MPI of none", "--mpi=pmix"]);
    assert_eq!(task("3").err.matches("error: ").count(), 0);
}
