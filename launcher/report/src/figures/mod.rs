//! The figures of the page: a drawing, a title, and a caption that says what one sees.
//!
//! In: parts of a [`super::Report`]. Out: [`Figure`]s; parts that are not there give none.
//!
//! * figure: what a figure is, and which colour whose marks have.
//! * scores: models between P_S and P_T, of one run or of several.

mod figure;
mod scores;

pub(crate) use figure::row_class;
pub use figure::{Figure, class};
pub use scores::{compared, gap};

use super::curves::{Client, Clients, JobLosses, Series, Shadow, Translator};
use super::headline::count;
use super::svg::{Axis, MapRows, Plot, Scale, fixed, map, significant};
use super::times::{RateSeries, Times};
use super::tuples::{Cosines, Side, Tuples};
use crate::spread::Spread;
use crate::table::display_name;
use gradtx_run::role::Role;
use std::fmt::Write as _;

fn step_axis(steps: impl IntoIterator<Item = u64>) -> Axis {
    Axis::exact("optimizer step", 0.0, steps.into_iter().max().unwrap_or(1).max(1) as f64)
}

/// Losses of all shadow jobs.
pub fn shadow(shadow: &Shadow) -> Option<Figure> {
    let jobs = [(Role::Tiny, shadow.tiny.as_ref()), (Role::Llm, shadow.llm.as_ref())];
    job_losses("shadow-loss", "Shadow fine-tuning", &jobs, &[])
}

/// Losses of all clients.
pub fn clients(clients: &Clients) -> Option<Figure> {
    let jobs = [(Role::Tiny, clients.tiny.as_ref()), (Role::Llm, clients.llm.as_ref())];
    let each: Vec<&Client> = clients.each.iter().filter(|c| c.model.is_some()).collect();
    let few = if each.len() <= 16 { each } else { vec![] };
    job_losses("client-loss", "Fine-tuning on private data", &jobs, &few)
}

fn job_losses(
    id: &str,
    title: &str,
    jobs: &[(Role, Option<&JobLosses>)],
    each: &[&Client],
) -> Option<Figure> {
    let jobs: Vec<(Role, &JobLosses)> =
        jobs.iter().filter_map(|(role, jobs)| Some((*role, (*jobs)?))).collect();
    if jobs.is_empty() {
        return None;
    }
    let spreads = || jobs.iter().flat_map(|(_, jobs)| jobs.loss.iter().flatten());
    let values: Vec<f64> = spreads().flat_map(|s| [s.low, s.high]).collect();
    let y = Axis::log_if_wide("training loss", &values);
    let scale = if y.scale() == Scale::Log { ", on a logarithmic axis" } else { "" };
    let mut caption = match each.is_empty() {
        true => format!("The line is the median over jobs, the band holds the middle 80 % of them{scale}."),
        false => format!("Thick: the median over clients. Thin: every client{scale}."),
    };
    for (role, jobs) in &jobs {
        if let (Some(first), Some(last)) = (jobs.first, jobs.last) {
            let (from, to) = (significant(first.median), significant(last.median));
            let fell = match jobs.improved {
                _ if from == to => "it hardly changed".to_string(),
                n if n == jobs.jobs => "the loss of all fell".into(),
                n => format!("the loss of {n} of {} fell", jobs.jobs),
            };
            let _ = write!(
                caption,
                " {}: {} from {from} to {to} in the median; {fell}.",
                display_name(*role),
                count(jobs.jobs, "job"),
            );
        }
    }
    let x = step_axis(jobs.iter().map(|(_, jobs)| jobs.steps));
    Some(Figure::of(title, caption, |title, description| {
        let mut plot = Plot::new(id, title, description, x, y);
        for (role, jobs) in &jobs {
            if each.is_empty() {
                let band = jobs.at.iter().zip(&jobs.loss);
                plot.band(class(*role), band.filter_map(|(&x, s)| s.map(|s| (x as f64, s.low, s.high))));
            }
        }
        for client in each {
            let class = format!("thin {}", client.model.map_or("muted", class));
            plot.line(&class, points(&client.loss));
        }
        for (role, jobs) in &jobs {
            let line = jobs.at.iter().zip(&jobs.loss);
            let medians: Vec<(f64, f64)> =
                line.filter_map(|(&x, s)| s.map(|s| (x as f64, s.median))).collect();
            plot.values(display_name(*role), medians.iter().copied());
            plot.line(class(*role), medians);
            if let Some(last) = jobs.loss.iter().rev().flatten().next() {
                plot.end(class(*role), last.median, display_name(*role));
            }
        }
        plot.finish()
    }))
}

