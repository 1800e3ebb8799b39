//! Mutations: of bytes, and of what a form makes of them.
//!
//! An input is a seed file and a list of mutations, each with a random seed of its own, so that
//! mutations can be left out one by one to find the smallest input that still fails.

use crate::forms::{json, jsonl, tensors, text, toml};
use crate::random::Random;

/// No input is longer: what is long alone has targets of its own.
const LONGEST: usize = 4 << 20;
/// Numbers at which arithmetic and comparisons go wrong.
pub const NUMBERS: [i64; 16] =
    [0, 1, -1, 2, 7, 127, 128, 255, 256, 65_535, 65_536, 1 << 31, -(1 << 31), 1 << 40, i64::MAX, i64::MIN];

/// What a file is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Bytes.
    Bytes,
    /// One JSON value.
    Json,
    /// A JSON value on each line.
    JsonLines,
    /// TOML.
    Toml,
    /// Jinja.
    Template,
    /// CSV, prompts and the like.
    Text,
    /// Safetensors.
    Tensors,
    /// Command lines: words, one on each line.
    Words,
}

/// How an input is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Number of the seed file.
    pub seed_file: usize,
    /// Random seeds of the mutations.
    pub mutations: Vec<u64>,
}

impl Recipe {
    /// The recipe of an input.
    pub fn of(random: &mut Random, seed_files: usize) -> Self {
        let count = [1, 1, 1, 2, 2, 3, 5, 8][random.below(8)];
        Self { seed_file: random.below(seed_files), mutations: (0..count).map(|_| random.next()).collect() }
    }

    /// The input.
    pub fn make(&self, form: Form, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.seed_file].clone();
        for &mutation in &self.mutations {
            bytes = mutated(form, bytes, seeds, &mut Random::of(&[mutation]));
            bytes.truncate(LONGEST);
        }
        bytes
    }
}

fn mutated(form: Form, bytes: Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    // Words stay words: bytes of paths could lead anywhere.
    let structured = form != Form::Bytes && (form == Form::Words || !random.once_in(4));
    let other = structured
        .then(|| match form {
            Form::Bytes => None,
            Form::Json => json(&bytes, random),
            Form::JsonLines => jsonl(&bytes, random),
            Form::Toml => toml(&bytes, random),
            Form::Tensors => tensors(&bytes, random),
            Form::Template | Form::Text | Form::Words => text(form, &bytes, random),
        })
        .flatten();
    other.unwrap_or_else(|| of_bytes(bytes, seeds, random))
}

/// A place in a file: often at its beginning or its end, where headers and footers are.
fn place(random: &mut Random, len: usize) -> usize {
    match random.below(3) {
        0 => random.below(len.min(256)),
        1 => len - 1 - random.below(len.min(256)),
        _ => random.below(len),
    }
}

/// Bytes changed without regard to what they mean.
fn of_bytes(mut bytes: Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    if bytes.is_empty() {
        return (0..random.below(64)).map(|_| random.next() as u8).collect();
    }
    let at = place(random, bytes.len());
    let end = (at + 1 + random.below(64)).min(bytes.len());
    match random.below(10) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = *random.pick(&[0, 1, 0x7F, 0x80, 0xFF, b'"', b'{', b'[', b'\n', 0x1B]),
        2 => bytes.truncate(at),
        3 => bytes.extend((0..random.below(300)).map(|_| random.next() as u8)),
        4 => drop(bytes.drain(at..end)),
        5 => bytes.splice(at..at, bytes[at..end].to_vec()).for_each(drop),
        6 => {
            let inserted: Vec<u8> = (0..1 + random.below(16)).map(|_| random.next() as u8).collect();
            bytes.splice(at..at, inserted).for_each(drop);
        }
        7 => set_number(&mut bytes, at, random),
        8 => {
            let other = random.pick(seeds);
            let from = random.below(other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        _ => bytes[at..end].fill(random.next() as u8),
    }
    bytes
}

/// An interesting number of 1, 2, 4 or 8 bytes at an aligned place.
fn set_number(bytes: &mut [u8], at: usize, random: &mut Random) {
    let width = *random.pick(&[1, 2, 4, 8]);
    let at = at / width * width;
    let value = *random.pick(&NUMBERS);
    let value = if random.once_in(2) { value.to_le_bytes() } else { value.swap_bytes().to_le_bytes() };
    if let Some(place) = bytes.get_mut(at..at + width) {
        place.copy_from_slice(&value[..width]);
    }
}
