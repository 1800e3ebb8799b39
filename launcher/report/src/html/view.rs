//! What templates show: parts of a page, tables and figures, in plain words.

use crate::figures::Figure;
use serde::Serialize;

/// An entry of the table of contents.
#[derive(Debug, PartialEq, Serialize)]
pub struct Entry {
    /// `id` of the part.
    pub id: String,
    /// What it is called.
    pub title: String,
}

/// A part of a page with a heading of its own.
#[derive(Serialize)]
pub struct Part {
    /// Its place in links; unique on the page.
    pub id: String,
    /// The heading.
    pub title: String,
    /// A sentence or two about it.
    pub intro: String,
    /// What it shows, one below the other.
    pub blocks: Vec<Block>,
}

impl Part {
    /// A part; none where there is nothing to show.
    pub fn of(id: &str, title: &str, intro: impl Into<String>, blocks: Vec<Option<Block>>) -> Option<Self> {
        let blocks: Vec<Block> = blocks.into_iter().flatten().collect();
        (!blocks.is_empty()).then(|| Self { id: id.into(), title: title.into(), intro: intro.into(), blocks })
    }

    /// The table of contents of some parts.
    pub fn contents(parts: &[Self]) -> Vec<Entry> {
        parts.iter().map(|part| Entry { id: part.id.clone(), title: part.title.clone() }).collect()
    }
}

/// Something that a part shows.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Block {
    /// Figures, side by side where there is room.
    Figures {
        /// The figures.
        figures: Vec<Figure>,
    },
    /// A table.
    Table {
        /// The table.
        table: Table,
    },
    /// A table that is folded away.
    Details {
        /// What stands in its place.
        summary: String,
        /// The table.
        table: Table,
    },
    /// A figure and what follows from it.
    Findings {
        /// The figure.
        figure: Figure,
        /// What follows.
        findings: Vec<Finding>,
    },
}

impl Block {
    /// Figures, if there are any.
    pub fn figures(figures: Vec<Figure>) -> Option<Self> {
        (!figures.is_empty()).then_some(Self::Figures { figures })
    }

    /// A table, if it has rows.
    pub fn table(table: Table) -> Option<Self> {
        (!table.rows.is_empty()).then_some(Self::Table { table })
    }
}

/// A finding: its colour, its verdict, and a sentence.
#[derive(Serialize)]
pub struct Finding {
    /// Class of its colour.
    pub class: &'static str,
    /// The verdict.
    pub title: &'static str,
    /// The sentence.
    pub text: String,
}

/// A table. The first cell of a row is its heading.
#[derive(Default, Serialize)]
pub struct Table {
    /// Headings of the columns.
    pub head: Vec<Column>,
    /// The rows.
    pub rows: Vec<Row>,
    /// What there is to say about it.
    pub caption: String,
}

/// A column of a table.
#[derive(Serialize)]
pub struct Column {
    /// Its heading.
    pub title: String,
    /// It holds words, which are aligned to the left, and not numbers.
    pub left: bool,
}

/// A row of a table.
#[derive(Serialize)]
pub struct Row {
    /// Class of its colour; empty for none.
    pub class: String,
    /// As many as there are columns.
    pub cells: Vec<Cell>,
}

/// A cell of a table.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cell {
    /// What stands in it.
    pub text: String,
    /// Half the width of an interval around it.
    pub half: Option<String>,
    /// It is a name of the machine's: a path, a checksum, a setting.
    pub code: bool,
    /// It deserves attention.
    pub strong: bool,
}

impl Table {
    /// A table with these columns; those of `left` hold words.
    pub fn new<S: AsRef<str>>(head: &[S], left: &[usize], caption: impl Into<String>) -> Self {
        let column =
            |(i, title): (usize, &S)| Column { title: title.as_ref().into(), left: left.contains(&i) };
        Self { head: head.iter().enumerate().map(column).collect(), rows: vec![], caption: caption.into() }
    }

    /// Adds a row; `class` is that of its colour.
    pub fn push(&mut self, class: impl Into<String>, cells: Vec<Cell>) {
        self.rows.push(Row { class: class.into(), cells });
    }
}

impl Cell {
    /// A name of the machine's.
    pub fn code(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: true, ..Self::default() }
    }

    /// Words that deserve attention.
    pub(crate) fn strong(text: impl Into<String>) -> Self {
        Self { text: text.into(), strong: true, ..Self::default() }
    }
}

impl<S: Into<String>> From<S> for Cell {
    fn from(text: S) -> Self {
        Self { text: text.into(), ..Self::default() }
    }
}
