//! The program against other programs' results, stored in `goldens/fixtures`: metrics,
//! merged models, generated texts; and the exchange with programs of clients.

#![allow(clippy::unwrap_used)]

mod dictionaries;
mod emulators;
mod metrics;
mod texts;
mod versions;
