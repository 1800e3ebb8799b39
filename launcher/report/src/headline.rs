//! What a table says, in sentences made from its numbers.
//!
//! In: a [`Table`]. Out: [`Headline`]. Two rows are the same where the 95 % interval of
//! their paired difference holds zero. When a constant or a random update does as well as
//! the Grad-Transformer, the sentence says what that means: such a comparison shows
//! nothing about translation.

use crate::table::{Difference, Entry, Row, Table};
use gradtx_run::role::Role;
use gradtx_train::baselines::{About, Kind, Method};
use serde::Serialize;

/// What a table says.
#[derive(Debug, Serialize)]
pub struct Headline {
    /// Performance gap recovered by the Grad-Transformer, in percent.
    pub pgr: Option<f64>,
    /// Half the width of its 95 % confidence interval over clients.
    pub pgr_interval: Option<f64>,
    /// Clients that PGR is taken over.
    pub clients: usize,
    /// Test examples of all clients.
    pub examples: usize,
    /// What the table says, in a sentence.
    pub text: String,
    /// What follows from the rows beside the Grad-Transformer, in a sentence or two.
    pub conclusion: String,
    /// What the rows beside the Grad-Transformer say about it.
    pub findings: Vec<Finding>,
}

/// What one comparison says.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// Whether it speaks for the Grad-Transformer.
    pub verdict: Verdict,
    /// In a sentence.
    pub text: String,
}

/// What a comparison means for the Grad-Transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The Grad-Transformer is better, beyond chance.
    Supports,
    /// The Grad-Transformer is better, but something that knows nothing of the client
    /// already recovers more than half of what it recovers.
    SaysLittle,
    /// Another translator of the client's update does as well.
    NotNeeded,
    /// Something that knows nothing of the client does as well.
    ShowsNothing,
    /// Something that the comparison needs is not there.
    Unknown,
}

/// What this table says.
pub fn of(table: &Table) -> Headline {
    let translated = table.row(Entry::GRAD_TRANSFORMER);
    let (student, teacher) =
        (table.row(Entry::Finetuned(Role::Tiny)), table.row(Entry::Finetuned(Role::Llm)));
    let mut headline = Headline {
        pgr: translated.and_then(|row| row.pgr),
        pgr_interval: translated.and_then(|row| row.pgr_interval),
        clients: table.data.len(),
        examples: table.examples,
        text: String::new(),
        conclusion: String::new(),
        findings: vec![],
    };
    let Some(translated) = translated.filter(|row| row.mean.is_some()) else {
        headline.text = "The Grad-Transformer has no score yet.".into();
        return headline;
    };
    if let (Some(student), Some(teacher)) = (student, teacher) {
        let all = [student, translated, teacher];
        let complete = |i: &usize| all.iter().all(|row| row.scores[*i].is_some());
        headline.clients = (0..table.data.len()).filter(complete).count();
    }
    headline.text = summary(table, translated, student, teacher, &headline);
    let rivals = rivals();
    headline.findings = findings(&rivals, table, translated);
    headline.conclusion = conclusion(&rivals, &headline.findings);
    headline
}

fn summary(
    table: &Table,
    translated: &Row,
    student: Option<&Row>,
    teacher: Option<&Row>,
    headline: &Headline,
) -> String {
    let unit = table.metric.label();
    let score = |row: &Row| row.mean.map_or("no number".into(), |mean| format!("{mean:.1} %"));
    let reached = format!(
        "With the Grad-Transformer's update the LLM reaches {} {unit} on {} of {}",
        score(translated),
        count(table.examples, "test example"),
        count(table.data.len(), "client"),
    );
    let (Some(student), Some(teacher)) = (student, teacher) else {
        let missing: Vec<&str> =
            [(student, "P_S, the fine-tuned TinyLM"), (teacher, "P_T, the fine-tuned LLM")]
                .into_iter()
                .filter_map(|(row, name)| row.is_none().then_some(name))
                .collect();
        return format!("{reached}. There is no PGR without a score of {}.", missing.join(" and "));
    };
    let ends = format!(
        "{reached}; the clients' own fine-tuned TinyLM reaches {}, the LLM fine-tuned on the private data \
         itself {}",
        score(student),
        score(teacher)
    );
    let Some(pgr) = headline.pgr else {
        return format!("{ends}. P_T is not above P_S, so there is no gap that a translation could recover.");
    };
    let interval = match headline.pgr_interval {
        Some(half) => format!(
            " (95 % interval over {}: {} to {})",
            count(headline.clients, "client"),
            number(pgr - half),
            number(pgr + half)
        ),
        None => " (one client: no interval)".into(),
    };
    let unsure = table.difference(teacher, student).is_some_and(|gap| gap.mean - gap.interval <= 0.0);
    let doubt = if unsure { " The gap itself is not beyond chance here, so PGR means little." } else { "" };
    match pgr < 0.0 {
        true => format!("{ends}: it does worse than the TinyLM alone, PGR {}{interval}.{doubt}", number(pgr)),
        false => format!("{ends}: it recovers {} % of the gap{interval}.{doubt}", number(pgr)),
    }
}

