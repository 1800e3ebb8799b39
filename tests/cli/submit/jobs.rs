//! Jobs after they were submitted: their queue, their logs, and what their scripts do.

use super::{PIPELINE, ok, refused, sandbox};
use crate::home::Home;
use std::process::Command;

#[test]
fn jobs_are_found_again_and_not_submitted_twice() {
    let home = Home::with_client();
    let none = refused(&home, &["cancel", "run"], 2);
    assert!(none.contains("no such directory"), "{none}");
    let said = ok(&home, &PIPELINE);
    assert!(said.contains("job 7: gradtx-curate-run") && said.contains("watch: gradtx status run"), "{said}");
    let kept: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(home.path("run/slurm/jobs.json")).unwrap()).unwrap();
    let ids: Vec<&str> =
        kept["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["7", "8", "9", "10"]);
    assert_eq!(
        (kept["jobs"][2]["kind"].as_str(), kept["jobs"][2]["array"].as_u64()),
        (Some("evaluate"), Some(1))
    );

    let queue = "7|RUNNING|None|2026-11-27T15:00:00|node[1-2]\n8|PENDING|Dependency|N/A|\n9|PENDING|Dependency|N/A|\n\
                 10|PENDING|Dependency|N/A|\n99|PENDING|Resources|N/A|\n";
    std::fs::write(home.path("queue"), queue).unwrap();
    let status = ok(&home, &["status", "run"]);
    for (stage, wanted) in [
        ("curate", "job 7 (curate): RUNNING on node[1-2]"),
        ("train", "job 8 (train): PENDING (Dependency)"),
        ("evaluate", "job 9 (evaluate, array of 1): PENDING (Dependency)"),
        ("report", "job 10 (report): PENDING (Dependency)"),
    ] {
        assert!(status.contains(wanted), "no `{wanted}` in: {status}");
        assert!(status.lines().any(|line| line.starts_with(stage)), "{status}");
    }
    assert!(!status.contains("99"), "{status}");
    let line = status.lines().find(|line| line.starts_with("train")).unwrap();
    assert!(line.contains("PENDING") && !status.contains("not started  translator"), "{status}");

    let curate = ["submit", "--run=run", "--stage=curate"];
    let twice = refused(&home, &curate, 4);
    assert!(
        twice.contains("job 7 (curate) is in the queue already: RUNNING") && twice.contains("--again"),
        "{twice}"
    );
    assert!(ok(&home, &[&curate[..], &["--again"]].concat()).contains("job 11: "));

    let cancelled = ok(&home, &["cancel", "run", "evaluate", "report"]);
    assert!(cancelled.contains("cancelled job 10 (report)"), "{cancelled}");
    assert_eq!(std::fs::read_to_string(home.path("cancelled")).unwrap(), "10\n9\n", "the last ones first");
    std::fs::write(home.path("queue"), "").unwrap();
    assert!(ok(&home, &["cancel", "run"]).contains("no such job is in the queue"));
    assert!(ok(&home, &curate).contains("job 12: "), "those before have ended");
    // A squeue that fails hides nothing, and is said.
    let squeue = home.path("bin/squeue");
    std::fs::write(&squeue, "#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
        .unwrap();
    let run = |words: &[&str]| {
        let path = format!("{}:/usr/bin:/bin", home.path("bin").display());
        let mut command = home.command(words);
        command.env("PATH", path).env("HOME", home.dir());
        command.output().unwrap()
    };
    let status = run(&["status", "run"]);
    assert!(status.status.success());
    assert!(String::from_utf8_lossy(&status.stderr).contains("Unable to contact"), "{status:?}");
    let again = run(&curate);
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(
        !again.status.success() && said.contains("were submitted before: 7") && said.contains("--again"),
        "{said}"
    );
}

#[test]
fn a_chain_that_sbatch_refuses_halfway_is_taken_back() {
    let home = Home::with_client();
    sandbox(&home);
    let path = format!("{}:/usr/bin:/bin", home.path("bin").display());
    let text = std::fs::read_to_string(home.path("bin/sbatch")).unwrap();
    let text = text
        .replace("echo $((n + 7))", "[ $n -lt 2 ] || { echo 'invalid qos' >&2; exit 1; }\necho $((n + 7))");
    std::fs::write(home.path("bin/sbatch"), text).unwrap();
    let mut command = home.command(&PIPELINE);
    command.env("PATH", path).env("HOME", home.dir());
    let output = command.env("GRADTX", "/bin/true").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("invalid qos"), "{said}");
    assert_eq!(std::fs::read_to_string(home.path("cancelled")).unwrap(), "7\n8\n");
    let kept = std::fs::read_to_string(home.path("run/slurm/jobs.json")).unwrap();
    assert!(!kept.contains("\"7\""), "{kept}");
}

