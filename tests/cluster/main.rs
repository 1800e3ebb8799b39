//! The batch scripts and `gradtx submit` on a real SLURM of two nodes, which these tests start
//! themselves (`make cluster`). What runs is the miniature pipeline; where the program's own
//! part would hide the scripts', a shell script stands in for it.

#![allow(clippy::unwrap_used)]

mod cluster;
mod home;

use cluster::{Cluster, both, cluster, cluster_alone};
use gradtx_runtime::artifact::TupleStore;
use home::{GRADTX, Home, SMALL, scripts};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Stops when it is asked to, in its first start; ends well in the next.
const STOPS_ONCE: &str = r#"
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then echo "went on"; exit 0; fi
trap 'exit 75' USR1
echo listening
while true; do sleep 0.05; done"#;

/// Waits until each of a job's ranks has said something.
fn until_said(home: &Home, cluster: &Cluster, job: &str, ranks: usize, what: &str) {
    cluster.until(&format!("job {job} says `{what}`"), || {
        (0..ranks)
            .all(|rank| home.find_log(&format!("-{job}.{rank}.log")).is_some_and(|log| log.contains(what)))
    });
}

/// Waits until a job has been put back into the queue, for the first time.
fn until_requeued(home: &Home, cluster: &Cluster, job: &str) {
    let restarted = || {
        assert_ne!(cluster.field(job, "JobState"), "FAILED", "{}", home.said(job));
        cluster.field(job, "Restarts") == "1"
    };
    cluster.until_or("requeued", restarted, || home.said(job));
}

fn ask_to_stop(cluster: &Cluster, job: &str) {
    cluster.done(cluster.command("scancel").args(["--batch", "--signal=USR1", job]));
}

