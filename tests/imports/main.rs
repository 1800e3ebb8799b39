//! Imports have a direction. Between packages Cargo keeps it; within a package this does: no
//! circle of files of different folders, and none of more than three files.
//!
//! Read from the text: every path that begins with `crate`, `self`, `super` or a module of the
//! file's own, in code that is not a test's. A name that a module only passes on (`pub use`) is
//! an import of the file that has it.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Packages whose files are looked at.
const PACKAGES: [&str; 11] = [
    "kernels",
    "runtime",
    "models",
    "launcher/run",
    "launcher/train",
    "launcher/plan",
    "launcher/pipeline",
    "launcher/report",
    "launcher/world",
    "launcher/cli",
    "benches",
];

/// A module by the names on the way to it; empty for the package's own.
type Module = Vec<String>;
/// The modules of a package, with their folders and texts.
type Files = BTreeMap<Module, (String, String)>;

#[test]
fn files_do_not_import_each_other_in_circles() {
    let mut found = vec![];
    for package in PACKAGES {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(package).join("src");
        let mut files = Files::new();
        read(&dir, &mut vec![], &mut files);
        assert!(files.contains_key(&vec![]), "{package} has no lib.rs");
        found.extend(faults(&files).into_iter().map(|fault| format!("{package}: {fault}")));
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn circles_are_found() {
    let files = |texts: &[(&str, &str)]| -> Files {
        let module = |path: &str| path.split("::").filter(|p| !p.is_empty()).map(String::from).collect();
        let folder = |path: &str| path.rsplit_once("::").map_or("", |(folder, _)| folder).to_string();
        texts.iter().map(|(path, text)| (module(path), (folder(path), text.to_string()))).collect()
    };
    let straight = [("", "mod a; mod b;"), ("a", "use crate::b::B;"), ("b", "pub struct B;")];
    assert!(faults(&files(&straight)).is_empty());
    let pair = [("", ""), ("a", "use crate::b::B;"), ("b", "use super::a::{self, A};")];
    assert!(faults(&files(&pair)).is_empty(), "two files of one folder may");
    let apart = [
        ("", ""),
        ("a", ""),
        ("a::x", "use crate::b::y::Y;"),
        ("b", ""),
        ("b::y", "fn f() { crate::a::x::g() }"),
    ];
    assert_eq!(faults(&files(&apart)).len(), 1);
    let long = [
        ("", ""),
        ("a", "use crate::b::B;"),
        ("b", "use crate::c::C;"),
        ("c", "use crate::d::D;"),
        ("d", "use crate::a::A;"),
    ];
    assert_eq!(faults(&files(&long)).len(), 1);
    let in_tests = [
        ("", ""),
        ("a", "use crate::b::x::X;"),
        ("b", ""),
        ("b::x", "#[cfg(test)]\nmod tests { use crate::a::A; }"),
    ];
    assert!(faults(&files(&in_tests)).is_empty(), "what tests import does not count");
    let passed_on = [
        ("", ""),
        ("a", "pub use x::X; pub mod x;"),
        ("a::x", ""),
        ("a::y", "use super::X;"),
        ("b", "use crate::a::X;"),
    ];
    assert!(faults(&files(&passed_on)).is_empty());
}

/// Reads the sources of a package; files of tests are left out.
fn read(dir: &Path, at: &mut Module, files: &mut Files) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            at.push(name);
            read(&path, at, files);
            at.pop();
        } else if path.extension().is_some_and(|end| end == "rs") && !["tests", "main"].contains(&&*name) {
            let mut module = at.clone();
            if !["lib", "mod"].contains(&&*name) {
                module.push(name);
            }
            files.insert(module, (at.join("::"), std::fs::read_to_string(&path).unwrap()));
        }
    }
}

/// Circles that the rule forbids, a line each.
fn faults(files: &Files) -> Vec<String> {
    let arrows = arrows(files);
    let reached = |from: &Module| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
        while let Some(at) = next.pop() {
            next.extend(arrows[at].iter().filter(|to| seen.insert((*to).clone())));
        }
        seen
    };
    let reached: BTreeMap<&Module, BTreeSet<Module>> = files.keys().map(|m| (m, reached(m))).collect();
    let circle = |module: &Module| -> BTreeSet<&Module> {
        let back = reached.iter().filter(|(_, from)| from.contains(module)).map(|(m, _)| *m);
        back.filter(|m| reached[module].contains(*m)).collect()
    };
    let circles: BTreeSet<BTreeSet<&Module>> = files.keys().map(circle).collect();
    let is_fault = |circle: &&BTreeSet<&Module>| {
        let folders: BTreeSet<&String> = circle.iter().map(|module| &files[*module].0).collect();
        circle.len() > 3 || folders.len() > 1
    };
    let line = |circle: &BTreeSet<&Module>| {
        let names = circle.iter().map(|module| module.join("::"));
        names.collect::<Vec<_>>().join(", ")
    };
    circles.iter().filter(is_fault).map(line).collect()
}

