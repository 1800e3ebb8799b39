//! `bench table`: what was measured, held against what is wanted of the program.
//!
//! In: files of lines, ours and those of `benches/peer_transformers.py` (`"who": "peer"`), from one
//! device; none at all is possible, too. Out: a Markdown table with a row for every target, "not
//! measured yet" where nothing was measured, and on which device and day the rest was; where a
//! target is missed and its line has a profile, the operations that its time went to. The lines of
//! `benches/gpu-check/run.sh` also say how results compare with the CPU's.

use super::profile;
use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{MAX_LINES_BYTES, read_regular_text};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Where results are.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Files of JSON lines, or directories of .jsonl files; without any, the targets alone.
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write the table of targets into this Markdown file, between the lines
    /// `<!-- bench table -->` and `<!-- end of bench table -->`.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

/// What stands around the table in a file that it is written into.
const BEGIN: &str = "<!-- bench table -->\n";
const END: &str = "<!-- end of bench table -->";
/// Operations that are shown of a missed target.
const SHOWN_OPERATIONS: usize = 12;

/// A row of the table.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    work: &'static str,
    target: String,
    /// The measured value, and its line's shape.
    measured: Option<(f64, String)>,
    met: Option<bool>,
    unit: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Unit {
    Share,
    Times,
    Milliseconds,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Share => format!("{:.1} %", 100.0 * value),
            Self::Times => format!("{value:.1}×"),
            Self::Milliseconds => format!("{value:.1} ms"),
        }
    }
}

/// Prints the table.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let mut lines = vec![];
    for path in &job.files {
        lines.extend(read(path)?);
    }
    let rows = rows(&lines);
    for row in &rows {
        let (value, shape) = row.measured.clone().unzip();
        context.ui.result_object(
            "bench",
            json!({"work": row.work, "target": row.target, "measured": value, "shape": shape, "met": row.met}),
        );
    }
    let targets = targets(&rows, &lines, &job.files);
    if let Some(path) = &job.write {
        write_into(path, &targets)?;
    }
    if !context.ui.is_json() {
        context.ui.result(&targets);
        misses(&rows, &lines).iter().for_each(|text| context.ui.result(text));
        if let Some(text) = compared(&lines) {
            context.ui.result(text);
        }
    }
    Ok(())
}

/// The table, on which devices and days it was measured, and where the raw results are.
fn targets(rows: &[Row], lines: &[Value], files: &[PathBuf]) -> String {
    let places: Vec<String> = files.iter().map(|path| format!("`{}`", path.display())).collect();
    let places =
        if places.is_empty() { String::new() } else { format!(" Raw results: {}.", places.join(", ")) };
    format!("{}\n\n{}{places}", markdown(rows), measured_on(lines))
}

/// Puts the table into a file, in the place of the last one.
fn write_into(path: &Path, table: &str) -> Result<()> {
    let text = read_regular_text(path, MAX_LINES_BYTES)?;
    let place = text.find(BEGIN).map(|at| at + BEGIN.len());
    let place = place.and_then(|from| Some((from, from + text[from..].find(END)?)));
    let Some((from, to)) = place else {
        let what = format!("{}: no place for the table of targets", path.display());
        return Err(failed(what, format!("add the lines `{}` and `{END}`", BEGIN.trim_end())));
    };
    let new = format!("{}{table}\n{}", &text[..from], &text[to..]);
    std::fs::write(path, new).with_context(|| format!("{}: cannot write", path.display()))
}

