//! The program `gradtx`.