#[test]
fn logs_show_the_end_and_what_is_appended() {
    use std::io::{BufRead, Write};
    let home = Home::with_client();
    std::fs::create_dir_all(home.path("run/logs")).unwrap();
    let said = refused(&home, &["logs", "run"], 1);
    assert!(said.contains("there are no logs"), "{said}");
    let write = |name: &str, text: &str| {
        let path = home.path("run/logs").join(name);
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    write("gradtx-train-8.log", "gradtx-train-run 8: gradtx 0.1.0 on node1\n");
    write("gradtx-train-8.0.log", "step 1\nstep 2\nstep 3\n");
    let said = ok(&home, &["logs", "run", "train", "--lines=2"]);
    assert!(said.starts_with("==> run/logs/gradtx-train-8.log <==\n"), "{said}");
    assert!(said.ends_with("==> run/logs/gradtx-train-8.0.log <==\nstep 2\nstep 3\n"), "{said}");
    assert!(refused(&home, &["logs", "run", "curate"], 1).contains("no logs of a job curate"));
    let json: serde_json::Value = serde_json::from_str(&ok(&home, &["logs", "run", "--json"])).unwrap();
    assert_eq!(json["files"][1]["lines"][2], "step 3");

    let mut child = home
        .command(&["logs", "run", "train", "--follow", "-n", "1"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.by_ref().any(|line| line == "step 3"));
    write("gradtx-train-8.0.log", "step 4\nunfinished");
    assert_eq!(lines.next().unwrap(), "step 4", "nothing is shown twice");
    write("gradtx-train-8.0.log", " line\n");
    assert_eq!(lines.next().unwrap(), "unfinished line");
    write("gradtx-train-8-r1.0.log", "resumed\n");
    assert!(lines.by_ref().any(|line| line == "resumed"), "a requeued job has a new log");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn jobs_log_their_place_and_start_their_container() {
    let home = Home::with_client();
    let more = ["--container=/images/gradtx.sif", "--env=A=b c", "--srun=--cpu-bind=cores"];
    let words = ["submit", "--run=run", "--config=settings.toml", "--stage=curate", "--device=auto"];
    ok(&home, &[&words[..], &more].concat());
    let script = home.submitted().remove(0);
    std::fs::write(home.path("script"), &script).unwrap();
    let tool = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = home.path("bin").join(name);
        std::fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    tool("apptainer", "[ \"${@: -1}\" = --version ] && echo \"gradtx 9.8.7\"");
    tool("nvidia-smi", "echo 'NVIDIA A100, 550.54'; echo 'NVIDIA A100, 550.54'");
    let ran = Command::new("bash")
        .arg(home.path("script"))
        .current_dir(home.dir())
        .env("PATH", format!("{}:/usr/bin:/bin", home.path("bin").display()))
        .env("SEEN", home.path("seen"))
        .env("SLURM_JOB_ID", "7")
        .env("SLURM_JOB_NAME", "gradtx-curate-run")
        .env("SLURM_JOB_NODELIST", "node[1-2]")
        .env("GRADTX", "/not/in/the/container")
        .output()
        .unwrap();
    let said = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    let first = said.lines().next().unwrap();
    for wanted in [
        "gradtx-curate-run 7: gradtx 9.8.7 on node[1-2]",
        "2 x NVIDIA A100, driver 550.54",
        "settings ",
        "started 2",
    ] {
        assert!(first.contains(wanted), "no `{wanted}` in: {first}");
    }
    assert!(said.lines().last().unwrap().contains("done"), "{said}");
    let seen = std::fs::read_to_string(home.path("seen")).unwrap();
    let words: Vec<&str> = seen.lines().collect();
    let at = words.iter().position(|word| *word == "apptainer").unwrap();
    assert!(words[..at].contains(&"--cpu-bind=cores"), "{seen}");
    let binds = words[at + 4].split(',').collect::<Vec<_>>();
    assert_eq!(words[at + 1..at + 4], ["exec", "--nv", "--bind"]);
    assert!(
        binds.contains(&home.dir().to_str().unwrap()),
        "the directory of data, models and run: {binds:?}"
    );
    assert_eq!(words[at + 5..at + 8], ["/images/gradtx.sif", "gradtx", "curate"]);
}