#[test]
fn ranks_see_their_gpus_and_have_threads_and_logs() {
    let (cluster, home) = (cluster(), Home::new());
    let show = home.stand_in(r#"echo "$SLURM_PROCID on $(hostname -s): gpu $CUDA_VISIBLE_DEVICES, $*""#);
    let options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3"];
    let job = home.sbatch(&cluster, &options, "curate.sbatch", &["run", "--x", "a b"], &[("GRADTX", &show)]);
    assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
    let mut places: Vec<String> = (0..4)
        .map(|rank| {
            let said = home.log(&format!("-{job}.{rank}.log"));
            let (place, words) = said.trim().split_once(", ").unwrap();
            assert_eq!(words, "curate --threads 3 --run run --x a b");
            place.split_once(" on ").unwrap().1.to_string()
        })
        .collect();
    places.sort();
    if places[0].starts_with("node1") {
        assert_eq!(places, ["node1: gpu 0,1", "node1: gpu 0,1", "node2: gpu 0,1", "node2: gpu 0,1"]);
    } else {
        // Nodes that share this machine's host name.
        assert!(places.iter().all(|place| place.ends_with("gpu 0,1")), "{places:?}");
    }
    let said = home.said(&job);
    let [first, last] = said.lines().collect::<Vec<_>>()[..] else { panic!("two lines: {said}") };
    let named = ["gradtx 0.0.0-stand-in on ", "(nodes: 2, tasks: 4)", "no GPU", "started 2"];
    assert!(named.iter().all(|word| first.contains(word)), "the first line says where: {first}");
    let said = last;
    assert!(said.contains("done") && said.contains(&format!("run/logs/gradtx-curate-{job}.*.log")), "{said}");
}

#[test]
fn in_the_batch_script_itself_the_program_is_alone() {
    let (cluster, home) = (cluster(), Home::new());
    let mut command = home.command(&cluster, "sbatch");
    command
        .args(["--parsable", "--ntasks=2", "--wrap"])
        .arg("\"$GRADTX\" curate --run run --config settings.toml");
    let job = cluster.done(&mut command).trim().to_string();
    assert_eq!(cluster.ended(&job), "COMPLETED");
    assert!(TupleStore::open(&home.path("run/shadow")).is_ok());
}

#[test]
fn a_job_that_is_asked_to_stop_comes_back() {
    let (cluster, home) = (cluster(), Home::new());
    let program = home.stand_in(STOPS_ONCE);
    let job = home.sbatch(&cluster, &["--nodes=2"], "train.sbatch", &["run"], &[("GRADTX", &program)]);
    until_said(&home, &cluster, &job, 2, "listening");
    ask_to_stop(&cluster, &job);
    until_requeued(&home, &cluster, &job);
    assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
    let said = home.said(&job);
    assert!(said.contains("stopped on request, requeued") && said.contains("done"), "{said}");
    assert_eq!(home.log(&format!("-{job}-r1.1.log")).trim(), "went on", "a log for every start");
}

#[test]
fn ranks_that_have_answered_are_not_asked_again() {
    let (cluster, home) = (cluster(), Home::new());
    // A second signal would end it without its checkpoint for longer than the script waits.
    let program = home.stand_in(
        r#"
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then exit 0; fi
trap 'asked=1 && trap "exit 1" USR1 && echo "stopping at the end of this step; once more to end at once"' USR1
echo listening
for ((i = 0; ${asked:-0} == 0 || i < 240; i++)); do sleep 0.05; done
exit 75"#,
    );
    let job = home.sbatch(&cluster, &["--nodes=2"], "train.sbatch", &["run"], &[("GRADTX", &program)]);
    until_said(&home, &cluster, &job, 2, "listening");
    ask_to_stop(&cluster, &job);
    until_requeued(&home, &cluster, &job);
    assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
}

#[test]
fn early_signals_requeue_the_job_too() {
    let (cluster, home) = (cluster(), Home::new());
    // Rank 1 does not listen yet, and dies of the signal; rank 0 is ended with it.
    let program = home.stand_in(&STOPS_ONCE.replace("trap", "[ \"$SLURM_PROCID\" = 1 ] || trap"));
    let job = home.sbatch(&cluster, &["--nodes=2"], "train.sbatch", &["run"], &[("GRADTX", &program)]);
    until_said(&home, &cluster, &job, 2, "listening");
    ask_to_stop(&cluster, &job);
    until_requeued(&home, &cluster, &job);
    assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
}

#[test]
fn a_job_comes_back_only_so_often() {
    let (cluster, home) = (cluster(), Home::new());
    let program = home.stand_in(&STOPS_ONCE.replace("SLURM_RESTART_COUNT", "NEVER"));
    let env = [("GRADTX", program.as_path()), ("GRADTX_RESTARTS", Path::new("1"))];
    let job = home.sbatch(&cluster, &[], "train.sbatch", &["run"], &env);
    until_said(&home, &cluster, &job, 1, "listening");
    ask_to_stop(&cluster, &job);
    until_requeued(&home, &cluster, &job);
    cluster.start_now(&job);
    until_said(&home, &cluster, &format!("{job}-r1"), 1, "listening");
    ask_to_stop(&cluster, &job);
    assert_eq!(cluster.ended(&job), "FAILED");
    assert_eq!(cluster.field(&job, "ExitCode"), "75:0");
    assert!(home.said(&job).contains("NOT requeued after 1 restarts"), "{}", home.said(&job));
}

#[test]
fn a_cancelled_job_stays_away() {
    let (cluster, home) = (cluster(), Home::new());
    // It ends as if it had been asked to stop, which SLURM's cancelling does look like.
    let program = home.stand_in(&STOPS_ONCE.replace("USR1", "USR1 TERM"));
    let job = home.sbatch(&cluster, &["--nodes=2"], "train.sbatch", &["run"], &[("GRADTX", &program)]);
    until_said(&home, &cluster, &job, 2, "listening");
    cluster.done(cluster.command("scancel").arg(&job));
    assert_eq!(cluster.ended(&job), "CANCELLED");
    cluster.until("a last line", || home.said(&job).contains("logs:"));
    assert!(!home.said(&job).contains("requeued"), "{}", home.said(&job));
    assert_eq!(cluster.field(&job, "JobState"), "CANCELLED");
}

#[test]
fn a_rank_s_error_is_not_taken_for_a_stop() {
    let (cluster, home) = (cluster(), Home::new());
    // Rank 1 fails; the others are ended and say that they stopped.
    let program = home.stand_in(
        r#"trap 'exit 75' USR1 TERM
if [ "$SLURM_PROCID" = 1 ]; then sleep 0.3; echo "error: no space left"; exit 1; fi
while true; do sleep 0.05; done"#,
    );
    let job = home.sbatch(&cluster, &["--nodes=2"], "train.sbatch", &["run"], &[("GRADTX", &program)]);
    assert_eq!(cluster.ended(&job), "FAILED", "{}", home.said(&job));
    let said = home.said(&job);
    assert!(said.contains("FAILED with exit code") && said.contains("error: no space left"), "{said}");
    assert_eq!(cluster.field(&job, "Restarts"), "0");
}

/// Ranks on two nodes, and on one.
const TWO_NODES: [&str; 1] = ["--nodes=2"];
const ONE_NODE: [&str; 1] = ["--ntasks-per-node=2"];

/// What an undisturbed training gives, and a home whose tuples are there but not more.
fn before_training(cluster: &Cluster, ranks: &[&str]) -> (Home, BTreeMap<PathBuf, String>) {
    let home = Home::with_long_training(400);
    home.done("curate");
    let job = home.sbatch(cluster, ranks, "train.sbatch", &["run"], &[]);
    assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
    let undisturbed = home.sums("run/translator");
    assert!(undisturbed.contains_key(Path::new("model.safetensors")));
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    (home, undisturbed)
}

/// Submits a training and waits until it has made some steps.
fn begin_training(home: &Home, cluster: &Cluster, ranks: &[&str]) -> String {
    let job = home.sbatch(cluster, ranks, "train.sbatch", &["run"], &[]);
    let checkpoints = home.path("run/translator/checkpoints");
    cluster.until("checkpoints", || {
        let names = std::fs::read_dir(&checkpoints).into_iter().flatten().flatten().map(|e| e.file_name());
        names.map(|name| name.to_string_lossy().into_owned()).any(|name| &*name >= "step-000000020")
    });
    assert_eq!(cluster.field(&job, "JobState"), "RUNNING", "{}", home.said(&job));
    job
}

/// A disturbed training has come back, has gone on from a checkpoint, and has ended as if
/// nothing had been.
fn assert_it_went_on(home: &Home, cluster: &Cluster, job: &str, undisturbed: &BTreeMap<PathBuf, String>) {
    until_requeued(home, cluster, job);
    assert_eq!(cluster.ended(job), "COMPLETED", "{}", home.said(job));
    let log = home.log(&format!("-{job}-r1.0.log"));
    assert!(log.contains("going on after step"), "{log}");
    assert_eq!(&home.sums("run/translator"), undisturbed);
}

#[test]
fn stopped_or_requeued_training_gives_the_same_bytes() {
    let cluster = cluster();
    let (home, undisturbed) = before_training(&cluster, &TWO_NODES);
    let job = begin_training(&home, &cluster, &TWO_NODES);
    ask_to_stop(&cluster, &job);
    assert_it_went_on(&home, &cluster, &job, &undisturbed);
    let log = home.log(&format!("-{job}.0.log"));
    assert!(log.contains("stopped as asked"), "{log}");
    assert!(log.contains("stopping at the end of this step"), "for this the script looks: {log}");
    assert!(home.said(&job).contains("stopped on request, requeued"), "{}", home.said(&job));

    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    let job = begin_training(&home, &cluster, &TWO_NODES);
    cluster.scontrol(&["requeue", &job]);
    assert_it_went_on(&home, &cluster, &job, &undisturbed);
}

#[test]
fn a_training_survives_the_crash_of_its_node() {
    let cluster = cluster_alone();
    let (home, undisturbed) = before_training(&cluster, &ONE_NODE);
    let job = begin_training(&home, &cluster, &ONE_NODE);
    let node = cluster.field(&job, "BatchHost");
    cluster.node("crash", &node);
    assert_it_went_on(&home, &cluster, &job, &undisturbed);
    assert_ne!(cluster.field(&job, "BatchHost"), node, "on the node that is left");
    cluster.node("up", &node);
    cluster.until("both nodes up", || {
        let states = cluster.done(cluster.command("sinfo").args(["--noheader", "--Node", "--format=%T"]));
        states.lines().filter(|state| *state == "idle").count() == 2
    });
}

/// Ids that pipeline.sh or `gradtx submit` report, a job per line.
fn ids(said: &str) -> Vec<String> {
    let of_line = |line: &str| {
        let line = line.strip_prefix("job ").unwrap_or(line);
        let id: String = line.chars().take_while(char::is_ascii_digit).collect();
        (!id.is_empty()).then_some(id)
    };
    said.lines().filter_map(of_line).collect()
}

/// Checksums of a tuple store that is intact.
fn tuples(home: &Home) -> BTreeMap<PathBuf, String> {
    assert!(TupleStore::open(&home.path("run/shadow")).unwrap().verify().is_empty());
    home.sums("run/shadow")
}

fn pipeline(home: &Home, cluster: &Cluster) -> Vec<String> {
    let mut command = home.command(cluster, scripts().join("pipeline.sh"));
    command.args(["run", "settings.toml", "clients/ada", "clients/bob"]);
    for stage in ["CURATE", "TRAIN", "EVALUATE"] {
        command.env(stage, SMALL.join(" "));
    }
    let said = cluster.done(&mut command);
    let ids = ids(&said);
    assert_eq!(ids.len(), 4, "{said}");
    assert!(said.contains(&format!("squeue --jobs={}", ids.join(","))), "{said}");
    ids
}

#[test]
fn the_chain_runs_to_the_report() {
    let (cluster, home) = (cluster(), Home::new());
    for job in pipeline(&home, &cluster) {
        assert_eq!(cluster.ended(&job), "COMPLETED", "job {job}");
    }
    assert!(TupleStore::open(&home.path("run/shadow")).unwrap().verify().is_empty());
    let report = std::fs::read_to_string(home.path("run/report.html")).unwrap();
    assert!(report.contains("Grad-Transformer"));
}

#[test]
fn a_failing_stage_ends_the_chain() {
    let (cluster, home) = (cluster(), Home::new());
    std::fs::remove_file(home.path("public.jsonl")).unwrap();
    let jobs = pipeline(&home, &cluster);
    let states: Vec<String> = jobs.iter().map(|job| cluster.ended(job)).collect();
    assert_eq!(states, ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]);
    let said =
        std::fs::read_to_string(home.path(&format!("run/logs/gradtx-curate-{}.log", jobs[0]))).unwrap();
    assert!(said.contains("FAILED with exit code") && said.contains("public.jsonl"), "{said}");
}

