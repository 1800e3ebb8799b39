//! What a site profile adds to scripts, nodes that a plan chooses, and scripts as shellcheck reads them.

use super::{PIPELINE, ok, options_of, refused, scripts};
use crate::home::Home;
use std::process::Command;

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
    let site_options =
        ["--dry-run", "--nodes=curate=8", "--mem=64G", "--sbatch=train=--spread-job", "--nodes=train=3"];
    let said = ok(&home, &[&PIPELINE[..], &site_options].concat());
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
