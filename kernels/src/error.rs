//! The one error type of this crate: what an operation expected, and what it found.

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A view's length does not fit the dimensions that came with it.
    #[error("{op}: `{what}` should hold {expected} elements, found {found}")]
    Shape {
        /// The operation, as in its contract.
        op: &'static str,
        /// The argument's name in the contract.
        what: &'static str,
        /// Elements that the dimensions ask for.
        expected: usize,
        /// Elements in the view.
        found: usize,
    },
    /// Dimensions that the operation does not do.
    #[error("{op}: {why}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What is wrong with the dimensions.
        why: String,
    },
    /// The device has not that much memory.
    #[error("out of memory on {device}: {bytes} bytes wanted")]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// A kind of device that cannot be used here.
    #[error("{what} cannot be used: {why}")]
    Unavailable {
        /// What was asked for.
        what: &'static str,
        /// What is missing or too old.
        why: String,
    },
    /// Arguments that are not those of a kernel: a mistake of this program.
    #[error("launch of `{kernel}`: {why}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// Which argument, what was expected and what was found.
        why: String,
    },
    /// The device's driver or compiler refused something.
    #[error("the device could not {what}: {why}")]
    Driver {
        /// What was asked of it.
        what: String,
        /// What it said.
        why: String,
    },
}

/// Fails unless a view holds exactly `expected` elements.
pub fn expect_len(op: &'static str, what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Shape { op, what, expected, found }) }
}

/// Fails unless a view holds at least `expected` elements (strided rows may end early).
pub fn expect_at_least(op: &'static str, what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found >= expected { Ok(()) } else { Err(Error::Shape { op, what, expected, found }) }
}

/// Elements that `rows` rows of `cols` values at this stride span, the last row cut off at its end.
pub fn row_span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// Fails unless the view holds the elements that these rows span, and rows do not overlap.
pub fn expect_rows(
    op: &'static str,
    what: &'static str,
    found: usize,
    rows: usize,
    cols: usize,
    stride: usize,
) -> Result<()> {
    if stride < cols {
        return Err(Error::Unsupported {
            op,
            why: format!("`{what}` has {cols} columns at stride {stride}"),
        });
    }
    expect_at_least(op, what, found, row_span(rows, cols, stride))
}

/// Fails unless every index is below `limit`.
pub fn expect_below(op: &'static str, what: &'static str, ids: &[u32], limit: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= limit) {
        None => Ok(()),
        Some(i) => {
            let why = format!("`{what}`[{i}] is {}, which is not below {limit}", ids[i]);
            Err(Error::Unsupported { op, why })
        }
    }
}
