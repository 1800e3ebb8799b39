//! Files that nobody should trust, and faults, by the sections of the first report of them.

use crate::common::{Case, UPDATE, end_of, kept};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What ends at all ends within this.
const SOON: Duration = Duration::from_secs(30);

/// 1: a shard shrinks while `train` has it open: not a signal; the file is named, or nothing
/// happens because its bytes are in memory already.
#[test]
fn a_shard_that_shrinks_while_it_is_used() {
    let case = Case::smoke();
    case.remove("a/run/translator");
    let settings = case.read("a/run/run.toml");
    let (before, train) = settings.split_once("[train]").unwrap();
    let train = train.replacen("max_steps = 4", "max_steps = 500000", 1).replacen(
        "eval_steps = 2",
        "eval_steps = 1000",
        1,
    );
    case.write("a/run/run.toml", format!("{before}[train]{train}"));
    let errors = std::fs::File::create(case.path("errors")).unwrap();
    let mut train = case.command(&["train", "--run", "a/run", "--quiet"]);
    let mut train = train.stdout(Stdio::null()).stderr(errors).spawn().unwrap();
    let began = Instant::now();
    while !case.path("a/run/translator/progress.json").exists() && began.elapsed() < SOON {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(500));
    std::fs::File::options()
        .write(true)
        .open(case.path("a/run/shadow/shards/00001.student.safetensors"))
        .unwrap()
        .set_len(0)
        .unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let died = train.try_wait().unwrap();
    if died.is_none() {
        std::process::Command::new("kill").args(["-TERM", &train.id().to_string()]).status().unwrap();
    }
    let code = train.wait().unwrap().code();
    let said = case.read("errors");
    match died {
        Some(_) => assert!(code == Some(1) && said.contains("00001.student.safetensors"), "{code:?}: {said}"),
        None => assert_eq!(code, Some(75), "{said}"),
    }
}

/// Scores one row with a model whose chat template is this; how that ended, and soon.
pub fn rendered(template: &str) {
    let case = Case::new();
    case.write("base/chat_template.jinja", template);
    let end =
        case.evaluate("o", &["--set", "data.prompt=template", "--set", "evaluate.max_new_tokens=2"]).ended();
    assert!(end.took < SOON, "{end:#?}");
    assert!(end.text.len() < 20_000, "an error is no dump of the template");
}

fn rendered_kept(name: &str) {
    rendered(&std::fs::read_to_string(kept(name)).unwrap());
}

/// 2: templates that grow, recurse and loop.
#[test]
fn template_that_doubles() {
    rendered_kept("doubling.jinja");
}

#[test]
fn template_that_joins() {
    rendered_kept("join_big.jinja");
}

#[test]
fn template_of_a_long_sum() {
    rendered(&format!("{{{{ 1{} }}}}", "+1".repeat(200_000)));
}

#[test]
fn template_with_a_tree_of_macros() {
    rendered_kept("macro_tree.jinja");
}

#[test]
fn template_with_a_namespace_in_itself() {
    rendered_kept("namespace_self.jinja");
}

#[test]
fn template_with_nested_loops() {
    rendered_kept("nested_loops.jinja");
}

/// 3: translators and tuples of another run, whose shapes are the same, and damage in them.
#[test]
fn another_run_s_translator_is_refused() {
    let case = Case::smoke();
    case.run("demo b --world smoke --seed 2").well();
    case.remove("a/run/translator");
    case.copy("b/run/translator", "a/run/translator");
    not_translated(&case, "grad-transformer");
}

#[test]
fn a_damaged_translator_is_refused() {
    let case = Case::smoke();
    case.flip("a/run/translator/model.safetensors", 600_000);
    not_translated(&case, "grad-transformer");
}

#[test]
fn a_damaged_shard_is_refused_by_every_method() {
    let case = Case::smoke();
    case.flip("a/run/shadow/shards/00001.teacher.safetensors", 6400);
    for method in ["mean", "nearest", "ridge"] {
        not_translated(&case, method);
    }
}

#[test]
fn another_run_s_tuples_are_not_trained_on() {
    let case = Case::smoke();
    case.run("demo b --world smoke --seed 2").well();
    case.remove("a/run/translator");
    case.remove("a/run/shadow");
    case.copy("b/run/shadow", "a/run/shadow");
    case.run("train --run a/run").refused();
    assert!(!case.path("a/run/translator/model.safetensors").exists());
}

/// The control: what is intact and of this run is used, by every method.
#[test]
fn an_intact_run_translates() {
    let case = Case::smoke();
    for method in ["grad-transformer", "mean", "nearest", "ridge"] {
        case.run(&format!("translate --run a/run {UPDATE} --method {method} --out o-{method}")).well();
    }
    case.remove("a/run/translator");
    case.run("train --run a/run").well();
}

/// A translation is refused, and leaves nothing that could be taken for one.
pub fn not_translated(case: &Case, method: &str) {
    case.run(&format!("translate --run a/run {UPDATE} --method {method} --out o-{method}")).refused();
    let out = case.path(&format!("o-{method}"));
    assert!(!out.join("update.safetensors").exists() && !out.join("adapter").exists(), "{method}");
}

