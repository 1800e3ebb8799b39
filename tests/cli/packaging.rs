//! What is handed to users who do not build: the archive, the containers' recipes, the citation.

#![allow(clippy::unwrap_used)]

use crate::home::PROGRAM;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn text(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn dist(program: &str, out: &Path, most_glibc: &str) -> Output {
    Command::new(root().join("launcher/packaging/dist.sh"))
        .arg(program)
        .arg(out)
        .env("MOST_GLIBC", most_glibc)
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .output()
        .unwrap()
}

fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_archive_has_the_program_and_what_belongs_to_it() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let made = dist(PROGRAM, &out, "");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    ok(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&out));
    let archive = |dir: &Path| {
        let names = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
        names.into_iter().find(|path| path.to_string_lossy().ends_with(".tar.gz")).unwrap()
    };
    let first = archive(&out);
    let name = first.file_name().unwrap().to_string_lossy().replace(".tar.gz", "");
    let version = env!("CARGO_PKG_VERSION");
    assert!(name.starts_with(&format!("gradtx-{version}-x86_64-linux-glibc2.")), "{name}");
    ok(Command::new("tar").arg("-xzf").arg(&first).current_dir(scratch.path()));
    let tree = scratch.path().join(&name);
    ok(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&tree));
    for file in [
        "INSTALL",
        "share/man/man1/gradtx.1",
        "share/man/man1/gradtx-submit.1",
        "share/bash-completion/completions/gradtx",
        "share/zsh/site-functions/_gradtx",
        "share/fish/vendor_completions.d/gradtx.fish",
        "share/gradtx/slurm/train.sbatch",
        "share/gradtx/slurm/cluster.toml",
        "share/doc/gradtx/LICENSE",
        "share/doc/gradtx/docs/slurm.md",
    ] {
        assert!(tree.join(file).metadata().is_ok_and(|data| data.len() > 0), "no {file}");
    }
    let program = tree.join("bin/gradtx");
    assert_eq!(ok(Command::new(&program).arg("--version")).trim(), format!("gradtx {version}"));
    let symbols = Command::new("nm").arg(&program).output().unwrap();
    assert!(String::from_utf8_lossy(&symbols.stderr).contains("no symbols"), "it is stripped");

    // The same program gives the same bytes.
    let again = scratch.path().join("again");
    assert!(dist(PROGRAM, &again, "").status.success());
    assert_eq!(std::fs::read(archive(&again)).unwrap(), std::fs::read(&first).unwrap());
}

#[test]
fn programs_for_a_newer_glibc_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let made = dist(PROGRAM, scratch.path(), "2.5");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(
        !made.status.success() && said.contains("needs glibc 2.") && said.contains("MOST_GLIBC is 2.5"),
        "{said}"
    );
    let made = dist("/nowhere/gradtx", scratch.path(), "");
    assert!(String::from_utf8_lossy(&made.stderr).contains("/nowhere/gradtx"), "{made:?}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left behind");
}

