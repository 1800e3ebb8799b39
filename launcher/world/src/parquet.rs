//! Writes a table of texts as Parquet, in the form in which data sets are downloaded.

use anyhow::{Context as _, Result};
use gradtx_runtime::artifact::write_atomic;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// Writes one row group; every column has as many texts as there are rows.
pub(crate) fn write_texts(path: &Path, columns: &[(&str, Vec<String>)]) -> Result<()> {
    let bytes = encode(columns).with_context(|| format!("{}: cannot be made", path.display()))?;
    write_atomic(path, |out| out.write_all(&bytes))?;
    Ok(())
}

fn encode(columns: &[(&str, Vec<String>)]) -> parquet::errors::Result<Vec<u8>> {
    let fields: String = columns.iter().map(|(name, _)| format!("required binary {name} (UTF8); ")).collect();
    let schema = Arc::new(parse_message_type(&format!("message schema {{ {fields} }}"))?);
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut bytes = vec![];
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties))?;
    let mut rows = file.next_row_group()?;
    for (_, texts) in columns {
        let mut column = rows.next_column()?.expect("the schema has these columns");
        let texts: Vec<ByteArray> = texts.iter().map(|text| text.as_str().into()).collect();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None)?;
        column.close()?;
    }
    rows.close()?;
    file.close()?;
    Ok(bytes)
}
