//! Scores between P_S and P_T: the models of one run, or the runs of a comparison.

use super::figure::{Figure, row_class};
use crate::Scores;
use crate::comparison::{ComparedRun, ComparedScore, Comparison};
use crate::headline::count;
use crate::svg::{WIDTH, drawing, escape, fixed, hover};
use crate::table::Entry;
use gradtx_run::role::Role;
use gradtx_runtime::data::Metric;
use std::fmt::Write as _;

/// Height of a row.
const LINE: f64 = 40.0;
/// Room above the rows.
const TOP: f64 = 26.0;
/// Where scores begin and end.
const LEFT: f64 = 8.0;
const RIGHT: f64 = WIDTH - 98.0;

/// A row of the drawing: scores in percent.
struct Line<'a> {
    name: String,
    class: &'static str,
    mean: Option<f64>,
    interval: Option<f64>,
    /// What the mean is of, with names.
    parts: Vec<(&'a str, f64)>,
    /// P_S and P_T of this row.
    ends: [Option<f64>; 2],
}

/// Where scores are drawn.
struct Range {
    low: f64,
    high: f64,
}

impl Range {
    /// From zero, unless all scores are in a narrow range far above it.
    fn of(lines: &[Line]) -> Self {
        let (mut low, mut high) = (100.0, 0.0f64);
        for line in lines {
            let around = line.mean.map(|mean| [mean, mean - line.interval.unwrap_or(0.0)]);
            let values = line.parts.iter().map(|part| part.1).chain(around.into_iter().flatten());
            let ends = line.ends.iter().flatten().copied();
            values.chain(ends).for_each(|x| (low, high) = (f64::min(low, x), f64::max(high, x)));
        }
        let is_narrow = low > 50.0 && high - low < 20.0;
        Self {
            low: if is_narrow { ((low - 5.0) / 10.0).floor() * 10.0 } else { 0.0 },
            high: if high <= 50.0 { ((high + 5.0) / 10.0).ceil().max(1.0) * 10.0 } else { 100.0 },
        }
    }

    fn place(&self, score: f64) -> f64 {
        LEFT + ((score - self.low) / (self.high - self.low)).clamp(0.0, 1.0) * (RIGHT - LEFT)
    }
}

/// Every model's score between P_S and P_T: mean, interval, and each client.
pub fn gap(id: &str, scores: &Scores) -> Figure {
    let table = &scores.table;
    let mean_of = |role| table.row(Entry::Finetuned(role)).and_then(|row| row.mean);
    let ends = [mean_of(Role::Tiny), mean_of(Role::Llm)];
    let lines = table.rows.iter().map(|row| {
        let parts = row.scores.iter().zip(&table.data);
        Line {
            name: row.name.clone(),
            class: row_class(row.entry),
            mean: row.mean,
            interval: row.interval,
            parts: parts.filter_map(|(score, data)| Some((data.name.as_str(), (*score)?))).collect(),
            ends,
        }
    });
    let lines: Vec<Line> = lines.collect();
    let title = format!("Scores, {} in percent", table.metric.label());
    let mut caption = format!(
        "Each large dot is a model's mean over {}, the bar its 95 % interval, small dots are single clients.",
        count(table.data.len(), "client")
    );
    if scores.offsite_alone().is_none() {
        caption += " The shaded gap, from P_S to P_T, is what a translation can recover: PGR 0 to 100.";
    }
    Figure::of(&title, caption, |title, description| draw(id, title, description, &lines, Some(ends)))
}

/// The scores of several runs by one metric, each between its own P_S and P_T; nothing where no
/// translation was scored.
pub fn compared(id: &str, comparison: &Comparison, metric: Metric) -> Option<Figure> {
    let of_run = |run: &ComparedRun| -> Vec<Line<'static>> {
        let scored = run.scores.iter().filter(|score| score.metric == metric);
        let line = |ComparedScore { model, score, interval, p_s, p_t, .. }: &ComparedScore| {
            let model = model.as_ref()?;
            let is_ours = *model == Entry::GRAD_TRANSFORMER.label();
            Some(Line {
                name: format!("{}: {}", run.name, model.strip_prefix("LLM + ").unwrap_or(model)),
                class: if is_ours { "grad" } else { "rival" },
                mean: *score,
                interval: *interval,
                parts: vec![],
                ends: [*p_s, *p_t],
            })
        };
        scored.filter_map(line).collect()
    };
    let lines: Vec<Line> = comparison.runs.iter().flat_map(of_run).collect();
    if lines.is_empty() {
        return None;
    }
    let title = format!("Scores, {} in percent", metric.label());
    let caption =
        "Each dot is the mean over clients, the bar its 95 % interval. The dashed marks of a row are the \
                   P_S and P_T of its run: PGR 0 and 100."
            .to_string();
    Some(Figure::of(&title, caption, |title, description| draw(id, title, description, &lines, None)))
}

/// The drawing; `ends` are P_S and P_T where they are those of all rows.
fn draw(id: &str, title: &str, description: &str, lines: &[Line], ends: Option<[Option<f64>; 2]>) -> String {
    let range = Range::of(lines);
    let height = TOP + LINE * lines.len() as f64 + 42.0;
    let bottom = height - 36.0;
    let mut marks = String::new();
    if let Some([Some(s), Some(t)]) = ends {
        let (from, to) = (range.place(s.min(t)), range.place(s.max(t)));
        let _ = write!(
            marks,
            "<rect class=\"gap\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>",
            to - from,
            bottom - TOP
        );
    }
    if let Some(ends) = ends {
        marks += &end_names(&found_ends(ends, &range));
    }
    for (i, line) in lines.iter().enumerate() {
        marks += &draw_line(line, TOP + LINE * i as f64, &range);
    }
    marks += &axis(&range, bottom);
    drawing(id, title, description, height, &marks)
}

