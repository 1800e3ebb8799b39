//! `--profile`: where the time of a step goes on a GPU.
//!
//! One more step is run with a pair of events around every launch. Each operation is held against
//! its own floor: the longer of its floating-point operations at the rate of the large product and
//! of its bytes at the rate of the large copy. Bytes are those of the memory that a launch is
//! given, so the floor of an operation that needs only part of it is too high; operations without
//! a count have none. On a CPU a line's `share_of_time` says where time goes, and this adds nothing.

use super::On;
use super::counts::Count;
use super::machine::{self, Operation};
use super::measure::rounded;
use super::measured::Ceilings;
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use gradtx_kernels::Device;
use serde_json::{Value, json};

/// Seconds that work takes at least; 0 where nothing is counted.
pub(crate) fn floor(work: Count, ceilings: &Ceilings) -> f64 {
    (work.flops / ceilings.gemm).max(work.bytes / ceilings.copy)
}

/// Runs `step` once more and measures its operations, the longest first; null unless `--profile` was
/// given and the device is a GPU.
pub(super) fn of_step<D: Device>(on: &On<'_, D>, step: impl FnOnce() -> Result<()>) -> Result<Value> {
    if !on.profile {
        return Ok(Value::Null);
    }
    let Some(operations) = machine::operations(on.device, step)? else { return Ok(Value::Null) };
    Ok(lines(&operations, on.ceilings))
}

fn lines(operations: &[Operation], ceilings: &Ceilings) -> Value {
    let total: f64 = operations.iter().map(|o| o.seconds).sum();
    let line = |o: &Operation| {
        let floor = floor(Count { flops: o.flops, bytes: o.bytes }, ceilings);
        let mut line = json!({"name": o.name, "calls": o.calls, "seconds": rounded(o.seconds),
            "share_of_time": rounded(o.seconds / total.max(f64::MIN_POSITIVE))});
        if floor > 0.0 {
            line["floor_s"] = rounded(floor);
            line["share_of_floor"] = rounded(floor / o.seconds.max(f64::MIN_POSITIVE));
        }
        line
    };
    Value::Array(operations.iter().map(line).collect())
}

/// The longest operations of a line for people; nothing where it has none.
pub fn table(operations: &Value, most: usize) -> Option<Table> {
    let operations = operations.as_array().filter(|all| !all.is_empty())?;
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["operation", "calls", "ms", "share of time", "floor, ms", "floor / time"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let number = |line: &Value, key: &str, scale: f64, unit: &str| {
        line[key].as_f64().map_or(String::new(), |x| format!("{:.2}{unit}", scale * x))
    };
    for line in operations.iter().take(most) {
        table.add_row([
            line["name"].as_str().unwrap_or_default().to_string(),
            line["calls"].to_string(),
            number(line, "seconds", 1e3, ""),
            number(line, "share_of_time", 100.0, " %"),
            number(line, "floor_s", 1e3, ""),
            number(line, "share_of_floor", 100.0, " %"),
        ]);
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(name: &str, seconds: f64, flops: f64, bytes: f64) -> Operation {
        Operation { name: name.into(), calls: 2, seconds, flops, bytes }
    }

    #[test]
    fn operations_are_compared_with_the_longer_floor() {
        let ceilings = Ceilings { gemm: 100.0, copy: 10.0 };
        let operations = [
            operation("product", 3.0, 150.0, 5.0),
            operation("copy", 1.0, 10.0, 5.0),
            operation("no count", 1.0, 0.0, 0.0),
        ];
        let lines = lines(&operations, &ceilings);
        assert_eq!(lines[0]["floor_s"], 1.5);
        assert_eq!(lines[0]["share_of_floor"], 0.5);
        assert_eq!(lines[0]["share_of_time"], 0.6);
        assert_eq!(lines[1]["floor_s"], 0.5);
        assert!(lines[2]["floor_s"].is_null());
        let text = table(&lines, 2).unwrap().to_string();
        assert!(text.contains("product") && text.contains("50.00 %") && !text.contains("no count"), "{text}");
        assert!(table(&Value::Null, 2).is_none());
    }
}
