//! `gradtx submit` where there is no SLURM: what it refuses, and the scripts that it prints.
//! Submissions in earnest are tested by the target `cluster`.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use std::path::PathBuf;
use std::process::{Command, Output};

impl Home {
    /// The miniature, and a client whose name needs quotes.
    fn with_client() -> Self {
        let home = Self::miniature();
        std::fs::create_dir_all(home.path("it's ada")).unwrap();
        std::fs::copy(home.path("private.jsonl"), home.path("it's ada/train.jsonl")).unwrap();
        home
    }

    fn submit(&self, words: &[&str]) -> Output {
        self.command(&["submit", "--run", "run", "--config", "settings.toml"])
            .args(words)
            .env("PATH", "")
            .env("HOME", self.dir())
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("GRADTX_PROFILE")
            .output()
            .unwrap()
    }

    fn submit_refused(&self, words: &[&str], expected: &str) {
        let output = self.submit(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{words:?}: no `{expected}` in: {said}");
        assert!(!self.path("run").exists(), "{words:?}: nothing is written");
    }
}

#[test]
fn impossible_jobs_are_refused_before_any_write() {
    let home = Home::with_client();
    home.submit_refused(&["--stage=train"], "no tuple store");
    home.submit_refused(&["--stage=evaluate", "--client=it's ada"], "no trained translator");
    home.submit_refused(&["--stage=curate", "--set", "train.learning_rate=-1"], "train.learning_rate");
    home.submit_refused(&["--stage=curate", "--set", "models.llm=nowhere"], "models.llm");
    home.submit_refused(&["--stage=curate", "--set", "data.public=nowhere"], "data.public");
    home.submit_refused(&["--stage=train", "--array=4"], "only curation runs as an array");
    home.submit_refused(
        &["--stage=curate", "--client=it's ada"],
        "only for the stages evaluate and pipeline",
    );
    home.submit_refused(&["--stage=pipeline", "--client=nobody"], "--client nobody");
    home.submit_refused(&["--stage=curate", "--sbatch=oops"], "--sbatch oops");
    home.submit_refused(&["--stage=curate", "--nodes=0"], "--nodes");
    std::fs::remove_file(home.path("tiny/tokenizer.json")).unwrap();
    home.submit_refused(&["--stage=curate"], "tokenizer.json");
}

#[test]
fn without_slurm_nothing_is_submitted_or_written() {
    Home::with_client().submit_refused(&["--stage=curate"], "sbatch: not on the PATH");
}

/// Scripts of a dry run, by the path that is printed before each.
fn scripts(said: &str) -> Vec<(String, String)> {
    let parts = said.split("# /").skip(1);
    parts.map(|part| part.split_once('\n').unwrap()).map(|(path, text)| (path.into(), text.into())).collect()
}

#[test]
fn a_dry_run_prints_what_would_be_submitted() {
    let home = Home::with_client();
    let words = ["--stage=pipeline", "--client=it's ada", "--dry-run", "--nodes=2", "--array=16"];
    let output = home.submit(&words);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!home.path("run").exists(), "a dry run writes nothing");
    let scripts = scripts(&said);
    let names: Vec<&str> = scripts.iter().map(|(path, _)| path.rsplit('/').next().unwrap()).collect();
    let expected = ["curate", "train", "evaluate", "report"].map(|stage| format!("gradtx-{stage}.sbatch"));
    assert_eq!(names, expected);
    for (path, text) in &scripts {
        let checked = Command::new("bash").args(["-n", "-c", text]).output().unwrap();
        assert!(checked.status.success(), "{path}: {}", String::from_utf8_lossy(&checked.stderr));
        assert!(text.starts_with("#!/bin/bash\n#SBATCH --job-name=gradtx-"), "{path}");
    }
    assert!(scripts[0].1.contains("#SBATCH --array=0-15\n"));
    assert!(scripts[1].1.contains("#SBATCH --nodes=2\n"));
    assert!(scripts[2].1.contains(r"it'\''s ada'"), "the shell sees one word: {}", scripts[2].1);
    let commands: Vec<&str> = said.lines().filter(|line| line.starts_with("# command: sbatch")).collect();
    assert_eq!(commands.len(), 4);
    assert!(!commands[0].contains("--dependency"));
    assert!(commands[2].contains("'--dependency=afterok:<id of gradtx-train>' --kill-on-invalid-dep=yes"));
    let of_report = "'--dependency=afterok:<id of gradtx-train>,afterany:<id of gradtx-evaluate>' --kill-on";
    assert!(commands[3].contains(of_report), "a client that fails does not cost the report: {}", commands[3]);
}

