//! Linear algebra of shadow pairs: few rows, many columns.

pub mod cholesky;
pub mod gram;
