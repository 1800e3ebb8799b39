//! `split` as a person runs it on downloaded files, and what it writes read again.

#![allow(clippy::unwrap_used)]

use crate::home::{gradtx, said};
use gradtx_runtime::artifact::checksum_file;
use gradtx_runtime::data::read_rows;
use gradtx_runtime::data::split::Split;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A mixture: rows of two data sets, and the Parquet files of all six.
fn data(dir: &Path) -> Vec<String> {
    let rows = |make: fn(usize) -> String| (0..60).map(make).collect::<String>();
    let gsm8k = rows(|i| format!("{{\"question\": \"q{i}\", \"answer\": \"#### {i}\"}}\n"));
    let samsum = rows(|i| format!("{{\"id\": {i}, \"dialogue\": \"d{i}\", \"summary\": \"s{i}\"}}\n"));
    std::fs::write(dir.join("gsm8k.jsonl"), gsm8k).unwrap();
    std::fs::write(dir.join("samsum.jsonl"), samsum).unwrap();
    let tasks = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/fixtures/parquet/tasks");
    vec!["gsm8k.jsonl".into(), "samsum.jsonl".into(), tasks.to_str().unwrap().into()]
}

fn sums(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => out.extend(sums(&path)),
            false => _ = out.insert(path.clone(), checksum_file(&path).unwrap()),
        }
    }
    out
}

#[test]
fn every_row_goes_to_one_place_that_is_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let mut args =
        vec!["split", "--out", "out", "--seed", "5", "--clients", "3", "--dirichlet", "0.8", "--data"];
    args.extend(data.iter().map(String::as_str));
    let output = gradtx(dir.path(), &args);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let summary = said(&output);
    for word in ["public", "private/client-3/test", "gsm8k", "samsum", "rows"] {
        assert!(summary.contains(word), "no `{word}` in: {summary}");
    }
    let out = dir.path().join("out");
    let split = Split::read(&out.join("split.json")).unwrap();
    // 60 rows each, and the Parquet fixtures with their originals: 13 rows twice, which stay together.
    assert_eq!((split.rows, split.list("public").unwrap().len()), (146, 75));
    let mut all: Vec<usize> = split.lists.values().flatten().copied().collect();
    all.sort_unstable();
    assert_eq!(all, (0..146).collect::<Vec<_>>());
    // Files hold the rows that the lists say, with their own columns.
    for (name, list) in &split.lists {
        let rows = read_rows(&out.join(format!("{name}.jsonl"))).unwrap();
        assert_eq!(rows.len(), list.len());
        for (row, &at) in rows.iter().zip(list) {
            match at {
                0..60 => assert_eq!(row.columns["question"], format!("q{at}")),
                60..120 => assert_eq!(row.columns["id"], at - 60),
                _ => {}
            }
        }
    }

    let before = sums(&out);
    assert!(said(&gradtx(dir.path(), &args)).contains("finished"));
    assert_eq!(sums(&out), before);
    // The same anywhere; another seed is refused here and differs elsewhere.
    args[2] = "again";
    assert_eq!(gradtx(dir.path(), &args).status.code(), Some(0));
    let again = sums(&dir.path().join("again"));
    assert!(before.values().eq(again.values()));
    args[4] = "6";
    let refused = gradtx(dir.path(), &args);
    assert_eq!(refused.status.code(), Some(3));
    assert!(said(&refused).contains("+ split.seed = 6"), "{}", said(&refused));
}

#[test]
fn what_cannot_be_split_is_said() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    for (args, code, word) in [
        (&["--data", "gsm8k.jsonl", "--public-fraction", "1"][..], 2, "--public-fraction"),
        (&["--data", "gsm8k.jsonl", "--train-fraction", "0"], 2, "--train-fraction"),
        (&["--data", "gsm8k.jsonl", "--dirichlet=-1"], 2, "--dirichlet"),
        (&["--data", "gsm8k.jsonl", "--clients", "40"], 1, "client 1 would have"),
        (&["--data", "gsm8k.jsonl", "--group-by", "subject"], 1, "no column `subject`"),
        (&["--data", "none.jsonl"], 1, "none.jsonl"),
    ] {
        let mut all = vec!["split", "--out", "out"];
        all.extend(args);
        let output = gradtx(dir.path(), &all);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", said(&output));
        assert!(said(&output).contains(word), "{args:?}: {}", said(&output));
    }
}
