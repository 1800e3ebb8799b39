//! Rows of CSV and TSV files. The first line has the names of the columns; every value is
//! text. Quoted values may hold line breaks, as RFC 4180 has it.

use super::row::{Origin, Row, Sink, Unit};
use super::source::Source;
use crate::{Error, Result};
use csv::{ByteRecord, ReaderBuilder, Terminator};
use serde_json::{Map, Value};
use std::io::Read;

/// Delimiters of files named CSV: the one that the header has most of.
const DELIMITERS: [u8; 3] = [b',', b';', b'\t'];
/// Comes after the file's last line. A quoted value without an end swallows it.
const END: &[u8] = b"\x01end of the file";

/// Reads a file of text with a header.
pub(super) fn read(source: Source, delimiter: Option<u8>, sink: &mut Sink) -> Result<()> {
    let path = source.path.clone();
    let delimiter = delimiter.unwrap_or_else(|| common_delimiter(&source.begin));
    let end = [b"\n", END, b"\n"].concat();
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .terminator(Terminator::Any(b'\n'))
        .from_reader(source.text.chain(&*end));
    let failed = |e: csv::Error| Error::file(&path, format!("cannot read: {e}"));
    let mut record = ByteRecord::new();
    let mut names: Option<Vec<String>> = None;
    while reader.read_byte_record(&mut record).map_err(failed)? {
        // The reader stands behind the line break that ends the record. Its own position of a
        // record's begin is before empty lines.
        let breaks = record.as_slice().iter().filter(|&&byte| byte == b'\n').count();
        let line = (reader.position().line() as usize).saturating_sub(1 + breaks);
        let mut origin = Origin { file: path.clone(), line, unit: Unit::Line };
        if record.len() == 1 && record.get(0) == Some(b"\r") {
            continue;
        }
        if record.len() == 1 && record.get(0) == Some(END) {
            return Ok(());
        }
        if record.iter().next_back().is_some_and(|last| last.ends_with(&end)) {
            let why = "a quoted value begins here or below, and the file ends before its closing quote: it is cut \
                short, or a quote is missing";
            // No line break ends this record.
            origin.line += 1;
            return sink(Err(origin.error(why)));
        }
        match &names {
            None => names = Some(header(&record, &origin)?),
            Some(names) => sink(row(&record, names, origin))?,
        }
    }
    Ok(())
}

fn common_delimiter(begin: &[u8]) -> u8 {
    let header = begin.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let count = |delimiter: u8| header.iter().filter(|&&byte| byte == delimiter).count();
    // The first of equally common ones.
    DELIMITERS.into_iter().rev().max_by_key(|&delimiter| count(delimiter)).unwrap_or(b',')
}

fn header(record: &ByteRecord, origin: &Origin) -> Result<Vec<String>> {
    let mut names: Vec<String> = vec![];
    for name in texts(record, origin)? {
        let name = name.trim().to_string();
        if !name.is_empty() && names.contains(&name) {
            return Err(origin.error(format!("the column `{name}` is there twice")));
        }
        names.push(name);
    }
    Ok(names)
}

fn row(record: &ByteRecord, names: &[String], origin: Origin) -> Result<Row> {
    if record.len() != names.len() {
        let why = format!("{} values; the first line names {} columns", record.len(), names.len());
        return Err(origin.error(why));
    }
    let values = texts(record, &origin)?.into_iter().map(Value::from);
    let columns: Map<String, Value> = names.iter().cloned().zip(values).collect();
    Ok(Row::new(origin, columns))
}

fn texts(record: &ByteRecord, origin: &Origin) -> Result<Vec<String>> {
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).map(String::from);
    let mut texts: Vec<String> =
        record.iter().map(text).collect::<std::result::Result<_, _>>().map_err(|e| {
            origin.error(format!("not valid UTF-8: {e}; `iconv -f WINDOWS-1252 -t UTF-8` may help"))
        })?;
    if let Some(last) = texts.last_mut().filter(|last| last.ends_with('\r')) {
        last.pop();
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::super::read_rows;
    use super::*;

    fn read_as(name: &str, text: &[u8]) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_rows(&path)
    }

    #[test]
    fn quotes_line_breaks_and_delimiters() {
        let comma = "\u{feff}prompt,response\r\n\"a, \"\"b\"\"\nc\",d\r\n\r\ne,\r\n";
        let semicolon = "prompt;response\n\"a, \"\"b\"\"\nc\";d\n\ne;\n";
        let tab = "prompt\tresponse\n\"a, \"\"b\"\"\nc\"\td\ne\t\n";
        for (name, text) in [("d.csv", comma), ("d.csv", semicolon), ("d.tsv", tab), ("D.CSV", comma)] {
            let rows = read_as(name, text.as_bytes()).unwrap();
            assert_eq!(rows.len(), 2, "{text}");
            assert_eq!(
                (&rows[0].columns["prompt"], &rows[0].columns["response"]),
                (&"a, \"b\"\nc".into(), &"d".into())
            );
            assert_eq!((&rows[1].columns["prompt"], &rows[1].columns["response"]), (&"e".into(), &"".into()));
            assert!(rows[0].origin.to_string().to_lowercase().ends_with(":2"));
        }
        // Without a final line break, and with a value that looks like a number.
        let rows = read_as("d.csv", b"prompt,response\n1+1,2").unwrap();
        assert_eq!(rows[0].columns["response"], "2");
    }

    #[test]
    fn damage_names_the_line() {
        for (text, say) in [
            (&b"a,b\n1,2\n3\n"[..], "d.csv:3: 1 values; the first line names 2 columns"),
            (b"a,b\n1,2\n3,4,5\n", "d.csv:3: 3 values"),
            (b"a,b\n1,\"x\ny\"\n3\n", "d.csv:4: 1 values"),
            (b"a,b\n1,\"x\ny\n3,4\n", "d.csv:2: a quoted value begins here"),
            (b"a,\"b\n1,2\n", "d.csv:1: a quoted value begins here"),
            (b"a,a\n1,2\n", "d.csv:1: the column `a` is there twice"),
            (b"a,b\n1,\xff\n", "d.csv:2: not valid UTF-8"),
        ] {
            let message = read_as("d.csv", text).unwrap_err().to_string();
            assert!(message.contains(say), "{message}");
        }
    }
}
