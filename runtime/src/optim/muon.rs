//! [`Muon`]: momentum whose matrix updates are orthogonalised (Jordan et al. 2024).
//!
//! For a matrix W `[rows, cols]` with gradient G, momentum μ and learning rate η:
//!
//! ```text
//! B ← μ B + G;   U = G + μ B            (Nesterov's form)
//! X = U / (‖U‖ + 1e-7)
//! five times:  A = X Xᵀ;  X ← a X + (b A + c A²) X     a, b, c = 3.4445, −4.7750, 2.0315
//! W ← (1 − η·wd) W − η · √max(1, rows / cols) · X
//! ```
//!
//! The iteration drives the singular values of X to about 1. With more rows than
//! columns it runs on the smaller Gram matrix `A = XᵀX` and multiplies from the
//! right, which is the same polynomial. Small models pretrain in far fewer steps
//! than with AdamW; embeddings, biases and norms are left to AdamW.

use super::finite_norms;
use crate::Result;
use crate::buffers::Allocator;
use crate::plan::Purpose;
use gradtx_kernels::{
    Buffer, Device, Real, View, ViewMut,
    ops::{AdamW, Elementwise, Gemm, GemmDims},
};
use std::ops::Range;

const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// Keeps a zero update zero.
const NORM_FLOOR: f64 = 1e-7;

/// A matrix in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Its name, for errors.
    pub name: String,
    /// Its first element.
    pub offset: usize,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
}

impl Matrix {
    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
    }
}

/// Numbers of one Muon step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    /// η, the learning rate of this step.
    pub lr: f64,
    /// μ, usually 0.95.
    pub momentum: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The step's number, for errors.
    pub step: u32,
}

/// Muon's state: momentum of every matrix, and scratch for the largest.
pub struct Muon<D: Device, A: Real> {
    matrices: Vec<Matrix>,
    /// The matrices' momenta one after the other.
    momentum: D::Buf<A>,
    /// X of the largest matrix, twice: each iteration reads one and writes the other.
    x: D::Buf<A>,
    x_next: D::Buf<A>,
    /// A and b A + c A² of the largest Gram matrix.
    gram: D::Buf<A>,
    poly: D::Buf<A>,
    /// `[matrices]`
    sums: D::Buf<A>,
}

