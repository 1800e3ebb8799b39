//! Inner products of all pairs of long rows.
//!
//! In: rows, some columns at a time, so that they need not be in memory together. Out: the
//! symmetric matrix of their inner products in f64. Every product is a sum over the columns in their
//! order, whatever the width of the parts and the number of threads: its bits are those of a
//! plain loop. A loop over pairs of rows would read every row once for each other one; here
//! a tile of rows stays in the cache.

use gradtx_kernels::cpu::simd::{Level, Task, dispatch};
use rayon::prelude::*;

/// Rows of a tile. Its products, 32 × 32, stay in the first level of the cache.
const TILE: usize = 32;
/// Rows and columns of products that a loop body keeps in registers.
const HIGH: usize = 4;
const WIDE: usize = 8;
/// Columns that are best added at a time: those of two tiles stay in the second level of the cache.
pub const COLUMNS: usize = 1024;

/// The products so far.
#[derive(Debug)]
pub struct Gram {
    rows: usize,
    /// Pairs of tiles with the products of their rows, `[TILE, TILE]`.
    tiles: Vec<(usize, usize, Vec<f64>)>,
}

impl Gram {
    /// Of so many rows, without columns yet.
    pub fn new(rows: usize) -> Self {
        let tiles = rows.div_ceil(TILE);
        let pairs = (0..tiles).flat_map(|i| (0..=i).map(move |j| (i, j, vec![0.0; TILE * TILE])));
        Self { rows, tiles: pairs.collect() }
    }

    /// Adds `width` columns of all rows, `[rows, width]`.
    ///
    /// # Panics
    /// When there are not as many values.
    pub fn add(&mut self, columns: &[f64], width: usize) {
        assert_eq!(columns.len(), self.rows * width, "{} rows of {width} columns", self.rows);
        if width == 0 {
            return;
        }
        // Panels with their columns turned into rows, so that the products of one row with eight
        // others lie side by side, and are read one after the other.
        let turned: Vec<Vec<f64>> = columns.par_chunks(TILE * width).map(|tile| turn(tile, width)).collect();
        self.tiles.par_iter_mut().for_each(|(i, j, sums)| {
            dispatch(Tile { left: &turned[*i], right: &turned[*j], sums });
        });
    }

    /// The matrix `[rows, rows]`.
    pub fn finish(self) -> Vec<Vec<f64>> {
        let mut out = vec![vec![0.0; self.rows]; self.rows];
        for (i, j, sums) in &self.tiles {
            for (k, sum) in sums.iter().enumerate() {
                let (row, column) = (i * TILE + k / TILE, j * TILE + k % TILE);
                if row < self.rows && column <= row {
                    (out[row][column], out[column][row]) = (*sum, *sum);
                }
            }
        }
        out
    }
}

/// Panels of WIDE rows, each `[width, WIDE]`, of up to TILE rows `[_, width]`; the rest is 0.
fn turn(rows: &[f64], width: usize) -> Vec<f64> {
    let mut out = vec![0.0; width * TILE];
    for (r, row) in rows.chunks(width).enumerate() {
        let panel = &mut out[r / WIDE * WIDE * width..];
        row.iter().enumerate().for_each(|(c, &x)| panel[c * WIDE + r % WIDE] = x);
    }
    out
}

/// The products of two tiles, added to what is there.
struct Tile<'a> {
    left: &'a [f64],
    right: &'a [f64],
    sums: &'a mut [f64],
}

impl Task for Tile<'_> {
    type Out = ();

    // Multiplication and addition stay apart, so that all instruction sets give the same bits.
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { left, right, sums } = self;
        let panel = left.len() / TILE * WIDE;
        for (i, left) in left.chunks_exact(panel).enumerate() {
            for (j, right) in right.chunks_exact(panel).enumerate() {
                for half in (0..WIDE).step_by(HIGH) {
                    let at = |r: usize| (i * WIDE + half + r) * TILE + j * WIDE;
                    let mut body = [[0.0f64; WIDE]; HIGH];
                    for (r, row) in body.iter_mut().enumerate() {
                        row.copy_from_slice(&sums[at(r)..at(r) + WIDE]);
                    }
                    // Arrays, and not slices: only then do the sums stay in registers.
                    for (left, right) in left.as_chunks::<WIDE>().0.iter().zip(right.as_chunks::<WIDE>().0) {
                        for r in 0..HIGH {
                            for c in 0..WIDE {
                                body[r][c] += left[half + r] * right[c];
                            }
                        }
                    }
                    for (r, row) in body.iter().enumerate() {
                        sums[at(r)..at(r) + WIDE].copy_from_slice(row);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    #[test]
    fn every_product_has_the_bits_of_a_plain_loop() {
        for (rows, width) in [(1, 5), (33, 70), (70, 300)] {
            let mut random = Stream::new(rows as u64);
            let values: Vec<f64> = (0..rows * width).map(|_| f64::from(random.normal() as f32)).collect();
            let row = |i: usize| &values[i * width..(i + 1) * width];
            for part in [width, 64, 7] {
                let mut gram = Gram::new(rows);
                for first in (0..width).step_by(part) {
                    let last = width.min(first + part);
                    let columns: Vec<f64> =
                        (0..rows).flat_map(|i| row(i)[first..last].iter().copied()).collect();
                    gram.add(&columns, last - first);
                }
                let found = gram.finish();
                for i in 0..rows {
                    for j in 0..rows {
                        let want: f64 = row(i).iter().zip(row(j)).map(|(x, y)| x * y).sum();
                        assert_eq!(found[i][j].to_bits(), want.to_bits(), "{rows} {width} {part}: {i} {j}");
                    }
                }
            }
        }
    }
}
