//! Pages: HTML files that need nothing else, no network and no script.
//!
//! All markup is in the templates (`launcher/report/templates`), except for that of the drawings
//! ([`crate::svg`]); here is what they show. In: a report, a comparison of runs, or predictions.
//! Out: the page's text.
//!
//! | module | has |
//! |---|---|
//! | `environment` | the templates, and how values become text |
//! | `view` | what templates show: parts, tables, figures |
//! | `report`, `tables`, `translators` | the page of a report |
//! | `updates` | its part about clients' updates |
//! | `comparison` | the page of a comparison of runs |
//! | `predictions` | the page of predictions |

mod comparison;
mod environment;
mod predictions;
mod report;
mod tables;
mod translators;
mod updates;
mod view;

pub use comparison::page as comparison_page;
pub use predictions::page as predictions_page;
pub use report::page;
