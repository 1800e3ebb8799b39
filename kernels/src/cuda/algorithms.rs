//! Which of cuBLASLt's heuristics a matrix product takes.
//!
//! The library names several algorithms for a product, the one first that it expects to be the fastest. For large
//! products it is right; for products of few tiles another one may be a quarter faster. So some are measured once, by
//! `gradtx bench … --tune FILE`, and stored: results then do not depend on what a device did while it was
//! measured. `GRADTX_CUBLASLT_ALGORITHMS` names another file than the one that is part of the program
//! (`algorithms.tsv`), or says `off`. A choice counts for one kind of GPU, one version of the library and one product with all
//! its strides and alignments; everything else takes the library's first answer.
//!
//! A line is `device, version of cuBLASLt, product, number of the heuristic, its time, that of the first one`, separated by
//! tabs; lines that begin with `#` are remarks.

use crate::{Error, Result};
use std::collections::HashMap;

/// Names a file of choices, or `off`.
const VARIABLE: &str = "GRADTX_CUBLASLT_ALGORITHMS";
const BUILT_IN: (&str, &str) = ("algorithms.tsv", include_str!("algorithms.tsv"));

/// Heuristics that are asked for where there may be a choice.
pub(super) const MAX_HEURISTICS: usize = 8;

/// The choices for a device and a version of the library.
#[derive(Debug, Default)]
pub(super) struct Algorithms {
    choices: HashMap<String, usize>,
}

impl Algorithms {
    /// As the environment says.
    ///
    /// # Errors
    /// Names the file that cannot be read, or the line in it that says nothing.
    pub fn standard(device: &str, version: usize) -> Result<Self> {
        match std::env::var(VARIABLE).ok().filter(|value| !value.is_empty()) {
            None => Self::read(BUILT_IN.0, BUILT_IN.1, device, version),
            Some(value) if value == "off" => Ok(Self::default()),
            Some(path) => {
                let text = std::fs::read_to_string(&path).map_err(|e| unusable(&path, e.to_string()))?;
                Self::read(&path, &text, device, version)
            }
        }
    }

    fn read(file: &str, text: &str, device: &str, version: usize) -> Result<Self> {
        let mut choices = HashMap::new();
        for (i, line) in
            text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        {
            let wrong = || {
                let expected = "expected device, version of cuBLASLt, product and number of the heuristic, separated by tabs";
                unusable(file, format!("line {}: {expected}", i + 1))
            };
            let mut fields = line.split('\t');
            let mut next = || fields.next().ok_or_else(wrong);
            let (of_device, of_version, product, choice) = (next()?, next()?, next()?, next()?);
            let of_version: usize = of_version.parse().map_err(|_| wrong())?;
            let choice = choice.parse().ok().filter(|&choice| choice < MAX_HEURISTICS).ok_or_else(wrong)?;
            if (of_device, of_version) == (device, version) {
                choices.insert(product.to_string(), choice);
            }
        }
        Ok(Self { choices })
    }

    /// How many products have one.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// The number of the heuristic that a product takes.
    pub fn choice(&self, product: &str) -> usize {
        self.choices.get(product).copied().unwrap_or(0)
    }

    /// A number that differs where choices do; for the record of what results were computed with.
    pub fn fingerprint(&self) -> u64 {
        let of = |(product, choice): (&String, &usize)| {
            let bytes = product.bytes().chain([*choice as u8]);
            bytes
                .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
        };
        self.choices.iter().map(of).fold(0, u64::wrapping_add)
    }
}

fn unusable(file: &str, why: String) -> Error {
    Error::Unavailable {
        what: "choices of cuBLASLt's algorithms",
        why: format!("{file}: {why} ({VARIABLE})"),
    }
}

/// What was measured of a product: seconds by each heuristic.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub product: String,
    pub seconds: Vec<f64>,
}

/// A heuristic must be this much faster than the first to be chosen: noise is not.
const WORTH_IT: f64 = 0.97;

impl Measured {
    /// A line of the file, if another heuristic than the first is worth it.
    pub fn line(&self, device: &str, version: usize) -> Option<String> {
        let first = *self.seconds.first()?;
        let (best, least) = self.seconds.iter().copied().enumerate().min_by(|a, b| a.1.total_cmp(&b.1))?;
        let microseconds = |seconds: f64| format!("{:.1}", seconds * 1e6);
        let line = [
            device.to_string(),
            version.to_string(),
            self.product.clone(),
            best.to_string(),
            microseconds(least),
            microseconds(first),
        ];
        (least < WORTH_IT * first).then(|| line.join("\t"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# remark\n\nGPU\t130100\tbf16 4x5x6\t3\t1.0\t2.0\nother\t130100\tbf16 4x5x6\t5\nGPU\t120000\tbf16 4x5x6\t6\n";

    #[test]
    fn choices_are_those_of_device_and_version() {
        let choice =
            |device, version, product| Algorithms::read("f", FILE, device, version).unwrap().choice(product);
        assert_eq!(choice("GPU", 130_100, "bf16 4x5x6"), 3);
        assert_eq!(choice("other", 130_100, "bf16 4x5x6"), 5);
        assert_eq!(choice("GPU", 120_000, "bf16 4x5x6"), 6);
        assert_eq!(choice("GPU", 130_100, "bf16 4x5x7"), 0);
        assert_eq!(choice("none", 130_100, "bf16 4x5x6"), 0);
    }

    #[test]
    fn lines_that_say_nothing_are_named() {
        for line in ["GPU", "GPU\tx\tp\t0", "GPU\t1\tp", "GPU\t1\tp\t8", "GPU\t1\tp\t-1"] {
            let text = format!("# remark\n{line}\n");
            let error = Algorithms::read("file.tsv", &text, "GPU", 1).unwrap_err().to_string();
            assert!(error.contains("file.tsv: line 2"), "{line}: {error}");
        }
    }

    #[test]
    fn records_differ_where_choices_do() {
        let of = |text: &str| Algorithms::read("f", text, "GPU", 1).unwrap().fingerprint();
        let [one, two] = ["GPU\t1\ta\t1\nGPU\t1\tb\t2\n", "GPU\t1\tb\t2\nGPU\t1\ta\t1\n"].map(of);
        assert_eq!(one, two);
        assert_ne!(one, of("GPU\t1\ta\t2\nGPU\t1\tb\t2\n"));
        assert_eq!(of(""), 0);
    }

    #[test]
    fn noise_is_no_reason_for_a_choice() {
        let line =
            |seconds: &[f64]| Measured { product: "p".into(), seconds: seconds.to_vec() }.line("GPU", 1);
        assert_eq!(line(&[1e-5, 0.98e-5]), None);
        assert_eq!(line(&[1e-5, 0.9e-5, 0.8e-5]).unwrap(), "GPU\t1\tp\t2\t8.0\t10.0");
        assert_eq!(line(&[]), None);
    }

    #[test]
    fn built_in_choices_can_be_read() {
        Algorithms::read(BUILT_IN.0, BUILT_IN.1, "GPU", 1).unwrap();
    }
}
