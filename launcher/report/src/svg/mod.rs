//! Plots as SVG text: axes with round ticks, lines, bands, bars, dots, maps.
//!
//! In: numbers and words. Out: `<svg>` elements that need nothing but the page's style
//! sheet: marks carry class names, colours and fonts are the page's, so that one drawing
//! serves light, dark and paper. Every drawing has a title and a description for those
//! who cannot see it, and marks name their values in a `<title>`, which a browser shows while the
//! pointer rests on them. All words are escaped; what is not a number is not drawn.

mod axis;
mod map;
mod plot;

pub use axis::{Axis, Scale};
pub use map::{MapRows, map};
pub use plot::Plot;

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

/// With three digits that count, of a number of any size.
pub fn significant(value: f64) -> String {
    let digits = match value.abs() {
        x if x >= 100.0 => 0,
        x if x >= 10.0 => 1,
        x if x >= 1.0 => 2,
        x if x >= 0.1 || x == 0.0 => 3,
        x if x >= 0.001 => 4,
        _ => return format!("{value:.1e}").replace('-', "−"),
    };
    fixed(value, digits)
}

/// Width of a drawing, in its own units: about the pixels that a phone has for it.
pub const WIDTH: f64 = 380.0;

fn path(places: &[(f64, f64)]) -> String {
    let mut out = String::new();
    for (i, (x, y)) in places.iter().enumerate() {
        let _ = write!(out, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
    }
    out
}

/// A `<title>` element: what a browser shows while the pointer rests on the mark around it.
pub(crate) fn hover(text: &str) -> String {
    format!("<title>{}</title>", escape(text))
}

/// An `<svg>` element around these marks.
pub(crate) fn drawing(id: &str, title: &str, description: &str, height: f64, marks: &str) -> String {
    let id = escape(id);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\
         <title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>{marks}</svg>\n",
        escape(title),
        escape(description)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_escaped_and_nans_are_not_drawn() {
        assert_eq!(escape("<a href='x'>&\"\u{7}"), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;\u{fffd}");
        let axis = || Axis::linear("<x>", [0.0, 1.0]);
        let mut plot = Plot::new("p\"", "<title>", "a & b", axis(), axis());
        plot.line("a", [(0.0, f64::NAN), (0.5, f64::INFINITY)]);
        plot.band("a", [(0.0, f64::NAN, 1.0)]);
        plot.dot("a", f64::NAN, 0.0);
        plot.bar("a", 0.0, 0.1, f64::NAN, "<bar>");
        plot.values("<series>", [(0.0, f64::NAN), (0.5, 0.25)]);
        plot.end("a", 0.5, "<end>");
        plot.end("a", 0.5, "other");
        let text = plot.finish();
        assert!(
            !text.contains("NaN")
                && !text.contains("inf")
                && !text.contains("<x>")
                && !text.contains("<series>")
                && !text.contains("<end>")
        );
        assert!(!text.contains("class=\"line") && text.contains("&lt;title&gt;"));
        let rows = MapRows { starts: vec![1], names: vec!["<a>".into(), "b".into()], ..MapRows::default() };
        let text = map("m", "", "", &[vec![1.0, f64::NAN], vec![0.0, -1.0]], &rows);
        assert!(text.contains("class=\"m12\"") && !text.contains("NaN") && !text.contains("<a>"));
    }

    #[test]
    fn numbers() {
        assert_eq!([fixed(-0.04, 1), fixed(-1234.5, 1), fixed(12.0, 0)], ["0.0", "−1,234.5", "12"]);
        assert_eq!(
            [0.0, 0.00012, 0.0456, 0.5, 12.34, 1234.5].map(significant),
            ["0.000", "1.2e−4", "0.0456", "0.500", "12.3", "1,234"]
        );
    }
}
