//! Plots as SVG text: axes with round ticks, lines, bands, bars, dots, maps.
//!
//! In: numbers and words. Out: `<svg>` elements that need nothing but the page's style
//! sheet: marks carry class names, colours and fonts are the page's, so that one drawing
//! serves light, dark and paper. Every drawing has a title and a description for those
//! who cannot see it. All words are escaped; what is not a number is not drawn.

mod axis;

pub use axis::{Axis, Scale};

use std::fmt::Write as _;

/// Text that may stand in HTML, in an element or a quoted attribute.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // Control characters are not allowed in a page.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// With so many digits, groups of thousands, and a real minus sign.
pub fn fixed(value: f64, digits: usize) -> String {
    let text = format!("{:.digits$}", value.abs());
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), ""), |(w, r)| (w, r));
    let whole = whole.parse().map_or_else(|_| whole.to_string(), super::headline::grouped);
    let zero = text.chars().all(|c| matches!(c, '0' | '.'));
    let sign = if value < 0.0 && !zero { "−" } else { "" };
    if rest.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{rest}") }
}

/// Room around the field of a plot.
#[derive(Clone, Copy, Debug)]
pub struct Margins {
    /// Above.
    pub top: f64,
    /// To the right: for labels at the ends of lines.
    pub right: f64,
    /// Below: for the x axis.
    pub bottom: f64,
    /// To the left: for the y axis.
    pub left: f64,
}

/// Width of a drawing, in its own units.
pub const WIDTH: f64 = 460.0;

/// A plot with two axes.
pub struct Plot {
    id: String,
    title: String,
    description: String,
    x: Axis,
    y: Axis,
    height: f64,
    margins: Margins,
    marks: String,
    ends: Vec<(f64, String, String)>,
}

impl Plot {
    /// An empty plot. `id` is unique on the page.
    pub fn new(id: &str, title: &str, description: &str, x: Axis, y: Axis) -> Self {
        let margins = Margins { top: 26.0, right: 84.0, bottom: 46.0, left: 58.0 };
        Self {
            id: id.into(),
            title: title.into(),
            description: description.into(),
            x,
            y,
            height: 280.0,
            margins,
            marks: String::new(),
            ends: vec![],
        }
    }

    /// Other room on the right.
    pub fn right(mut self, right: f64) -> Self {
        self.margins.right = right;
        self
    }

    fn at(&self, x: f64, y: f64) -> Option<(f64, f64)> {
        Some((self.at_x(x)?, self.at_y(y)?))
    }

    fn at_x(&self, x: f64) -> Option<f64> {
        let m = self.margins;
        Some(m.left + self.x.place(x)? * (WIDTH - m.left - m.right))
    }

    fn at_y(&self, y: f64) -> Option<f64> {
        let m = self.margins;
        Some(self.height - m.bottom - self.y.place(y)? * (self.height - m.top - m.bottom))
    }

    /// A line through the points that can be drawn.
    pub fn line(&mut self, class: &str, points: impl IntoIterator<Item = (f64, f64)>) {
        let places: Vec<_> = points.into_iter().filter_map(|(x, y)| self.at(x, y)).collect();
        if places.len() == 1 {
            self.circle(class, places[0], 3.0);
        } else if !places.is_empty() {
            let _ = write!(self.marks, "<path class=\"line {class}\" d=\"{}\"/>", path(&places));
        }
    }

    /// The area between two lines: (x, low, high).
    pub fn band(&mut self, class: &str, points: impl IntoIterator<Item = (f64, f64, f64)>) {
        let (mut lower, mut upper) = (vec![], vec![]);
        for (x, low, high) in points {
            if let (Some(low), Some(high)) = (self.at(x, low), self.at(x, high)) {
                lower.push(low);
                upper.push(high);
            }
        }
        if lower.len() > 1 {
            lower.reverse();
            upper.extend(lower);
            let _ = write!(self.marks, "<path class=\"band {class}\" d=\"{}Z\"/>", path(&upper));
        }
    }

    /// A dot.
    pub fn dot(&mut self, class: &str, x: f64, y: f64) {
        if let Some(place) = self.at(x, y) {
            self.circle(class, place, 4.5);
        }
    }

    fn circle(&mut self, class: &str, (x, y): (f64, f64), radius: f64) {
        let _ =
            write!(self.marks, "<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>");
    }