impl<D, A> Muon<D, A>
where
    A: Real,
    D: Gemm<A> + Elementwise<A> + AdamW<A>,
{
    /// For these matrices of a flat buffer. Momenta start at 0.
    pub fn new(device: &D, matrices: Vec<Matrix>) -> Result<Self> {
        Self::allocate(&mut Allocator::new(device, Purpose::Optimizer), matrices)
    }

    /// [`Self::new`] with an allocator.
    pub fn allocate(alloc: &mut Allocator<'_, D>, matrices: Vec<Matrix>) -> Result<Self> {
        let total = matrices.iter().map(|m| m.range().len()).sum();
        let largest = matrices.iter().map(|m| m.range().len()).max().unwrap_or(0);
        let gram = matrices.iter().map(|m| m.rows.min(m.cols).pow(2)).max().unwrap_or(0);
        let before = alloc.set_purpose(Purpose::Optimizer);
        let momentum = alloc.buffer("Muon's momentum", &[total])?;
        alloc.set_purpose(Purpose::Scratch);
        let mut two = |name: &str, len: usize| -> Result<_> {
            Ok((alloc.buffer(name, &[len])?, alloc.buffer(name, &[len])?))
        };
        let (x, x_next) = two("Muon's largest matrix", largest)?;
        let (gram, poly) = two("Muon's largest Gram matrix", gram)?;
        let sums = alloc.buffer("Muon's gradient norm sums", &[matrices.len()])?;
        alloc.set_purpose(before);
        Ok(Self { matrices, momentum, x, x_next, gram, poly, sums })
    }

    /// One step on the matrices in `params` with their gradients at the same places in
    /// `grads`. Returns the norm of each matrix's gradient; if one is not finite, fails
    /// and changes nothing.
    pub fn step(
        &mut self,
        device: &D,
        mut params: D::ViewMut<'_, A>,
        grads: D::View<'_, A>,
        step: MuonStep,
    ) -> Result<Vec<f64>> {
        for (i, matrix) in self.matrices.iter().enumerate() {
            let sum = self.sums.view_mut(i..i + 1);
            device.sum_squares(sum, grads.slice(matrix.range()), 1, matrix.range().len())?;
        }
        let name = |i: usize| format!("`{}`", self.matrices[i].name);
        let norms = finite_norms(&device.to_host(self.sums.all())?, format!("step {}", step.step), name)?;
        let mut at = 0;
        for i in 0..self.matrices.len() {
            let Matrix { rows, cols, .. } = self.matrices[i];
            let range = self.matrices[i].range();
            let state = at..at + range.len();
            at = state.end;
            self.direction(device, state, grads.slice(range.clone()), step.momentum)?;
            self.orthogonalise(device, rows, cols)?;
            let size = step.lr * (rows as f64 / cols as f64).max(1.0).sqrt();
            let w = params.reborrow().slice(range.clone());
            device.axpby(w, -size, self.x.view(0..range.len()), 1.0 - step.lr * step.weight_decay)?;
        }
        Ok(norms)
    }

    /// `B ← μ B + G` at `state`, and `x = (G + μ B) / (‖G + μ B‖ + floor)`.
    fn direction(
        &mut self,
        device: &D,
        state: Range<usize>,
        grad: D::View<'_, A>,
        momentum: f64,
    ) -> Result<()> {
        let n = state.len();
        device.axpby(self.momentum.view_mut(state.clone()), 1.0, grad, momentum)?;
        device.axpby(self.x_next.view_mut(0..n), 1.0, grad, 0.0)?;
        device.axpby(self.x_next.view_mut(0..n), momentum, self.momentum.view(state), 1.0)?;
        let update = self.x_next.view(0..n);
        device.sum_squares(self.sums.view_mut(0..1), update, 1, n)?;
        let norm = device.to_host(self.sums.view(0..1))?[0].to_f64().sqrt();
        Ok(device.axpby(self.x.view_mut(0..n), 1.0 / (norm + NORM_FLOOR), update, 0.0)?)
    }

    /// The Newton–Schulz iteration on `x` `[rows, cols]`, in place.
    fn orthogonalise(&mut self, device: &D, rows: usize, cols: usize) -> Result<()> {
        let [a, b, c] = COEFFICIENTS;
        let (n, small) = (rows * cols, rows.min(cols));
        let wide = rows <= cols;
        for _ in 0..ITERATIONS {
            let x = self.x.view(0..n);
            let gram_dims = GemmDims::new(small, small, rows.max(cols), !wide, wide);
            device.gemm(self.gram.view_mut(0..small * small), x, x, gram_dims)?;
            let gram = self.gram.view(0..small * small);
            device.axpby(self.poly.view_mut(0..small * small), b, gram, 0.0)?;
            let square = GemmDims { alpha: c, ..GemmDims::new(small, small, small, false, false) }.add();
            device.gemm(self.poly.view_mut(0..small * small), gram, gram, square)?;
            let poly = self.poly.view(0..small * small);
            device.axpby(self.x_next.view_mut(0..n), a, x, 0.0)?;
            let (left, right) = if wide { (poly, x) } else { (x, poly) };
            let product = GemmDims::new(rows, cols, small, false, false).add();
            device.gemm(self.x_next.view_mut(0..n), left, right, product)?;
            std::mem::swap(&mut self.x, &mut self.x_next);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::{cpu::Cpu, rng::Stream};

    fn random(n: usize, key: u64) -> Vec<f64> {
        let mut stream = Stream::new(key);
        (0..n).map(|_| stream.normal()).collect()
    }

    fn transpose(x: &[f64], rows: usize, cols: usize) -> Vec<f64> {
        (0..cols * rows).map(|i| x[i % rows * cols + i / rows]).collect()
    }

    /// `a [m, k] · b [k, n]`
    fn product(a: &[f64], b: &[f64], m: usize, k: usize) -> Vec<f64> {
        let n = b.len() / k;
        let at = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
        (0..m * n).map(|ij| at(ij / n, ij % n)).collect()
    }

    /// The iteration as it is usually written: on the wide form, after a transposition if need be.
    fn reference(u: &[f64], rows: usize, cols: usize) -> Vec<f64> {
        if rows > cols {
            return transpose(&reference(&transpose(u, rows, cols), cols, rows), cols, rows);
        }
        let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut x: Vec<f64> = u.iter().map(|x| x / (norm + 1e-7)).collect();
        for _ in 0..5 {
            let a = product(&x, &transpose(&x, rows, cols), rows, cols);
            let a2 = product(&a, &a, rows, rows);
            let b: Vec<f64> = a.iter().zip(&a2).map(|(a, a2)| -4.775 * a + 2.0315 * a2).collect();
            let bx = product(&b, &x, rows, rows);
            x.iter_mut().zip(&bx).for_each(|(x, bx)| *x = 3.4445 * *x + bx);
        }
        x
    }

    fn matrices() -> Vec<Matrix> {
        let shapes = [("wide", 2, 5, 9), ("tall", 60, 12, 4), ("row", 120, 1, 7)];
        shapes.map(|(name, offset, rows, cols)| Matrix { name: name.into(), offset, rows, cols }).into()
    }

    #[test]
    fn steps_follow_the_equations_for_all_shapes() {
        let cpu = Cpu::new(2);
        let mut p = random(130, 1);
        let mut want = p.clone();
        let mut muon = Muon::<Cpu, f64>::new(&cpu, matrices()).unwrap();
        let mut momentum = vec![0.0; 130];
        for t in 1..=3u32 {
            let g = random(130, 10 + t as u64);
            let step = MuonStep { lr: 0.02, momentum: 0.95, weight_decay: 0.1, step: t };
            let norms = muon.step(&cpu, &mut p, &g, step).unwrap();
            for (Matrix { rows, cols, .. }, (range, norm)) in
                matrices().iter().zip(matrices().iter().map(Matrix::range).zip(norms))
            {
                let g = &g[range.clone()];
                assert!((norm - g.iter().map(|x| x * x).sum::<f64>().sqrt()).abs() <= 1e-12);
                let b = &mut momentum[range.clone()];
                b.iter_mut().zip(g).for_each(|(b, g)| *b = 0.95 * *b + g);
                let u: Vec<f64> = g.iter().zip(b.iter()).map(|(g, b)| g + 0.95 * b).collect();
                let x = reference(&u, *rows, *cols);
                let size = 0.02 * (*rows as f64 / *cols as f64).max(1.0).sqrt();
                want[range].iter_mut().zip(&x).for_each(|(w, x)| *w = *w * (1.0 - 0.02 * 0.1) - size * x);
            }
        }
        for i in 0..130 {
            assert!((p[i] - want[i]).abs() <= 1e-12, "element {i}: {} is not {}", p[i], want[i]);
        }
        assert_eq!(p[60 + 48..120], random(130, 1)[60 + 48..120], "between the matrices");
    }

    #[test]
    fn updates_are_nearly_orthogonal() {
        let cpu = Cpu::new(1);
        let (rows, cols) = (6, 40);
        let matrix = Matrix { name: "w".into(), offset: 0, rows, cols };
        let mut muon = Muon::<Cpu, f64>::new(&cpu, vec![matrix]).unwrap();
        let mut p = vec![0.0; rows * cols];
        let step = MuonStep { lr: 1.0, momentum: 0.95, weight_decay: 0.0, step: 1 };
        muon.step(&cpu, &mut p, &random(rows * cols, 5), step).unwrap();
        let gram = product(&p, &transpose(&p, rows, cols), rows, cols);
        for i in 0..rows {
            assert!((0.4..1.6).contains(&gram[i * rows + i]), "{}", gram[i * rows + i]);
        }
    }

    #[test]
    fn nan_gradients_change_nothing_and_name_their_matrix() {
        let cpu = Cpu::new(1);
        let mut muon = Muon::<Cpu, f32>::new(&cpu, matrices()).unwrap();
        let (mut p, mut g) = (vec![1.0f32; 130], vec![0.5f32; 130]);
        g[61] = f32::NAN;
        let step = MuonStep { lr: 1.0, momentum: 0.95, weight_decay: 0.0, step: 1 };
        let message = muon.step(&cpu, &mut p, &g, step).unwrap_err().to_string();
        assert!(message.contains("`tall`"), "{message}");
        assert!(p.iter().all(|&x| x == 1.0) && muon.momentum.iter().all(|&x| x == 0.0));
        muon.step(&cpu, &mut p, &[0.0; 130], step).unwrap();
        assert!(p.iter().all(|&x| x == 1.0), "a zero update stays zero");
    }
}
