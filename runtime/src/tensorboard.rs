//! [`EventFile`]: scalars of a run as TensorBoard reads them.
//!
//! A file of records, each `length (u64) | crc of it | bytes | crc of them`, little-endian, with the
//! masked CRC-32C of TFRecord. The bytes of a record are an `Event` of TensorBoard's `event.proto`;
//! of its fields three are written: `wall_time` (1), `step` (2), and one of `file_version` (3) and
//! `summary` (5), a list of values with `tag` (1) and `simple_value` (2). That is so little that it
//! is written here, without a library for protocol buffers.
//!
//! Every process writes a file of its own, as TensorBoard expects: it reads files in the order of
//! their names, which begin with the time. A process that resumes takes over the events of the steps
//! that it does not repeat and removes the older files, so that no step is there twice.

use crate::artifact::{MAX_LINES_BYTES, read_regular, write_atomic};
use crate::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What every name of an event file has in it: TensorBoard looks for no other files.
pub const MARK: &str = "tfevents";
/// What the first record of a file says.
const FILE_VERSION: &str = "brain.Event:2";

/// A file of events.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `dir`, named for this `host`, with the events of earlier files there whose
    /// step is below `step`; removes those files.
    pub fn resume(dir: &Path, host: &str, step: u64) -> Result<Self> {
        let earlier = files_in(dir)?;
        let mut kept = vec![];
        for path in &earlier {
            let bytes = read_regular(path, MAX_LINES_BYTES)?;
            kept.extend(
                records(&bytes).filter(|event| step_of(event).is_some_and(|of| of < step)).flat_map(framed),
            );
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let host: String = host.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let name = format!(
            "events.out.{MARK}.{:010}.{host}.{}.{:09}",
            now.as_secs(),
            std::process::id(),
            now.subsec_nanos()
        );
        let path = dir.join(name);
        let version = framed(&event(now.as_secs_f64(), 0, 3, FILE_VERSION.as_bytes()));
        write_atomic(&path, |out| out.write_all(&version).and_then(|()| out.write_all(&kept)))?;
        for old in earlier {
            match std::fs::remove_file(&old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &old, e));
                }
                _ => {}
            }
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io("open", &path, e))?;
        Ok(Self { path, file })
    }

    /// Appends the scalars of a step, each with its tag. Readers see whole events.
    pub fn write(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut summary = vec![];
        for (tag, value) in scalars {
            let mut scalar = vec![];
            field(&mut scalar, 1, tag.as_bytes());
            // Field 2, 32 bits.
            scalar.push(2 << 3 | 5);
            scalar.extend((*value as f32).to_le_bytes());
            field(&mut summary, 1, &scalar);
        }
        let record = framed(&event(now.as_secs_f64(), step, 5, &summary));
        self.file.write_all(&record).map_err(|e| Error::io("write", &self.path, e))
    }
}

/// The event files of a directory, in the order of their names.
fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("events.out.") && name.contains(MARK) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// An event with one field of bytes beside its time and step.
fn event(wall_time: f64, step: u64, number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(wall_time.to_le_bytes());
    out.push(2 << 3);
    varint(&mut out, step);
    field(&mut out, number, bytes);
    out
}

/// A field of bytes.
fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A record as it stands in a file.
fn framed(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(event.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(event);
    out.extend(masked_crc(event).to_le_bytes());
    out
}

/// The whole records of a file, up to the first that is damaged.
fn records(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        if masked_crc(length) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (event, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        bytes = rest;
        (masked_crc(event) == u32::from_le_bytes(*crc)).then_some(event)
    })
}

/// The step of an event with scalars, as this writer lays it out; none for any other record.
fn step_of(event: &[u8]) -> Option<u64> {
    let rest = event.strip_prefix(&[1 << 3 | 1])?.get(8..)?.strip_prefix(&[2 << 3])?;
    let end = rest.iter().position(|byte| byte & 0x80 == 0)?;
    let step = rest[..=end].iter().rev().fold(0u64, |step, byte| step << 7 | u64::from(byte & 0x7f));
    (rest.get(end + 1) == Some(&(5 << 3 | 2))).then_some(step)
}

/// CRC-32C (Castagnoli), rotated and shifted as TFRecord does it.
fn masked_crc(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let crc = !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(dir: &Path) -> Vec<u64> {
        let files = files_in(dir).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        let bytes = std::fs::read(&files[0]).unwrap();
        let whole: usize = records(&bytes).map(|event| event.len() + 16).sum();
        assert_eq!(whole, bytes.len(), "every record is whole");
        records(&bytes).filter_map(step_of).collect()
    }

    #[test]
    fn checksums_are_those_of_the_format() {
        // RFC 3720, B.4: 32 bytes of zeros; unmasked.
        let unmasked = masked_crc(&[0; 32]).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!(unmasked, 0x8a91_36aa);
    }

    #[test]
    fn a_resumed_file_has_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::resume(dir.path(), "node-1.site", 0).unwrap();
        (1..=300).for_each(|step| file.write(step, &[("loss", 0.5), ("learning_rate", 1e-3)]).unwrap());
        drop(file);
        // A crash in the middle of a record.
        let path = files_in(dir.path()).unwrap().remove(0);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 3);
        std::fs::write(&path, bytes).unwrap();
        let mut file = EventFile::resume(dir.path(), "node-1.site", 200).unwrap();
        (200..=202).for_each(|step| file.write(step, &[("loss", 0.25)]).unwrap());
        assert_eq!(steps(dir.path()), (1..=202).collect::<Vec<u64>>());
        EventFile::resume(dir.path(), "other", 0).unwrap();
        assert_eq!(steps(dir.path()), [0u64; 0]);
    }

    #[test]
    fn damaged_records_end_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::resume(dir.path(), "h", 0).unwrap();
        (1..=3).for_each(|step| file.write(step, &[("loss", 1.0)]).unwrap());
        let path = files_in(dir.path()).unwrap().remove(0);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 10;
        bytes[at] ^= 1;
        assert_eq!(records(&bytes).filter_map(step_of).collect::<Vec<_>>(), [1, 2]);
        // A length that no file has.
        let huge =
            [u64::MAX.to_le_bytes().to_vec(), masked_crc(&u64::MAX.to_le_bytes()).to_le_bytes().to_vec()]
                .concat();
        assert_eq!(records(&huge).count(), 0);
    }
}
