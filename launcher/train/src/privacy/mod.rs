//! Differential privacy of fine-tuning.
//!
//! A step of DP-SGD is a mechanism ([`SampledGaussian`]); accountants say what steps cost ([`epsilon`], [`Rdp`]) and
//! how much noise a cost needs ([`noise_for`]); [`Budget`] holds a training to it. [`ClippedSum`] bounds what an example contributes,
//! [`PrivateRandom`] draws samples and noise, and [`Ledger`] remembers what was spent. The loop is
//! [`crate::lora::private`].

mod accountant;
mod budget;
mod clip;
mod fft;
mod ledger;
mod mechanism;
mod pld;
mod random;
mod rdp;

pub use accountant::{epsilon, noise_for};
pub use budget::{Budget, check};
pub use clip::ClippedSum;
pub use ledger::{LEDGER_FILE, Ledger};
pub use mechanism::SampledGaussian;
pub use random::PrivateRandom;
pub use rdp::Rdp;
