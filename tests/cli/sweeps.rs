//! Settings that change between stages, tuples and translators of other runs, sweeps, and
//! comparisons.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, expect_failure, expect_success, said};
use gradtx_tests::miniature;
use serde_json::Value;
use std::process::{Command, Output};
use std::time::Duration;

/// Commands as one would type them, on one thread.
struct Typed(Home);

impl std::ops::Deref for Typed {
    type Target = Home;
    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Typed {
    fn new() -> Self {
        Self(Home::miniature())
    }

    /// With a curated run.
    fn curated() -> Self {
        let home = Self::new();
        home.ok("curate --run run --config settings.toml");
        home
    }

    /// A client with training and test data.
    fn client(&self, name: &str) {
        let rows = self.read("private.jsonl");
        self.write(&format!("{name}/train.jsonl"), &rows);
        let test: Vec<&str> = rows.lines().take(3).collect();
        self.write(&format!("{name}/test.jsonl"), &(test.join("\n") + "\n"));
    }

    fn gradtx(&self, line: &str) -> Output {
        let args: Vec<&str> = line.split_whitespace().chain(["--threads", "1"]).collect();
        self.0.gradtx(&args)
    }

    /// What a command that ends well says, on standard output and error.
    #[track_caller]
    fn ok(&self, line: &str) -> String {
        let output = self.gradtx(line);
        expect_success(&[line], &output);
        said(&output)
    }

    /// What a command that fails says.
    #[track_caller]
    fn refused(&self, line: &str, code: i32, words: &[&str]) -> String {
        expect_failure(&[line], &self.gradtx(line), code, words)
    }

    fn status(&self) -> Value {
        let said = self.ok("status run --json");
        serde_json::from_str(said.lines().last().unwrap()).unwrap()
    }

    /// State of a stage of the run.
    fn state(&self, stage: &str) -> String {
        let status = self.status();
        let rows = status["stages"].as_array().unwrap();
        let row =
            rows.iter().find(|row| row["stage"] == stage).unwrap_or_else(|| panic!("{stage}: {status}"));
        row["state"].as_str().unwrap().into()
    }
}

const FINETUNE: &str = "finetune --run run --data private.jsonl --out run/clients/a/finetuned/tiny";
const EVALUATE: &str =
    "evaluate --run run --data private.jsonl --model tiny --out run/clients/a/evaluated/base-tiny";

#[test]
fn a_stage_is_tied_to_its_own_settings_and_no_others() {
    let home = Typed::curated();
    home.ok("train --run run");
    home.ok(FINETUNE);
    home.ok(EVALUATE);
    let before = miniature::checksums(&home.path("run/shadow"));

    // Settings of training are nothing to curation, and those of curation nothing to training.
    let said = home.refused(
        "train --run run --set train.learning_rate=0.02",
        3,
        &["- train.learning_rate = 0.01", "+ train.learning_rate = 0.02", "--tuples run"],
    );
    assert!(!said.contains("curate."), "{said}");
    assert!(home.read("run/run.toml").contains("learning_rate = 0.01"), "a refusal changes nothing");
    let said = home.ok("curate --run run --set train.learning_rate=0.02");
    assert!(said.contains("- train.learning_rate = 0.01\n  + train.learning_rate = 0.02"), "{said}");
    assert!(said.contains("is finished"), "{said}");
    assert_eq!(miniature::checksums(&home.path("run/shadow")), before);
    assert_eq!([home.state("curate"), home.state("train")], ["finished", "stale"]);
    let status = home.ok("status run");
    assert!(status.contains("- train.learning_rate = 0.01") && status.contains("stale"), "{status}");

    home.refused(
        "submit --run run --stage train --gpus-per-node 0 --dry-run",
        3,
        &["- train.learning_rate = 0.01"],
    );
    home.ok("submit --run run --stage curate --gpus-per-node 0 --dry-run");

    // What is stale is made again when it was removed.
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    home.ok("train --run run");
    assert_eq!(home.state("train"), "finished");

    // The same for clients.
    home.refused(&format!("{FINETUNE} --set finetune.tiny.max_steps=4"), 3, &["- recipe.max_steps = 3"]);
    home.ok(&format!("{EVALUATE} --set finetune.tiny.max_steps=4"));
    assert_eq!([home.state("finetune"), home.state("evaluate")], ["stale", "finished"]);
    home.refused(
        &format!("{EVALUATE} --set evaluate.max_new_tokens=3"),
        3,
        &["- evaluate.max_new_tokens = 4"],
    );
    home.refused(
        "curate --run run --set curate.num_subsets=4",
        3,
        &["- curate.num_subsets = 5", "another run"],
    );
    // The length of examples is curation's and fine-tuning's, and not that of scores.
    home.refused("curate --run run --set data.max_length=63", 3, &["- max_length = 64"]);
    home.ok(&format!("{EVALUATE} --set data.max_length=63"));
    let states = ["curate", "train", "finetune", "evaluate"].map(|stage| home.state(stage));
    assert_eq!(states, ["stale", "finished", "stale", "finished"]);
}

#[test]
fn tuples_of_other_settings_are_used_with_a_warning() {
    let home = Typed::curated();
    let said = home.ok("train --run run --set curate.num_subsets=4");
    assert!(said.contains("warning") && said.contains("- curate.num_subsets = 5"), "{said}");
    assert_eq!([home.state("curate"), home.state("train")], ["stale", "finished"]);
    let said = home.ok("train --run run --set curate.num_subsets=5");
    assert!(!said.contains("warning"), "{said}");
    assert_eq!(home.state("curate"), "finished");
}

#[test]
fn a_run_takes_tuples_and_translator_of_another() {
    let home = Typed::curated();
    home.ok("train --run run");
    let expected = miniature::checksums(&home.path("run/translator")).into_values().collect::<Vec<_>>();
    // A new run has the settings of the one that it takes tuples from.
    home.ok("train --run other --tuples run --set train.learning_rate=0.02");
    assert!(!home.path("other/shadow").exists());
    let other = miniature::checksums(&home.path("other/translator")).into_values().collect::<Vec<_>>();
    assert_ne!(other, expected, "another rate gives another translator");
    home.ok("train --run same --tuples other");
    home.refused("train --run same --set train.learning_rate=0.03", 3, &["train.learning_rate"]);
    let stored = home.read("same/run.toml");
    assert!(
        stored.contains("tuples_checksum = \"") && stored.contains("/run\""),
        "from where they are: {stored}"
    );
    assert!(home.ok("status same").contains("shadow"), "status names the tuples that are used");

    // A client needs neither.
    home.ok("finetune --run same --data private.jsonl --out c");
    home.ok("translate --run same c/update.safetensors --out t");
    home.ok("translate --run same c/update.safetensors --method ridge --out r");
    home.ok("translate --run third --translator same c/update.safetensors --out t3");
    let [t, t3] = ["t", "t3"].map(|name| std::fs::read(home.path(name).join("update.safetensors")).unwrap());
    assert_eq!(t, t3);
    home.ok("translate --run third c/update.safetensors --method ridge --out r3");
    home.ok("evaluate --run third --data private.jsonl --adapter t3/adapter --out e3");

    // What is made elsewhere is not made here.
    home.refused("curate --run same", 2, &["takes its tuples from", "reuse.tuples", "gradtx curate --run"]);
    home.refused("train --run third", 2, &["takes its translator from", "gradtx train --run"]);
    home.refused("train --run new --tuples nowhere", 2, &["nowhere", "no such directory"]);
    home.refused("train --run new --tuples run/shadow", 2, &["stage curate", "did you mean"]);
    home.write("sweep.toml", "[[sweep]]\nbase = \"settings.toml\"\nseed = [1, 2]\n");
    home.ok("sweep sweep.toml --out sweep");
    home.refused("train --run new --tuples sweep", 2, &["directory of a sweep"]);
    assert!(!home.path("new").exists());
}

#[test]
fn tuples_that_changed_or_moved_are_refused_by_name() {
    let home = Typed::curated();
    home.ok("train --run other --tuples run");
    std::fs::rename(home.path("run"), home.path("moved")).unwrap();
    home.refused("train --run other", 1, &["run/shadow", "no tuple store", "--tuples RUN"]);
    home.ok("train --run other --tuples moved");
    assert!(home.read("other/run.toml").contains("/moved\""));
    // Other tuples in the same place.
    std::fs::remove_dir_all(home.path("moved")).unwrap();
    home.ok("curate --run moved --config settings.toml --set curate.num_subsets=4");
    home.refused("train --run other", 3, &["moved/shadow", "changed", "- reuse.tuples_checksum", "--tuples"]);
    home.refused("train --run other --tuples moved", 3, &["- tuples = ", "+ tuples = "]);
    // Of another seed: nothing of it fits.
    home.ok("curate --run seed --config settings.toml --set seed=4");
    home.refused("train --run fresh --config settings.toml --tuples seed", 1, &["initial adapter", "seed"]);
    assert!(!home.path("fresh/run.toml").exists());
}

const SWEEP: &str =
    "[[sweep]]\nbase = \"settings.toml\"\ntrain.learning_rate = [0.01, 0.02]\ncurate.num_subsets = [4, 5]\n";

#[test]
fn a_sweep_curates_once_runs_everything_and_compares() {
    let home = Typed::new();
    home.client("clients/ada");
    home.write("sweep.toml", SWEEP);
    let line = "sweep sweep.toml --out s --run --client clients/ada";
    let said = home.ok(line);
    assert_eq!(std::fs::read_dir(home.path("s/curations")).unwrap().count(), 2);
    for word in ["4 runs in s, 4 new, 2 shared curations", "learning_rate=0.02,num_subsets=5  finished"] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    assert_eq!(said.matches(": curate\n").count(), 2, "{said}");
    assert_eq!(said.matches(": train\n").count(), 4, "{said}");
    // What the translator has no part in is done once for runs that share its settings: here all of
    // them do, for how many subsets there are is nothing to a client.
    assert_eq!(said.matches("ada: finetune llm\n").count(), 1, "{said}");
    assert_eq!(said.matches("ada: evaluate grad-transformer\n").count(), 4, "{said}");
    let csv = home.read("s/comparison.csv");
    let rows: Vec<&str> = csv.lines().collect();
    assert!(rows[0].starts_with("run,curate.num_subsets,train.learning_rate,metric,model,"), "{csv}");
    assert_eq!(rows.len(), 5, "{csv}");
    assert!(rows[1].contains("LLM + Grad-Transformer") && csv.contains(",2,"), "{csv}");
    assert!(home.read("s/comparison.html").contains("learning_rate=0.02,num_subsets=5"));
    // A copy is as good as a result of one's own.
    let status: Value =
        serde_json::from_str(home.ok("status s --verify --json").lines().last().unwrap()).unwrap();
    let rows = status["stages"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["state"] == "finished"), "{status}");

