//! Errors of the driver.

use crate::Error;
use cudarc::driver::result;

/// Turns the driver's error into ours.
pub(super) fn failed(what: impl Into<String>) -> impl FnOnce(result::DriverError) -> Error {
    let what = what.into();
    move |e| Error::Driver { what, why: e.to_string() }
}