/// A model that stands beside the Grad-Transformer.
struct Rival {
    entry: Entry,
    about: &'static About,
}

/// Noise in the place of the client's update.
const NOISE: About = About {
    name: "random-student",
    help: "",
    label: "random student",
    kind: Kind::Control,
    called: "a random update",
    what: "A random update in the place of the client's",
    as_good: "What the client sent does not matter here, so this comparison shows nothing about translation.",
    worse: "the client's update matters",
};

/// All of them: controls, then what translates too.
fn rivals() -> Vec<Rival> {
    let noise = [Rival { entry: Entry::RANDOM_STUDENT, about: &NOISE }];
    let of_kind = |kind| {
        let baselines =
            Method::ALL.into_iter().filter_map(|method| Some((method, method.baseline()?.about())));
        let these = baselines.filter(move |(_, about)| about.kind == kind);
        these.map(|(method, about)| Rival { entry: Entry::translated(method), about })
    };
    of_kind(Kind::Control).chain(noise).chain(of_kind(Kind::Rival)).collect()
}

impl Rival {
    /// What follows when it is as good as the Grad-Transformer.
    fn verdict(&self) -> Verdict {
        match self.about.kind {
            Kind::Control => Verdict::ShowsNothing,
            Kind::Rival => Verdict::NotNeeded,
        }
    }
}

fn findings(rivals: &[Rival], table: &Table, translated: &Row) -> Vec<Finding> {
    let found = |rival: &Rival| {
        let row = table.row(rival.entry);
        let compared = row.and_then(|row| Some((row, table.difference(translated, row)?, row.mean?)));
        let Some((row, difference, mean)) = compared else {
            let name = rival.entry.label();
            let text = format!("{name}: no score to compare with.");
            return Finding { verdict: Verdict::Unknown, text };
        };
        let over = match table.clients_of_both(translated, row) {
            1 => "over the examples of one client".to_string(),
            n => format!("over {n} clients"),
        };
        let what = format!("{} reaches {mean:.1} %", rival.about.what);
        if difference.mean - difference.interval > 0.0 {
            if let (Verdict::ShowsNothing, Some(pgr)) = (rival.verdict(), most_of(row, translated)) {
                let text = format!(
                    "{what}, {:.1} points less ({}, {over}). It already recovers {} % of the gap: little of the \
                     result is translation.",
                    difference.mean,
                    range(difference),
                    number(pgr)
                );
                return Finding { verdict: Verdict::SaysLittle, text };
            }
            let text = format!(
                "{what}, {:.1} points less ({}, {over}): {}.",
                difference.mean,
                range(difference),
                rival.about.worse
            );
            return Finding { verdict: Verdict::Supports, text };
        }
        let text = match difference.mean + difference.interval < 0.0 {
            true => format!(
                "{what}, {:.1} points more than the Grad-Transformer ({}, {over}). {}",
                -difference.mean,
                range(Difference { mean: -difference.mean, ..difference }),
                rival.about.as_good
            ),
            false => format!(
                "{what}, within chance of the Grad-Transformer's {:.1} % (difference {} points, {}, {over}). {}",
                translated.mean.unwrap_or(f64::NAN),
                number(difference.mean),
                range(difference),
                rival.about.as_good
            ),
        };
        Finding { verdict: rival.verdict(), text }
    };
    rivals.iter().map(found).collect()
}

