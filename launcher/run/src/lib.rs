//! What every command of gradtx stands on, below training and stages.
//!
//! [`config`] has the settings, checked; [`dispatch`] is the one place that chooses device and
//! element type. [`stage`] is the one way to do a step of the pipeline, and [`record`] makes it
//! repeatable: finished and intact work is not done again, and work of another configuration
//! is refused. [`progress`] gives other processes who works where and how far, [`ui`] gives
//! the person or script that started this one, and [`cluster`] what the processes of one job
//! are to each other.

pub mod cluster;
pub mod command_log;
pub mod config;
pub mod context;
pub mod device;
pub mod dispatch;
pub mod failure;
pub mod interrupt;
pub mod paths;
pub mod progress;
pub mod record;
pub mod role;
pub mod stage;
pub mod text;
pub mod ui;
