//! How good translations are before they are used: the cross-validation of the run, and the rounds of
//! refinements.

use super::tables::{NONE, optional};
use super::view::{Block, Cell, Part, Table};
use crate::Report;
use crate::cross_validation::{Difference, Summary};
use crate::headline::{count, grouped};
use crate::svg::{fixed, significant};
use gradtx_pipeline::stages::refine::{DOUBTFUL_SHARE, TrainedOn};

/// What `gradtx cross-validate` found.
pub(super) fn cross_validation(report: &Report) -> Option<Part> {
    let summary = report.cross_validation.as_ref()?;
    let intro = format!(
        "Translators compared on {} of shadow pairs, each held out once, without private data. The TinyLM \
         fine-tuned (P_S) scores {} %, the LLM fine-tuned (P_T) {} %.",
        count(summary.clients, "group"),
        fixed(summary.student, 1),
        fixed(summary.teacher, 1)
    );
    let blocks = vec![Block::table(translators(summary)), Block::table(warnings(summary))];
    Part::of("cross-validation", "Cross-validation", intro, blocks)
}

fn translators(summary: &Summary) -> Table {
    let less = format!("less {}", summary.against.trim_start_matches("LLM + "));
    let head =
        ["translator", "score, %", "PGR, %", "95 %", "reached", less.as_str(), "95 %", "better", "worse"];
    let caption = "PGR of means over groups; 95 %: interval of a bootstrap over groups, paired for differences. \
                   Reached: groups with at least 95 % of P_T.";
    let mut table = Table::new(&head, &[], caption);
    for translator in &summary.translators {
        let mut cells = vec![
            Cell::from(translator.name.as_str()),
            fixed(translator.score, 1).into(),
            finite(translator.pgr),
            interval(translator.interval),
            grouped(translator.reached as u64).into(),
        ];
        let difference = summary.differences.iter().find(|difference| difference.name == translator.name);
        cells.extend(match difference {
            Some(Difference { points, interval: between, better, worse, .. }) => {
                [finite(*points), interval(*between), better.to_string().into(), worse.to_string().into()]
            }
            None => [NONE; 4].map(Cell::from),
        });
        table.push("", cells);
    }
    table
}

fn warnings(summary: &Summary) -> Table {
    let head = ["signal", "translator", "AUC", "PGR below 50", "PGR above 90"];
    let caption = "AUC: the probability that a translation with PGR below 50 has a more doubtful signal than one \
                   above 90; 0.5 is chance.";
    let mut table = Table::new(&head, &[1], caption);
    for warning in &summary.warnings {
        let [bad, good] = warning.counts.map(|n| Cell::from(grouped(n as u64)));
        let cells = vec![
            warning.signal.into(),
            warning.name.as_str().into(),
            fixed(warning.auc, 2).into(),
            bad,
            good,
        ];
        table.push("", cells);
    }
    table
}

/// A number; where there is no gap to recover, PGR is none.
fn finite(value: f64) -> Cell {
    optional(Some(value).filter(|value| value.is_finite()), |value| fixed(value, 1))
}

fn interval([low, high]: [f64; 2]) -> Cell {
    match low.is_finite() && high.is_finite() {
        true => format!("{} to {}", fixed(low, 1), fixed(high, 1)).into(),
        false => NONE.into(),
    }
}

/// How refinements went.
pub(super) fn refinements(report: &Report) -> Option<Part> {
    let intro = format!(
        "A translation is refined on public prompts that it and the client's TinyLM answer alike. The share of \
         answers that agree shows how far the translation follows the client; where it is below {} % in the first \
         round, the translation is doubtful.",
        100.0 * DOUBTFUL_SHARE
    );
    Part::of("refinement", "Refinement", intro, vec![Block::table(rounds(report))])
}

/// A row for each round of each refinement.
fn rounds(report: &Report) -> Table {
    let head = [
        "refined",
        "translator",
        "round",
        "prompts",
        "answered",
        "agreed",
        "share",
        "trained on",
        "last loss",
    ];
    let caption =
        "Answered: prompts of which the TinyLM ended its answer. Share: answers that agree, of all prompts.";
    let mut table = Table::new(&head, &[1, 7], caption);
    for refinement in &report.refinements {
        for (i, round) in refinement.rounds.iter().enumerate() {
            let trained_on = match round.trained_on {
                TrainedOn::Agreed => "answers that agree",
                TrainedOn::Surest => "the TinyLM's surest answers",
                TrainedOn::Nothing => "nothing: too few agree",
            };
            let share = format!("{} %", fixed(100.0 * round.share, 1));
            let is_doubtful = i == 0 && round.share < DOUBTFUL_SHARE;
            let cells = vec![
                Cell::code(&refinement.name),
                refinement.method.map_or(NONE, |method| method.label()).into(),
                (i + 1).to_string().into(),
                grouped(refinement.prompts as u64).into(),
                grouped(refinement.answered as u64).into(),
                grouped(round.agreed as u64).into(),
                if is_doubtful { Cell::strong(share) } else { share.into() },
                trained_on.into(),
                optional(round.loss, significant),
            ];
            table.push("", cells);
        }
    }
    table
}