/// Instructions of a Dockerfile, each as one line.
fn instructions(dockerfile: &str) -> Vec<(String, String)> {
    let lines = dockerfile.lines().filter(|line| !line.trim_start().starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let split = |line: &str| {
        let (name, rest) = line.split_once(' ')?;
        Some((name.to_string(), rest.split_whitespace().collect::<Vec<_>>().join(" ")))
    };
    joined.lines().filter_map(split).collect()
}

/// What hadolint's rules of most weight would find.
fn faults(dockerfile: &str) -> Vec<String> {
    let all = instructions(dockerfile);
    let mut found = vec![];
    let stages: Vec<&str> = all
        .iter()
        .filter(|(name, _)| name == "FROM")
        .filter_map(|(_, rest)| rest.split_once(" AS ").map(|(_, stage)| stage))
        .collect();
    for (name, rest) in &all {
        let mut fault = |what: &str| found.push(format!("{name} {rest}: {what}"));
        match name.as_str() {
            "FROM" => {
                let image = rest.split(' ').next().unwrap();
                match image.split_once(':') {
                    None if stages.contains(&image) => {}
                    None => fault("an image without a tag (DL3006)"),
                    Some((_, "latest")) => fault("the tag latest (DL3007)"),
                    Some(_) => {}
                }
            }
            "RUN" => {
                found.extend(faults_of_shell(rest).into_iter().map(|what| format!("RUN {rest}: {what}")));
            }
            "WORKDIR" if !rest.starts_with('/') => fault("a relative path (DL3000)"),
            "ADD" | "MAINTAINER" => fault("COPY, or a label (DL3020, DL4000)"),
            "CMD" | "ENTRYPOINT" if !rest.starts_with('[') => fault("not in JSON form (DL3025)"),
            "COPY" | "ENV" | "USER" | "CMD" | "ENTRYPOINT" | "WORKDIR" => {}
            _ => fault("an unknown instruction (DL1000)"),
        }
    }
    let last = all.iter().rev().find(|(name, _)| name == "USER").map(|(_, user)| user.as_str());
    if last.is_none_or(|user| user == "root" || user == "0") {
        found.push("the last user is root (DL3002)".into());
    }
    found
}

/// The same of shell commands that build an image.
fn faults_of_shell(commands: &str) -> Vec<String> {
    let mut found = vec![];
    if commands.contains("apt-get install") {
        for (needed, rule) in [
            ("--no-install-recommends", "DL3015"),
            (" -y", "DL3014"),
            ("apt-get update", "DL3009"),
            ("rm -rf /var/lib/apt/lists/*", "DL3009"),
        ] {
            if !commands.contains(needed) {
                found.push(format!("apt-get install without `{needed}` ({rule})"));
            }
        }
    }
    if commands.contains("sudo ") || commands.contains("apt-get upgrade") || commands.contains("apt install")
    {
        found.push("sudo, apt, or an upgrade (DL3004, DL3005, DL3027)".into());
    }
    if let Some((_, words)) = commands.split_once("pip install") {
        if !words.contains("--no-cache-dir") {
            found.push("pip keeps its cache (DL3042)".into());
        }
        let mut packages = words.split_whitespace().filter(|word| !word.starts_with(['-', '/']));
        if packages.any(|package| !package.contains("==")) {
            found.push("a Python package without a version (DL3013)".into());
        }
    }
    if commands.contains(" cd ") || commands.contains('|') && !commands.contains("||") {
        found.push("cd, or a pipe whose failure is hidden (DL3003, DL4006)".into());
    }
    found
}

#[test]
fn dockerfile_is_clean_and_names_existing_files() {
    let dockerfile = text("launcher/packaging/Dockerfile");
    assert_eq!(faults(&dockerfile), [""; 0]);
    for (_, rest) in instructions(&dockerfile).iter().filter(|(name, _)| name == "COPY") {
        let words: Vec<&str> = rest.split(' ').collect();
        if words[0].starts_with("--from=") {
            continue;
        }
        for source in &words[..words.len() - 1] {
            assert!(root().join(source).exists(), "COPY {source}");
        }
    }
    let ignored = text(".dockerignore");
    assert!(ignored.lines().any(|line| line == "target"), "gigabytes of builds are not sent to the builder");
}

#[test]
fn the_linter_of_the_test_finds_what_is_planted() {
    for (planted, rule) in [
        ("FROM debian\nUSER a", "DL3006"),
        ("FROM debian:latest\nUSER a", "DL3007"),
        (
            "FROM debian:12\nRUN apt-get update && apt-get install -y gcc \\\n  && rm -rf /var/lib/apt/lists/*\nUSER a",
            "DL3015",
        ),
        ("FROM debian:12\nRUN apt-get install -y --no-install-recommends gcc\nUSER a", "DL3009"),
        ("FROM debian:12\nRUN pip install --no-cache-dir numpy\nUSER a", "DL3013"),
        ("FROM debian:12\nRUN sudo make\nUSER a", "DL3004"),
        ("FROM debian:12\nCMD gradtx\nUSER a", "DL3025"),
        ("FROM debian:12\nWORKDIR work\nUSER a", "DL3000"),
        ("FROM debian:12", "DL3002"),
        ("FROM debian:12\nRUNN x\nUSER a", "DL1000"),
    ] {
        let found = faults(planted).join("\n");
        assert!(found.contains(rule), "{planted}: {found}");
    }
}

/// Sections of an Apptainer definition: of each stage the header's keys, then `%name` with its lines.
fn stages(definition: &str) -> Vec<BTreeMap<String, Vec<String>>> {
    let mut stages: Vec<BTreeMap<String, Vec<String>>> = vec![];
    let mut section = String::new();
    for line in definition.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        if let Some((key, value)) = line.split_once(": ").filter(|_| !line.starts_with([' ', '%'])) {
            if key == "Bootstrap" {
                stages.push(BTreeMap::new());
            }
            stages.last_mut().unwrap().insert(key.into(), vec![value.into()]);
        } else if let Some(name) = line.strip_prefix('%') {
            section = format!("%{name}");
            stages.last_mut().unwrap().entry(section.clone()).or_default();
        } else {
            assert!(line.starts_with("    "), "a line outside of a section: {line}");
            stages.last_mut().unwrap().get_mut(&section).unwrap().push(line.trim().into());
        }
    }
    stages
}