/// On which devices and days lines of ours were measured.
fn measured_on(lines: &[Value]) -> String {
    let mut found: Vec<(String, String)> = vec![];
    for line in lines.iter().filter(|line| line["who"] == "gradtx") {
        let text = |key: &str| line[key].as_str().unwrap_or("unknown").to_string();
        let device = (text("device"), text("date"));
        if !found.contains(&device) {
            found.push(device);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => "Not measured yet.".into(),
        all => {
            let texts: Vec<String> = all.iter().map(|(device, date)| format!("{device}, {date}")).collect();
            format!("Measured on {}.", texts.join("; "))
        }
    }
}

/// Where the time of missed targets goes, of those that have a profile.
fn misses(rows: &[Row], lines: &[Value]) -> Vec<String> {
    let missed = rows.iter().filter(|row| row.met == Some(false));
    let mut texts: Vec<String> = vec![];
    for row in missed {
        let Some((_, shape)) = &row.measured else { continue };
        let is_source = |line: &&Value| {
            line["who"] == "gradtx" && line["shape"] == **shape && line["operations"].is_array()
        };
        let Some(line) = lines.iter().rev().find(is_source) else { continue };
        let Some(table) = profile::table(&line["operations"], SHOWN_OPERATIONS) else { continue };
        let text = format!("\nMissed: {}. Device time of a step, {shape}:\n\n{table}", row.work);
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    texts
}

/// Comparisons with the CPU: how many, and the one that is nearest to its bound or beyond it.
fn compared(lines: &[Value]) -> Option<String> {
    let is_comparison = |line: &&Value| line["part"] == "correct" && line["bound"].is_number();
    let all: Vec<&Value> = lines.iter().filter(is_comparison).collect();
    let share = |line: &Value| match (line["error"].as_f64(), line["bound"].as_f64()) {
        (Some(error), Some(bound)) if bound > 0.0 => error / bound,
        _ => f64::INFINITY,
    };
    let worst = all.iter().max_by(|a, b| share(a).total_cmp(&share(b)))?;
    let beyond = all.iter().filter(|line| line["within"] != true).count();
    Some(format!(
        "\n{} comparisons with the CPU, {beyond} beyond their bound. The one with the largest error for its \
         bound: {} {}, {} of {}.",
        all.len(),
        worst["case"].as_str().unwrap_or_default(),
        worst["dtype"].as_str().unwrap_or_default(),
        worst["error"],
        worst["bound"],
    ))
}

/// The lines of a file, or of the `.jsonl` files of a directory.
fn read(path: &Path) -> Result<Vec<Value>> {
    let cannot = || format!("{}: cannot read", path.display());
    if path.is_dir() {
        let entries = std::fs::read_dir(path).with_context(cannot)?;
        let mut files = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|file| file.extension().is_some_and(|e| e == "jsonl"));
        files.sort();
        return Ok(files.iter().map(|file| read(file)).collect::<Result<Vec<_>>>()?.concat());
    }
    let text = read_regular_text(path, MAX_LINES_BYTES)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}: line {}: not JSON", path.display(), i + 1))
    };
    lines.map(parse).collect()
}

/// What lines are looked for by: fields that must be equal.
struct Wanted<'a> {
    lines: &'a [Value],
}

impl Wanted<'_> {
    /// The last line with these fields: later measurements take the place of earlier ones.
    fn find(&self, fields: &Value) -> Option<&Value> {
        let fields = fields.as_object()?;
        self.lines.iter().rev().find(|line| fields.iter().all(|(key, value)| &line[key] == value))
    }

    /// A number of such a line, with what the line says of its shape.
    fn number(&self, fields: &Value, key: &str) -> Option<(f64, String)> {
        let line = self.find(fields)?;
        Some((line[key].as_f64()?, line["shape"].as_str().unwrap_or_default().into()))
    }

    /// How many times as many of `key` per second ours does.
    fn ratio(&self, ours: &Value, peer: &Value, key: &str) -> Option<(f64, String)> {
        let (ours, shape) = self.number(ours, key)?;
        Some((ours / self.number(peer, key)?.0, shape))
    }
}

fn at_least(work: &'static str, what: &str, unit: Unit, least: f64, found: Option<(f64, String)>) -> Row {
    let met = found.as_ref().map(|(value, _)| *value >= least);
    Row { work, target: format!("≥ {} {what}", shown(unit, least)), measured: found, met, unit }
}

fn at_most(work: &'static str, what: &str, unit: Unit, most: f64, found: Option<(f64, String)>) -> Row {
    let met = found.as_ref().map(|(value, _)| *value <= most);
    Row { work, target: format!("≤ {} {what}", shown(unit, most)), measured: found, met, unit }
}

/// A target's number, without digits that say nothing.
fn shown(unit: Unit, value: f64) -> String {
    unit.show(value).replace(".0", "")
}

/// How many times the released loop's tokens a step of 7B should reach: as many as a step in which every operation runs at its floor.
/// It was 10, which no kernel can: the loop's 2.16 s by 0.364 s, the sum of the floors, of which 0.323 s are products at the
/// large product's rate (`gpu-check_h100_2026-11-27_fourth`, `bench counts`, docs/gpu.md).
const OF_RELEASED_7B: f64 = 5.9;