fn points(series: &Series) -> impl Iterator<Item = (f64, f64)> {
    series.steps.iter().zip(&series.values).filter_map(|(&step, value)| Some((step as f64, (*value)?)))
}

/// Training of the Grad-Transformer: loss, validation, error by block, gradient.
pub fn translator(training: &Translator) -> Vec<Figure> {
    let mut figures = vec![];
    let x = || step_axis([training.steps]);
    figures.extend(line_figure("translator-loss", "Training loss", "squared error", x(), &training.loss));
    figures.extend(validation(training, x()));
    figures.extend(line_figure(
        "translator-rate",
        "Learning rate",
        "learning rate",
        x(),
        &training.learning_rate,
    ));
    figures.extend(by_block(training));
    figures.extend(line_figure(
        "translator-gradient",
        "Gradient norm",
        "norm before clipping",
        x(),
        &training.grad_norm,
    ));
    figures
}

fn line_figure(id: &str, title: &str, label: &str, x: Axis, series: &Series) -> Option<Figure> {
    let values: Vec<f64> = series.values.iter().flatten().copied().collect();
    let (first, last) = (*values.first()?, *values.last()?);
    let y = Axis::log_if_wide(label, &values);
    let scale = if y.scale() == Scale::Log { " Logarithmic axis." } else { "" };
    let width = series.steps.first().copied().unwrap_or(1);
    let each = if width > 1 { format!("Each point is the mean over {width} steps. ") } else { String::new() };
    let caption = format!("{each}From {} to {}.{scale}", significant(first), significant(last));
    Some(Figure::of(title, caption, |title, description| {
        let mut plot = Plot::new(id, title, description, x, y).right(16.0);
        plot.line("grad", points(series));
        plot.values(label, points(series));
        plot.finish()
    }))
}

fn validation(training: &Translator, x: Axis) -> Option<Figure> {
    let best = training.best.as_ref()?;
    let error = best.relative_error?;
    let found = || training.validations.iter().filter_map(|v| Some((v.step as f64, v.relative_error?)));
    let values: Vec<f64> = found().map(|v| v.1).chain([1.0]).collect();
    let y = Axis::log_if_wide("relative error", &values);
    let caption = format!(
        "Error of generated updates on held-out shadow subsets; 1 is what the mean teacher reaches. Smallest at \
         step {}: {}. That model was kept.",
        super::headline::grouped(best.step),
        significant(error)
    );
    Some(Figure::of("Validation by generation", caption, |title, description| {
        let mut plot = Plot::new("validation", title, description, x, y).right(82.0);
        plot.level(1.0, "mean");
        plot.line("grad", found());
        found().for_each(|(x, y)| plot.dot("small grad", x, y));
        plot.dot("best", best.step as f64, error);
        plot.end("grad", error, &format!("best {}", significant(error)));
        plot.values("relative error", found());
        plot.finish()
    }))
}

fn by_block(training: &Translator) -> Option<Figure> {
    let best = training.best.as_ref()?;
    let blocks = &best.relative_error_by_block;
    let worst = (0..blocks.len()).filter_map(|i| Some((i, blocks[i]?))).max_by(|a, b| a.1.total_cmp(&b.1))?;
    let caption = format!(
        "Relative error of each block of the LLM's update at step {}. Largest in block {}: {}.",
        super::headline::grouped(best.step),
        worst.0 + 1,
        significant(worst.1)
    );
    let count = blocks.len() as f64;
    let mut x = Axis::exact("block", 0.5, count + 0.5);
    x.whole_ticks();
    let y = Axis::linear("relative error", blocks.iter().flatten().copied().chain([0.0]));
    Some(Figure::of("Error by block", caption, |title, description| {
        let mut plot = Plot::new("by-block", title, description, x, y).right(16.0);
        for (i, error) in blocks.iter().enumerate() {
            if let Some(error) = error {
                let text = format!("block {}: {}", i + 1, significant(*error));
                plot.bar("grad", i as f64 + 0.6, 0.8, *error, &text);
            }
        }
        plot.finish()
    }))
}

/// The tuples: norms over snapshots and over subsets, and cosines.
pub fn tuples(tuples: &Tuples) -> Vec<Figure> {
    let sides = [(Role::Tiny, &tuples.student), (Role::Llm, &tuples.teacher)];
    let mut figures = vec![];
    figures.extend(norms(tuples, &sides));
    figures.extend(histogram(&sides));
    for (role, side) in sides {
        figures.extend(side.cosines.as_ref().map(|cosines| cosine_map(role, cosines, tuples.tasks)));
    }
    figures
}