/// P_S or P_T: where the scale of PGR is 0 or 100.
struct End {
    x: f64,
    score: f64,
    name: &'static str,
    class: &'static str,
}

fn found_ends([student, teacher]: [Option<f64>; 2], range: &Range) -> Vec<End> {
    [(student, "P_S", "student"), (teacher, "P_T", "teacher")]
        .into_iter()
        .filter_map(|(score, name, class)| Some(End { x: range.place(score?), score: score?, name, class }))
        .collect()
}

/// Their names above the rows, apart from each other where they are close.
fn end_names(ends: &[End]) -> String {
    const HALF: f64 = 12.0;
    let mut places: Vec<f64> = ends.iter().map(|end| end.x.clamp(LEFT + HALF, RIGHT - HALF)).collect();
    if let [a, b] = places[..]
        && (b - a).abs() < 2.0 * HALF
    {
        let middle = ((a + b) / 2.0).clamp(LEFT + 2.0 * HALF, RIGHT - 2.0 * HALF);
        let side = if b < a { -HALF } else { HALF };
        places = vec![middle - side, middle + side];
    }
    let mut out = String::new();
    for (end, x) in ends.iter().zip(places) {
        let _ = write!(
            out,
            "<text class=\"end {}\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}{}</text>",
            end.class,
            TOP - 8.0,
            hover(&format!("{}: {}", end.name, fixed(end.score, 1))),
            words(end.name)
        );
    }
    out
}

fn draw_line(line: &Line, top: f64, range: &Range) -> String {
    let Line { name, class, mean, interval, parts, ends } = line;
    let (text_y, y) = (top + 15.0, top + 28.0);
    let mut out = format!(
        "<path class=\"track\" d=\"M{LEFT} {y}H{RIGHT}\"/><text class=\"name {class}\" x=\"{LEFT}\" \
         y=\"{text_y}\">{}</text>",
        words(name)
    );
    // Beside the names, not through them.
    for End { x, class, name, score } in found_ends(*ends, range) {
        let _ = write!(
            out,
            "<path class=\"ref {class}\" d=\"M{x:.1} {:.1}V{:.1}\">{}</path>",
            y - 8.0,
            y + 8.0,
            hover(&format!("{name}: {}", fixed(score, 1)))
        );
    }
    let value = match (mean, interval) {
        (Some(mean), Some(half)) => format!("{} ± {}", fixed(*mean, 1), fixed(*half, 1)),
        (Some(mean), None) => fixed(*mean, 1),
        (None, _) => "no number".into(),
    };
    let _ = write!(
        out,
        "<text class=\"value\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{value}</text>",
        WIDTH - 2.0,
        y + 4.5
    );
    if let (Some(mean), Some(half)) = (mean, interval) {
        let _ = write!(
            out,
            "<path class=\"whisker {class}\" d=\"M{:.1} {y}H{:.1}\">{}</path>",
            range.place(mean - half),
            range.place(mean + half),
            hover(&format!("95 % interval: {} to {}", fixed(mean - half, 1), fixed(mean + half, 1)))
        );
    }
    for (part, score) in parts {
        let _ = write!(
            out,
            "<circle class=\"one {class}\" cx=\"{:.1}\" cy=\"{y}\" r=\"2.6\">{}</circle>",
            range.place(*score),
            hover(&format!("{part}: {}", fixed(*score, 1)))
        );
    }
    if let Some(mean) = mean {
        let _ = write!(
            out,
            "<circle class=\"dot {class}\" cx=\"{:.1}\" cy=\"{y}\" r=\"5.5\">{}</circle>",
            range.place(*mean),
            hover(&format!("{name}: {value}"))
        );
    }
    out
}

/// Words in a drawing, with the letters of P_S and P_T below the line.
fn words(text: &str) -> String {
    let Some((before, after)) = text.split_once("P_") else { return escape(text) };
    let (letter, rest) = after.split_at(after.chars().next().map_or(0, char::len_utf8));
    let rest =
        if rest.is_empty() { String::new() } else { format!("<tspan dy=\"-3\">{}</tspan>", escape(rest)) };
    format!("{}P<tspan class=\"sub\" dy=\"3\">{}</tspan>{rest}", escape(before), escape(letter))
}

fn axis(range: &Range, bottom: f64) -> String {
    let (from, to) = (range.place(range.low), range.place(range.high));
    let mut out = format!("<path class=\"axis\" d=\"M{from:.1} {bottom}H{to:.1}\"/>");
    let step = (range.high - range.low) / 5.0;
    for i in 0..=5 {
        let tick = range.low + i as f64 * step;
        let anchor = [(0, "start"), (5, "end")].into_iter().find(|a| a.0 == i).map_or("middle", |a| a.1);
        let _ = write!(
            out,
            "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{y}\" \
             text-anchor=\"{anchor}\">{}</text>",
            fixed(tick, usize::from(step.fract() != 0.0)),
            x = range.place(tick),
            y = bottom + 18.0
        );
    }
    out
}
