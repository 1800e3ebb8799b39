//! The page of a preview: one HTML file that needs nothing else.

use super::statistics::Statistics;
use super::view::View;
use anyhow::Result;
use gradtx_runtime::artifact::write_atomic;
use minijinja::{Environment, context};
use std::path::Path;

/// Its name makes the library escape what is put into it.
const NAME: &str = "page.html";

/// Writes the page.
pub(super) fn write(out: &Path, assumed: &[String], view: &View, statistics: &Statistics) -> Result<()> {
    let text = html(assumed, view, statistics)?;
    Ok(write_atomic(out, |file| std::io::Write::write_all(file, text.as_bytes()))?)
}

fn html(assumed: &[String], view: &View, statistics: &Statistics) -> Result<String> {
    let mut pages = Environment::new();
    pages.add_template(NAME, include_str!("page.html"))?;
    let (rows, problems) = (statistics.rows(), statistics.problems());
    let mut example = minijinja::Value::from_serialize(view);
    example = context! { title => view.title(), ..example };
    Ok(pages.get_template(NAME)?.render(context! { assumed, view => example, rows, problems })?)
}

#[cfg(test)]
mod tests {
    use super::super::view::{Kind, Piece, Token};
    use super::*;

    #[test]
    fn text_of_examples_is_escaped() {
        let piece = Piece { text: "<script>alert(1)</script> & more".into(), kind: Kind::Trained };
        let token = Token { id: 7, token: "<b>".into(), kind: Kind::Cut };
        let view =
            View { number: 1, of: 2, origin: "a<b.jsonl:1".into(), text: vec![piece], tokens: vec![token] };
        let page = html(&["data: x".into()], &view, &Statistics::default()).unwrap();
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"), "{page}");
        for word in [
            "class=\"trained\"",
            "class=\"cut\"",
            "example 1 of 2",
            "a&lt;b.jsonl:1",
            "data: x",
            "labels lost",
        ] {
            assert!(page.contains(word), "no {word} in {page}");
        }
    }
}
