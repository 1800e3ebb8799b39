//! Private fine-tuning: what it states, what it costs, what a kill does to that.

#![allow(clippy::unwrap_used)]

use gradtx_runtime::artifact::{Generator, Privacy, UpdateVector};
use gradtx_runtime::metrics::JsonLines;
use gradtx_tests::miniature;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        miniature::write(dir.path());
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradtx-under-test"));
        command.args(args).args(["--threads", "1"]).current_dir(self.dir.path());
        command
    }

    fn gradtx(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// All that a command that succeeds says.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.gradtx(args);
        let said = both(&output);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
        said
    }

    fn refused(&self, args: &[&str], words: &[&str]) {
        let output = self.gradtx(args);
        let said = both(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{args:?}: {said}");
    }

    fn update(&self, out: &str) -> UpdateVector {
        UpdateVector::read(&self.path(out).join("update.safetensors")).unwrap()
    }

    fn cost(&self, out: &str) -> (f64, u64) {
        match self.update(out).meta.privacy {
            Privacy::DpSgd { epsilon, steps, .. } => (epsilon, steps),
            Privacy::None => panic!("{out}: states no guarantee"),
        }
    }

    /// Tokens so far, by step.
    fn tokens(&self, out: &str) -> Vec<u64> {
        let lines = JsonLines::read(&self.path(out).join("metrics.jsonl")).unwrap();
        lines.iter().map(|line| line["tokens"].as_u64().unwrap()).collect()
    }

    fn ledger(&self, out: &str) -> u64 {
        let text = std::fs::read_to_string(self.path(out).join("privacy-ledger.jsonl")).unwrap_or_default();
        text.lines().count().saturating_sub(1) as u64
    }
}

fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

const FINETUNE: [&str; 7] =
    ["finetune", "--run", "run", "--config", "settings.toml", "--data", "private.jsonl"];

fn finetune<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&FINETUNE[..], more].concat()
}