#[test]
fn the_apptainer_definition_is_the_dockerfile_s_image() {
    let definition = text("launcher/packaging/gradtx.def");
    let stages = stages(&definition);
    let [build, last] = &stages[..] else { panic!("expected two stages: {stages:?}") };
    let known =
        ["%files", "%files from build", "%post", "%environment", "%runscript", "%test", "%labels", "%help"];
    for stage in &stages {
        assert_eq!(stage["Bootstrap"], ["docker"]);
        let unknown: Vec<&String> =
            stage.keys().filter(|key| key.starts_with('%') && !known.contains(&key.as_str())).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        let commands = stage["%post"].join(" && ").replace("\\ && ", "");
        let mut found = faults_of_shell(&commands);
        // The stage of the build is thrown away; a section has its own directory.
        found.retain(|fault| {
            !(fault.contains("DL3003") || fault.contains("DL3009") && stage["Stage"] == ["build"])
        });
        assert!(found.is_empty(), "{found:?}");
        assert_eq!(stage["%post"][0], "set -eu", "a command that fails ends the build");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), stage["%post"].join("\n")).unwrap();
        ok(Command::new("sh").arg("-n").arg(file.path()));
    }
    let dockerfile = text("launcher/packaging/Dockerfile");
    for image in [&build["From"][0], &last["From"][0]] {
        assert!(dockerfile.contains(&format!("FROM {image}")), "the same images: {image}");
    }
    for line in last["%post"].iter().filter(|line| line.contains("==")) {
        assert!(dockerfile.contains(line.trim_end_matches(" \\")), "the same versions: {line}");
    }
    assert_eq!(last["%runscript"], ["exec gradtx \"$@\""]);
    for line in &last["%files from build"] {
        if let Some(source) = line.split(' ').next().unwrap().strip_prefix("/src/") {
            assert!(root().join(source).exists(), "{source}");
        }
    }
}

#[test]
fn the_citation_has_what_its_format_asks_for() {
    let citation = text("CITATION.cff");
    let value = |key: &str| {
        let line = citation.lines().find(|line| line.starts_with(&format!("{key}: ")));
        line.unwrap_or_else(|| panic!("no {key}"))[key.len() + 2..].trim_matches('"').to_string()
    };
    assert_eq!(value("cff-version"), "1.2.0");
    assert_eq!(value("type"), "software");
    assert_eq!(value("version"), env!("CARGO_PKG_VERSION"));
    assert!(text("Cargo.toml").contains(&format!("license = \"{}\"", value("license"))));
    assert!(!value("message").is_empty() && value("title").starts_with("gradtx"));
    let at = |line: &str| {
        citation.lines().position(|found| found == line).unwrap_or_else(|| panic!("no `{line}`"))
    };
    assert!(at("authors:") < at("  - name: \"gradtx contributors\""));
    assert!(at("references:") < at("  - type: article") && citation.contains("arXiv:2605.27591"));
    assert!(!citation.contains('\t'), "YAML has no tabs");
    for line in citation.lines() {
        let indent = line.len() - line.trim_start().len();
        assert!(indent % 2 == 0, "indented by two: {line}");
    }
}
