//! What an update vector reveals about the examples that it was trained on.
//!
//! [`scores`] attacks: a number for every example, larger for those that were probably trained on.
//! [`statistics`] judges an attack where it is known which were: areas, rates, and a lower bound on ε.

pub mod scores;
pub mod statistics;