#[test]
fn a_private_update_states_what_it_cost() {
    let home = Home::new();
    let args = ["--dp-noise-multiplier", "1.5", "--dp-delta", "0.05", "--dp-max-grad-norm", "0.5"];
    let said = home.ok(&finetune(&[&args[..], &["--out", "a", "--save-adapter"]].concat()));
    for words in ["differentially private: ε", "only 7 examples", "signal to noise", "nothing is validated"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    let update = home.update("a");
    let Privacy::DpSgd { epsilon, delta, sigma, sampling_rate, steps, clip_norm, generator, .. } =
        update.meta.privacy
    else {
        panic!("no guarantee");
    };
    assert_eq!((delta, sigma, steps, clip_norm), (0.05, 1.5, 3, 0.5));
    assert!(epsilon > 0.5 && epsilon < 3.0 && (sampling_rate - 4.0 / 7.0).abs() < 1e-12, "{epsilon}");
    assert_eq!(generator, Generator::ChaCha20);
    assert!(home.ok(&["inspect", "a/update.safetensors"]).contains("for one example added or removed"));
    assert!(std::fs::read_to_string(home.path("a/adapter/README.md")).unwrap().contains("DP-SGD of 3 steps"));
    let lines = JsonLines::read(&home.path("a/metrics.jsonl")).unwrap();
    let spent: Vec<f64> = lines.iter().map(|line| line["epsilon"].as_f64().unwrap()).collect();
    assert!(spent.len() == 3 && spent.is_sorted() && spent[2] >= epsilon, "{spent:?} {epsilon}");
    assert_eq!((lines[2]["spent_steps"].as_u64(), home.ledger("a")), (Some(3), 3));
    // The same again is finished and costs nothing; elsewhere, the noise is another.
    home.ok(&finetune(&[&args[..], &["--out", "a", "--save-adapter"]].concat()));
    assert_eq!(home.ledger("a"), 3);
    home.ok(&finetune(&[&args[..], &["--out", "b"]].concat()));
    assert_ne!(home.update("b").values, update.values);
    // A damaged result is made again from what was kept, at no cost.
    std::fs::remove_file(home.path("a/update.safetensors")).unwrap();
    home.ok(&finetune(&[&args[..], &["--out", "a", "--save-adapter"]].concat()));
    assert_eq!((home.ledger("a"), home.update("a").values), (3, update.values));
}

#[test]
fn a_chosen_seed_is_marked_and_streams_do_not_matter() {
    let home = Home::new();
    let args = ["--dp-noise-multiplier", "0.5", "--set", "privacy.insecure_seed=1"];
    let run = |out, tokens| {
        let tokens = format!("device.max_tokens_per_microbatch={tokens}");
        let more = [&args[..], &["--out", out, "--set", &tokens]].concat();
        home.ok(&[&FINETUNE[..], &more].concat())
    };
    let said = run("a", 2048);
    run("b", 2048);
    run("c", 16);
    assert!(said.contains("NOT PRIVATE"), "{said}");
    let [a, b, c] = ["a", "b", "c"].map(|out| home.update(out));
    assert_eq!(a, b);
    let Privacy::DpSgd { generator, .. } = a.meta.privacy else { panic!() };
    assert_eq!(generator, Generator::Insecure);
    assert!(home.ok(&["inspect", "a/update.safetensors"]).contains("NOT PRIVATE"));
    let norm = |values: &[f32]| values.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
    let apart: Vec<f32> = a.values.iter().zip(&c.values).map(|(a, c)| a - c).collect();
    assert!(norm(&apart) <= 1e-4 * norm(&a.values), "{} of {}", norm(&apart), norm(&a.values));
}

/// Quick, for many runs.
const RDP: &str = "privacy.accountant=rdp";

/// Kills a fine-tuning at five moments, and then lets it end.
fn killed(home: &Home, out: &str, args: &[&str]) -> Vec<u64> {
    let args =
        finetune(&[args, &["--out", out, "--set", "finetune.tiny.max_steps=600", "--set", RDP]].concat());
    let mut spent = vec![];
    for delay in [30, 250, 90, 400, 170] {
        let mut child = home.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let before = home.ledger(out);
        while home.ledger(out) == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        spent.push(home.ledger(out));
    }
    home.ok(&args);
    spent.push(home.ledger(out));
    spent
}

#[test]
fn kills_never_lower_what_is_reported() {
    let home = Home::new();
    let spent = killed(&home, "by-noise", &["--dp-noise-multiplier", "8", "--dp-delta", "0.01"]);
    assert!(spent.is_sorted() && spent[0] > 0, "{spent:?}");
    let (epsilon, steps) = home.cost("by-noise");
    assert!(steps == spent[5] && steps >= 600, "{steps}: {spent:?}");
    let tokens = home.tokens("by-noise");
    assert!(tokens.len() == 600 && tokens.is_sorted() && tokens[0] < tokens[599], "{tokens:?}");
    home.ok(&finetune(&[
        "--dp-noise-multiplier",
        "8",
        "--dp-delta",
        "0.01",
        "--out",
        "calm",
        "--set",
        "finetune.tiny.max_steps=600",
        "--set",
        RDP,
    ]));
    let calm = home.cost("calm");
    assert!(calm.1 == 600 && epsilon >= calm.0, "{epsilon} {calm:?}");

    // Where an ε was promised, what is lost is not trained again.
    let spent = killed(&home, "by-epsilon", &["--dp-epsilon", "2", "--dp-delta", "0.01"]);
    let (epsilon, steps) = home.cost("by-epsilon");
    assert!(spent.is_sorted() && steps == spent[5] && steps <= 600 && epsilon <= 2.0, "{epsilon}: {spent:?}");
}

#[test]
fn what_is_not_private_or_not_meant_is_refused() {
    let home = Home::new();
    home.refused(&finetune(&["--out", "x", "--dp-delta", "1e-6"]), &["--dp-epsilon", "--dp-delta"]);
    home.refused(
        &finetune(&["--out", "x", "--dp-epsilon", "1", "--dp-noise-multiplier", "1"]),
        &["cannot be used"],
    );
    home.refused(&finetune(&["--out", "x", "--dp-epsilon=-1"]), &["epsilon"]);
    home.refused(
        &finetune(&["--out", "x", "--dp-noise-multiplier", "0.001"]),
        &["privacy.noise_multiplier", "0.05"],
    );
    let token = ["--out", "x", "--dp-epsilon", "1", "--set", "finetune.tiny.loss_reduction=token"];
    home.refused(&finetune(&token), &["loss_reduction", "sequence"]);
    assert!(!home.path("x/update.safetensors").exists());
    home.refused(&["plan", "--config", "settings.toml", "--dp-epsilon", "1"], &["--examples"]);
    home.refused(&["plan", "--config", "settings.toml"], &["--gpu"]);
}

#[test]
fn a_plan_says_what_a_promise_takes() {
    let home = Home::new();
    let said = home.ok(&[
        "plan",
        "--config",
        "settings.toml",
        "--dp-epsilon",
        "1",
        "--dp-delta",
        "1e-5",
        "--examples",
        "5000",
        "--json",
    ]);
    let plan: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let noise = plan["mechanism"]["noise_multiplier"].as_f64().unwrap();
    assert!(noise > 0.3 && noise < 3.0 && plan["steps"] == 3, "{plan}");
    assert!(plan["epsilon"].as_f64().unwrap() <= 1.0 && plan["signal_to_noise"].as_f64().unwrap() > 0.0);
    let said =
        home.ok(&["plan", "--config", "settings.toml", "--dp-noise-multiplier", "2", "--examples", "50"]);
    assert!(said.contains("noise multiplier 2") && said.contains("warning: only 50 examples"), "{said}");
}

#[test]
fn a_translation_keeps_the_guarantee_of_its_update() {
    let home = Home::new();
    home.ok(&["curate", "--run", "run", "--config", "settings.toml"]);
    home.ok(&finetune(&["--dp-noise-multiplier", "2", "--dp-delta", "0.01", "--out", "a"]));
    let translate =
        ["translate", "--run", "run", "--method", "mean", "--allow-outliers", "a/update.safetensors"];
    home.ok(&[&translate[..], &["--out", "one"]].concat());
    assert_eq!(home.update("one").meta.privacy, home.update("a").meta.privacy);
    home.ok(&[&translate[..], &["--out", "noise", "--random-update"]].concat());
    assert_eq!(home.update("noise").meta.privacy, Privacy::None);
}