    /// Words beside a point; to its left where there is no room on its right.
    pub fn note(&mut self, x: f64, y: f64, text: &str) {
        if let Some((x, y)) = self.at(x, y) {
            let right = WIDTH - self.margins.right;
            let (anchor, x) = if x > right - 90.0 { ("end", x - 2.0) } else { ("start", x + 2.0) };
            let _ = write!(
                self.marks,
                "<text class=\"note\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
                y - 10.0,
                escape(text)
            );
        }
    }

    /// A bar from the bottom, of this width on the x axis.
    pub fn bar(&mut self, class: &str, x: f64, width: f64, y: f64) {
        let bottom = if self.y.scale() == Scale::Log { self.y.low() } else { 0.0 };
        let corners = (self.at(x, y), self.at(x + width, bottom));
        if let (Some((left, top)), Some((right, base))) = corners {
            let (top, base) = (top.min(base), top.max(base));
            let _ = write!(
                self.marks,
                "<rect class=\"bar {class}\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                left + 0.6,
                (right - left - 1.2).max(0.8),
                base - top
            );
        }
    }

    /// A dashed line across, with words at its right end.
    pub fn level(&mut self, y: f64, text: &str) {
        if let Some(place) = self.at_y(y) {
            let (left, right) = (self.margins.left, WIDTH - self.margins.right);
            let _ = write!(self.marks, "<path class=\"level\" d=\"M{left} {place:.1}H{right}\"/>");
            self.end("muted", y, text);
        }
    }

    /// Words at the right of the field, at the height of a value: the name of a line.
    pub fn end(&mut self, class: &str, y: f64, text: &str) {
        if let Some(place) = self.at_y(y) {
            self.ends.push((place, class.into(), text.into()));
        }
    }

    /// The drawing.
    pub fn finish(mut self) -> String {
        let (left, right) = (self.margins.left, WIDTH - self.margins.right);
        let (top, bottom) = (self.margins.top, self.height - self.margins.bottom);
        let mut axes = String::new();
        for &tick in self.y.ticks() {
            let Some(y) = self.at_y(tick) else { continue };
            let _ = write!(
                axes,
                "<path class=\"grid\" d=\"M{left} {y:.1}H{right}\"/><text class=\"tick\" x=\"{}\" \
                 y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 7.0,
                y + 4.2,
                self.y.text(tick)
            );
        }
        for &tick in self.x.ticks() {
            let Some(x) = self.at_x(tick) else { continue };
            let _ = write!(
                axes,
                "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{}</text>",
                bottom + 18.0,
                self.x.text(tick)
            );
        }
        let _ = write!(
            axes,
            "<path class=\"axis\" d=\"M{left} {bottom}H{right}\"/><text class=\"label\" x=\"{:.1}\" y=\"{}\" \
             text-anchor=\"middle\">{}</text><text class=\"label\" x=\"2\" y=\"{}\">{}</text>",
            (left + right) / 2.0,
            bottom + 38.0,
            escape(self.x.label()),
            top - 13.0,
            escape(self.y.label())
        );
        let ends = self.end_labels(right);
        drawing(&self.id, &self.title, &self.description, self.height, &format!("{axes}{}{ends}", self.marks))
    }

    /// Labels at the ends of lines, moved apart where they would overlap.
    fn end_labels(&mut self, right: f64) -> String {
        const LINE: f64 = 15.0;
        self.ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        let last = self.height - self.margins.bottom;
        let mut places: Vec<f64> = self.ends.iter().map(|end| end.0).collect();
        for i in 1..places.len() {
            places[i] = places[i].max(places[i - 1] + LINE);
        }
        for i in (0..places.len()).rev() {
            let below = places.get(i + 1).map_or(last, |next| next - LINE);
            places[i] = places[i].min(below);
        }
        let mut out = String::new();
        for ((_, class, text), y) in self.ends.iter().zip(places) {
            let _ = write!(
                out,
                "<text class=\"end {class}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                right + 10.0,
                y + 4.2,
                escape(text)
            );
        }
        out
    }
}

fn path(places: &[(f64, f64)]) -> String {
    let mut out = String::new();
    for (i, (x, y)) in places.iter().enumerate() {
        let _ = write!(out, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
    }
    out
}

/// An `<svg>` element around these marks.
pub fn drawing(id: &str, title: &str, description: &str, height: f64, marks: &str) -> String {
    let id = escape(id);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\
         <title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>{marks}</svg>\n",
        escape(title),
        escape(description)
    )
}

/// Shades of a map on each side of zero.
pub const SHADES: i32 = 6;