fn rows(lines: &[Value]) -> Vec<Row> {
    let all = Wanted { lines };
    let finetune =
        |model: &str, jobs: usize| json!({"who": "gradtx", "name": "finetune", "model": model, "jobs": jobs});
    let released = |model: &str| json!({"who": "peer", "name": "finetune released", "model": model});
    let large = json!({"who": "gradtx", "name": "train", "model": "flan-t5-large", "batch": 32});
    let plain = json!({"who": "peer", "name": "train", "model": "flan-t5-large", "batch": 32});
    let attention = |way: &str| json!({"who": "gradtx", "name": format!("attention {way}"), "head_dim": 128, "tokens": 8192});
    let generate = json!({"who": "gradtx", "name": "generate", "model": "qwen2.5-7b", "batch": 64});
    let milliseconds = all.number(&large, "median_s").map(|(s, shape)| (1e3 * s, shape));
    let seven = "LoRA r=2 fine-tune, Qwen2.5-7B, packed 8k tokens";
    let three = "LoRA r=2 fine-tune, Qwen2.5-3B, 4 jobs at once";
    let translator = "Grad-Transformer step, Flan-T5-Large, batch 32";
    let of_gemm = "of the GEMM rate";
    let (b7, b3) = ("qwen2.5-7b", "qwen2.5-3b");
    let key = "share_of_gemm";
    vec![
        at_least(seven, of_gemm, Unit::Share, 0.55, all.number(&finetune(b7, 1), key)),
        at_least(
            seven,
            "the released loop",
            Unit::Times,
            OF_RELEASED_7B,
            all.ratio(&finetune(b7, 1), &released(b7), "tokens_per_s"),
        ),
        at_least(three, of_gemm, Unit::Share, 0.5, all.number(&finetune(b3, 4), key)),
        at_least(
            three,
            "the released loop",
            Unit::Times,
            12.0,
            all.ratio(&finetune(b3, 4), &released(b3), "tokens_per_s"),
        ),
        at_most(
            "LoRA overhead over the frozen base",
            "",
            Unit::Share,
            0.03,
            all.number(&finetune(b7, 1), "overhead"),
        ),
        at_most(translator, "(H100)", Unit::Milliseconds, 22.0, milliseconds),
        at_least(translator, "plain PyTorch", Unit::Times, 5.0, all.ratio(&large, &plain, "tuples_per_s")),
        at_least("memory-bound kernels, the slowest", "of the copy rate", Unit::Share, 0.85, slowest(lines)),
        at_least(
            "attention forward, head 128",
            of_gemm,
            Unit::Share,
            0.5,
            all.number(&attention("forward"), key),
        ),
        at_least(
            "attention backward, head 128",
            of_gemm,
            Unit::Share,
            0.4,
            all.number(&attention("backward"), key),
        ),
        at_least(
            "greedy generation, 7B, batch 64",
            "of the bandwidth floor",
            Unit::Share,
            0.6,
            all.number(&generate, "share_of_copy"),
        ),
    ]
}

/// Of the kernels that are bound by memory, the one with the least share of the copy's rate. Of
/// several measurements of one the last counts.
fn slowest(lines: &[Value]) -> Option<(f64, String)> {
    let is_memory = |line: &&Value| line["bench"] == "kernels" && line["work"] == "memory";
    let mut last: Vec<(&Value, f64)> = vec![];
    for line in lines.iter().filter(is_memory) {
        let Some(share) = line["share_of_copy"].as_f64() else { continue };
        last.retain(|(earlier, _)| earlier["name"] != line["name"]);
        last.push((line, share));
    }
    let (line, share) = last.into_iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    Some((share, format!("{}, {}", text("name"), text("shape"))))
}

