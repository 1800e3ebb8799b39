//! A matrix product for cuBLASLt, and everything that its answers depend on.

use crate::DType;
use crate::ops::GemmDims;

/// Beyond, the alignment of an address decides nothing.
const MAX_ALIGNMENT: u32 = 256;

/// `c = alpha · op(a) op(b) [+ bias] [+ start]`, by addresses.
pub(super) struct Product {
    /// Type of a, b and bias.
    pub inputs: DType,
    /// Type of c and start; that of the inputs where there is a bias.
    pub output: DType,
    pub a: u64,
    pub b: u64,
    pub c: u64,
    /// `[n]`, or 0.
    pub bias: u64,
    /// A matrix like c with a row stride of its own, or 0; may be c itself.
    pub start: u64,
    pub start_stride: usize,
    pub dims: GemmDims,
}

/// Everything that an algorithm may depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub inputs: DType,
    pub output: DType,
    pub mnk: [usize; 3],
    pub transposed: [bool; 2],
    /// Of a, b, start and c.
    pub strides: [usize; 4],
    pub alignments: [u32; 4],
    /// Of the bias; 0 without one.
    pub bias_alignment: u32,
    pub add: bool,
}

impl Shape {
    pub fn of(p: &Product) -> Self {
        let d = &p.dims;
        let align = |address: u64| 1 << address.trailing_zeros().min(MAX_ALIGNMENT.trailing_zeros());
        let add = p.start != 0;
        let (start, start_stride) = if add { (p.start, p.start_stride) } else { (p.c, d.c_stride) };
        let cols = |transposed: bool, rows: usize, cols: usize| if transposed { rows } else { cols };
        // A single row may have any stride.
        let strides = [
            d.a_stride.max(cols(d.trans_a, d.m, d.k)),
            d.b_stride.max(cols(d.trans_b, d.k, d.n)),
            start_stride.max(d.n),
            d.c_stride.max(d.n),
        ];
        Self {
            inputs: p.inputs,
            output: p.output,
            mnk: [d.m, d.n, d.k],
            transposed: [d.trans_a, d.trans_b],
            strides,
            alignments: [p.a, p.b, start, p.c].map(align),
            bias_alignment: if p.bias == 0 { 0 } else { align(p.bias) },
            add,
        }
    }
}

/// As in files of stored choices: everything that the library's answers depend on.
impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { inputs, output, mnk: [m, n, k], transposed, strides, alignments, bias_alignment, add } =
            self;
        let turned = transposed.map(|turned| if turned { 'T' } else { 'N' });
        let [first, second] = turned;
        let sum = if *add { "+=" } else { "=" };
        write!(
            f,
            "{output:?} {sum} {inputs:?} {m}x{n}x{k} {first}{second}, strides {strides:?}, alignments {alignments:?}"
        )?;
        if *bias_alignment > 0 { write!(f, ", bias {bias_alignment}") } else { Ok(()) }
    }
}
