//! Structures in Thrift's compact encoding, walked over but not decoded.
//!
//! The headers in a Parquet file are such structures. Its reader skips unknown fields as
//! often as a list says that it has elements, also where these take no bytes or the file
//! has ended: a few bytes can keep it busy for hours. What [`structure`] accepts has at
//! least a byte for every element.

use std::io::Read;

type Result<T> = std::result::Result<T, String>;

/// Structures within structures, at most.
const DEPTH: usize = 32;

/// Numbers of the types that have bytes of their own; 1 and 2 are the two boolean values.
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;
const UUID: u8 = 13;

/// What is known of a structure.
pub(super) struct Walked {
    /// Its bytes.
    pub length: u64,
    /// The number in its field 3, if that is a 32-bit one: in the header of a page, the
    /// bytes of the page behind it.
    pub third: Option<i64>,
}

/// Walks over one structure of at most `most` bytes.
///
/// # Errors
/// Says what is wrong where the input ends within it, or a list, set or map is longer than
/// the bytes that are left.
pub(super) fn structure(input: impl Read, most: u64) -> Result<Walked> {
    let mut walk = Walk { input, left: most };
    let third = walk.structure(DEPTH)?;
    Ok(Walked { length: most - walk.left, third })
}

struct Walk<R> {
    input: R,
    left: u64,
}

impl<R: Read> Walk<R> {
    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.left = self.left.checked_sub(1).ok_or("it ends within a header")?;
        self.input.read_exact(&mut byte).map_err(|_| "the file ends within a header")?;
        Ok(byte[0])
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or("a value is longer than its header")?;
        match std::io::copy(&mut self.input.by_ref().take(bytes), &mut std::io::sink()) {
            Ok(found) if found == bytes => Ok(()),
            _ => Err("the file ends within a header".into()),
        }
    }

    fn number(&mut self) -> Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a number in a header has no end".into())
    }

    /// The number of the field 3.
    fn structure(&mut self, depth: usize) -> Result<Option<i64>> {
        let (mut id, mut third) = (0i64, None);
        loop {
            let begin = self.byte()?;
            let kind = begin & 0xf;
            if kind == 0 {
                return Ok(third);
            }
            id = match begin >> 4 {
                0 => signed(self.number()?),
                more => id + i64::from(more),
            };
            match (id, kind) {
                (3, I32) => third = Some(signed(self.number()?)),
                _ => self.value(kind, depth)?,
            }
        }
    }

    fn value(&mut self, kind: u8, depth: usize) -> Result<()> {
        let depth = depth.checked_sub(1).ok_or("a header is nested too deeply")?;
        match kind {
            // In a structure, the type of the field is the value.
            1 | 2 => Ok(()),
            BYTE => self.skip(1),
            I16 | I32 | I64 => self.number().map(drop),
            DOUBLE => self.skip(8),
            UUID => self.skip(16),
            BINARY => {
                let length = self.number()?;
                self.skip(length)
            }
            STRUCT => self.structure(depth).map(drop),
            LIST | SET => {
                let begin = self.byte()?;
                let count = match begin >> 4 {
                    15 => self.number()?,
                    short => short.into(),
                };
                self.elements(count, &[begin & 0xf], depth)
            }
            MAP => {
                let count = self.number()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                self.elements(count, &[kinds >> 4, kinds & 0xf], depth)
            }
            _ => Err(format!("a header has a value of the unknown type {kind}")),
        }
    }

    fn elements(&mut self, count: u64, kinds: &[u8], depth: usize) -> Result<()> {
        // Some readers take no bytes for booleans here, others one: no header has such lists.
        let is_possible = count <= self.left && !kinds.iter().any(|kind| matches!(kind, 1 | 2));
        if count > 0 && !is_possible {
            return Err(format!("a header has a list of {count} values, which are not there"));
        }
        for _ in 0..count {
            kinds.iter().try_for_each(|&kind| self.value(kind, depth))?;
        }
        Ok(())
    }
}

/// The number with a sign that an unsigned one stands for.
fn signed(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(bytes: &[u8]) -> Result<Walked> {
        structure(bytes, bytes.len() as u64)
    }

    #[test]
    fn a_header_is_as_long_as_its_fields() {
        // A page of 300 bytes, with a structure of a number and a true boolean, and a list of two texts.
        let header = [0x15, 0, 0x15, 8, 0x15, 0xd8, 4, 0x2c, 0x15, 2, 0x11, 0, 0x19, 0x28, 1, b'a', 0, 0];
        let found = walked(&[&header[..], b"page"].concat()).unwrap();
        assert_eq!((found.length, found.third), (header.len() as u64, Some(300)));
        for end in 0..header.len() {
            assert!(walked(&header[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn lists_whose_values_are_not_there() {
        let count = [0xff, 0xff, 0xff, 0xff, 7];
        for (kind, element) in [(LIST, 1), (LIST, 2), (SET, 7), (LIST, UUID), (LIST, 8), (LIST, LIST)] {
            let header = [&[0x10 | kind, 0xf0 | element][..], &count, &[0, 0]].concat();
            let message = walked(&header).err().unwrap();
            assert!(message.contains("list of 2147483647 values"), "{message}");
        }
        let map = [&[0x10 | MAP][..], &count, &[0x17, 0, 0]].concat();
        assert!(walked(&map).err().unwrap().contains("2147483647"));
        // The controls: none, and as many as there are.
        assert_eq!(walked(&[0x19, 0x01, 0]).unwrap().length, 3);
        assert_eq!(walked(&[0x1b, 0, 0]).unwrap().length, 3);
        assert_eq!(walked(&[0x19, 0x23, 0, 0, 0]).unwrap().length, 5);
    }

    #[test]
    fn headers_without_an_end() {
        assert!(walked(&[0x1c; 4000]).err().unwrap().contains("nested"));
        assert!(walked(&[&[0x15][..], &[0xff; 40]].concat()).err().unwrap().contains("no end"));
        assert!(walked(&[0x18, 0xff, 0xff, 3, 0]).err().unwrap().contains("longer than"));
        assert!(walked(&[0x1e, 0]).err().unwrap().contains("type 14"));
        // The bytes that a structure may have end before those of the file.
        assert!(structure(&[0x15, 2, 0][..], 2).is_err());
    }
}
