//! The snippet of docs/clients.md for pickled dictionaries of changes: with PyTorch where `GRADTX_PYTHON` (default:
//! `python3`) has it, otherwise with what `without_torch` has in its place.

use gradtx_runtime::artifact::UpdateVector;
use gradtx_tests::miniature;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn gradtx(dir: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradtx-under-test"));
    command.args(line.split(' ')).current_dir(dir).output().unwrap()
}

fn done(output: &Output) {
    let said = [&output.stdout, &output.stderr].map(|out| String::from_utf8_lossy(out).into_owned());
    assert!(output.status.success(), "{}", said.concat());
}

/// The block of Python of a page that reads `changes.pt`.
fn snippet() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/clients.md");
    let text = std::fs::read_to_string(page).unwrap();
    let blocks = text.split("```python\n").skip(1).filter_map(|block| block.split_once("\n```"));
    let found: Vec<&str> =
        blocks.map(|(block, _)| block).filter(|block| block.contains("changes.pt")).collect();
    assert_eq!(found.len(), 1, "blocks of docs/clients.md that read changes.pt");
    found[0].to_owned()
}

/// A Python, and where its PyTorch is if it has none of its own; nothing if there is no Python.
fn python() -> Option<(PathBuf, Option<PathBuf>)> {
    let python = PathBuf::from(std::env::var_os("GRADTX_PYTHON").unwrap_or("python3".into()));
    let works = |code: &str| {
        let found = Command::new(&python).args(["-c", code]).output();
        found.is_ok_and(|output| output.status.success())
    };
    if !works("import sys; assert sys.version_info >= (3, 9)") {
        eprintln!("{} is no Python 3.9 or later: the snippet is not run", python.display());
        return None;
    }
    let has_torch = works("import torch, safetensors.torch");
    let standin = Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/without_torch");
    Some((python, (!has_torch).then_some(standin)))
}

#[test]
fn dictionaries_of_changes_become_updates() {
    let Some((python, standin)) = python() else { return };
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    miniature::write(dir);
    for line in [
        "curate --run run --config settings.toml",
        "init-clients --run run --out package",
        "finetune --run package --set models.tiny=tiny --data private.jsonl --out client --save-adapter",
    ] {
        done(&gradtx(dir, line));
    }
    std::fs::write(dir.join("snippet.py"), snippet()).unwrap();
    let want = UpdateVector::read(&dir.join("client/update.safetensors")).unwrap();
    for names in ["full", "short"] {
        let mut command = Command::new(&python);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/dictionaries.py"));
        command.args(["snippet.py", "package/initial", "client/adapter", names]).current_dir(dir);
        if let Some(standin) = &standin {
            command.env("PYTHONPATH", standin);
        }
        done(&command.output().unwrap());
        let out = format!("{names}.safetensors");
        done(&gradtx(dir, &format!("convert --run package --adapter trained --examples 7 --out {out}")));
        let found = UpdateVector::read(&dir.join(out)).unwrap();
        let norm = |values: &[f32]| values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let apart: Vec<f32> = found.values.iter().zip(&want.values).map(|(a, b)| a - b).collect();
        assert!(found.values.len() == want.values.len() && norm(&want.values) > 0.0);
        assert!(norm(&apart) <= 1e-5 * norm(&want.values), "{names}: {} apart", norm(&apart));
        std::fs::remove_dir_all(dir.join("trained")).unwrap();
    }
}
