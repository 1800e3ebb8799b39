//! Where stages write when they are not told: in the run directory, where `report` and `status`
//! find it.
//!
//! ```text
//! RUN/clients/NAME/finetuned/{tiny,llm}     finetune
//! RUN/clients/NAME/translated/METHOD        translate; refine: METHOD-refined
//! RUN/clients/NAME/evaluated/WHAT           evaluate: base-llm, finetuned-tiny, METHOD, …
//! ```
//!
//! In: the paths of a command line. Out: a path. NAME is that of the data or of the update: what
//! its directory is called where the file is only called `train` or `test`.

use gradtx_run::paths::{ADAPTER_DIR, CLIENTS_DIR, UPDATE_FILE};
use gradtx_run::role::Role;
use gradtx_train::baselines::Method;
use std::path::{Component, Path, PathBuf};

/// Names of files that say nothing about whose they are.
const COMMON: [&str; 10] =
    ["train", "training", "test", "testing", "dev", "valid", "validation", "eval", "data", "examples"];
/// Directory of a client's fine-tuned models.
const FINETUNED: &str = "finetuned";
/// Directory of a client's translations.
const TRANSLATED: &str = "translated";
/// Directory of a client's scores.
const EVALUATED: &str = "evaluated";
/// Letters of the name of several clients together at most.
const MAX_NAME: usize = 80;

/// Where `finetune` writes.
pub fn finetuned(run: &Path, data: &Path, role: Role) -> PathBuf {
    client(run, &name_of_data(data)).join(FINETUNED).join(role.name())
}

/// Where `translate` writes.
pub fn translated(run: &Path, updates: &[PathBuf], method: Method, random_student: bool) -> PathBuf {
    let names = names_of_updates(run, updates);
    let mut name = names.join("+");
    if name.chars().count() > MAX_NAME {
        name = format!("{}+{}-more", names[0], names.len() - 1);
    }
    let what = match (method, random_student) {
        (_, false) => method.name().to_string(),
        (Method::GradTransformer, true) => "random-student".into(),
        (_, true) => format!("{}-random-student", method.name()),
    };
    client(run, &name).join(TRANSLATED).join(what)
}

/// The clients that updates are of.
pub fn names_of_updates(run: &Path, updates: &[PathBuf]) -> Vec<String> {
    updates.iter().map(|update| name_of_update(run, update)).collect()
}

/// Where `refine` writes.
pub fn refined(translated: &Path) -> PathBuf {
    translated.with_file_name(format!("{}-refined", last(translated)))
}

/// Where `evaluate` writes.
pub fn evaluated(
    run: &Path,
    data: &Path,
    role: Role,
    base: Option<&Path>,
    adapter: Option<&Path>,
) -> PathBuf {
    let what = match (base.map(last), adapter.map(name_of_adapter)) {
        (None, None) => format!("base-{}", role.name()),
        (Some(base), None) => base,
        (None, Some(adapter)) => adapter,
        (Some(base), Some(adapter)) => format!("{base}-{adapter}"),
    };
    client(run, &name_of_data(data)).join(EVALUATED).join(what)
}

fn client(run: &Path, name: &str) -> PathBuf {
    run.join(CLIENTS_DIR).join(name)
}

/// The last part of a path, also of `.` and `..`.
fn last(path: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let resolved = || path.canonicalize().ok().and_then(|path| name(&path));
    name(path).or_else(resolved).unwrap_or_else(|| "unnamed".into())
}

/// `client-1` of `…/client-1/train.jsonl`, `alice` of `…/alice.jsonl.gz` and of a directory `…/alice`.
fn name_of_data(data: &Path) -> String {
    let name = last(data);
    let stem = match data.is_dir() {
        true => name.as_str(),
        false => name.split('.').next().filter(|stem| !stem.is_empty()).unwrap_or(&name),
    };
    match COMMON.contains(&stem.to_lowercase().as_str()) {
        true => name_above(data).unwrap_or_else(|| stem.into()),
        false => stem.into(),
    }
}

