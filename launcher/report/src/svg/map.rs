//! Square maps of values from −1 to 1.

use super::{WIDTH, drawing, escape, fixed, hover};
use std::fmt::Write as _;

/// Shades of a map on each side of zero.
const SHADES: i32 = 6;
/// Blocks of a map, in each direction, whose mean can be read, where rows have no names.
const BLOCKS: usize = 16;
/// Where the map begins: names of rows stand to its left.
const LEFT: f64 = 92.0;
const TOP: f64 = 6.0;
/// Room for the key.
const RIGHT: f64 = 62.0;
/// Height of a name.
const LINE: f64 = 13.0;
/// Letters of a name that there is room for.
const LETTERS: usize = 13;

/// What the rows of a map are; the columns are the same.
#[derive(Debug, Default)]
pub struct MapRows {
    /// Rows, other than the first, at which another named part begins.
    pub starts: Vec<usize>,
    /// Names of the parts; none where rows are alike.
    pub names: Vec<String>,
    /// Things that the rows stand for, where parts have no names.
    pub count: usize,
    /// What such a thing is called.
    pub what: String,
}

/// A part of the rows.
struct Part {
    name: String,
    from: usize,
    to: usize,
}

impl MapRows {
    /// The parts of so many rows.
    fn parts(&self, rows: usize) -> Vec<Part> {
        if self.names.is_empty() {
            let blocks = rows.min(BLOCKS);
            let thing = |row: usize| row * self.count.max(rows) / rows;
            let part = |i: usize| {
                let (from, to) = (i * rows / blocks, (i + 1) * rows / blocks);
                let (first, last) = (thing(from) + 1, thing(to).max(1));
                let name = match first >= last {
                    true => format!("{} {first}", self.what),
                    false => format!("{}s {first} to {last}", self.what),
                };
                Part { name, from, to }
            };
            return (0..blocks).map(part).collect();
        }
        let mut edges = vec![0];
        edges.extend(self.starts.iter().copied().filter(|start| *start < rows));
        edges.push(rows);
        let ends = edges.windows(2);
        self.names
            .iter()
            .zip(ends)
            .map(|(name, edge)| Part { name: name.clone(), from: edge[0], to: edge[1] })
            .collect()
    }
}

/// A square map, and what its rows and columns are.
pub fn map(id: &str, title: &str, description: &str, cells: &[Vec<f64>], rows: &MapRows) -> String {
    let size = cells.len().max(1) as f64;
    let side = WIDTH - LEFT - RIGHT;
    let unit = side / size;
    let mut shades: Vec<String> = vec![String::new(); 2 * SHADES as usize + 1];
    for (i, row) in cells.iter().enumerate() {
        for (j, value) in row.iter().enumerate().filter(|(_, v)| v.is_finite()) {
            let shade = (value.clamp(-1.0, 1.0) * SHADES as f64).round() as i32 + SHADES;
            let _ = write!(shades[shade as usize], "M{j} {i}h1v1h-1z");
        }
    }
    let frame = format!("<g transform=\"translate({LEFT} {TOP}) scale({unit:.4})\"");
    let mut marks = format!("{frame} class=\"map\">");
    for (shade, d) in shades.iter().enumerate().filter(|(_, d)| !d.is_empty()) {
        let _ = write!(marks, "<path class=\"m{shade}\" d=\"{d}\"/>");
    }
    marks += "</g>";
    let parts = rows.parts(cells.len());
    // With very many parts the lines would hide the cells.
    if !rows.names.is_empty() && parts.len() <= BLOCKS {
        for part in parts.iter().skip(1) {
            let at = part.from as f64 * unit;
            let _ = write!(
                marks,
                "<path class=\"divide\" d=\"M{:.1} {TOP}v{side}M{LEFT} {:.1}h{side}\"/>",
                LEFT + at,
                TOP + at
            );
        }
    }
    let _ =
        write!(marks, "<rect class=\"frame\" x=\"{LEFT}\" y=\"{TOP}\" width=\"{side}\" height=\"{side}\"/>");
    marks += &row_names(&parts, unit);
    let _ = write!(marks, "{frame} class=\"parts\">{}</g>", readings(&parts, cells));
    marks += &map_key(WIDTH - RIGHT + 14.0, side);
    drawing(id, title, description, side + 2.0 * TOP, &marks)
}

