//! A [`Comparison`] as a page that needs nothing else.

use super::Comparison;
use crate::svg::escape;

/// Light and dark follow the reader's system; a wide table scrolls under its first column.
const STYLE: &str = "\
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8886; padding: .3rem .7rem; text-align: left; white-space: nowrap }
th:first-child, td:first-child { background: Canvas; left: 0; position: sticky }
";

/// The page.
pub fn page(comparison: &Comparison) -> String {
    let row = |cells: &[String], tag: &str| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = comparison.rows().iter().map(|cells| row(cells, "td")).collect();
    let notes: String = comparison.notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>gradtx comparison</title>\n<style>\n{STYLE}</style>\n\
         </head>\n<body>\n<h1>Comparison of {} runs</h1>\n<div class=\"table\"><table>\n<thead>{}</thead>\n<tbody>\n\
         {rows}</tbody>\n</table></div>\n<p>{:.2} {} in all, every curation once. Scores in percent; ± is the 95 % \
         confidence interval over clients; PGR = 100 · (score − P_S) / (P_T − P_S).</p>\n<ul>\n{notes}</ul>\n</body>\n\
         </html>\n",
        comparison.runs.len(),
        row(&comparison.header(), "th"),
        comparison.rank_hours(),
        comparison.unit(),
    )
}