/// The client of a directory in the run, or the name of a file that came from elsewhere.
fn name_of_update(run: &Path, update: &Path) -> String {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    if let Ok(rest) = absolute(update).strip_prefix(absolute(run).join(CLIENTS_DIR))
        && let (Some(Component::Normal(name)), true) =
            (rest.components().next(), rest.components().count() > 1)
    {
        return name.to_string_lossy().into_owned();
    }
    let name = last(update);
    if name == UPDATE_FILE {
        return name_above(update).unwrap_or_else(|| "update".into());
    }
    name.split('.').next().filter(|stem| !stem.is_empty()).unwrap_or(&name).into()
}

/// `finetuned-tiny` of `…/finetuned/tiny/adapter`, `ridge` of `…/translated/ridge/adapter`.
fn name_of_adapter(adapter: &Path) -> String {
    let home = match (last(adapter) == ADAPTER_DIR, adapter.parent()) {
        (true, Some(home)) if !home.as_os_str().is_empty() => home,
        _ => adapter,
    };
    match name_above(home) {
        Some(above) if above == FINETUNED => format!("{above}-{}", last(home)),
        _ => last(home),
    }
}

/// Name of the directory that a file or directory lies in.
fn name_above(path: &Path) -> Option<String> {
    let path = std::path::absolute(path).ok()?;
    Some(path.parent()?.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: PathBuf) -> String {
        path.display().to_string()
    }

    #[test]
    fn clients_are_named_by_their_data() {
        let of = |data: &str| at(finetuned(Path::new("run"), Path::new(data), Role::Tiny));
        assert_eq!(of("data/private/client-1/train.jsonl"), "run/clients/client-1/finetuned/tiny");
        assert_eq!(of("alice.jsonl.gz"), "run/clients/alice/finetuned/tiny");
        assert_eq!(of("data/Test.csv"), "run/clients/data/finetuned/tiny");
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("v1.2");
        std::fs::create_dir(&dir).unwrap();
        assert!(of(dir.to_str().unwrap()).ends_with("run/clients/v1.2/finetuned/tiny"));
    }

    #[test]
    fn translations_are_named_by_their_updates() {
        let of = |updates: &[&str], random| {
            let updates: Vec<PathBuf> = updates.iter().map(PathBuf::from).collect();
            at(translated(Path::new("run"), &updates, Method::GradTransformer, random))
        };
        let inside = "run/clients/client-1/finetuned/tiny/update.safetensors";
        assert_eq!(of(&[inside], false), "run/clients/client-1/translated/grad-transformer");
        assert_eq!(of(&["inbox/acme.safetensors"], true), "run/clients/acme/translated/random-student");
        let both = of(&["a/update.safetensors", "./run/clients/b/update.safetensors"], false);
        assert_eq!(both, "run/clients/a+b/translated/grad-transformer");
        let many: Vec<String> = (0..40).map(|i| format!("in/client-{i}.safetensors")).collect();
        let many = of(&many.iter().map(String::as_str).collect::<Vec<_>>(), false);
        assert_eq!(many, "run/clients/client-0+39-more/translated/grad-transformer");
        assert_eq!(at(refined(Path::new("x/products"))), "x/products-refined");
    }

    #[test]
    fn evaluations_are_named_by_their_model() {
        let of = |base: Option<&str>, adapter: Option<&str>| {
            let data = Path::new("data/client-1/test.jsonl");
            let paths = (base.map(Path::new), adapter.map(Path::new));
            at(evaluated(Path::new("run"), data, Role::Llm, paths.0, paths.1))
        };
        let home = "run/clients/client-1/evaluated";
        assert_eq!(of(None, None), format!("{home}/base-llm"));
        assert_eq!(of(Some("models/merged/"), None), format!("{home}/merged"));
        assert_eq!(of(None, Some("x/finetuned/llm/adapter")), format!("{home}/finetuned-llm"));
        assert_eq!(of(None, Some("x/translated/ridge/adapter/")), format!("{home}/ridge"));
        assert_eq!(of(Some("m"), Some("mine")), format!("{home}/m-mine"));
        assert!(of(None, Some("adapter")).starts_with(home));
    }
}
