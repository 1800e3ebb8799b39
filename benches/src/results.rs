//! Lines of results, as JSON and as a table for people.

use super::counts::Count;
use super::machine::{self, Machine};
pub use super::measure::rounded;
use super::measure::{Repeats, Times};
use super::measured::Ceilings;
use super::options::Common;
use super::profile;
use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use gradtx_kernels::{DType, Device};
use gradtx_plan::cost::rates::Kind;
use gradtx_run::text::{human_seconds, today};
use gradtx_run::ui::{Ui, is_silent};
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::Write;

/// Operations of a profile that people see.
const SHOWN_OPERATIONS: usize = 20;

/// What was measured, before it is held against anything.
pub struct Entry {
    /// Its name, the same in all runs.
    pub name: String,
    /// Its sizes, for people.
    pub shape: String,
    /// What it takes; nothing where neither operations nor bytes report anything.
    pub count: Count,
    /// Which rate of [`gradtx_plan::cost`] it measures.
    pub work: Option<Kind>,
    /// How long it takes.
    pub times: Times,
    /// What else its line says.
    pub more: Value,
}

impl Entry {
    /// With no more to say, and of no kind of work.
    pub fn new(name: impl Into<String>, shape: impl Into<String>, count: Count, times: Times) -> Self {
        Self { name: name.into(), shape: shape.into(), count, work: None, times, more: Value::Null }
    }

    /// Of this kind of work.
    pub fn of(self, work: Kind) -> Self {
        Self { work: Some(work), ..self }
    }

    /// With these fields too, an object.
    pub fn with(self, more: Value) -> Self {
        Self { more, ..self }
    }
}

/// The lines of a run.
pub struct Results {
    ui: Ui,
    machine: Machine,
    dtype: DType,
    repeats: Repeats,
    ceilings: Option<Ceilings>,
    out: Option<File>,
    table: Table,
    /// Where the time of steps goes, for people.
    profiles: Vec<String>,
    /// Bytes that were free at the beginning.
    free: u64,
}

impl Results {
    /// None yet. The file is opened now, so that nothing is measured in vain.
    pub fn new<D: Device>(
        ui: Ui,
        device: &D,
        machine: &Machine,
        common: &Common,
        dtype: DType,
    ) -> Result<Self> {
        let path = common.out.as_ref().filter(|_| !is_silent());
        let open = |path| OpenOptions::new().create(true).append(true).open(path);
        let out = path.map(|p| open(p).with_context(|| format!("{}: cannot write", p.display())));
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header([
            "what",
            "shape",
            "time",
            "quartiles",
            "TFLOP/s",
            "of GEMM",
            "GB/s",
            "of copy",
            "tokens/s",
        ]);
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let repeats = Repeats { warmup: common.warmup, runs: common.runs };
        let (machine, ceilings) = (machine.clone(), None);
        ui.line(format!("measuring on {} in {}", machine.device, type_name(dtype)));
        let free = machine::free_memory(device)?;
        let (out, profiles) = (out.transpose()?, vec![]);
        Ok(Self { ui, machine, dtype, repeats, ceilings, out, table, profiles, free })
    }

    /// From now on lines report their shares of these.
    pub(crate) fn hold_against(&mut self, ceilings: &Ceilings) {
        self.ceilings = Some(*ceilings);
    }

    /// Warm-up and samples that were asked for.
    pub fn repeats(&self) -> Repeats {
        self.repeats
    }

    /// Bytes that are in use now; see [`machine::used_memory`].
    pub(crate) fn used_memory<D: Device>(&self, device: &D) -> Option<u64> {
        machine::used_memory(device, self.free)
    }

    /// A message to people, such as what was chosen in the place of a default.
    pub fn say(&self, text: &str) {
        self.ui.line(text);
    }

