//! Plots with two axes.

use super::{Axis, Scale, WIDTH, drawing, escape, fixed, hover, path, significant};
use std::fmt::Write as _;

/// Most places of an x axis whose values can be read.
const MAX_STRIPS: usize = 64;

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
    readings: Vec<Reading>,
}

/// One value of a series, to be read while the pointer is above or below it.
struct Reading {
    x: f64,
    /// Name of the series.
    name: String,
    value: f64,
}

impl Plot {
    /// An empty plot. `id` is unique on the page.
    pub fn new(id: &str, title: &str, description: &str, x: Axis, y: Axis) -> Self {
        let margins = Margins { top: 26.0, right: 66.0, bottom: 46.0, left: 54.0 };
        Self {
            id: id.into(),
            title: title.into(),
            description: description.into(),
            x,
            y,
            height: 250.0,
            margins,
            marks: String::new(),
            ends: vec![],
            readings: vec![],
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
    pub(crate) fn band(&mut self, class: &str, points: impl IntoIterator<Item = (f64, f64, f64)>) {
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

    /// A bar from the bottom, of this width on the x axis, and what is read from it.
    pub fn bar(&mut self, class: &str, x: f64, width: f64, y: f64, text: &str) {
        let bottom = if self.y.scale() == Scale::Log { self.y.low() } else { 0.0 };
        let corners = (self.at(x, y), self.at(x + width, bottom));
        if let (Some((left, top)), Some((right, base))) = corners {
            let (top, base) = (top.min(base), top.max(base));
            let _ = write!(
                self.marks,
                "<rect class=\"bar {class}\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\">{}</rect>",
                left + 0.6,
                (right - left - 1.2).max(0.8),
                base - top,
                hover(text)
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

    /// Values of a series that can be read where the pointer is: those of all series at one place
    /// of the x axis together.
    pub fn values(&mut self, name: &str, points: impl IntoIterator<Item = (f64, f64)>) {
        let finite = points.into_iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        self.readings.extend(finite.map(|(x, value)| Reading { x, name: name.into(), value }));
    }

    /// Invisible strips over the whole height that name the values at their place.
    fn strips(&mut self) -> String {
        self.readings.sort_by(|a, b| a.x.total_cmp(&b.x));
        let mut places: Vec<f64> = self.readings.iter().map(|reading| reading.x).collect();
        places.dedup();
        // Of very many places every so many, the last among them.
        let every = places.len().div_ceil(MAX_STRIPS).max(1);
        let places: Vec<f64> = places.into_iter().rev().step_by(every).collect::<Vec<_>>();
        let (left, right) = (self.margins.left, WIDTH - self.margins.right);
        let (top, bottom) = (self.margins.top, self.height - self.margins.bottom);
        let middle = |a: &f64, b: &f64| Some((self.at_x(*a)? + self.at_x(*b)?) / 2.0);
        let mut out = String::new();
        for (i, x) in places.iter().enumerate() {
            let to = i.checked_sub(1).map_or(Some(right), |above| middle(&places[above], x));
            let from = places.get(i + 1).map_or(Some(left), |below| middle(below, x));
            let (Some(from), Some(to)) = (from, to) else { continue };
            let mut text = format!("{} {}", self.x.label(), plain(*x));
            for reading in self.readings.iter().filter(|reading| reading.x == *x) {
                let _ = write!(text, "\n{} {}", reading.name, significant(reading.value));
            }
            let _ = write!(
                out,
                "<rect class=\"strip\" x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{:.1}\">{}</rect>",
                (to - from).max(0.5),
                bottom - top,
                hover(&text)
            );
        }
        out
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
        let (ends, strips) = (self.end_labels(right), self.strips());
        let marks = format!("{axes}{}{ends}{strips}", self.marks);
        drawing(&self.id, &self.title, &self.description, self.height, &marks)
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
                right + 8.0,
                y + 4.2,
                escape(text)
            );
        }
        out
    }
}

/// A place on an x axis in words: whole where it is.
fn plain(x: f64) -> String {
    if x.fract() == 0.0 { fixed(x, 0) } else { significant(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn values_of_one_place_are_read_together() {
        let axis = |high: f64| Axis::exact("step", 0.0, high);
        let mut plot = Plot::new("p", "", "", axis(1000.0), axis(1.0));
        plot.values("tiny", [(10.0, 0.5), (20.0, 0.25)]);
        plot.values("llm", [(10.0, 0.125)]);
        let text = plot.finish();
        assert!(text.contains("<title>step 10\ntiny 0.500\nllm 0.125</title>"), "{text}");
        assert_eq!(text.matches("class=\"strip\"").count(), 2);
        let mut plot = Plot::new("p", "", "", axis(1000.0), axis(1.0));
        plot.values("many", (1..=1000).map(|step| (step as f64, 0.5)));
        let text = plot.finish();
        assert!(text.matches("class=\"strip\"").count() <= MAX_STRIPS && text.contains("step 1,000\n"));
    }
}
