//! Absurd numbers, in settings and on the command line: one error, at once, by every command
//! that takes them.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use std::process::Output;
use std::time::{Duration, Instant};

fn gradtx(home: &Home, args: &[&str]) -> Output {
    let began = Instant::now();
    let output = home.gradtx(args);
    assert!(began.elapsed() < Duration::from_secs(10), "{args:?}: {:?}", began.elapsed());
    output
}

const PLAN: [&str; 7] = ["plan", "--config", "settings.toml", "--gpu", "h100", "--tokens-per-example", "20"];

#[test]
fn every_command_refuses_what_is_out_of_bounds() {
    let home = Home::miniature();
    for (key, value) in [
        ("translator.num_layers", "1000000000"),
        ("curate.num_subsets", "1000000000000"),
        ("train.learning_rate", "nan"),
        ("train.save_minutes", "-5"),
        ("lora.lora_dropout", "1.0"),
        ("finetune.tiny.warmup_steps", "1000000"),
    ] {
        let set = format!("{key}={value}");
        for args in [
            [&PLAN[..], &["--set", &set]].concat(),
            vec![
                "submit",
                "--run",
                "run",
                "--config",
                "settings.toml",
                "--stage=curate",
                "--dry-run",
                "--set",
                &set,
            ],
            vec!["curate", "--run", "run", "--config", "settings.toml", "--set", &set],
        ] {
            let output = gradtx(&home, &args);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
            assert!(said.contains(key) && said.contains("expected"), "{args:?}: {said}");
            assert!(!home.path("run").exists(), "{args:?}: a run was made");
        }
        let (section, name) = key.rsplit_once('.').unwrap();
        let text = format!("[{section}]\n{name} = {value}\n");
        std::fs::write(home.path("absurd.toml"), text).unwrap();
        let output = gradtx(&home, &["doctor", "--run", "absurd.toml"]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{key}: {said}");
        assert!(said.contains(key) && said.contains("expected"), "{key}: {said}");
    }
}

#[test]
fn options_have_bounds_too() {
    let home = Home::miniature();
    for words in [
        &["--nodes", "1000000000"][..],
        &["--nodes", "100000", "--gpus-per-node", "1024"],
        &["--tokens-per-example", "1000000000000000000"],
        &["--tokens-per-example", "4000000000"],
        &["--nodes", "-1"],
        &["--threads", "0"],
        &["--threads", "1000000000"],
    ] {
        let args = [&["plan", "--config", "settings.toml", "--gpu", "h100"], words].concat();
        assert_eq!(gradtx(&home, &args).status.code(), Some(2), "{args:?}");
    }
    for words in [["--seed", "18446744073709551615"], ["--seed", "9223372036854775808"]] {
        let output = gradtx(&home, &[&["demo", "d", "--world", "smoke"], &words[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{words:?}");
    }
    let many: Vec<String> = (0..10_000).map(|i| i.to_string()).collect();
    let many = many.join(", ");
    let sweep = format!(
        "[[sweep]]\nbase = \"settings.toml\"\nseed = [{many}]\ntrain.max_steps = [{many}]\nlora.r = [{many}]\n"
    );
    std::fs::write(home.path("sweep.toml"), sweep).unwrap();
    let output = gradtx(&home, &["sweep", "sweep.toml", "--out", "out"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("1000000000000 combinations"), "{said}");
    assert!(!home.path("out").exists());
}

#[test]
fn what_is_large_and_allowed_is_planned_in_time() {
    let home = Home::miniature();
    for set in [
        "curate.num_subsets=100000",
        "curate.tiny.global_batch_size=1000000000",
        "translator.num_layers=1000",
        "evaluate.max_new_tokens=16777216",
        "device.max_tokens_per_microbatch=16777216",
    ] {
        let output =
            gradtx(&home, &[&PLAN[..], &["--nodes", "1000", "--gpus-per-node", "8", "--set", set]].concat());
        assert_eq!(output.status.code(), Some(0), "{set}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
