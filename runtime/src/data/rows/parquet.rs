//! Rows of Parquet files, as the Hugging Face hub serves them.
//!
//! Every column becomes what JSON has: strings, numbers, lists, objects and null; dates,
//! times and decimals become their usual text, binary columns text if they are valid
//! UTF-8. A file is input from outside: whatever is wrong with it ends in one error that
//! names it, also where the library underneath panics.

use super::row::{Origin, Row, Sink, Unit};
use super::thrift::structure;
use crate::artifact::open_file;
use crate::plan::human_bytes;
use crate::{Error, Result};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};
use std::cell::Cell;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

/// Reads a Parquet file whose values may have `allowed` bytes.
pub(super) fn read(path: &Path, allowed: u64, sink: &mut Sink) -> Result<()> {
    match catch_unwind(AssertUnwindSafe(|| without_panic_message(|| read_file(path, allowed, sink)))) {
        Ok(read) => read,
        Err(_) => Err(damaged(path, "its parts contradict each other, or have a type that is not supported")),
    }
}

fn read_file(path: &Path, allowed: u64, sink: &mut Sink) -> Result<()> {
    let headers = open_file(path)?;
    let size = headers.metadata().map_err(|e| Error::io("read", path, e))?.len();
    check_footer(&headers, size).map_err(|why| damaged(path, why))?;
    let reader = SerializedFileReader::new(open_file(path)?).map_err(|e| damaged(path, e))?;
    let count = expected_rows(&reader, size, allowed).map_err(|why| damaged(path, why))?;
    check_pages(&reader, &headers).map_err(|why| damaged(path, why))?;
    let file = Arc::new(path.to_owned());
    let mut read = 0;
    for found in reader.get_row_iter(None).map_err(|e| damaged(path, e))? {
        let origin = Origin { file: file.clone(), line: read + 1, unit: Unit::Row };
        let found = found.map_err(|e| damaged(path, format!("row {}: {e}", origin.line)))?;
        let columns = found.into_columns().into_iter().map(|(name, field)| {
            let value = value(&field).map_err(|why| origin.error(format!("column `{name}`: {why}")))?;
            Ok((name, value))
        });
        let columns: Result<Map<String, Value>> = columns.collect();
        sink(columns.map(|columns| Row::new(origin, columns)))?;
        read += 1;
    }
    match read as i64 == count {
        true => Ok(()),
        false => Err(damaged(path, format!("it has {read} rows, its end says {count}"))),
    }
}

/// The end of a Parquet file: the length of its footer, and this.
const MAGIC: &[u8] = b"PAR1";
/// Bytes of a page's header at most; it may hold the smallest and the largest text of the page.
const MAX_PAGE_HEADER: u64 = 16 << 20;

/// Fails where the footer has lists of what is not there. Other damage is found by the reader.
fn check_footer(file: &File, size: u64) -> std::result::Result<(), String> {
    let mut end = [0; 8];
    let Some(at) = size.checked_sub(end.len() as u64) else { return Ok(()) };
    from(file, at)?.read_exact(&mut end).map_err(|e| e.to_string())?;
    let (length, magic) = end.split_at(4);
    let length = length.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    match at.checked_sub(length) {
        Some(begin) if magic == MAGIC => structure(from(file, begin)?, length).map(drop),
        _ => Ok(()),
    }
}

/// Fails where the header of a page has lists of what is not there, or a column's pages do not
/// end where the column does.
fn check_pages(reader: &dyn FileReader, file: &File) -> std::result::Result<(), String> {
    for column in reader.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        let named = |why: String| format!("column `{}`: {why}", column.column_path());
        let (mut at, mut left) = column.byte_range();
        while left > 0 {
            let header = structure(from(file, at)?, left.min(MAX_PAGE_HEADER)).map_err(named)?;
            let page = header.third.and_then(|bytes| u64::try_from(bytes).ok());
            let whole = page.and_then(|bytes| bytes.checked_add(header.length)).filter(|&n| n <= left);
            let whole = whole.ok_or_else(|| named("a page reaches beyond its column".into()))?;
            (at, left) = (at + whole, left - whole);
        }
    }
    Ok(())
}