/// Names to the left of the rows, with a tick in the middle of each; of many every so many.
fn row_names(parts: &[Part], unit: f64) -> String {
    let mut out = String::new();
    let mut free = f64::NEG_INFINITY;
    for part in parts {
        let middle = TOP + (part.from + part.to) as f64 / 2.0 * unit;
        let _ = write!(out, "<path class=\"axis\" d=\"M{} {middle:.1}h-4\"/>", LEFT);
        if middle - LINE / 2.0 < free {
            continue;
        }
        free = middle + LINE / 2.0;
        let name: String = match part.name.chars().count() > LETTERS {
            true => part.name.chars().take(LETTERS - 1).chain(['…']).collect(),
            false => part.name.clone(),
        };
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 7.0,
            middle + 4.0,
            escape(&name)
        );
    }
    out
}

/// Invisible marks that name the mean of every part with every other.
fn readings(parts: &[Part], cells: &[Vec<f64>]) -> String {
    let mut out = String::new();
    for (i, a) in parts.iter().enumerate() {
        for (j, b) in parts.iter().enumerate() {
            let values = cells[a.from..a.to].iter().flat_map(|row| &row[b.from..b.to]);
            let values: Vec<f64> = values.copied().filter(|value| value.is_finite()).collect();
            if values.is_empty() {
                continue;
            }
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let names = if i == j { a.name.clone() } else { format!("{}, {}", a.name, b.name) };
            let (width, height) = (b.to - b.from, a.to - a.from);
            let _ = write!(
                out,
                "<path d=\"M{} {}h{width}v{height}h-{width}z\">{}</path>",
                b.from,
                a.from,
                hover(&format!("{names}: {}", fixed(mean, 2)))
            );
        }
    }
    out
}

/// The key of a map: a column of shades from 1 to −1.
fn map_key(x: f64, height: f64) -> String {
    let count = 2 * SHADES + 1;
    let unit = height * 0.6 / count as f64;
    let mut out = String::new();
    for i in 0..count {
        let y = TOP + i as f64 * unit;
        let _ = write!(
            out,
            "<rect class=\"m{}\" x=\"{x:.1}\" y=\"{y:.2}\" width=\"14\" height=\"{:.2}\"/>",
            count - 1 - i,
            unit + 0.3
        );
    }
    for (i, text) in [(0.5, "1"), (count as f64 / 2.0, "0"), (count as f64 - 0.5, "−1")] {
        let y = TOP + i * unit + 4.2;
        let _ = write!(out, "<text class=\"tick\" x=\"{:.1}\" y=\"{y:.1}\">{text}</text>", x + 20.0);
    }
    let _ = write!(
        out,
        "<text class=\"label\" x=\"{x:.1}\" y=\"{:.1}\">cosine</text>",
        TOP + height * 0.6 + 20.0
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_names_and_blocks_their_means() {
        let cells = vec![vec![1.0, 0.5, 0.0], vec![0.5, 1.0, 0.0], vec![0.0, 0.0, -1.0]];
        let names = vec!["copy".to_string(), "reverse everything".to_string()];
        let rows = MapRows { starts: vec![2], names, ..MapRows::default() };
        let text = map("m", "", "", &cells, &rows);
        for part in
            ["<title>copy: 0.75</title>", "<title>copy, reverse everything: 0.00</title>", ">reverse ever…<"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("d=\"M0 0h2v2h-2z\"") && text.contains("class=\"divide\""));
        let rows = MapRows { count: 6, what: "subset".into(), ..MapRows::default() };
        let text = map("m", "", "", &cells, &rows);
        assert!(text.contains("<title>subsets 1 to 2: 1.00</title>") && !text.contains("divide"), "{text}");
        assert!(map("m", "", "", &[], &rows).contains("frame"));
    }

    #[test]
    fn names_of_many_rows_do_not_overlap() {
        let cells = vec![vec![0.0; 40]; 40];
        let rows = MapRows {
            starts: (1..40).collect(),
            names: (0..40).map(|i| format!("task {i}")).collect(),
            ..MapRows::default()
        };
        let text = map("m", "", "", &cells, &rows);
        let names: Vec<f64> = text
            .split("<text class=\"tick\" x=\"85\" y=\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
            .collect();
        assert!(names.len() > 10 && names.windows(2).all(|w| w[1] - w[0] >= LINE - 0.11), "{names:?}");
    }
}