/// Which modules a module imports from.
fn arrows(files: &Files) -> BTreeMap<Module, BTreeSet<Module>> {
    let paths: BTreeMap<&Module, Vec<(bool, Vec<String>)>> =
        files.iter().map(|(module, (_, text))| (module, paths(text))).collect();
    // What a module passes on, by name.
    let mut passed: BTreeMap<(Module, String), (Module, String)> = BTreeMap::new();
    for (module, paths) in &paths {
        for (_, path) in paths.iter().filter(|(is_passed, _)| *is_passed) {
            if let Some((to, name)) = target(files, module, path) {
                passed.insert(((*module).clone(), name.clone()), (to, name));
            }
        }
    }
    let mut arrows = BTreeMap::new();
    for (module, paths) in &paths {
        let mut to = BTreeSet::new();
        for (is_passed, path) in paths {
            let Some(mut found) = target(files, module, path) else { continue };
            if *is_passed && found.0.starts_with(module) {
                continue;
            }
            while let Some(next) = passed.get(&found).filter(|next| **next != found) {
                found = next.clone();
            }
            if found.0 != **module {
                to.insert(found.0);
            }
        }
        arrows.insert((*module).clone(), to);
    }
    arrows
}

/// The module that a path leads to, and the name that is wanted of it; none for paths that
/// leave the package.
fn target(files: &Files, from: &Module, path: &[String]) -> Option<(Module, String)> {
    let mut rest = path;
    let mut at = match path.first()?.as_str() {
        "crate" => vec![],
        _ => from.clone(),
    };
    if ["crate", "self"].contains(&&*path[0]) {
        rest = &path[1..];
    }
    while rest.first().is_some_and(|name| name == "super") {
        at.pop();
        rest = &rest[1..];
    }
    let is_child = |at: &Module, name: &String| {
        files.contains_key(&[at.as_slice(), std::slice::from_ref(name)].concat())
    };
    if rest.len() == path.len() && !is_child(&at, &path[0]) {
        return None;
    }
    while rest.first().is_some_and(|name| is_child(&at, name)) {
        at.push(rest[0].clone());
        rest = &rest[1..];
    }
    Some((at, rest.first().cloned().unwrap_or_default()))
}

/// Every path in the code of a file, and whether it is passed on (`pub use`).
fn paths(text: &str) -> Vec<(bool, Vec<String>)> {
    // A module of tests is the last thing in its file.
    let tests = ["mod tests {", "pub(crate) mod tests {"].map(|head| format!("#[cfg(test)]\n{head}"));
    let code = tests.iter().fold(text, |code, head| code.split(head.as_str()).next().unwrap());
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    let code = lines.collect::<Vec<_>>().join("\n");
    let mut found = vec![];
    let mut rest = code.as_str();
    let mut is_passed = false;
    while let Some(start) = rest.find(|c: char| c.is_alphanumeric() || c == '_') {
        let before = rest[..start].trim_end();
        // A new statement, or a path that continues from a value or a type.
        if before.ends_with([';', '}']) && !before.ends_with("::{") {
            is_passed = false;
        }
        rest = &rest[start..];
        let (tree, left) = tree(rest);
        let continues = before.ends_with("::") || before.ends_with('.') || before.ends_with('>');
        match tree.as_slice() {
            [one] if one.len() == 1 && one[0] == "use" => {}
            [one] if one.len() == 1 && one[0] == "pub" => {
                // `pub use`, `pub(crate) use`
                let to = left.strip_prefix('(').and_then(|to| to.split_once(')'));
                rest = to.map_or(left, |(_, rest)| rest);
                is_passed = rest.trim_start().starts_with("use");
                continue;
            }
            all if !continues => {
                found.extend(all.iter().filter(|p| p.len() > 1).map(|p| (is_passed, p.clone())))
            }
            _ => {}
        }
        rest = left;
    }
    found
}

/// The paths of `a::{b, c::d}` at the beginning of a text, and what follows.
fn tree(text: &str) -> (Vec<Vec<String>>, &str) {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, mut rest) = (text[..end].to_string(), &text[end..]);
    let Some(after) = rest.strip_prefix("::") else { return (vec![vec![name]], rest) };
    let mut all = vec![];
    if let Some(mut list) = after.strip_prefix('{') {
        loop {
            list = list.trim_start_matches([',', ' ', '\n', '\t', '*']);
            if list.is_empty() || list.starts_with('}') {
                break;
            }
            let (inner, left) = tree(list);
            if left.len() == list.len() {
                break;
            }
            all.extend(inner);
            // ` as other`
            list = left.trim_start_matches(|c: char| c != ',' && c != '}');
        }
        rest = list.strip_prefix('}').unwrap_or(list);
    } else if after.starts_with(|c: char| c.is_alphanumeric() || c == '_') {
        (all, rest) = tree(after);
    } else {
        return (vec![vec![name, "*".into()]], after);
    }
    let with = |mut path: Vec<String>| {
        if path == ["self"] {
            path.clear();
        }
        path.insert(0, name.clone());
        path
    };
    (all.into_iter().map(with).collect(), rest)
}