/// What the verdicts on all rivals, in their order, say together.
fn conclusion(rivals: &[Rival], findings: &[Finding]) -> String {
    let names = |kinds: &[Kind], verdict: Verdict| -> Vec<&str> {
        let both = rivals.iter().zip(findings);
        let these =
            both.filter(|(rival, found)| kinds.contains(&rival.about.kind) && found.verdict == verdict);
        these.map(|(rival, _)| rival.about.called).collect()
    };
    let verb = |names: &[&str], one: &'static str, many: &'static str| {
        format!("{} {}", listed(names), if names.len() == 1 { one } else { many })
    };
    let (controls, others) = (&[Kind::Control], &[Kind::Rival]);
    let mut sentences = vec![];
    let nothing = names(controls, Verdict::ShowsNothing);
    let little = names(controls, Verdict::SaysLittle);
    let beaten = names(controls, Verdict::Supports);
    if !nothing.is_empty() {
        let who = verb(&nothing, "does", "do");
        sentences.push(format!("But {who} as well: this comparison shows nothing about translation."));
    } else if !little.is_empty() {
        let who = verb(&little, "already recovers", "already recover");
        sentences.push(format!("But {who} most of that: little of the result is translation."));
    } else if !beaten.is_empty() {
        let who = verb(&beaten, "does", "do");
        sentences.push(format!("{who} worse, so what the client sent matters."));
    }
    let needless = names(others, Verdict::NotNeeded);
    let beaten = names(others, Verdict::Supports);
    if !needless.is_empty() {
        let who = verb(&needless, "does", "do");
        sentences.push(format!("{who} as well, so this does not show that translation takes a transformer."));
    } else if !beaten.is_empty() {
        sentences.push(format!("{} worse too.", verb(&beaten, "does", "do")));
    }
    let unknown = names(&[Kind::Control, Kind::Rival], Verdict::Unknown);
    if !unknown.is_empty() {
        sentences.push(format!("There is no score to compare with of {}.", listed(&unknown)));
    }
    sentences.iter().map(|sentence| capital(sentence)).collect::<Vec<_>>().join(" ")
}

/// `a`, `a and b`, `a, b and c`.
fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => one.to_string(),
        [all @ .., last] => format!("{} and {last}", all.join(", ")),
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// A row's PGR, where it is more than half of the Grad-Transformer's.
fn most_of(row: &Row, translated: &Row) -> Option<f64> {
    let (pgr, whole) = row.pgr.zip(translated.pgr)?;
    (pgr > 0.5 * whole && whole > 0.0).then_some(pgr)
}

fn range(difference: Difference) -> String {
    let (low, high) = (difference.mean - difference.interval, difference.mean + difference.interval);
    format!("95 % interval {} to {}", number(low), number(high))
}

/// With one digit, and a real minus sign.
pub fn number(value: f64) -> String {
    let text = format!("{value:.1}");
    match text.strip_prefix('-') {
        Some("0.0") => "0.0".into(),
        Some(rest) => format!("−{rest}"),
        None => text,
    }
}

/// `1 client`, `4 clients`, `1,000 test examples`.
pub fn count(n: usize, what: &str) -> String {
    format!("{} {what}{}", grouped(n as u64), if n == 1 { "" } else { "s" })
}