#[test]
fn clients_are_scored_in_parts_by_an_array() {
    let (cluster, home) = (cluster(), Home::new());
    home.done("curate");
    home.done("train");
    // What ada's provider gets in earnest: her update alone, and nothing to score it on.
    std::fs::create_dir(home.path("sent")).unwrap();
    let job = home.sbatch(
        &cluster,
        &["--array=0-1"],
        "evaluate.sbatch",
        &["run", "clients/ada", "clients/bob"],
        &[("METHODS", Path::new("grad-transformer ridge"))],
    );
    assert_eq!(cluster.ended(&job), "COMPLETED");
    for client in ["ada", "bob"] {
        for name in ["base-tiny", "base-llm", "finetuned-tiny", "finetuned-llm", "grad-transformer", "ridge"]
        {
            let score = home.path(&format!("run/clients/{client}/evaluated/{name}/score.json"));
            assert!(score.is_file(), "{}", score.display());
        }
    }
    let update = home.path("run/clients/ada/finetuned/tiny/update.safetensors");
    std::fs::copy(update, home.path("sent/update.safetensors")).unwrap();
    let arguments = ["run", "sent"];
    let job = home.sbatch(&cluster, &["--array=0"], "evaluate.sbatch", &arguments, &[]);
    assert_eq!(cluster.ended(&job), "COMPLETED");
    let adapter =
        |client: &str| home.sums(&format!("run/clients/{client}/translated/grad-transformer/adapter"));
    assert_eq!(adapter("sent"), adapter("ada"));
    assert!(!home.path("run/clients/sent/evaluated").exists());
}

