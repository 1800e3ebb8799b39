//! The program against other programs' results, stored in `goldens/fixtures`: metrics,
//! merged models, generated texts.

#![allow(clippy::unwrap_used)]

mod metrics;
mod texts;
mod versions;
