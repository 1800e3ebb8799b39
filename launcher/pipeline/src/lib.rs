//! The pipeline: every stage in a file of [`stages`], and what they share.
//!
//! [`records`] has what every result depends on, [`artifacts`] opens what earlier stages made,
//! [`lineage`] says how a model came to be, [`aggregate`] makes one update of several clients',
//! [`products`] translates by products, [`cross_validation`] has held-out shadow pairs play clients, which may
//! differ from the shadows ([`variant`]), [`score`] compares answers, and [`staleness`] finds results
//! that were made with other settings.

pub mod aggregate;
pub mod artifacts;
pub mod card;
pub mod cross_validation;
pub mod default_out;
pub mod fold;
pub mod lineage;
pub mod products;
pub mod records;
pub mod score;
pub mod stages;
pub mod staleness;
pub mod variant;