/// Digits in groups of three.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::world;

    const S: Entry = Entry::Finetuned(Role::Tiny);
    const T: Entry = Entry::Finetuned(Role::Llm);

    fn baseline(name: &str) -> Entry {
        Entry::translated(Method::named(name).unwrap())
    }

    fn said(rows: &[(Entry, &[f64])]) -> Headline {
        of(&Table::of(&world(rows)).0[0])
    }

    fn finding<'a>(headline: &'a Headline, what: &str) -> &'a Finding {
        headline.findings.iter().find(|f| f.text.contains(what)).unwrap()
    }

    #[test]
    fn translation_that_works() {
        let said = said(&[
            (S, &[0.5, 0.6, 0.4]),
            (T, &[0.98, 0.97, 0.99]),
            (Entry::GRAD_TRANSFORMER, &[0.97, 0.97, 0.98]),
            (baseline("mean"), &[0.0, 0.02, 0.01]),
            (baseline("ridge"), &[0.95, 0.99, 0.975]),
        ]);
        assert!(said.text.contains("recovers 98.") && said.text.contains("300 test examples of 3 clients"));
        assert_eq!(finding(&said, "constant").verdict, Verdict::Supports);
        let ridge = finding(&said, "Ridge");
        assert_eq!(ridge.verdict, Verdict::NotNeeded);
        assert!(ridge.text.contains("within chance") && ridge.text.contains("linear map is enough"));
        assert_eq!(finding(&said, "random student").verdict, Verdict::Unknown);
        assert_eq!(
            said.conclusion,
            "The mean of the LLM's shadow updates does worse, so what the client sent matters. Ridge regression does \
             as well, so this does not show that translation takes a transformer. There is no score to compare \
             with of a random update and the nearest shadow pair."
        );
    }

    #[test]
    fn equal_constants_are_said_to_show_nothing() {
        let said = said(&[
            (S, &[0.5, 0.6]),
            (T, &[0.9, 0.9]),
            (Entry::GRAD_TRANSFORMER, &[0.91, 0.89]),
            (baseline("mean"), &[0.9, 0.91]),
            (Entry::RANDOM_STUDENT, &[0.99, 0.97]),
        ]);
        for what in ["constant", "random update"] {
            let found = finding(&said, what);
            assert_eq!(found.verdict, Verdict::ShowsNothing);
            assert!(found.text.contains("shows nothing about translation"), "{}", found.text);
        }
        assert!(said.conclusion.starts_with(
            "But the mean of the LLM's shadow updates and a random update do as well: this comparison shows nothing"
        ));
        // Better beyond chance is "more", not "within chance".
        assert!(finding(&said, "random update").text.contains("8.0 points more"));
    }

    #[test]
    fn a_control_that_recovers_most_of_the_gap_is_told() {
        let said = said(&[
            (S, &[0.5, 0.6, 0.55]),
            (T, &[0.9, 0.9, 0.9]),
            (Entry::GRAD_TRANSFORMER, &[0.85, 0.86, 0.85]),
            (Entry::RANDOM_STUDENT, &[0.8, 0.81, 0.8]),
            (baseline("mean"), &[0.1, 0.1, 0.2]),
        ]);
        let found = finding(&said, "random update");
        assert_eq!(found.verdict, Verdict::SaysLittle);
        assert!(found.text.contains("already recovers 72.4 % of the gap"), "{}", found.text);
        assert!(said.conclusion.starts_with("But a random update already recovers most of that"));
    }

    #[test]
    fn what_lacks_is_said() {
        assert!(said(&[(S, &[0.5])]).text.contains("no score yet"));
        let text = said(&[(S, &[0.5]), (Entry::GRAD_TRANSFORMER, &[0.6])]).text;
        assert!(text.contains("no PGR without a score of P_T"), "{text}");
        let text = said(&[(S, &[0.5]), (T, &[0.4]), (Entry::GRAD_TRANSFORMER, &[0.6])]).text;
        assert!(text.contains("no gap"), "{text}");
        let text = said(&[(S, &[0.5]), (T, &[0.52]), (Entry::GRAD_TRANSFORMER, &[0.51])]).text;
        assert!(text.contains("one client") && text.contains("not beyond chance"), "{text}");
        let text = said(&[(S, &[f64::NAN]), (T, &[0.52]), (Entry::GRAD_TRANSFORMER, &[f64::NAN])]).text;
        assert!(text.contains("no score yet"), "{text}");
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(number(-0.04), "0.0");
        assert_eq!(number(-126.72), "−126.7");
        assert_eq!([grouped(7), grouped(1000), grouped(1234567)], ["7", "1,000", "1,234,567"]);
        assert_eq!([count(1, "client"), count(1000, "example")], ["1 client", "1,000 examples"]);
    }
}
