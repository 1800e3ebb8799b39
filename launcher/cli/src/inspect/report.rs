//! What was found at a path: facts, tensors, problems and parts, as JSON and as text.

use gradtx_pipeline::package::Package;
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_runtime::artifact::TensorFile;
use gradtx_runtime::text::printable_line;
use safetensors::Dtype;
use serde::Serialize;
use std::path::Path;

/// What was found at a path.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What it is.
    pub kind: String,
    /// Where it is.
    pub path: String,
    /// What is known about it, in the order of printing.
    pub facts: Vec<(String, String)>,
    /// Its tensors.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorFact>,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// What it is made of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Report>,
}

/// One tensor of a file.
#[derive(Debug, Serialize)]
pub struct TensorFact {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: usize,
}

/// Tensors and parts listed in the text form; JSON has all.
const LISTED: usize = 24;
/// The fact that names the stage that made something.
const MADE_BY: &str = "made by";
/// What a run directory for clients is.
const PACKAGE: &str = "package for clients";
/// Facts about parts that are longer than this are left out of the text form.
const SHORT: usize = 80;

impl Report {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            kind: "unknown".into(),
            path: path.display().to_string(),
            facts: vec![],
            tensors: vec![],
            problems: vec![],
            parts: vec![],
        }
    }

    pub(super) fn fact(&mut self, key: &str, value: impl std::fmt::Display) {
        self.facts.push((key.into(), value.to_string()));
    }

    /// Problems of this and of all its parts.
    pub fn damage(&self) -> usize {
        self.problems.len() + self.parts.iter().map(Report::damage).sum::<usize>()
    }

    pub(super) fn list_tensors(&mut self, file: &TensorFile) {
        for name in file.names() {
            match file.tensor(&name) {
                Ok(tensor) => self.tensors.push(TensorFact {
                    dtype: format!("{:?}", tensor.dtype),
                    shape: tensor.shape.to_vec(),
                    bytes: tensor.bytes.len(),
                    name: name.clone(),
                }),
                Err(error) => self.problems.push(error.to_string()),
            }
        }
    }

    /// Reads every floating-point value.
    pub(super) fn scan(&mut self, file: &TensorFile) {
        for name in file.names() {
            let Ok(tensor) = file.tensor(&name) else { continue };
            let real = matches!(tensor.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
            if let (true, Err(error)) = (real, tensor.to_f32()) {
                self.problems.push(error.to_string());
            }
        }
    }

    pub(super) fn look_at_record(&mut self, dir: &Path) {
        match record::read(&dir.join(RECORD_FILE)) {
            Err(error) => self.problems.push(format!("{error:#}")),
            Ok(record) => {
                if self.kind == "directory" {
                    self.kind = format!("result of `{}`", record.stage);
                }
                self.fact(MADE_BY, format!("{} {}", record.stage, record.version));
                self.fact("settings", &record.settings);
                if !record.computed_on.is_empty() {
                    self.fact(
                        "computed on",
                        record.computed_on.iter().cloned().collect::<Vec<_>>().join("; "),
                    );
                }
                if record.outputs.is_empty() {
                    self.problems.push(format!("`{}` has not finished here", record.stage));
                }
                for name in record.damaged(dir) {
                    self.problems.push(format!("{name}: missing, or not as it was finished"));
                }
            }
        }
    }

    pub(super) fn look_at_package(&mut self, package: &Package, dir: &Path) {
        self.kind = PACKAGE.into();
        let space = &package.space;
        self.fact("for clients with", &package.model);
        self.fact("base model", &space.base_model);
        self.fact("adapter", format!("r {}, alpha {}, {}", space.rank, space.alpha, space.targets.join(",")));
        self.fact("initial adapter", &space.init);
        self.fact("block layout", &space.layout);
        self.problems.extend(package.problems(dir));
    }

    /// Whether this or a part of it was made by a stage.
    fn is_made_here(&self) -> bool {
        self.facts.iter().any(|(key, _)| key == MADE_BY) || self.parts.iter().any(Report::is_made_here)
    }

    /// What to do about damage.
    pub(super) fn hint(&self) -> &'static str {
        if self.is_made_here() || matches!(&*self.kind, "tuple store" | "checkpoint" | "run directory") {
            return "the stage that wrote it rebuilds it when it is run again";
        }
        match &*self.kind {
            PACKAGE => "copy it again from where `gradtx init-clients` wrote it",
            "update vector" => {
                "copy it again from where `gradtx finetune` wrote it, or ask its client for it"
            }
            "model directory" | "adapter (PEFT)" => {
                "download or copy it again: its files are not whole, or do not belong together"
            }
            _ => "copy it again from where it is whole",
        }
    }

    pub(super) fn text(&self, depth: usize) -> String {
        let pad = "  ".repeat(depth);
        let state = if self.damage() == 0 { "intact" } else { "NOT INTACT" };
        let mut text = format!("{pad}{}: {}, {state}\n", printable_line(&self.path), self.kind);
        // A line each, whatever the names in it hold.
        let mut line = |words: String| text += &format!("{pad}  {}\n", printable_line(&words));
        // Of parts, only what is short.
        let listed = if depth == 0 { LISTED } else { 0 };
        for (key, value) in self.facts.iter().filter(|(_, value)| depth == 0 || value.len() <= SHORT) {
            line(format!("{key}: {value}"));
        }
        for t in self.tensors.iter().take(listed) {
            line(format!("{:<56} {:>5} {:?} {} bytes", t.name, t.dtype, t.shape, t.bytes));
        }
        if self.tensors.len() > listed {
            line(format!("{} tensors{}", self.tensors.len(), if listed > 0 { " in all" } else { "" }));
        }
        for problem in self.problems.iter().take(LISTED) {
            line(format!("PROBLEM: {problem}"));
        }
        if self.problems.len() > LISTED {
            line(format!("… and {} problems more", self.problems.len() - LISTED));
        }
        self.parts.iter().for_each(|part| text += &part.text(depth + 1));
        text
    }
}
