//! The page of predictions: examples with the answers of all models beside each other.
//!
//! No script: which examples are shown is chosen by radio buttons and the style sheet.

use super::environment::render;
use super::view::Entry;
use crate::figures::row_class;
use crate::headline::{count, grouped};
use crate::predictions::{Answer, Change, Example, Piece, Predictions, TestSet, changes};
use crate::svg::fixed;
use crate::table::Entry as Model;
use anyhow::Result;
use gradtx_runtime::data::Metric;
use serde::Serialize;

#[derive(Serialize)]
struct View<'a> {
    title: &'a str,
    kind: &'static str,
    contents: Vec<Entry>,
    sets: Vec<SetView<'a>>,
    notes: &'a [String],
}

#[derive(Serialize)]
struct SetView<'a> {
    id: String,
    title: &'a str,
    intro: String,
    examples: Vec<ExampleView<'a>>,
}

#[derive(Serialize)]
struct ExampleView<'a> {
    line: String,
    /// Classes by which the page chooses what is shown.
    class: String,
    prompt: Option<&'a str>,
    reference: &'a str,
    answers: Vec<AnswerView>,
}

#[derive(Serialize)]
struct AnswerView {
    model: String,
    class: &'static str,
    right: bool,
    verdict: String,
    pieces: Vec<Piece>,
}

/// The page.
///
/// # Errors
/// If a template cannot be filled in, which is a bug.
pub fn page(predictions: &Predictions) -> Result<String> {
    let sets: Vec<SetView> = predictions.sets.iter().enumerate().map(|(i, set)| of_set(i, set)).collect();
    let contents = sets.iter().map(|set| Entry { id: set.id.clone(), title: set.title.into() }).collect();
    let title = &predictions.run;
    render(
        "predictions.html",
        &View { title, kind: "predictions", contents, sets, notes: &predictions.notes },
    )
}

fn of_set(i: usize, set: &TestSet) -> SetView<'_> {
    let shown = match set.examples.len() {
        n if n == set.all => count(n, "example"),
        n => format!("{n} of {}, evenly spaced", count(set.all, "example")),
    };
    let intro = format!("{shown}, {}; {}.", count(set.models.len(), "model"), set.metric.label());
    let examples = set.examples.iter().map(|example| of_example(set, example)).collect();
    SetView { id: format!("set-{i}"), title: &set.name, intro, examples }
}

fn of_example<'a>(set: &TestSet, example: &'a Example) -> ExampleView<'a> {
    let models = set.models.iter().zip(&example.answers);
    let answers: Vec<(Model, &Answer)> =
        models.filter_map(|(model, answer)| Some((*model, answer.as_ref()?))).collect();
    let mut class = "example".to_string();
    if example.is_disputed() {
        class += " disputed";
    }
    if answers.iter().any(|(model, answer)| *model == Model::GRAD_TRANSFORMER && !answer.right) {
        class += " missed";
    }
    ExampleView {
        line: grouped(example.line),
        class,
        prompt: example.prompt.as_deref(),
        reference: &example.reference,
        answers: answers.into_iter().map(|(model, answer)| of_answer(set, model, answer, example)).collect(),
    }
}

fn of_answer(set: &TestSet, model: Model, answer: &Answer, example: &Example) -> AnswerView {
    let mut verdict = match (set.metric, answer.right) {
        (Metric::Rouge1, _) => format!("ROUGE-1 {}", fixed(100.0 * answer.rouge1, 1)),
        (_, true) => "right".into(),
        (_, false) => "wrong".into(),
    };
    if !answer.ended {
        verdict += ", cut at the limit";
    }
    // A right answer may be worded in another way: that is no difference to look at.
    let pieces = match answer.right {
        true => vec![Piece { change: Change::Same, text: answer.prediction.clone() }],
        false => changes(&answer.prediction, &example.reference),
    };
    AnswerView { model: model.label(), class: row_class(model), right: answer.right, verdict, pieces }
}
