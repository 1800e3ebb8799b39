//! [`Step`]: one command of a run of a sweep.
//!
//! In: a run directory, and clients. Out: the commands in their order, each with the directory that
//! it writes. They are those of slurm/evaluate.sbatch, with the same directories.

use gradtx_run::paths::{ADAPTER_DIR, CLIENTS_DIR, SHADOW_DIR, TRANSLATOR_DIR, UPDATE_FILE};
use gradtx_run::role::Role;
use gradtx_run::text::quoted;
use gradtx_train::baselines::Method;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// A client's training data.
pub(crate) const TRAIN_FILE: &str = "train.jsonl";
/// A client's test data.
const TEST_FILE: &str = "test.jsonl";

/// One command of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What it is, for people.
    pub title: String,
    /// The directory that it writes, relative to the run's; none for a command that is always done.
    pub dir: Option<PathBuf>,
    /// The words after `gradtx`.
    pub arguments: Vec<OsString>,
    /// Several processes can do it together.
    pub has_ranks: bool,
    /// Does not depend on the translator, so that runs with the same other settings share it.
    pub is_shared: bool,
}

/// Words of a command: texts and paths.
type Words<'a> = &'a [&'a dyn AsRef<OsStr>];

impl Step {
    fn new(title: impl Into<String>, dir: impl Into<PathBuf>, words: Words<'_>) -> Self {
        Self {
            title: title.into(),
            dir: Some(dir.into()),
            arguments: words.iter().map(|word| word.as_ref().to_owned()).collect(),
            has_ranks: false,
            is_shared: false,
        }
    }

    /// The curation of a run directory.
    pub fn curation(run: &Path) -> Self {
        Self { has_ranks: true, ..Self::new("curate", SHADOW_DIR, &[&"curate", &"--run", &run]) }
    }

    /// The command as it can be pasted into a shell.
    pub fn command(&self) -> String {
        let words: Vec<String> = self.arguments.iter().map(|word| quoted(&word.to_string_lossy())).collect();
        format!("gradtx {}", words.join(" "))
    }
}

/// The commands of a run that has its tuples, and serves these clients by these translators.
pub fn of_run(run: &Path, clients: &[PathBuf], methods: &[Method]) -> Vec<Step> {
    let train = Step::new("train", TRANSLATOR_DIR, &[&"train", &"--run", &run]);
    let mut steps = vec![Step { has_ranks: true, ..train }];
    for client in clients {
        steps.extend(Client { run, from: client }.steps(methods));
    }
    let report = Step::new("report", "", &[&"report", &"--run", &run]);
    steps.push(Step { dir: None, ..report });
    steps
}

/// A client of a run.
struct Client<'a> {
    run: &'a Path,
    /// Its data, or its update.
    from: &'a Path,
}

impl Client<'_> {
    fn name(&self) -> String {
        let absolute = std::path::absolute(self.from).unwrap_or_else(|_| self.from.to_owned());
        absolute.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Directory of a result, relative to the run's.
    fn dir(&self, what: &str, which: &str) -> PathBuf {
        Path::new(CLIENTS_DIR).join(self.name()).join(what).join(which)
    }

    fn steps(&self, methods: &[Method]) -> Vec<Step> {
        let Self { run, from } = self;
        let (data, mut update, mut steps) = (from.join(TRAIN_FILE), from.join(UPDATE_FILE), vec![]);
        if data.is_file() {
            let both = [Role::Tiny, Role::Llm].into_iter().flat_map(|role| self.fine_tuning(&data, role));
            // The translator has no part in them.
            steps.extend(both.map(|step| Step { is_shared: true, ..step }));
            update = run.join(self.dir("finetuned", Role::Tiny.name())).join(UPDATE_FILE);
        }
        for method in methods {
            let method = method.name();
            let out = self.dir("translated", method);
            let place = run.join(&out);
            let words: Words<'_> =
                &[&"translate", &"--run", run, &update, &"--method", &method, &"--out", &place];
            steps.push(Step::new(format!("{}: translate by {method}", self.name()), &out, words));
            steps.extend(self.score(method, Role::Llm, Some(&out)));
        }
        steps
    }

    /// One model fine-tuned on the client's data, and its scores before and after.
    fn fine_tuning(&self, data: &Path, role: Role) -> Vec<Step> {
        let (run, model) = (self.run, role.name());
        let out = self.dir("finetuned", model);
        let place = run.join(&out);
        let words: Words<'_> = &[
            &"finetune",
            &"--run",
            &run,
            &"--data",
            &data,
            &"--model",
            &model,
            &"--save-adapter",
            &"--out",
            &place,
        ];
        let step = Step::new(format!("{}: finetune {model}", self.name()), &out, words);
        let base = self.score(&format!("base-{model}"), role, None);
        let finetuned = self.score(&format!("finetuned-{model}"), role, Some(&out));
        [Some(step), base, finetuned].into_iter().flatten().collect()
    }

    /// The score of a model, with the adapter in a directory of the run; none without test data.
    fn score(&self, what: &str, role: Role, adapter: Option<&Path>) -> Option<Step> {
        let (run, data, out) = (self.run, self.from.join(TEST_FILE), self.dir("evaluated", what));
        if !data.is_file() {
            return None;
        }
        let (model, place) = (role.name(), run.join(&out));
        let words: Words<'_> =
            &[&"evaluate", &"--run", &run, &"--data", &data, &"--model", &model, &"--out", &place];
        let mut step = Step::new(format!("{}: evaluate {what}", self.name()), &out, words);
        if let Some(dir) = adapter {
            step.arguments.extend(["--adapter".into(), run.join(dir).join(ADAPTER_DIR).into()]);
        }
        Some(step)
    }
}