    // Everything again does nothing.
    let before = miniature::checksums(&home.path("s/learning_rate=0.02,num_subsets=5/translator"));
    let again = home.ok(line);
    assert!(!again.contains(": train\n") && !again.contains(": curate\n"), "{again}");
    assert_eq!(miniature::checksums(&home.path("s/learning_rate=0.02,num_subsets=5/translator")), before);

    let said = home.ok("sweep sweep.toml --out s --client clients/ada --submit --dry-run --gpus-per-node 0");
    assert!(said.contains("nothing is submitted"), "{said}");

    // A run of the sweep is the run that it would be alone.
    home.ok("curate --run alone --config settings.toml");
    home.ok("train --run alone --set train.learning_rate=0.02");
    let [alone, swept] = ["alone", "s/learning_rate=0.02,num_subsets=5"]
        .map(|run| std::fs::read(home.path(run).join("translator/model.safetensors")).unwrap());
    assert_eq!(alone, swept);
}

#[test]
fn sweeps_are_submitted_as_one_job_per_curation() {
    let home = Typed::new();
    home.client("clients/ada");
    home.write("sweep.toml", SWEEP);
    let program = |name: &str, script: &str| {
        home.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(home.path(&format!("bin/{name}")), executable).unwrap();
    };
    program("sbatch", "echo \"$@\" >> words\nwc -l < words");
    // Jobs 1 and 2 are curations, the last one compares the runs.
    program("squeue", "for job in 2 5 15; do echo \"$job|PENDING|Dependency|N/A|\"; done");
    program("scancel", "echo \"$@\" >> cancelled");
    let line = "sweep sweep.toml --out s --submit --client clients/ada --method ridge --gpus-per-node 0";
    let said = home.ok(&format!("{line} --dry-run"));
    assert_eq!(said.matches("# command: sbatch").count(), 15, "{said}");
    assert!(!home.path("s/slurm").exists());

    let with_slurm = |line: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        let path = format!("{}:{}", home.path("bin").display(), std::env::var("PATH").unwrap());
        expect_success(&args, &home.command(&args).env("PATH", path).output().unwrap())
    };
    with_slurm(line);
    let words = home.read("words");
    let lines: Vec<&str> = words.lines().collect();
    assert_eq!(lines.len(), 15, "{words}");
    assert!(lines[..2].iter().all(|line| line.contains("/s/curations/") && !line.contains("--dependency")));
    // Training waits for the curation that it shares; scores and report as in any other run.
    for (index, curation) in [(2, 1), (5, 1), (8, 2), (11, 2)] {
        assert!(lines[index].contains(&format!("--dependency=afterok:{curation} ")), "{words}");
        assert!(lines[index].ends_with("gradtx-train.sbatch"), "{words}");
        assert!(lines[index + 1].contains(&format!("afterok:{} ", index + 1)), "{words}");
    }
    let last = lines[14];
    assert!(last.contains("--dependency=afterany:5,afterany:8,afterany:11,afterany:14 "), "{last}");
    let compare = home.read("s/slurm/gradtx-report.sbatch");
    assert!(compare.contains("tasks \"$GRADTX\" compare \"$RUN\" --csv"), "{compare}");
    let evaluate = home.read("s/learning_rate=0.01,num_subsets=4/slurm/gradtx-evaluate.sbatch");
    assert!(evaluate.contains("export METHODS=ridge"), "{evaluate}");

    let status = with_slurm("status s");
    assert!(status.contains("job 15 (report): PENDING (Dependency)"), "{status}");
    let cancelled = with_slurm("cancel s curate");
    assert!(cancelled.contains("cancelled job 2 (curate)") && !cancelled.contains("job 5"), "{cancelled}");
    with_slurm("cancel s");
    assert_eq!(home.read("cancelled"), "2\n15 5 2\n", "the last ones first");
    home.refused("cancel clients", 1, &["no jobs were submitted"]);
    home.refused("sweep sweep.toml --out s --nodes 2", 2, &["--submit"]);
    home.refused("sweep sweep.toml --out s --submit --run", 2, &["--submit", "--run"]);
}

