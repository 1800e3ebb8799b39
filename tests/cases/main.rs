//! Small inputs that showed a fault once, and their relatives: each with its right result.
//!
//! [`reports`] are translated from public bug reports of the field, [`real`] are files as people
//! have them, [`hostile`] are files that nobody should trust. The others are further members of
//! the same kinds: [`answers`] that never end, [`data`] taken for something else, [`models`],
//! [`artifacts`] used though damaged or of another run, [`run`] directories, devices and batch
//! scripts, [`templates`] and tokenizers, [`sizes`] that files claim, [`files`] that are no
//! regular files, [`clients`] that nobody should believe.
//!
//! Assertions are strict about results and loose about words.

#![allow(clippy::unwrap_used)]

mod common;

mod answers;
mod artifacts;
mod clients;
mod data;
mod files;
mod hostile;
mod models;
mod real;
mod reports;
mod run;
mod sizes;
mod templates;
