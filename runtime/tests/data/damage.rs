//! Damaged Parquet files end in one error that names the file, never in a panic.

use crate::fixture;
use gradtx_kernels::rng::Stream;
use gradtx_runtime::data::read_rows;
use std::path::Path;

/// The message of what is wrong with these bytes; None when they can be read.
fn read(dir: &Path, bytes: &[u8]) -> Option<String> {
    let path = dir.join("damaged.parquet");
    std::fs::write(&path, bytes).unwrap();
    let found = std::panic::catch_unwind(|| read_rows(&path));
    match found.expect("reading does not panic") {
        Ok(_) => None,
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains("damaged.parquet"), "{message}");
            assert!(message.len() < 2000, "a message for people: {message}");
            Some(message)
        }
    }
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(fixture("encodings/snappy.parquet")).unwrap();
    assert_eq!(read(dir.path(), &whole), None);
    for keep in [0, 3, 4, 8, 11, 12, whole.len() / 2, whole.len() - 9, whole.len() - 1] {
        assert!(read(dir.path(), &whole[..keep]).is_some(), "{keep} of {} bytes", whole.len());
    }
    // The begin of one download and the end of another.
    let other = std::fs::read(fixture("encodings/row_groups.parquet")).unwrap();
    let message = read(dir.path(), &[&whole[..100], &other[other.len() / 2..]].concat()).unwrap();
    assert!(message.contains("damaged or incomplete"), "{message}");
}

/// Damage to texts may stay unseen (a letter becomes another); damage to everything else
/// must not do more than give an error.
#[test]
fn flipped_bytes_give_an_error_or_other_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut stream = Stream::new(17);
    for name in
        ["encodings/plain.parquet", "encodings/zstd.parquet", "encodings/pages.parquet", "tasks/drop.parquet"]
    {
        let whole = std::fs::read(fixture(name)).unwrap();
        let mut errors = 0;
        for _ in 0..100 {
            let mut bytes = whole.clone();
            for _ in 0..1 + stream.below(8) {
                let at = stream.below(bytes.len());
                bytes[at] = stream.next_u32() as u8;
            }
            errors += usize::from(read(dir.path(), &bytes).is_some());
        }
        assert!(errors > 20, "{name}: {errors} of 100 are seen");
    }
}

#[test]
fn any_byte_of_the_description_may_be_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(fixture("tasks/gsm8k.parquet")).unwrap();
    let mut errors = 0;
    for at in 4..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] = [whole[at] ^ 0xff, whole[at] ^ 1, 0x7f][at % 3];
        errors += usize::from(read(dir.path(), &bytes).is_some());
    }
    assert!(errors > 100, "{errors} of {} are seen", whole.len() - 4);
}

#[test]
fn page_checksums_are_checked_where_there_are_any() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for (name, text) in [("checksums", &b"\"quoted\""[..]), ("plain", b"\"quoted\"")] {
        let mut bytes = std::fs::read(fixture(&format!("encodings/{name}.parquet"))).unwrap();
        let Some(at) = bytes.windows(text.len()).position(|w| w == text) else { continue };
        bytes[at + 1] ^= 1;
        let message = read(dir.path(), &bytes);
        assert_eq!(message.is_some(), name == "checksums", "{name}: {message:?}");
        seen += 1;
    }
    assert_eq!(seen, 2);
}