/// 4: a newline in the run's path is no command of the batch script.
#[test]
fn newline_in_the_run_s_path() {
    let case = Case::smoke();
    case.write("bin/sbatch", "#!/bin/bash\ncp \"${@: -1}\" \"$CASE/submitted\"; echo 7\n");
    std::fs::set_permissions(case.path("bin/sbatch"), PermissionsExt::from_mode(0o755)).unwrap();
    let run = format!("{}/x\ntouch PWNED\n#", case.path("").display());
    let mut command = case.command(&[
        "submit",
        "--run",
        &run,
        "--config",
        "a/run/run.toml",
        "--stage",
        "curate",
        "--gpus-per-node=0",
    ]);
    let path = format!("{}:{}", case.path("bin").display(), std::env::var("PATH").unwrap());
    let end = end_of({
        command.env("PATH", path).env("CASE", case.path(""));
        command
    });
    if end.code == Some(0) {
        let script = case.read("submitted");
        assert!(!script.lines().any(|line| line.trim_start().starts_with("touch")), "{script}");
    } else {
        end.refused();
    }
}

/// 5: reading ends.
#[test]
fn inspect_of_links_in_a_circle() {
    let case = Case::empty();
    std::fs::create_dir(case.path("l")).unwrap();
    symlink(".", case.path("l/a")).unwrap();
    symlink(".", case.path("l/b")).unwrap();
    assert!(case.run("inspect l").ended().took < SOON);
}

#[test]
fn inspect_of_a_manifest_with_many_subsets() {
    let case = Case::smoke();
    case.edit("a/run/shadow/manifest.json", |m| m["shadows"] = 1_000_000_000_000_000_000u64.into());
    assert!(case.run("inspect a/run/shadow").refused().took < SOON);
}

#[test]
fn inspect_of_a_header_of_many_tensors() {
    let case = Case::empty();
    let entries: Vec<String> = (0..1_500_000)
        .map(|i| format!("\"{i:06}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    case.write("h.safetensors", bytes);
    assert!(case.run("inspect h.safetensors").refused().took < Duration::from_secs(10));
}

/// 6: sizes that files claim.
#[test]
fn an_update_of_half_a_terabyte() {
    let case = Case::smoke();
    let bytes = case.bytes(UPDATE);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header["update"] =
        serde_json::json!({ "dtype": "F32", "shape": [1, 1u64 << 37], "data_offsets": [0, 1u64 << 39] });
    let header = header.to_string();
    case.write("sparse.safetensors", [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat());
    let file = std::fs::File::options().write(true).open(case.path("sparse.safetensors")).unwrap();
    if file.set_len(8 + header.len() as u64 + (1 << 39)).is_err() {
        eprintln!("not tested: this file system has no files of that size");
        return;
    }
    let end = case.run("translate --run a/run sparse.safetensors --out o").refused();
    assert!(end.took < SOON && !end.has("os error"), "{end:#?}");
    end.says(&["sparse.safetensors"]);
}

#[test]
fn a_model_of_very_many_layers() {
    let case = Case::smoke();
    case.copy("a/world/tiny", "m");
    case.edit("m/config.json", |c| c["num_hidden_layers"] = 134_217_728.into());
    case.write("d.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\n");
    for line in ["doctor --model m", "inspect m", "evaluate --run a/run --data d.jsonl --base m --out o"] {
        let end = case.run(line).refused();
        assert!(end.took < SOON, "{end:#?}");
    }
}

#[test]
fn a_translator_s_configuration_that_is_absurd() {
    let case = Case::smoke();
    case.write("a/run/translator/config.json", std::fs::read(kept("translator_config.json")).unwrap());
    case.run("inspect a/run/translator").refused();
    case.run(&format!("translate --run a/run {UPDATE} --out o")).refused();
}

#[test]
fn a_table_that_grows_a_thousandfold() {
    let case = Case::empty();
    case.write("bomb.parquet", std::fs::read(kept("rows_bomb_gzip.parquet")).unwrap());
    case.run("split --data bomb.parquet --out o").refused().says(&["bomb.parquet"]);
}

#[test]
fn a_plan_of_a_billion_layers() {
    let case = Case::smoke();
    let end = case.run("plan --config a/run/run.toml --gpu a100-80g --tokens-per-example 10 --set translator.num_layers=1000000000");
    assert!(end.refused().says(&["num_layers"]).took < SOON);
}

/// 8: control characters of a file do not reach the terminal.
#[test]
fn control_characters_of_a_file() {
    let case = Case::empty();
    case.write("ansi.safetensors", std::fs::read(kept("ansi.safetensors")).unwrap());
    let end = case.run("inspect ansi.safetensors").ended();
    assert_printable(&end.text);
}

/// Fails unless a text has neither control characters nor marks that turn the direction of writing.
pub fn assert_printable(text: &str) {
    let is_bad = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || ('\u{202a}'..='\u{202e}').contains(&c)
            || ('\u{2066}'..='\u{2069}').contains(&c)
    };
    assert!(!text.contains(is_bad), "{text:?}");
}