#[test]
fn a_run_that_fails_does_not_stop_the_others() {
    let home = Typed::new();
    // More tuples in a step than training has.
    home.write("sweep.toml", "[[sweep]]\nbase = \"settings.toml\"\ntrain.max_steps = [6, 7]\n");
    home.ok("sweep sweep.toml --out s");
    home.write("s/max_steps=6/translator", "in the way");
    let output = home.gradtx("sweep sweep.toml --out s --run");
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in
        ["max_steps=6  FAILED in train with exit code 1", "max_steps=7  finished", "1 of 2 runs not finished"]
    {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    std::fs::remove_file(home.path("s/max_steps=6/translator")).unwrap();
    let said = home.ok("sweep sweep.toml --out s --run");
    assert_eq!(said.matches(": train\n").count(), 1, "the other one is finished: {said}");
    // A curation that fails takes its runs with it, and no others.
    home.write(
        "both.toml",
        "[[sweep]]\nbase = \"settings.toml\"\ndata.public = [\"public.jsonl\", \"none.jsonl\"]\n",
    );
    let said = home.refused("sweep both.toml --out b --run", 1, &["none.jsonl", "1 of 2 runs not finished"]);
    assert!(said.contains("curation"), "{said}");
    assert!(home.path("b/public=public.jsonl/translator/model.safetensors").is_file());
    let status = home.ok("sweep both.toml --out b --status");
    assert!(status.contains("public=public.jsonl  curate finished, train finished"), "{status}");
    home.refused("sweep sweep.toml --out s --run --client nobody", 2, &["--client nobody", "train.jsonl"]);
    home.refused("sweep sweep.toml --out s --client clients", 2, &["--run"]);
}

#[test]
fn stopped_sweeps_stop_their_command_and_resume() {
    let home = Typed::new();
    let settings = home.read("settings.toml");
    let long = settings.replace("max_steps = 6\n", "max_steps = 400\nsave_minutes = 0\n");
    assert_ne!(long, settings);
    home.write("settings.toml", &long);
    home.write("sweep.toml", "[[sweep]]\nbase = \"settings.toml\"\ntrain.learning_rate = [0.01, 0.02]\n");
    let line = "sweep sweep.toml --out s --run";
    let args: Vec<&str> = line.split(' ').chain(["--threads", "1"]).collect();
    let mut sweep = home.command(&args).stdout(std::process::Stdio::null()).spawn().unwrap();
    let checkpoints = home.path("s/learning_rate=0.01/translator/checkpoints");
    while !checkpoints.is_dir() {
        assert!(sweep.try_wait().unwrap().is_none(), "it ended before it trained");
        std::thread::sleep(Duration::from_millis(2));
    }
    let kill = Command::new("kill").arg("-TERM").arg(sweep.id().to_string()).status().unwrap();
    assert!(kill.success());
    assert_eq!(sweep.wait().unwrap().code(), Some(75));
    let status = home.ok("status s");
    assert!(status.contains("stopped") && !status.contains("running"), "{status}");
    assert!(!home.path("s/learning_rate=0.02/translator").exists(), "the next one is not begun");
    let said = home.ok(line);
    assert!(!said.contains(": curate\n") && said.matches(": train\n").count() == 2, "{said}");
}

#[test]
fn runs_are_compared_also_those_of_other_worlds() {
    let home = Typed::curated();
    home.ok("train --run run");
    home.ok(FINETUNE);
    home.ok(EVALUATE);
    home.ok("train --run other --tuples run --set train.learning_rate=0.02");
    let said = home.ok("compare run other");
    for word in
        ["learning_rate", "0.01", "0.02", "rel. error", "for 2", "other: no scores", "every curation once"]
    {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    assert!(!said.contains("d_model"), "only what differs: {said}");
    let json: Value =
        serde_json::from_str(home.ok("compare run other --json").lines().last().unwrap()).unwrap();
    let comparison = &json["comparison"];
    assert_eq!(comparison["settings"][0]["key"], "train.learning_rate");
    assert_eq!(comparison["settings"][0]["values"], serde_json::json!(["0.01", "0.02"]));
    assert!(comparison["runs"][0]["training"]["rank_hours"].as_f64().unwrap() > 0.0, "{json}");
    // The tuples' own settings count, whatever the run file of the other run says of them.
    home.ok("train --run third --tuples run --set curate.num_subsets=9 --set train.max_steps=5");
    let said = home.ok("compare run third");
    assert!(!said.contains("num_subsets") && said.contains("max_steps"), "{said}");

    let another = Typed::new();
    another.ok("curate --run run --config settings.toml --set models.tiny=llm");
    let path = another.path("run");
    let said = home.ok(&format!("compare run {}", path.display()));
    assert!(said.contains("the TinyLM of") && said.contains("is another one than that of"), "{said}");
    home.refused("compare run tiny", 2, &["tiny", "model directory"]);
    home.refused("compare nowhere", 2, &["nowhere", "no such directory"]);
    home.refused("compare run --csv x --html x", 2, &["--csv", "--html"]);
}
