//! README and docs/ are true: their commands run, their command lines exist, their links lead
//! somewhere.
//!
//! A fenced `sh` or `python` block is marked by an HTML comment before it, which a reader of the page
//! does not see:
//!
//! | comment | meaning |
//! |---|---|
//! | `<!-- test: run -->` | it is run, in a directory of the page's own |
//! | `<!-- test: output -->` | a `text` block: what the block before it prints; `…` stands for anything |
//! | `<!-- test: file NAME -->` | it is the content of this file, for the blocks after it |
//! | `<!-- test: skip, REASON -->` | it is not run |
//! | `<!-- test: setup`, commands, `-->` | commands that are run and that the page does not show |
//!
//! The directory begins with a miniature of everything: models `tiny/` and `llm/`, `public.jsonl`,
//! `private.jsonl`, `settings.toml` (see [`gradtx_tests::miniature`]), and `downloads/`, a data set to
//! divide. Of `sh` blocks that are not run every `gradtx` command line must still be one that the
//! program takes, and every `make` target must be there. Python is run where `GRADTX_PYTHON` (default:
//! `python3`) has numpy and safetensors.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod commands;
mod links;
mod page;
mod run;

use page::{Block, Mark, Page};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// README, CONTRIBUTING, CHANGELOG, and everything in docs/ and slurm/.
fn pages() -> Vec<Page> {
    let root = root();
    let mut names: Vec<String> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(String::from).into();
    for dir in ["docs", "slurm"] {
        let entries = std::fs::read_dir(root.join(dir)).unwrap().map(|entry| entry.unwrap().file_name());
        let entries = entries.map(|name| format!("{dir}/{}", name.to_string_lossy()));
        names.extend(entries.filter(|name| name.ends_with(".md")));
    }
    names.sort();
    names.iter().map(|name| Page::read(&root, name).unwrap()).collect()
}

#[test]
fn commands_of_pages_run() {
    let mut faults = vec![];
    for page in pages() {
        faults.extend(run::faults(&page));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn command_lines_of_pages_exist() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).unwrap();
    let faults: Vec<String> = pages().iter().flat_map(|page| commands::faults(page, &makefile)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn blocks_are_marked() {
    let mut faults = vec![];
    for page in pages() {
        let unmarked = |block: &&Block| block.is_program() && block.mark == Mark::None;
        for block in page.blocks.iter().filter(unmarked) {
            faults.push(format!(
                "{}:{}: a `{}` block without a mark; put `<!-- test: run -->` or `<!-- test: skip, REASON -->` \
                 before it (tests/docs/main.rs)",
                page.name, block.line, block.language
            ));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn links_of_pages_resolve() {
    let pages = pages();
    let faults: Vec<String> = pages.iter().flat_map(|page| links::faults(page, &root())).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

mod controls {
    //! What is wrong on a page is found.

    use super::*;

    fn faults_of(text: &str) -> Vec<String> {
        let page = Page::parse("page.md", text).unwrap();
        run::faults(&page)
    }

    #[test]
    fn blocks_run_in_order_and_in_one_directory() {
        let text = "<!-- test: file note.txt -->\n```text\nhello\n```\n\n<!-- test: setup\ncp note.txt copy.txt\n-->\n\
                    <!-- test: run -->\n```sh\ncat copy.txt   # what was copied\ngradtx --version\n```\n\
                    <!-- test: output -->\n```text\nhello\ngradtx …\n```\n";
        assert_eq!(faults_of(text), [""; 0]);
        assert_eq!(faults_of(&text.replace("\r", "")), [""; 0]);
        let wrong = faults_of(&text.replace("gradtx …", "gradtx 99"));
        assert!(
            wrong.len() == 1 && wrong[0].contains("page.md:15") && wrong[0].contains("gradtx 99"),
            "{wrong:?}"
        );
    }

    #[test]
    fn failing_commands_are_named() {
        let text = "# Page\n\n<!-- test: run -->\n```sh\ntrue\ngradtx train --run nowhere\n```\n";
        let found = faults_of(text);
        assert!(
            found.len() == 1 && found[0].contains("page.md:4") && found[0].contains("nowhere"),
            "{found:?}"
        );
        assert_eq!(faults_of(&text.replace("run -->", "skip, needs a cluster -->")), [""; 0]);
    }

    #[test]
    fn command_lines_that_do_not_exist_are_found() {
        let of = |line: &str| {
            let page = Page::parse("page.md", &format!("```sh\n{line}\n```\n")).unwrap();
            commands::faults(&page, "demo: build\nall test:\n")
        };
        for good in [
            "gradtx train --run run   # a comment with --nonsense",
            "srun --mpi=pmix gradtx curate --run run --config run.toml && make test",
            "X=1 ./gradtx status run | head -n 3",
            "gradtx train --run run \\\n  --set 'train.max_steps=3'",
            "gradtx --help; echo gradtx --nonsense",
            "cargo build -p gradtx --no-default-features",
        ] {
            assert_eq!(of(good), [""; 0], "{good}");
        }
        for (bad, word) in [
            ("gradtx train --run run --nonsense", "--nonsense"),
            ("cd x && gradtx nonsense", "nonsense"),
            ("make demo nothing", "nothing"),
            ("gradtx train", "--run"),
        ] {
            let found = of(bad);
            assert!(
                found.len() == 1 && found[0].contains("page.md:2") && found[0].contains(word),
                "{found:?}"
            );
        }
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("docs")).unwrap();
        std::fs::write(home.path().join("docs/a.md"), "# One\n\n## A `part`, and more\n").unwrap();
        let of = |name: &str, text: &str| links::faults(&Page::parse(name, text).unwrap(), home.path());
        let good = "# Here\n[x](docs/a.md) [y](docs/a.md#a-part-and-more) [z](#here) [w](https://example.org/x)\n\
                    `[not](a link)`\n```text\n[nor](this)\n```\n";
        assert_eq!(of("README.md", good), [""; 0]);
        assert_eq!(of("docs/b.md", "[x](a.md) [up](../docs/a.md)"), [""; 0]);
        for bad in ["[x](docs/b.md)", "[x](docs/a.md#other)", "[x](#there)", "![x](figure.svg)"] {
            let found = of("README.md", bad);
            assert!(found.len() == 1 && found[0].starts_with("README.md:1"), "{bad}: {found:?}");
        }
    }

    #[test]
    fn marks_that_say_nothing_are_refused() {
        for (text, word) in [
            ("<!-- test: skip -->\n```sh\nx\n```\n", "reason"),
            ("<!-- test: walk -->\n```sh\nx\n```\n", "walk"),
            ("<!-- test: file ../x -->\n```text\nx\n```\n", "../x"),
            ("```sh\nx\n", "not closed"),
            ("<!-- test: run -->\n\ntext\n", "no block"),
        ] {
            let error = Page::parse("page.md", text).unwrap_err();
            assert!(error.contains("page.md:1") && error.contains(word), "{error}");
        }
    }
}