/// A square map of values from −1 to 1, and lines before these rows and columns.
pub fn map(id: &str, title: &str, description: &str, cells: &[Vec<f64>], lines: &[usize]) -> String {
    let (size, top) = (cells.len().max(1) as f64, 6.0);
    let side = WIDTH - 120.0;
    let unit = side / size;
    let mut shades: Vec<String> = vec![String::new(); 2 * SHADES as usize + 1];
    for (i, row) in cells.iter().enumerate() {
        for (j, value) in row.iter().enumerate().filter(|(_, v)| v.is_finite()) {
            let shade = (value.clamp(-1.0, 1.0) * SHADES as f64).round() as i32 + SHADES;
            let _ = write!(shades[shade as usize], "M{j} {i}h1v1h-1z");
        }
    }
    let mut marks = format!("<g transform=\"translate(6 {top}) scale({unit:.4})\" class=\"map\">");
    for (shade, d) in shades.iter().enumerate().filter(|(_, d)| !d.is_empty()) {
        let _ = write!(marks, "<path class=\"m{shade}\" d=\"{d}\"/>");
    }
    marks += "</g>";
    for &line in lines {
        let at = line as f64 * unit;
        let _ = write!(
            marks,
            "<path class=\"divide\" d=\"M{:.1} {top}v{side}M6 {:.1}h{side}\"/>",
            6.0 + at,
            top + at
        );
    }
    let _ = write!(marks, "<rect class=\"frame\" x=\"6\" y=\"{top}\" width=\"{side}\" height=\"{side}\"/>");
    marks += &map_key(side + 26.0, top, side);
    drawing(id, title, description, side + 2.0 * top, &marks)
}

/// The key of a map: a column of shades from 1 to −1.
fn map_key(x: f64, top: f64, height: f64) -> String {
    let count = 2 * SHADES + 1;
    let unit = height * 0.6 / count as f64;
    let mut out = String::new();
    for i in 0..count {
        let y = top + i as f64 * unit;
        let _ = write!(
            out,
            "<rect class=\"m{}\" x=\"{x:.1}\" y=\"{y:.2}\" width=\"16\" height=\"{:.2}\"/>",
            count - 1 - i,
            unit + 0.3
        );
    }
    for (i, text) in [(0.5, "1"), (count as f64 / 2.0, "0"), (count as f64 - 0.5, "−1")] {
        let y = top + i * unit + 4.2;
        let _ = write!(out, "<text class=\"tick\" x=\"{:.1}\" y=\"{y:.1}\">{text}</text>", x + 23.0);
    }
    let _ = write!(
        out,
        "<text class=\"label\" x=\"{x:.1}\" y=\"{:.1}\">cosine</text>",
        top + height * 0.6 + 20.0
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_escaped_and_what_is_no_number_is_not_drawn() {
        assert_eq!(escape("<a href='x'>&\"\u{7}"), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;\u{fffd}");
        let axis = || Axis::linear("<x>", [0.0, 1.0]);
        let mut plot = Plot::new("p\"", "<title>", "a & b", axis(), axis());
        plot.line("a", [(0.0, f64::NAN), (0.5, f64::INFINITY)]);
        plot.band("a", [(0.0, f64::NAN, 1.0)]);
        plot.dot("a", f64::NAN, 0.0);
        plot.bar("a", 0.0, 0.1, f64::NAN);
        plot.end("a", 0.5, "<end>");
        plot.end("a", 0.5, "other");
        let text = plot.finish();
        assert!(
            !text.contains("NaN")
                && !text.contains("inf")
                && !text.contains("<x>")
                && !text.contains("<end>")
        );
        assert!(!text.contains("class=\"line") && text.contains("&lt;title&gt;"));
        let text = map("m", "", "", &[vec![1.0, f64::NAN], vec![0.0, -1.0]], &[1]);
        assert!(text.contains("class=\"m12\"") && !text.contains("NaN"));
    }

    #[test]
    fn labels_do_not_overlap() {
        let mut plot = Plot::new("p", "", "", Axis::linear("", [0.0, 1.0]), Axis::linear("", [0.0, 1.0]));
        (0..4).for_each(|_| plot.end("", 0.0, "x"));
        plot.end_labels(0.0);
        let text = plot.finish();
        let heights: Vec<f64> = text
            .split("class=\"end ")
            .skip(1)
            .map(|t| t.split("y=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        assert!(heights.windows(2).all(|w| w[1] - w[0] >= 14.9) && heights[3] < 280.0, "{heights:?}");
    }

    #[test]
    fn numbers() {
        assert_eq!([fixed(-0.04, 1), fixed(-1234.5, 1), fixed(12.0, 0)], ["0.0", "−1,234.5", "12"]);
    }
}
