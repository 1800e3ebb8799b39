//! The pipeline: every stage in a file of [`stages`], and what they share.
//!
//! [`records`] has what every result depends on, [`artifacts`] opens what earlier stages made,
//! [`lineage`] says how a model came to be, [`aggregate`] makes one update of several clients',
//! [`clients`] compares them with each other and with the shadows, by what [`calibration`] finds usual,
//! [`products`] translates by products, [`cross_validation`] has held-out shadow pairs play clients, which may
//! differ from the shadows ([`variant`]), [`score`] compares answers, and [`staleness`] finds results
//! that were made with other settings, [`trained`] is what can be put into a model. [`package`] is what clients start
//! from, [`canaries`] are what their updates are audited with.

pub mod aggregate;
pub mod artifacts;
pub mod calibration;
pub mod canaries;
pub mod card;
pub mod clients;
pub mod cross_validation;
pub mod default_out;
pub mod fold;
pub mod lineage;
pub mod package;
pub mod products;
pub mod records;
pub mod score;
pub mod stages;
pub mod staleness;
pub mod trained;
pub mod variant;