fn norms(tuples: &Tuples, sides: &[(Role, &Side)]) -> Option<Figure> {
    let values: Vec<f64> = sides
        .iter()
        .flat_map(|(_, side)| side.norms.iter().flatten().flat_map(|s| [s.low, s.high]))
        .collect();
    if values.is_empty() {
        return None;
    }
    let by_step = sides.iter().all(|(_, side)| side.steps.len() == tuples.snapshots);
    let step = |side: &Side, i: usize| if by_step { side.steps[i] as f64 } else { i as f64 + 1.0 };
    let label = if by_step { "optimizer step" } else { "snapshot" };
    let all = sides.iter().flat_map(|(_, side)| (0..tuples.snapshots).map(|i| step(side, i)));
    let mut x = Axis::linear(label, all);
    x.whole_ticks();
    let y = Axis::log_if_wide("norm of the update", &values);
    let caption = format!(
        "Euclidean norm of the updates at the {}: median and middle 80 % over {}.",
        count(tuples.snapshots, "snapshot"),
        count(sides[0].1.norm_subsets, "subset")
    );
    Some(Figure::of("How far the adapters move", caption, |title, description| {
        let mut plot = Plot::new("norms", title, description, x, y);
        for (role, side) in sides {
            let spreads = || side.norms.iter().enumerate().filter_map(|(i, s)| Some((step(side, i), (*s)?)));
            plot.band(class(*role), spreads().map(|(x, s): (f64, Spread)| (x, s.low, s.high)));
            plot.line(class(*role), spreads().map(|(x, s)| (x, s.median)));
            plot.values(display_name(*role), spreads().map(|(x, s)| (x, s.median)));
            if let Some((_, last)) = spreads().next_back() {
                plot.end(class(*role), last.median, display_name(*role));
            }
        }
        plot.finish()
    }))
}

fn histogram(sides: &[(Role, &Side)]) -> Option<Figure> {
    const BINS: usize = 24;
    let all: Vec<f64> = sides.iter().flat_map(|(_, side)| side.last_norms.iter().copied()).collect();
    if all.len() < 4 {
        return None;
    }
    let x = Axis::linear("norm of the last update", all.iter().copied());
    let width = x.span() / BINS as f64;
    let bins: Vec<(Role, Vec<usize>)> = sides
        .iter()
        .map(|(role, side)| {
            let mut bins = vec![0; BINS];
            for norm in &side.last_norms {
                bins[(((norm - x.low()) / width) as usize).min(BINS - 1)] += 1;
            }
            (*role, bins)
        })
        .collect();
    let most = bins.iter().flat_map(|(_, bins)| bins).max().copied().unwrap_or(1);
    let y = Axis::linear("subsets", [0.0, most as f64]);
    let spread = |side: &Side| {
        let spread = Spread::of(side.last_norms.iter().copied());
        spread.map_or(String::new(), |s| format!("{} to {}", significant(s.low), significant(s.high)))
    };
    let caption = format!(
        "Subsets by the norm of their last update. The middle 80 %: TinyLM {}, LLM {}.",
        spread(sides[0].1),
        spread(sides[1].1)
    );
    let low = x.low();
    Some(Figure::of("Norms over subsets", caption, |title, description| {
        let mut plot = Plot::new("norm-histogram", title, description, x, y);
        for (role, bins) in &bins {
            for (i, &n) in bins.iter().enumerate().filter(|(_, n)| **n > 0) {
                let from = low + i as f64 * width;
                let range = format!("{} to {}", significant(from), significant(from + width));
                let text = format!("{}, norm {range}: {}", display_name(*role), count(n, "subset"));
                plot.bar(&format!("see-through {}", class(*role)), from, width, n as f64, &text);
            }
        }
        // The names stand one below the other: places of bars say nothing about rows.
        for (i, (role, _)) in bins.iter().enumerate() {
            plot.end(class(*role), most as f64 * (0.95 - 0.1 * i as f64), display_name(*role));
        }
        plot.finish()
    }))
}