/// Reads on from a place in a file.
fn from(mut file: &File, at: u64) -> std::result::Result<impl Read, String> {
    file.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
    Ok(BufReader::with_capacity(512, file))
}

/// Rows of all row groups, if the file's description of itself can be true at all.
fn expected_rows(reader: &dyn FileReader, size: u64, allowed: u64) -> std::result::Result<i64, String> {
    let about = reader.metadata();
    if about.file_metadata().schema_descr().num_columns() == 0 {
        return Err("it has no columns".into());
    }
    let (mut sum, mut bytes) = (0i64, 0u64);
    for group in about.row_groups() {
        sum = sum.checked_add(group.num_rows().max(0)).ok_or("it says that it has too many rows")?;
        for column in group.columns() {
            let (begin, length) = column.byte_range();
            bytes = bytes.saturating_add(column.uncompressed_size().max(0) as u64);
            if begin.saturating_add(length) > size {
                return Err(format!("column `{}` reaches beyond the end of the file", column.column_path()));
            }
        }
    }
    if bytes > allowed {
        let (bytes, allowed) = (human_bytes(bytes), human_bytes(allowed));
        return Err(format!(
            "it says that it expands to {bytes}, more than the {allowed} that are allowed (data.read_limit_mib)"
        ));
    }
    match about.file_metadata().num_rows() == sum {
        true => Ok(sum),
        false => {
            Err(format!("its row groups have {sum} rows, its end says {}", about.file_metadata().num_rows()))
        }
    }
}

fn damaged(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::file(path, format!("this Parquet file is damaged or incomplete: {why}"))
}

fn value(field: &Field) -> std::result::Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(x) => (*x).into(),
        Field::Byte(x) => (*x).into(),
        Field::Short(x) => (*x).into(),
        Field::Int(x) => (*x).into(),
        Field::Long(x) => (*x).into(),
        Field::UByte(x) => (*x).into(),
        Field::UShort(x) => (*x).into(),
        Field::UInt(x) => (*x).into(),
        Field::ULong(x) => (*x).into(),
        // What JSON has no number for (NaN, infinities) is null.
        Field::Float16(x) => f64::from(*x).into(),
        Field::Float(x) => f64::from(*x).into(),
        Field::Double(x) => (*x).into(),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => match bytes.as_utf8() {
            Ok(text) => text.into(),
            Err(_) => return Err("binary values that are no text are not supported".into()),
        },
        Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => field.to_string().into(),
        Field::Group(row) => {
            let entries = row.get_column_iter().map(|(name, field)| Ok((name.clone(), value(field)?)));
            Value::Object(entries.collect::<std::result::Result<_, String>>()?)
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<std::result::Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let mut entries = Map::new();
            for (key, field) in map.entries() {
                let key = match value(key)? {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                entries.insert(key, value(field)?);
            }
            Value::Object(entries)
        }
    })
}

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Runs something whose panic is caught and reported as an error, so that it need not be
/// reported by the panic hook as well. Panics of other threads are reported as ever.
fn without_panic_message<T>(run: impl FnOnce() -> T) -> T {
    struct Loud;
    impl Drop for Loud {
        fn drop(&mut self) {
            SILENT.with(|silent| silent.set(false));
        }
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !SILENT.with(Cell::get) {
                before(info);
            }
        }));
    });
    let _loud = Loud;
    SILENT.with(|silent| silent.set(true));
    run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonfinite_numbers_are_null_and_bytes_are_text() {
        assert_eq!(value(&Field::Double(f64::NAN)).unwrap(), Value::Null);
        assert_eq!(value(&Field::ULong(u64::MAX)).unwrap(), Value::from(u64::MAX));
        assert_eq!(value(&Field::Bytes(b"ab".to_vec().into())).unwrap(), "ab");
        assert!(value(&Field::Bytes(vec![0xff].into())).is_err());
        assert_eq!(value(&Field::Date(0)).unwrap(), "1970-01-01");
    }

    #[test]
    fn a_panic_is_silent_only_while_it_is_asked_for() {
        let caught = catch_unwind(|| without_panic_message(|| panic!("inside")));
        assert!(caught.is_err() && !SILENT.with(Cell::get));
    }
}