#[test]
fn what_is_measured_is_kept() {
    let (cluster, home) = (cluster(), Home::new());
    let config = gradtx_tests::fixture("t5/model").join("config.json");
    let sizes = ["--translator", config.to_str().unwrap(), "--tiny", "3x10", "--llm", "4x12"];
    let lines = |options: &[&str], words: &[&str], env: &[(&str, &Path)]| -> Vec<serde_json::Value> {
        let words = [&["run"], words, &sizes].concat();
        let job = home.sbatch(&cluster, options, "bench.sbatch", &words, env);
        assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
        let text = std::fs::read_to_string(home.path(&format!("run/bench-{job}.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let found = lines(&[], &["train", "--runs", "1", "--large", "64"], &[]);
    assert!(found.iter().any(|line| line["work"] == "translator" && line["tflops"].is_number()), "{found:?}");
    let spread = ["--nodes=2", "--ntasks-per-node=1"];
    let found = lines(&spread, &["comm", "--bytes", "4096"], &[("GRADTX_MPI", Path::new("pmix"))]);
    assert!(found.len() == 4 && found.iter().all(|line| line["ranks"] == 2), "{found:?}");
}

fn submit(home: &Home, cluster: &Cluster, words: &[&str]) -> std::process::Output {
    let mut command = home.command(cluster, GRADTX);
    command.args(["submit", "--run", "run", "--config", "settings.toml", "--cpus-per-task=1"]).args(words);
    command.env_remove("GRADTX").env_remove("GRADTX_SLURM");
    command.output().unwrap()
}

#[test]
fn submitted_stages_run_from_their_own_scripts() {
    let (cluster, home) = (cluster(), Home::new());
    for (stage, words) in [("curate", vec!["--gpus-per-node=1"]), ("train", vec!["--gpus-per-node=0"])] {
        let output = submit(&home, &cluster, &[&["--stage", stage, "--time=10"], &words[..]].concat());
        assert!(output.status.success(), "{}", both(&output));
        let [job] = &ids(&both(&output))[..] else { panic!("{}", both(&output)) };
        assert_eq!(cluster.ended(job), "COMPLETED");
        let log = home.path(&format!("run/logs/gradtx-{stage}-{job}.log"));
        assert!(std::fs::read_to_string(log).unwrap().contains("done"));
        assert!(home.path(&format!("run/slurm/gradtx-{stage}.sbatch")).is_file());
    }
    assert!(home.path("run/translator/model.safetensors").is_file());
}

#[test]
fn chains_that_fail_to_submit_are_cancelled() {
    let (cluster, home) = (cluster(), Home::new());
    let output = submit(&home, &cluster, &["--stage=curate", "--partition=nowhere"]);
    assert!(!output.status.success() && both(&output).contains("invalid partition"), "{}", both(&output));
    // SLURM takes curation, and refuses the array of clients for what only that asks for.
    let mut command = home.command(&cluster, scripts().join("pipeline.sh"));
    command
        .args(["run", "settings.toml", "clients/ada"])
        .env("CURATE", format!("--hold {}", SMALL.join(" ")));
    command.env("TRAIN", SMALL.join(" ")).env("EVALUATE", "--array=0-10000");
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{}", both(&output));
    let [curate, train] = &ids(&both(&output))[..] else { panic!("{}", both(&output)) };
    assert_eq!([curate, train].map(|job| cluster.ended(job)), ["CANCELLED", "CANCELLED"]);
}

#[test]
fn a_submitted_pipeline_runs_to_the_report() {
    let (cluster, home) = (cluster(), Home::new());
    let words = ["--stage=pipeline", "--gpus-per-node=1", "--client=clients/ada", "--client=clients/bob"];
    let output = submit(&home, &cluster, &words);
    assert!(output.status.success(), "{}", both(&output));
    let jobs = ids(&both(&output));
    assert_eq!(jobs.len(), 4);
    for job in &jobs {
        assert_eq!(cluster.ended(job), "COMPLETED", "job {job}");
    }
    assert!(home.path("run/report.html").is_file());
}

/// A command of the program under test with the cluster's SLURM.
fn gradtx(home: &Home, cluster: &Cluster, words: &[&str]) -> std::process::Output {
    home.command(cluster, GRADTX).args(words).env_remove("GRADTX").output().unwrap()
}

#[test]
fn queued_jobs_are_seen_and_not_submitted_twice() {
    let (cluster, home) = (cluster(), Home::new());
    // Held, so that they wait for certain.
    let words = ["--stage=pipeline", "--gpus-per-node=1", "--client=clients/ada", "--sbatch=curate=--hold"];
    let output = submit(&home, &cluster, &words);
    assert!(output.status.success(), "{}", both(&output));
    let jobs = ids(&both(&output));
    assert_eq!(jobs.len(), 4);
    assert!(cluster.field(&jobs[0], "JobName").starts_with("gradtx-curate-run"));
    let status = both(&gradtx(&home, &cluster, &["status", "run"]));
    for (kind, job, reason) in [
        ("curate", &jobs[0], "JobHeldUser"),
        ("train", &jobs[1], "Dependency"),
        ("report", &jobs[3], "Dependency"),
    ] {
        assert!(status.contains(&format!("job {job} ({kind}): PENDING ({reason})")), "{kind}: {status}");
    }
    let twice = submit(&home, &cluster, &words);
    assert_eq!(twice.status.code(), Some(4), "{}", both(&twice));
    assert!(
        both(&twice).contains(&format!("job {} (curate) is in the queue already", jobs[0])),
        "{}",
        both(&twice)
    );
    let cancelled = gradtx(&home, &cluster, &["cancel", "run"]);
    assert!(cancelled.status.success(), "{}", both(&cancelled));
    for job in &jobs {
        assert_eq!(cluster.ended(job), "CANCELLED", "job {job}: {}", both(&cancelled));
    }
    assert!(both(&gradtx(&home, &cluster, &["cancel", "run"])).contains("no such job is in the queue"));
}

#[test]
fn slurm_takes_what_a_profile_asks_for() {
    let (cluster, home) = (cluster(), Home::new());
    let profile = "setup = [\"export FROM_SETUP=yes\"]\n[environment]\nFROM_PROFILE = \"a b\"\n[job]\n\
                   partition = \"main\"\ngres = \"gpu:1\"\ncomment = \"x\"\nnice = 5\nmem = \"100M\"\n\
                   exclude = \"node2\"\nsignal_seconds = 60\nsrun = [\"--kill-on-bad-exit=1\"]\n[curate]\ntime = \"7\"\n";
    std::fs::write(home.path("site.toml"), profile).unwrap();
    let output = submit(&home, &cluster, &["--stage=curate", "--profile=site.toml", "--array=2%1"]);
    assert!(output.status.success(), "{}", both(&output));
    let [job] = &ids(&both(&output))[..] else { panic!("{}", both(&output)) };
    assert_eq!(cluster.field(job, "Comment"), "x");
    assert_eq!(cluster.field(job, "TimeLimit"), "00:07:00");
    assert_eq!(cluster.ended(job), "COMPLETED");
    assert!(TupleStore::open(&home.path("run/shadow")).unwrap().verify().is_empty());
    let logs = gradtx(&home, &cluster, &["logs", "run", "curate"]);
    assert!(both(&logs).contains("on node1 (nodes: 1, tasks: 1)"), "{}", both(&logs));
    let script = std::fs::read_to_string(home.path("run/slurm/gradtx-curate.sbatch")).unwrap();
    assert!(script.contains("\nexport FROM_SETUP=yes\nexport FROM_PROFILE='a b'\n"), "{script}");
}

#[test]
fn a_client_that_fails_does_not_cost_the_report() {
    let (cluster, home) = (cluster(), Home::new());
    std::fs::write(home.path("clients/bob/train.jsonl"), "{\n").unwrap();
    let words = ["--stage=pipeline", "--gpus-per-node=1", "--client=clients/ada", "--client=clients/bob"];
    let output = submit(&home, &cluster, &words);
    assert!(output.status.success(), "{}", both(&output));
    let states: Vec<String> = ids(&both(&output)).iter().map(|job| cluster.ended(job)).collect();
    assert_eq!(states, ["COMPLETED", "COMPLETED", "COMPLETED FAILED", "COMPLETED"]);
    assert!(home.path("run/report.html").is_file());
}

#[test]
fn ranks_on_two_nodes_give_the_bytes_of_one() {
    let (cluster, home, alone) = (cluster(), Home::new(), Home::new());
    alone.done("curate");
    let options = ["--nodes=2", "--ntasks-per-node=2"];
    let job = home.sbatch(&cluster, &options, "curate.sbatch", &["run", "--config", "settings.toml"], &[]);
    assert_eq!(cluster.ended(&job), "COMPLETED", "{}", home.said(&job));
    assert_eq!(tuples(&home), tuples(&alone));
    // A rank that MPI does not find is an error, not a world of its own.
    let env = [("GRADTX_MPI", Path::new("none"))];
    let job = home.sbatch(&cluster, &["--nodes=2"], "train.sbatch", &["run"], &env);
    assert_eq!(cluster.ended(&job), "FAILED", "{}", home.said(&job));
    assert!(
        home.said(&job).contains("srun started 2 processes, but told MPI of none"),
        "{}",
        home.said(&job)
    );
    assert!(!home.path("run/translator").exists());
}

#[test]
fn an_array_of_four_gives_the_bytes_of_one_job() {
    let (cluster, home, alone) = (cluster(), Home::new(), Home::new());
    alone.done("curate");
    let scratch = home.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let job = home.sbatch(
        &cluster,
        &["--array=0-3"],
        "curate_array.sbatch",
        &["run", "--config", "settings.toml"],
        &[("SLURM_TMPDIR", &scratch)],
    );
    assert_eq!(cluster.ended(&job), "COMPLETED");
    assert_eq!(tuples(&home), tuples(&alone));
    let left: Vec<_> = std::fs::read_dir(scratch).unwrap().collect();
    assert!(left.is_empty(), "nothing stays in the scratch directory: {left:?}");
}
