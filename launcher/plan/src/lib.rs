//! What a run will take on given machines: [`cost`] predicts, [`plan`] shows it, and [`sweep`]
//! writes run directories for combinations of settings.

pub mod cost;
pub mod plan;
mod privacy;
pub mod sweep;
pub mod sweep_cost;
