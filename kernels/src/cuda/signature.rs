//! What kernels are called with, as their sources declare it, and the check of a launch against that.
//!
//! The driver reads as many bytes per argument as a kernel's parameter has and cannot tell a pointer from a number, or one
//! pointer from another. So every launch is compared, in number, kind and order, with the `KERNEL` line of `cu/*.cu`.

use crate::{DType, Error, Result};
use std::fmt;

// `SIGNATURES: &[Signature]`: written by the build script.
include!(concat!(env!("OUT_DIR"), "/signatures.rs"));

/// An entry point of a module.
#[derive(Debug)]
pub struct Signature {
    /// The file of `kernels/cu`, without `.cu`.
    pub module: &'static str,
    /// Its whole name.
    pub kernel: &'static str,
    /// What it takes.
    pub parameters: &'static [Parameter],
}

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Its name in the source.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// What a parameter or an argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `const T*`.
    Read(DType),
    /// `T*`.
    Write(DType),
    /// `T*` or `const T*`: memory without a view, such as scratch memory. Arguments only.
    Address(DType),
    /// `u32`.
    U32,
    /// `u64`.
    U64,
    /// `float`.
    F32,
}

impl Kind {
    /// Bytes of such a parameter.
    pub const fn size(self) -> usize {
        match self {
            Self::Read(_) | Self::Write(_) | Self::Address(_) | Self::U64 => 8,
            Self::U32 | Self::F32 => 4,
        }
    }

    /// Whether a parameter of this kind takes such an argument.
    fn takes(self, argument: Self) -> bool {
        match (self, argument) {
            (Self::Read(to) | Self::Write(to), Self::Address(at)) => to == at,
            _ => self == argument,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(to) => write!(f, "const {}*", cuda_name(*to)),
            Self::Write(to) | Self::Address(to) => write!(f, "{}*", cuda_name(*to)),
            Self::U32 => f.write_str("u32"),
            Self::U64 => f.write_str("u64"),
            Self::F32 => f.write_str("float"),
        }
    }
}

fn cuda_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 => "float",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        DType::C128 => "complex",
        DType::U64 => "u64",
        DType::U32 => "u32",
        DType::U8 => "u8",
    }
}

/// The parameters of a kernel.
///
/// # Errors
/// If the module declares no such kernel.
pub fn find(module: &str, kernel: &str) -> Result<&'static Signature> {
    let found = SIGNATURES.iter().find(|s| s.module == module && s.kernel == kernel);
    let why = || format!("kernels/cu/{module}.cu declares no such kernel");
    found.ok_or_else(|| Error::Launch { kernel: kernel.into(), why: why() })
}

impl Signature {
    /// Compares the arguments of a launch with the parameters.
    ///
    /// # Errors
    /// The first argument of another kind than its parameter, or else that there are too few or too many.
    pub fn check(&self, arguments: impl ExactSizeIterator<Item = Kind>) -> Result<()> {
        let (wanted, found) = (self.parameters.len(), arguments.len());
        for (slot, (parameter, argument)) in self.parameters.iter().zip(arguments).enumerate() {
            if !parameter.kind.takes(argument) {
                let Parameter { name, kind } = parameter;
                return self.refuse(format!("argument {slot} should be `{kind} {name}`, found `{argument}`"));
            }
        }
        if found == wanted {
            return Ok(());
        }
        self.refuse(format!("it takes {wanted} arguments, found {found}"))
    }

    fn refuse(&self, why: String) -> Result<()> {
        let why = format!("{why} (kernels/cu/{}.cu)", self.module);
        Err(Error::Launch { kernel: self.kernel.into(), why })
    }
}

#[cfg(test)]
mod tests {
    use super::Kind::{Address, F32, Read, U32, U64, Write};
    use super::*;

    const X: DType = DType::Bf16;
    const A: DType = DType::F32;

    /// Written by hand: the build script must read the same.
    #[test]
    fn signatures_are_those_of_the_sources() {
        let kinds = |module, kernel| -> Vec<Kind> {
            find(module, kernel).unwrap().parameters.iter().map(|p| p.kind).collect()
        };
        let forward = [Write(X), Write(A), Read(X), Read(X), U32, U64, U64, F32];
        assert_eq!(kinds("rmsnorm", "rmsnorm_forward_bf16"), forward);
        let names: Vec<_> = find("gemm", "gemm_nt_128_bf16_f32").unwrap().parameters.to_vec();
        assert_eq!(names.iter().map(|p| p.name).collect::<Vec<_>>()[..5], ["c", "a", "b", "bias", "start"]);
        assert_eq!(names[..2].iter().map(|p| p.kind).collect::<Vec<_>>(), [Write(A), Read(X)]);
        // Through macros within macros, with an empty argument, and with a number pasted to each name.
        let place = find("lora_rows", "lora_down_backward_f32").unwrap();
        let targets: Vec<_> =
            place.parameters.iter().map(|p| p.name).filter(|n| n.starts_with("site")).collect();
        assert_eq!(targets, ["site0", "site1", "site2", "site3"]);
        assert_eq!(find("t5_tiles", "t5_attention_backward_48").unwrap().parameters.len(), 18);
    }

    #[test]
    fn right_launches_pass() {
        let adamw = find("adamw", "sum_squares_partial").unwrap();
        adamw.check([Address(A), Read(A), U64].into_iter()).unwrap();
        adamw.check([Write(A), Read(A), U64].into_iter()).unwrap();
    }

    /// A launch with one fault each: what it says.
    #[test]
    fn wrong_launches_are_refused() {
        let adamw = find("adamw", "sum_squares_partial").unwrap();
        let complaint = |kinds: &[Kind]| adamw.check(kinds.iter().copied()).unwrap_err().to_string();
        let expected = |why: &str| format!("launch of `sum_squares_partial`: {why} (kernels/cu/adamw.cu)");
        let swapped = expected("argument 0 should be `float* partial`, found `const float*`");
        assert_eq!(complaint(&[Read(A), Address(A), U64]), swapped);
        let other = expected("argument 1 should be `const float* g`, found `const bf16*`");
        assert_eq!(complaint(&[Write(A), Read(X), U64]), other);
        let constant = expected("argument 1 should be `const float* g`, found `float*`");
        assert_eq!(complaint(&[Write(A), Write(A), U64]), constant);
        let narrow = expected("argument 2 should be `u64 len`, found `u32`");
        assert_eq!(complaint(&[Write(A), Read(A), U32]), narrow);
        assert_eq!(complaint(&[Write(A), Read(A)]), expected("it takes 3 arguments, found 2"));
        assert_eq!(complaint(&[Write(A), Read(A), U64, U64]), expected("it takes 3 arguments, found 4"));
        let none = find("adamw", "adamw_f16").unwrap_err().to_string();
        assert_eq!(none, "launch of `adamw_f16`: kernels/cu/adamw.cu declares no such kernel");
    }
}