/// The words of the `#SBATCH` lines of a script, read as sbatch reads them: up to the first line
/// that is neither empty nor a comment; blanks divide, quotes hold together, `#` begins a comment.
fn options_of(script: &str) -> Vec<String> {
    let is_comment = |line: &&str| line.is_empty() || line.starts_with('#');
    let lines = script.lines().take_while(is_comment).filter_map(|line| line.strip_prefix("#SBATCH"));
    lines.flat_map(words_of).collect()
}

fn words_of(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut escaped) = (vec![], None::<String>, None, false);
    for c in line.chars() {
        match c {
            _ if escaped => {
                word.get_or_insert_default().push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            _ if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            '#' if quote.is_none() => break,
            c if c.is_whitespace() && quote.is_none() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// A PATH with an `sbatch` that keeps what is submitted, and with programs for the script's run.
fn sandbox(home: &Home) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let bin = home.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let keep = home.path("submitted");
    std::fs::create_dir_all(&keep).unwrap();
    let sbatch = format!(
        "#!/bin/bash\nn=$(ls '{0}' | wc -l)\ncp -- \"${{@: -1}}\" '{0}'/$n\necho $((n + 7))\n",
        keep.display()
    );
    // What it says is in a file; without one, the queue is empty.
    let squeue = format!("#!/bin/bash\n[ ! -f '{0}' ] || cat '{0}'\n", home.path("queue").display());
    let scancel = format!("#!/bin/bash\nprintf '%s\\n' \"$@\" >>'{}'\n", home.path("cancelled").display());
    for (name, text) in [
        ("sbatch", sbatch.as_str()),
        ("srun", "#!/bin/bash\nprintf '%s\\n' \"$@\" >>\"$SEEN\"\n"),
        ("scontrol", "#!/bin/bash\n"),
        ("scancel", scancel.as_str()),
        ("squeue", squeue.as_str()),
    ] {
        let path = bin.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    bin
}

impl Home {
    /// A submission to the sandbox's sbatch, run from a directory of its own.
    fn submit_in(&self, bin: &std::path::Path, words: &[&std::ffi::OsStr]) -> Output {
        let path = format!("{}:/usr/bin:/bin", bin.display());
        self.command(&["submit", "--config", "settings.toml", "--stage=curate", "--device=cpu"])
            .args(words)
            .env("PATH", path)
            .env("HOME", self.dir())
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("GRADTX_PROFILE")
            .output()
            .unwrap()
    }

    fn submitted(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("submitted")).unwrap().flatten();
        entries.map(|entry| std::fs::read_to_string(entry.path()).unwrap()).collect()
    }
}

#[test]
fn hostile_names_are_refused_before_any_write() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let home = Home::with_client();
    let bin = sandbox(&home);
    let before = std::fs::read_dir(home.dir()).unwrap().count();
    let words: Vec<Vec<OsString>> = [
        vec!["--run", "x\ntouch PWNED\n#"],
        vec!["--run", "x\r\ntouch PWNED"],
        vec!["--run", "x\" --wrap=\"touch PWNED"],
        vec!["--run", "x'; touch PWNED; '"],
        vec!["--run", "x\\"],
        vec!["--run", "$(touch PWNED)"],
        vec!["--run", "`touch PWNED`"],
        vec!["--run=-x\u{1b}[2J"],
        vec!["--run", "run", "--partition", "a\ntouch PWNED"],
        vec!["--run", "run", "--partition", "a --wrap=x"],
        vec!["--run", "run", "--account", "a\"\n#SBATCH --uid=0"],
        vec!["--run", "run", "--account", ""],
        vec!["--run", "run", "--time", "1\ntouch PWNED"],
        vec!["--run", "run", "--time", "10 --exclusive"],
        vec!["--run", "run", "--sbatch=--qos=a --wrap=x"],
        vec!["--run", "run", "--sbatch=--comment=a\ntouch PWNED"],
        vec!["--run", "run", "--sbatch=--comment='a b'"],
        vec!["--run", "run", "--sbatch=-d afterok:1"],
        vec!["--run", "run", "--sbatch=--"],
        vec!["--run", "run", "--array", "3%"],
        vec!["--run", "run", "--array", "0-3"],
    ]
    .into_iter()
    .map(|words| words.into_iter().map(OsString::from).collect())
    .chain([vec!["--run".into(), OsStr::from_bytes(b"x\xff\xfe").to_owned()]])
    .collect();
    for words in words {
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        for dry in [&[][..], &[OsStr::new("--dry-run")]] {
            let output = home.submit_in(&bin, &[&words[..], dry].concat());
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
            assert!(!said.contains("\u{1b}") && !said.contains('\r'), "{words:?}: {said:?}");
        }
    }
    assert!(home.submitted().is_empty());
    assert_eq!(std::fs::read_dir(home.dir()).unwrap().count(), before, "nothing is written");
}

#[test]
fn odd_names_that_are_plain_arrive_as_they_are() {
    let allowed = [
        "--job-name=",
        "--output=",
        "--nodes=",
        "--ntasks-per-node=",
        "--cpus-per-task=",
        "--time=",
        "--array=",
        "--partition=",
        "--account=",
        "--requeue",
        "--signal=",
        "--open-mode=",
        "--constraint=",
    ];
    for run in ["a b", "50%j", "läufe (1)", "semi;touch PWNED;", "#run", "&touch PWNED&", "-dash", "{x"] {
        let home = Home::with_client();
        let bin = sandbox(&home);
        let words = [
            &format!("--run=./{run}"),
            "--partition=a100,h100",
            "--account=lab_1",
            "--sbatch=--constraint=a&b|c",
        ];
        let words: Vec<&std::ffi::OsStr> = words.iter().map(|word| std::ffi::OsStr::new(*word)).collect();
        let output = home.submit_in(&bin, &words);
        if run == "{x" {
            assert_eq!(output.status.code(), Some(2), "braces end a word of the script");
            continue;
        }
        assert!(output.status.success(), "{run}: {}", String::from_utf8_lossy(&output.stderr));
        let script = home.submitted().remove(0);
        let options = options_of(&script);
        let known = |word: &String| allowed.iter().any(|start| word.starts_with(start));
        assert!(options.iter().all(known), "{run}: {options:?}");
        let log = options.iter().find_map(|word| word.strip_prefix("--output=")).unwrap();
        let wanted =
            format!("{}/logs/gradtx-curate-%j.log", home.path(run).display().to_string().replace('%', "%%"));
        assert_eq!(log, wanted);
        // The script itself, in an empty directory: it does what it should, and nothing that a name says.
        let place = home.path("place");
        std::fs::create_dir(&place).unwrap();
        std::fs::write(home.path("script"), &script).unwrap();
        let seen = home.path("seen");
        let path = format!("{}:/usr/bin:/bin", bin.display());
        let ran = Command::new("bash")
            .arg(home.path("script"))
            .current_dir(&place)
            .env("PATH", path)
            .env("SEEN", &seen)
            .env("SLURM_JOB_ID", "7")
            .env("SLURM_JOB_NAME", "gradtx-curate")
            .env("SLURM_JOB_NODELIST", "n1")
            .env_remove("GRADTX")
            .output()
            .unwrap();
        assert!(ran.status.success(), "{run}: {}", String::from_utf8_lossy(&ran.stderr));
        let seen = std::fs::read_to_string(seen).unwrap();
        assert!(seen.lines().any(|word| word == home.path(run).to_str().unwrap()), "{run}: {seen}");
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "{run}: something else was run");
        assert!(!home.path("PWNED").exists() && !home.path(run).join("PWNED").exists());
    }
}

