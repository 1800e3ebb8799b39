//! The report of a run: everything worth knowing about it on one page, and as JSON.
//!
//! In: a run directory, finished or not, and directories of evaluations. Out: a
//! [`Report`], the content of report.json (`docs/report.md` describes every field), and
//! [`html::page`], the same as one self-contained page.
//!
//! What is not there is said, not guessed. Texts of examples and predictions never go in.
//! The same files give the same bytes, except for what was timed: [`times`].
//!
//! | module | makes |
//! |---|---|
//! | [`source`] | what lies in the directories |
//! | [`headline`] | what the table says, in sentences made from its numbers |
//! | [`offsite`] | what the rows of an emulator say |
//! | [`curves`] | losses of shadow jobs, clients and the translator |
//! | [`tuples`] | statistics of the update vectors |
//! | [`cross_validation`] | how translators compare on held-out groups of shadows |
//! | [`refinements`] | how refinements went |
//! | [`updates`] | how far clients are from the shadow updates |
//! | [`rows`] | who has which rows |
//! | [`times`] | throughput and dates |
//! | [`svg`], [`figures`], [`html`] | the page |
//! | [`csv`] | the same as CSV files |
//! | [`cross_validation`], [`variants`] | what held-out groups of shadows say of translators |
//! | [`predictions`] | the examples with all answers, for a page of its own |

pub mod comparison;
pub mod cost;
pub mod cross_validation;
pub mod csv;
pub mod curves;
pub mod figures;
pub mod headline;
pub mod html;
pub mod offsite;
pub mod predictions;
pub mod refinements;
pub mod rows;
pub mod source;
pub mod spread;
pub mod stage;
pub mod svg;
pub mod table;
#[cfg(test)]
mod tests;
pub mod times;
pub mod tuples;
pub mod updates;
pub mod variants;

use crate::table::Table;
use anyhow::Result;
use serde::Serialize;
use source::Source;
pub use spread::Spread;
use std::path::Path;

/// Version of report.json.
pub(crate) const SCHEMA: u32 = 1;

/// The content of report.json.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form.
    pub schema: u32,
    /// What run this is.
    pub run: source::RunFacts,
    /// What the models score, one entry for each metric.
    pub scores: Vec<Scores>,
    /// Shadow fine-tuning of both models.
    pub shadow: curves::Shadow,
    /// Training of the Grad-Transformer.
    pub translator: Option<curves::Translator>,
    /// Fine-tuning on private data.
    pub clients: curves::Clients,
    /// Statistics of the tuples.
    pub tuples: Option<tuples::Tuples>,
    /// What a cross-validation of the run found.
    pub cross_validation: Option<cross_validation::Summary>,
    /// Refinements of translations.
    pub refinements: Vec<refinements::Refinement>,
    /// The updates that translations were made of.
    pub updates: Vec<updates::Updates>,
    /// Who has which rows.
    pub rows: rows::Rows,
    /// What this run does not have yet.
    pub missing: Vec<String>,
    /// What could not be used, and why.
    pub notes: Vec<String>,
    /// All that was timed or dated: differs between runs of the same settings.
    pub times: times::Times,
}

/// The scores of one metric, and what they say.
#[derive(Debug, Serialize)]
pub struct Scores {
    /// What they say.
    pub headline: headline::Headline,
    /// What they say of an emulator, where an edge was plugged in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offsite: Option<offsite::Offsite>,
    /// The table.
    #[serde(flatten)]
    pub table: Table,
}

impl Scores {
    fn of(table: Table) -> Self {
        Self { headline: headline::of(&table), offsite: offsite::of(&table), table }
    }

    /// What an emulator's rows say, where no translation is beside them.
    fn offsite_alone(&self) -> Option<&offsite::Offsite> {
        self.offsite.as_ref().filter(|_| self.table.row(table::Entry::GRAD_TRANSFORMER).is_none())
    }

    /// What they say in a sentence or two.
    pub fn text(&self) -> &str {
        self.offsite_alone().map_or(&self.headline.text, |offsite| &offsite.text)
    }
}

impl Report {
    /// Reads everything that there is.
    pub fn of(run: &Path, evaluations: &[&Path]) -> Result<Self> {
        let mut source = Source::open(run, evaluations)?;
        let tables = source.tables();
        let scores: Vec<Scores> = tables.into_iter().map(Scores::of).collect();
        if scores.is_empty() {
            source.missing("No scores: run `gradtx evaluate`.");
        }
        let rows = rows::Rows::of(&mut source);
        let shadow = curves::Shadow::of(&mut source);
        let tuples = tuples::of(&mut source, rows.groups.as_deref(), &rows.tasks);
        let translator = curves::Translator::of(&mut source);
        let clients = curves::Clients::of(&mut source);
        let cross_validation = cross_validation::of(&mut source);
        let refinements = refinements::of(&mut source);
        let updates = updates::of(&mut source);
        let times = times::of(&mut source);
        Ok(Self {
            schema: SCHEMA,
            run: source.facts(),
            scores,
            shadow,
            translator,
            clients,
            tuples,
            cross_validation,
            refinements,
            updates,
            rows,
            missing: source.missing,
            notes: source.notes,
            times,
        })
    }
}