    /// Adds a line.
    pub fn add<D: Device>(&mut self, device: &D, entry: Entry) -> Result<()> {
        let Entry { name, times, .. } = &entry;
        let median = times.median();
        ensure!(median.is_finite() && median > 0.0, "{name}: a time of {median} s is none");
        let line = self.line(&entry, self.used_memory(device));
        if let Some(out) = &mut self.out {
            writeln!(out, "{line}").context("cannot write the results")?;
        }
        self.row(&entry, &line);
        if let Some(table) = profile::table(&line["operations"], SHOWN_OPERATIONS) {
            self.profiles.push(format!("{}, {}: device time of a step\n{table}", entry.name, entry.shape));
        }
        self.ui.result_object("bench", line);
        Ok(())
    }

    fn line(&self, entry: &Entry, memory: Option<u64>) -> Value {
        let Entry { name, shape, count, work, times, more } = entry;
        let seconds = times.median();
        let mut line = Map::new();
        let mut put = |key: &str, value: Value| {
            if !value.is_null() {
                line.insert(key.into(), value);
            }
        };
        put("who", "gradtx".into());
        put("name", name.as_str().into());
        put("work", work.map(Kind::name).into());
        put("device", self.machine.device.as_str().into());
        put("processor", self.machine.processor.as_str().into());
        put("threads", self.machine.threads.into());
        put("dtype", type_name(self.dtype).into());
        put("shape", shape.as_str().into());
        put("median_s", rounded(seconds));
        put("q1_s", rounded(times.quantile(0.25)));
        put("q3_s", rounded(times.quantile(0.75)));
        put("runs", times.runs().into());
        put("calls_per_run", times.calls.into());
        if count.flops > 0.0 {
            put("flops", count.flops.into());
            put("tflops", rounded(count.flops / seconds / 1e12));
            put(
                "share_of_gemm",
                self.ceilings.map_or(Value::Null, |c| rounded(count.flops / seconds / c.gemm)),
            );
        }
        if count.bytes > 0.0 {
            put("bytes", count.bytes.into());
            put("gb_per_s", rounded(count.bytes / seconds / 1e9));
            put(
                "share_of_copy",
                self.ceilings.map_or(Value::Null, |c| rounded(count.bytes / seconds / c.copy)),
            );
        }
        put("peak_memory_bytes", memory.into());
        if let Value::Object(more) = more {
            more.iter().for_each(|(key, value)| put(key, value.clone()));
        }
        put("version", env!("CARGO_PKG_VERSION").into());
        put("date", today().into());
        Value::Object(line)
    }

    fn row(&mut self, entry: &Entry, line: &Value) {
        let number = |key: &str| line[key].as_f64().map_or(String::new(), |x| format!("{}", Short(x)));
        let share = |key: &str| line[key].as_f64().map_or(String::new(), |x| format!("{:.1} %", 100.0 * x));
        let times = &entry.times;
        let [low, high] = [0.25, 0.75].map(|q| short_seconds(times.quantile(q)));
        self.table.add_row([
            entry.name.clone(),
            entry.shape.clone(),
            short_seconds(times.median()),
            format!("{low} … {high}"),
            number("tflops"),
            share("share_of_gemm"),
            number("gb_per_s"),
            share("share_of_copy"),
            number("tokens_per_s"),
        ]);
    }

    /// Prints the table.
    pub fn finish(self) {
        if !self.ui.is_json() {
            self.ui.result(self.table.to_string());
            self.profiles.iter().for_each(|profile| self.ui.result(profile));
        }
    }
}

/// A number of about three digits.
struct Short(f64);

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = if self.0 >= 100.0 {
            0
        } else if self.0 >= 1.0 {
            1
        } else {
            4
        };
        write!(f, "{:.digits$}", self.0)
    }
}

fn short_seconds(seconds: f64) -> String {
    if seconds < 1e-4 { format!("{:.1} µs", seconds * 1e6) } else { human_seconds(seconds) }
}

/// An element type as the command line spells it.
fn type_name(dtype: DType) -> String {
    format!("{dtype:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_short() {
        assert_eq!(rounded(0.000123456), json!(0.00012346));
        assert_eq!([0.0123, 5.25, 1234.5].map(|x| Short(x).to_string()), ["0.0123", "5.2", "1234"]);
        assert_eq!(short_seconds(5e-6), "5.0 µs");
        assert_eq!(type_name(DType::Bf16), "bf16");
    }
}