fn cosine_map(role: Role, cosines: &Cosines, tasks: Option<usize>) -> Figure {
    let who = match role {
        Role::Tiny => "students",
        Role::Llm => "teachers",
    };
    let of = |spread: Option<Spread>| spread.map(|s| fixed(s.median, 2));
    let mut caption = format!(
        "Cosines between the last updates of {}, their mean subtracted.",
        count(cosines.subsets, "subset")
    );
    if cosines.map.len() < cosines.subsets {
        let _ = write!(caption, " Cells are means of neighbours.");
    }
    match (of(cosines.within_centred), of(cosines.between_centred), tasks) {
        (Some(within), Some(between), Some(tasks)) => {
            let _ = write!(
                caption,
                " Subsets of the same of {} stand side by side: {within} within a task in the median, {between} \
                 between tasks.",
                count(tasks, "task")
            );
        }
        (_, Some(between), _) => {
            let _ = write!(caption, " Median {between} between different subsets.");
        }
        _ => {}
    }
    let rows = MapRows {
        starts: cosines.map_tasks.clone(),
        names: cosines.map_names.clone(),
        count: cosines.subsets,
        what: "subset".into(),
    };
    Figure::of(&format!("Similar {who}"), caption, |title, description| {
        map(&format!("cosines-{who}"), title, description, &cosines.map, &rows)
    })
}

/// Learning rates of shadow jobs and clients, where they were written down.
pub(crate) fn learning_rates(shadow: &Shadow, clients: &Clients) -> Option<Figure> {
    let of = |jobs: &Option<JobLosses>| jobs.as_ref().map(|jobs| jobs.learning_rate.clone());
    let lines: Vec<(Role, bool, Series)> = [
        (Role::Tiny, true, of(&shadow.tiny)),
        (Role::Llm, true, of(&shadow.llm)),
        (Role::Tiny, false, of(&clients.tiny)),
        (Role::Llm, false, of(&clients.llm)),
    ]
    .into_iter()
    .filter_map(|(role, is_shadow, rates)| Some((role, is_shadow, rates.filter(|r| !r.steps.is_empty())?)))
    .collect();
    let steps = lines.iter().filter_map(|(_, _, rates)| rates.steps.last().copied()).max()?;
    let values: Vec<f64> =
        lines.iter().flat_map(|(_, _, rates)| rates.values.iter().flatten().copied()).collect();
    let y = Axis::log_if_wide("learning rate", &values);
    let caption = "Thick: shadow jobs. Thin: clients, where their schedule is another.".to_string();
    Some(Figure::of("Learning rate", caption, |title, description| {
        let mut plot = Plot::new("learning-rate", title, description, step_axis([steps]), y);
        for (role, is_shadow, rates) in &lines {
            let thin = if *is_shadow { "" } else { "thin " };
            let name = format!("{}, {}", display_name(*role), if *is_shadow { "shadow" } else { "client" });
            plot.line(&format!("{thin}{}", class(*role)), points(rates));
            plot.values(&name, points(rates));
            if let (true, Some((_, last))) = (*is_shadow, points(rates).last()) {
                plot.end(class(*role), last, display_name(*role));
            }
        }
        plot.finish()
    }))
}

/// Throughput while the stages worked.
pub fn throughput(times: &Times) -> Vec<Figure> {
    let of = |stage: &str| times.rates.iter().filter(|rates| rates.stage == stage).collect::<Vec<_>>();
    [("curate", "Throughput of curation"), ("train", "Throughput of the translator's training")]
        .into_iter()
        .filter_map(|(stage, title)| rate_figure(stage, title, &of(stage)))
        .collect()
}

fn rate_figure(stage: &str, title: &str, rates: &[&RateSeries]) -> Option<Figure> {
    let first = rates.first()?;
    let values: Vec<f64> = rates.iter().flat_map(|r| r.per_s.values.iter().flatten().copied()).collect();
    let last = rates.iter().filter_map(|r| r.per_s.steps.last().copied()).max()?;
    let y = Axis::log_if_wide(&format!("{} per second", first.unit), &values);
    let (label, caption) = match first.of.as_str() {
        "group" => (
            "group of jobs",
            "Of every group of jobs that were trained together, in the order in which they ended.",
        ),
        _ => ("optimizer step", "Of the steps, as they were measured."),
    };
    let x = Axis::exact(label, 0.0, last.max(1) as f64);
    Some(Figure::of(title, caption.into(), |title, description| {
        let mut plot = Plot::new(&format!("throughput-{stage}"), title, description, x, y);
        for series in rates {
            let (class, name) = match series.model {
                Some(role) => (class(role), display_name(role)),
                None => ("grad", "training"),
            };
            plot.line(class, points(&series.per_s));
            plot.values(name, points(&series.per_s));
            if let Some((_, value)) = points(&series.per_s).last() {
                plot.end(class, value, name);
            }
        }
        plot.finish()
    }))
}