/// A command with the sandbox's SLURM, in the home's directory.
fn gradtx(home: &Home, words: &[&str]) -> Output {
    let path = format!("{}:/usr/bin:/bin", sandbox(home).display());
    home.command(words)
        .env("PATH", path)
        .env("HOME", home.dir())
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("GRADTX_PROFILE")
        // A program that computes on GPUs, however the tests were built.
        .env("GRADTX", "/bin/true")
        .output()
        .unwrap()
}

const PIPELINE: [&str; 6] = [
    "submit",
    "--run=run",
    "--config=settings.toml",
    "--stage=pipeline",
    "--client=it's ada",
    "--device=auto",
];

/// What a command prints when it succeeds.
fn ok(home: &Home, words: &[&str]) -> String {
    let output = gradtx(home, words);
    assert_eq!(output.status.code(), Some(0), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a command says when it fails with this code.
fn refused(home: &Home, words: &[&str], code: i32) -> String {
    let output = gradtx(home, words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
    said
}

const PROFILE: &str = r#"
setup = ["module load openmpi"]
[environment]
NCCL_SOCKET_IFNAME = "ib0"
[job]
account = "lab"
partition = "gpu"
gres = "gpu:a100:4"
mem = "480G"
nodes = 2
sbatch = ["--hint=nomultithread"]
[evaluate]
array_limit = 3
time = "2:00:00"
[report]
partition = "cpu"
"#;

/// With a site profile where gradtx looks for it.
fn home_with_profile() -> Home {
    let home = Home::with_client();
    std::fs::create_dir_all(home.path(".config/gradtx")).unwrap();
    std::fs::write(home.path(".config/gradtx/cluster.toml"), PROFILE).unwrap();
    home
}

#[test]
fn profiles_apply_unless_the_command_line_differs() {
    let home = home_with_profile();
    let told =
        ["--dry-run", "--nodes=curate=8", "--mem=64G", "--sbatch=train=--spread-job", "--nodes=train=3"];
    let said = ok(&home, &[&PIPELINE[..], &told].concat());
    let scripts = scripts(&said);
    let options: Vec<Vec<String>> = scripts.iter().map(|(_, text)| options_of(text)).collect();
    let has = |job: usize, option: &str| options[job].iter().any(|found| found == option);
    for job in 0..4 {
        assert!(has(job, "--account=lab") && has(job, "--mem=64G") && has(job, "--hint=nomultithread"));
        assert!(scripts[job].1.contains("\nmodule load openmpi\nexport NCCL_SOCKET_IFNAME=ib0\n"));
    }
    assert!(has(0, "--nodes=8") && has(1, "--nodes=3") && has(2, "--nodes=1") && has(3, "--nodes=1"));
    assert!(has(0, "--gres=gpu:a100:4") && has(1, "--gres=gpu:a100:4") && has(2, "--gres=gpu:a100:1"));
    assert!(
        options[3].iter().all(|option| !option.contains("gpu:")),
        "the report has no GPU: {:?}",
        options[3]
    );
    assert!(has(2, "--partition=gpu") && has(3, "--partition=cpu"));
    assert!(has(1, "--spread-job") && !has(0, "--spread-job"));
    assert!(has(2, "--array=0-0%3") && has(2, "--time=2:00:00") && has(3, "--time=01:00:00"));
    assert!(options[0].contains(&"--job-name=gradtx-curate-run".to_string()), "{:?}", options[0]);
    let file = home.path(".config/gradtx/cluster.toml").display().to_string();
    for line in [
        format!("# account = \"lab\" ({file} [job])"),
        "# nodes = 8 (command line)".into(),
        "# mem = \"64G\" (command line)".into(),
        format!("# time = \"2:00:00\" ({file} [evaluate])"),
        "# cpus_per_task = 8 (default)".into(),
    ] {
        assert!(said.lines().any(|found| found == line), "no `{line}` in: {said}");
    }
    let none = ok(&home, &[&PIPELINE[..], &["--dry-run", "--profile=none"]].concat());
    assert!(!none.contains("--account") && none.contains("#SBATCH --gpus-per-node=4\n"), "{none}");
}

#[test]
fn a_profile_that_cannot_be_used_is_refused() {
    let home = home_with_profile();
    let curate = ["submit", "--run=run", "--config=settings.toml", "--stage=curate", "--dry-run"];
    let said = refused(&home, &[&curate[..], &["--profile=elsewhere"]].concat(), 2);
    assert!(
        said.contains("--profile elsewhere: no such profile")
            && said.contains(".config/gradtx/elsewhere.toml"),
        "{said}"
    );
    std::fs::write(home.path("mine.toml"), "[job]\npartion = 'gpu'\n").unwrap();
    let said = refused(&home, &[&curate[..], &["--profile=mine.toml"]].concat(), 2);
    assert!(said.contains("mine.toml") && said.contains("did you mean `job.partition`?"), "{said}");
    std::fs::write(home.path("mine.toml"), "gpu = 'a99'\n[job]\ngpus_per_node = 4\n").unwrap();
    let said = refused(&home, &[&curate[..], &["--profile=mine.toml", "--device=auto"]].concat(), 2);
    assert!(said.contains("mine.toml: gpu: expected one of a100-40g"), "{said}");
    let said = refused(&home, &[&curate[..], &["--device=cpu"]].concat(), 2);
    assert!(
        said.contains("gres gpu:a100:4 (") && said.contains("cluster.toml [job]") && said.contains("idle"),
        "{said}"
    );
    let said = refused(&home, &[&curate[..], &["--sbatch=--array=0-31%8"]].concat(), 2);
    assert!(said.contains("--array is not passed on") && said.contains("--array-limit"), "{said}");
    let said = refused(&home, &[&curate[..], &["--mount=/scratch"]].concat(), 2);
    assert!(said.contains("--container IMAGE"), "{said}");
    assert!(!home.path("run").exists());
}

#[test]
fn plans_choose_nodes_for_a_known_gpu() {
    let home = Home::with_client();
    // Without a number of jobs per stream, which is then chosen too.
    let settings = std::fs::read_to_string(home.path("settings.toml")).unwrap();
    let settings: String = settings
        .lines()
        .filter(|line| !line.starts_with("jobs_per_batch = "))
        .map(|line| format!("{line}\n"))
        .collect();
    std::fs::write(home.path("settings.toml"), &settings).unwrap();
    let asked = ["--gpu=h100", "--nodes=4", "--gpus-per-node=2"];
    let said = ok(&home, &[&PIPELINE[..], &asked, &["--dry-run"]].concat());
    assert!(said.contains("# recommended: curate on "), "{said}");
    assert!(said.contains("(recommended by gradtx plan)"), "{said}");
    let train = &scripts(&said)[1].1;
    assert!(train.contains("#SBATCH --nodes=1\n"), "so small a translator is trained on one node: {train}");
    let exact = ok(&home, &[&PIPELINE[..], &asked, &["--nodes=train=3", "--dry-run"]].concat());
    assert!(scripts(&exact)[1].1.contains("#SBATCH --nodes=3\n"), "what was said for the job stays: {exact}");
    assert!(!home.path("run").exists());
    ok(&home, &[&PIPELINE[..], &asked].concat());
    let stored = std::fs::read_to_string(home.path("run/run.toml")).unwrap();
    let chosen = said.split("curate.jobs_per_batch = ").nth(1).unwrap().split(':').next().unwrap();
    assert!(stored.contains(&format!("jobs_per_batch = {chosen}\n")), "{chosen}: {stored}");
    let said = ok(&Home::with_client(), &[&PIPELINE[..], &["--nodes=4", "--dry-run"]].concat());
    assert!(said.contains("# nodes are as asked for; with --gpu KIND"), "{said}");
}

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

/// Scripts as they are submitted, with all that a profile can put into them.
#[test]
fn shellcheck_finds_nothing_in_generated_scripts() {
    if Command::new("shellcheck").arg("--version").output().is_err() {
        eprintln!("no shellcheck here: generated scripts are not read by it");
        return;
    }
    let home = home_with_profile();
    std::fs::create_dir(home.path("ada")).unwrap();
    std::fs::copy(home.path("private.jsonl"), home.path("ada/train.jsonl")).unwrap();
    let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/../slurm/cluster.toml");
    let profile = format!("--profile={whole}");
    let pyxis =
        ["--container=/images/x.sqsh", "--container-runtime=pyxis", "--array=16%4", "--nodes=curate=1"];
    // The example's GPUs are planned for; the miniature's data can be counted.
    for more in
        [&[][..], &["--array=16%4", "--nodes=curate=1"], &[&pyxis[..], &[&profile]].concat()[..], &[&profile]]
    {
        let said =
            ok(&home, &[&PIPELINE[..4], &["--client=ada", "--device=auto", "--dry-run"], more].concat());
        for (path, text) in scripts(&said) {
            let file = home.path("script");
            std::fs::write(&file, text).unwrap();
            let found = Command::new("shellcheck").arg("--shell=bash").arg(&file).output().unwrap();
            assert!(found.status.success(), "{path}: {}", String::from_utf8_lossy(&found.stdout));
        }
    }
    // It does find what is wrong.
    std::fs::write(home.path("script"), "#!/bin/bash\nrm -rf $1/x\n").unwrap();
    assert!(!Command::new("shellcheck").arg(home.path("script")).output().unwrap().status.success());
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

#[test]
fn the_parser_of_the_test_sees_what_is_planted() {
    let script =
        "#!/bin/bash\n#SBATCH --output=\"a b\" --wrap=x # c\n\n#SBATCH --qos=h\ntouch x\n#SBATCH --late\n";
    assert_eq!(options_of(script), ["--output=a b", "--wrap=x", "--qos=h"]);
}
