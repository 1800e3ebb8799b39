//! [`Figure`], and which colour whose marks have.

use crate::table::Entry;
use gradtx_run::role::Role;
use serde::Serialize;

/// A drawing with its words.
#[derive(Serialize)]
pub struct Figure {
    /// What it is.
    pub title: String,
    /// The `<svg>` element.
    pub svg: String,
    /// What one sees; plain text.
    pub caption: String,
}

impl Figure {
    /// A drawing that is made from its title and its caption, which describe it to those who
    /// cannot see it.
    pub fn of(title: &str, caption: String, draw: impl FnOnce(&str, &str) -> String) -> Self {
        let svg = draw(title, &caption);
        Self { title: title.into(), svg, caption }
    }
}

/// Class of a model's marks: its colour.
pub fn class(role: Role) -> &'static str {
    match role {
        Role::Tiny => "student",
        Role::Llm => "teacher",
    }
}

/// Class of a row's marks.
pub(crate) fn row_class(entry: Entry) -> &'static str {
    match entry {
        Entry::Finetuned(role) | Entry::FinetunedEdge(role) => class(role),
        Entry::GRAD_TRANSFORMER | Entry::PluggedIn => "grad",
        Entry::Base(_) | Entry::Adapter(_) => "muted",
        Entry::Translated { .. } | Entry::Refined(_) | Entry::Emulator(_) => "rival",
    }
}
