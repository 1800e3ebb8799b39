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
//! | `report`, `tables` | the page of a report |
//! | `predictions` | the page of predictions |

mod environment;
mod predictions;
mod report;
mod tables;
mod view;

pub use predictions::page as predictions_page;
pub use report::page;
