//! The same rows, however they are stored.

use crate::fixture;
use gradtx_runtime::data::{Row, data_files, read_rows};
use serde_json::Value;

fn columns(rows: &[Row]) -> Vec<Value> {
    rows.iter().map(|row| Value::Object(row.columns.clone())).collect()
}

#[test]
fn parquet_gives_the_rows_that_pyarrow_wrote() {
    let wanted = columns(&read_rows(&fixture("encodings/rows.json")).unwrap());
    assert_eq!(wanted.len(), 23);
    let files = data_files(&[fixture("encodings")]).unwrap();
    let parquet: Vec<_> = files.iter().filter(|f| f.extension().unwrap() == "parquet").collect();
    assert_eq!(parquet.len(), 15);
    for path in parquet {
        let rows = read_rows(path).unwrap();
        for (i, (row, wanted)) in columns(&rows).iter().zip(&wanted).enumerate() {
            assert_eq!(row, wanted, "row {i} of {}", path.display());
        }
        assert_eq!(rows.len(), wanted.len(), "{}", path.display());
        let origin = rows[16].origin.to_string();
        assert!(origin.ends_with(".parquet: row 17"), "{origin}");
    }
}

#[test]
fn columns_come_in_the_order_of_the_file() {
    let rows = read_rows(&fixture("encodings/plain.parquet")).unwrap();
    let names: Vec<&str> = rows[0].columns.keys().map(String::as_str).collect();
    assert_eq!(names[..4], ["text", "kind", "int", "small"]);
    // The comparison above sees a single value.
    let mut changed = columns(&rows);
    changed[5]["struct"]["inner"]["n"] = 6.into();
    assert_ne!(changed, columns(&rows));
}