fn markdown(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["work", "target", "measured", "met", "shape"]);
    for row in rows {
        let (value, shape) = row.measured.clone().unzip();
        let met = row.met.map_or("", |met| if met { "yes" } else { "no" });
        table.add_row([
            row.work.to_string(),
            row.target.trim_end().to_string(),
            value.map_or("not measured yet".into(), |value| row.unit.show(value)),
            met.into(),
            shape.unwrap_or_default(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn targets_are_met_or_not_and_nothing_is_made_up() {
        let empty = rows(&[]);
        assert!(empty.iter().all(|row| row.measured.is_none() && row.met.is_none()));
        assert_eq!(empty.len(), 11);
        let lines = [
            r#"{"who":"gradtx","name":"finetune","model":"qwen2.5-7b","jobs":1,"share_of_gemm":0.1,"tokens_per_s":10000,"overhead":0.02,"shape":"a"}"#,
            r#"{"who":"gradtx","name":"finetune","model":"qwen2.5-7b","jobs":1,"share_of_gemm":0.6,"tokens_per_s":20000,"overhead":0.04,"shape":"b"}"#,
            r#"{"who":"peer","name":"finetune released","model":"qwen2.5-7b","tokens_per_s":1000}"#,
            r#"{"who":"gradtx","name":"train","model":"flan-t5-large","batch":32,"median_s":0.025,"tuples_per_s":1280}"#,
            r#"{"who":"gradtx","bench":"kernels","work":"memory","name":"adamw","share_of_copy":0.9}"#,
            r#"{"who":"gradtx","bench":"kernels","work":"memory","name":"swiglu","share_of_copy":0.7,"shape":"s"}"#,
        ]
        .map(line);
        let found = rows(&lines);
        let told = |i: usize| (found[i].measured.as_ref().map(|m| m.0), found[i].met);
        assert_eq!(told(0), (Some(0.6), Some(true)), "the later line");
        assert_eq!(told(1), (Some(20.0), Some(true)));
        assert_eq!(told(2), (None, None), "another model");
        assert_eq!(told(4), (Some(0.04), Some(false)));
        assert_eq!(told(5), (Some(25.0), Some(false)));
        assert_eq!(told(6), (None, None), "no peer");
        assert_eq!(found[7].measured, Some((0.7, "swiglu, s".into())));
        let text = markdown(&found).to_string();
        assert!(text.contains("| ≥ 55 % of the GEMM rate") && text.contains("60.0 %"), "{text}");
        assert!(text.contains("not measured yet"), "{text}");
    }

    #[test]
    fn the_table_says_where_and_when_it_was_measured() {
        let lines = [
            r#"{"who":"gradtx","name":"a","device":"NVIDIA H100","date":"2026-12-01"}"#,
            r#"{"who":"gradtx","name":"b","device":"NVIDIA H100","date":"2026-12-01"}"#,
            r#"{"who":"peer","name":"a","device":"NVIDIA A100","date":"2026-12-02"}"#,
        ]
        .map(line);
        assert_eq!(measured_on(&lines), "Measured on NVIDIA H100, 2026-12-01.");
        assert_eq!(measured_on(&[]), "Not measured yet.");
    }

    #[test]
    fn a_missed_target_shows_its_operations() {
        let lines = [
            r#"{"who":"gradtx","name":"finetune","model":"qwen2.5-7b","jobs":1,"share_of_gemm":0.1,"overhead":0.01,
                "shape":"s","operations":[{"name":"flash_forward_128","calls":28,"seconds":0.01,"share_of_time":0.5}]}"#,
        ]
        .map(line);
        let texts = misses(&rows(&lines), &lines);
        assert_eq!(texts.len(), 1, "the overhead's target is met: {texts:?}");
        assert!(texts[0].contains("flash_forward_128") && texts[0].contains("10.00"), "{texts:?}");
    }

    #[test]
    fn comparisons_are_counted_and_the_worst_is_named() {
        let lines = [
            r#"{"part":"correct","case":"a","dtype":"f32","error":1e-7,"bound":1e-6,"within":true}"#,
            r#"{"part":"correct","case":"b","dtype":"bf16","error":"not finite","bound":1e-2,"within":false}"#,
            r#"{"part":"correct","name":"matrix::a","status":"passed","seconds":1,"why":""}"#,
        ]
        .map(line);
        let text = compared(&lines).unwrap();
        assert!(
            text.contains("2 comparisons") && text.contains("1 beyond") && text.contains("b bf16"),
            "{text}"
        );
        assert!(compared(&lines[2..]).is_none());
    }

    #[test]
    fn the_table_takes_the_place_of_the_last_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("README.md");
        std::fs::write(&path, format!("before\n{BEGIN}old\n{END}\nafter\n")).unwrap();
        for table in ["one", "two"] {
            write_into(&path, table).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("before\n{BEGIN}two\n{END}\nafter\n"));
        std::fs::write(&path, "no place").unwrap();
        let why = write_into(&path, "three").unwrap_err().to_string();
        assert!(why.contains("no place for the table"), "{why}");
    }

    /// The table in README is what `bench table --write` makes of the committed results that it names.
    #[test]
    fn readme_has_the_table_of_the_committed_results() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
        let block = readme.split_once(BEGIN).unwrap().1.split_once(END).unwrap().0;
        let places = block.split_once("Raw results: ").map_or("", |found| found.1);
        let files: Vec<PathBuf> = places.split('`').skip(1).step_by(2).map(PathBuf::from).collect();
        let lines: Vec<Value> = files.iter().flat_map(|path| read(&root.join(path)).unwrap()).collect();
        assert_eq!(block.trim_end(), targets(&rows(&lines), &lines, &files));
    }
}
