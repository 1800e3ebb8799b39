//! `device.kind = "auto"` on machines without a GPU, and GPUs that would stay idle. GPUs
//! themselves are tested on the stand-in device, by the target `cuda_emulated`.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, expect_success, expect_words, said};
use gradtx_runtime::artifact::checksum;
use std::path::Path;
use std::process::Output;

/// Whether this machine has an NVIDIA driver: then what is found here depends on it.
fn has_driver() -> bool {
    Path::new("/proc/driver/nvidia/version").exists()
}

impl Home {
    /// Runs the program outside of every SLURM job.
    fn gradtx_alone(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        for name in ["SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "GRADTX"] {
            command.env_remove(name);
        }
        command.output().unwrap()
    }

    fn finetune(&self, words: &[&str]) -> Output {
        let all = ["finetune", "--run", "run", "--data", "private.jsonl", "--out", "out", "--threads", "1"];
        self.gradtx_alone(&[&all[..], words].concat())
    }
}

fn ok(output: &Output) -> String {
    expect_success(&[], output)
}

fn refused(output: &Output, code: i32, words: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    expect_words(&[], &said, words);
}

#[test]
fn auto_records_the_cpu_and_leaves_the_run_open() {
    if has_driver() {
        return;
    }
    let home = Home::miniature();
    let said = ok(&home.finetune(&["--config", "settings.toml"]));
    assert!(said.contains("device: CPU (") && said.contains(", 1 thread\n"), "{said}");
    let stored = std::fs::read_to_string(home.path("run/run.toml")).unwrap();
    assert!(stored.contains("kind = \"auto\"") && stored.contains("dtype = \"auto\""), "{stored}");
    let record = std::fs::read_to_string(home.path("out/record.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["settings"]["device"]["kind"], "cpu");
    assert_eq!(record["settings"]["device"]["dtype"], "f32");
    assert!(ok(&home.finetune(&[])).contains("is finished"));
    assert!(ok(&home.finetune(&["--device", "cpu"])).contains("is finished"));
    refused(&home.finetune(&["--device", "cuda"]), 2, &["device.kind is cuda", "--device cpu"]);
    refused(&home.finetune(&["--dtype", "bf16", "--device", "auto"]), 2, &["device.dtype is bf16"]);
    refused(&home.finetune(&["--dtype", "bf16", "--device", "cpu"]), 2, &["device.dtype"]);
}

/// A record's text with the checksum of what it says now.
fn sealed(text: &str) -> String {
    let begin = text.rfind("\"xxh3\": \"").unwrap() + "\"xxh3\": \"".len();
    let end = begin + text[begin..].find('"').unwrap();
    let sum = checksum([&text[..begin], &text[end..]].concat().as_bytes());
    [&text[..begin], &sum, &text[end..]].concat()
}

#[test]
fn directories_of_a_gpu_refuse_to_resume_on_a_cpu() {
    if has_driver() {
        return;
    }
    let home = Home::miniature();
    ok(&home.finetune(&["--config", "settings.toml"]));
    let path = home.path("out/record.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record["settings"]["device"]["kind"] = "cuda".into();
    record["settings"]["device"]["dtype"] = "bf16".into();
    record["outputs"] = serde_json::json!({});
    std::fs::write(&path, record.to_string()).unwrap();
    refused(&home.finetune(&[]), 3, &["began on", "- device.kind = cuda", "+ device.kind = cpu", "hint:"]);
    // What is finished needs no device.
    let other = text.replace("\"kind\": \"cpu\"", "\"kind\": \"cuda\"").replace("\"f32\"", "\"bf16\"");
    assert_ne!(other, text);
    std::fs::write(&path, sealed(&other)).unwrap();
    assert!(ok(&home.finetune(&[])).contains("is finished"));
}

#[test]
fn submissions_and_plans_do_not_leave_gpus_idle() {
    let home = Home::miniature();
    let submit = |words: &[&str]| {
        let all = ["submit", "--run", "run", "--config", "settings.toml", "--stage=curate", "--dry-run"];
        home.gradtx_alone(&[&all[..], words].concat())
    };
    let idle = ["--gpus-per-node", "idle"];
    refused(&submit(&["--gpus-per-node=4", "--device=cpu"]), 2, &idle);
    refused(&submit(&["--sbatch=--gres=gpu:2", "--set", "device.kind=cpu"]), 2, &["--gres=gpu:2", "idle"]);
    refused(&submit(&["--gpus-per-node=0", "--device=cuda"]), 2, &["no GPUs"]);
    let said = ok(&submit(&["--device=cpu"]));
    assert!(!said.contains("#SBATCH --gpus"), "{said}");
    match cfg!(feature = "cuda") {
        true => {
            let said = ok(&submit(&["--gpus-per-node=2"]));
            assert!(said.contains("#SBATCH --gpus-per-node=2\n"), "{said}");
        }
        false => {
            refused(&submit(&["--gpus-per-node=2"]), 2, &["without CUDA", "idle"]);
            assert!(!ok(&submit(&[])).contains("#SBATCH --gpus"));
        }
    }
    let plan = |words: &[&str]| {
        let all = ["plan", "--config", "settings.toml", "--tokens-per-example", "20"];
        home.gradtx_alone(&[&all[..], words].concat())
    };
    ok(&plan(&["--gpu=h100"]));
    ok(&plan(&["--gpu=cpu"]));
    refused(&plan(&["--gpu=h100", "--set", "device.kind=cpu"]), 2, &["device.kind is cpu", "idle"]);
    refused(&plan(&["--gpu=cpu", "--set", "device.kind=cuda"]), 2, &["device.kind is cuda"]);
    let f32 = ok(&plan(&["--gpu=h100", "--set", "device.dtype=f32"]));
    assert!(f32.contains("warning: device.dtype is f32"), "{f32}");
    std::fs::write(
        home.path("sweep.toml"),
        "[[sweep]]\nbase = \"settings.toml\"\ndevice.kind = [\"auto\", \"cpu\"]\n",
    )
    .unwrap();
    let sweep = ["plan", "--sweep", "sweep.toml", "--tokens-per-example", "20", "--gpu=h100"];
    refused(&home.gradtx_alone(&sweep), 2, &["kind=cpu", "idle"]);
}
