//! `demo`: the whole job on a miniature world, by the same functions and files as the
//! single stages, ending with a table of scores.
//!
//! In: a directory, a world and a seed. Out: `DIR/world`, `DIR/run`, and the table, also as
//! `DIR/run/table.json`. With P_S the fine-tuned TinyLM's score, P_T that of the LLM
//! fine-tuned on the private data itself, and P a translated LLM's,
//! `PGR = 100 · (P − P_S) / (P_T − P_S)`.

use crate::args::{Combine, Method, Preset, Role, RunArgs};
use crate::score::mean_with_interval;
use crate::stages::{ADAPTER_DIR, Context, UPDATE_FILE, curate, evaluate, finetune, train, translate, world};
use crate::world::{RUN_FILE_OF_WORLD, World};
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use gradtx_runtime::artifact::write_json;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    /// Exact match in percent, one per client.
    scores: Vec<f64>,
    mean: f64,
    /// Half the width of the 95 % confidence interval over clients.
    interval: Option<f64>,
    pgr: Option<f64>,
}

/// Models of the table, from what a client has to what only the provider could have.
#[derive(Clone, Copy, PartialEq)]
enum Entry {
    Base(Role),
    Finetuned(Role),
    Translated(Method),
    RandomStudent,
}

const ENTRIES: [(&str, Entry); 9] = [
    ("TinyLM, as it is", Entry::Base(Role::Tiny)),
    ("LLM, as it is", Entry::Base(Role::Llm)),
    ("TinyLM fine-tuned (P_S)", Entry::Finetuned(Role::Tiny)),
    ("LLM + Grad-Transformer", Entry::Translated(Method::GradTransformer)),
    ("LLM + mean of teachers", Entry::Translated(Method::Mean)),
    ("LLM + nearest shadow", Entry::Translated(Method::Nearest)),
    ("LLM + ridge regression", Entry::Translated(Method::Ridge)),
    ("LLM + random student", Entry::RandomStudent),
    ("LLM fine-tuned (P_T)", Entry::Finetuned(Role::Llm)),
];

/// Runs everything that is missing, and prints the table.
pub fn run(context: &Context, dir: &Path, world: World, seed: u64, preset: Option<Preset>) -> Result<()> {
    let started = Instant::now();
    let (world_dir, run_dir) = (dir.join("world"), dir.join("run"));
    let mut times: Vec<(&str, f64)> = vec![];
    let mut timed = |name, from: Instant| times.push((name, from.elapsed().as_secs_f64()));

    let at = Instant::now();
    world::run(context, &world_dir, world, seed)?;
    timed("world", at);
    let args = RunArgs {
        run: run_dir.clone(),
        config: Some(world_dir.join(RUN_FILE_OF_WORLD)),
        preset,
        set: vec![],
    };
    let at = Instant::now();
    curate::run(context, &args)?;
    timed("curate", at);
    let at = Instant::now();
    train::run(context, &args)?;
    timed("train", at);
    let clients = (1..=world.clients()).map(|client| Client::new(context, &args, &world_dir, client));
    let clients: Vec<Client<'_>> = clients.collect();
    let at = Instant::now();
    for client in &clients {
        client.finetune()?;
    }
    timed("finetune", at);
    let at = Instant::now();
    for client in &clients {
        client.translate()?;
    }
    timed("translate", at);
    let at = Instant::now();
    let (rows, examples) = score(&clients)?;
    timed("evaluate", at);

    write_json(&run_dir.join("table.json"), &rows)?;
    print(context, &rows, examples);
    let times: Vec<String> = times.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s")).collect();
    let total = started.elapsed().as_secs_f64();
    context.ui.result(format!("Time: {}; {total:.1} s in all.", times.join(", ")));
    Ok(())
}

struct Client<'a> {
    context: &'a Context,
    args: &'a RunArgs,
    data: PathBuf,
    out: PathBuf,
}

impl<'a> Client<'a> {
    fn new(context: &'a Context, args: &'a RunArgs, world_dir: &Path, client: usize) -> Self {
        let name = format!("client-{client}");
        let data = world_dir.join("private").join(&name);
        Self { context, args, data, out: args.run.join("clients").join(name) }
    }

    fn finetuned(&self, role: Role) -> PathBuf {
        self.out.join("finetuned").join(role.name())
    }

    fn translated(&self, entry: Entry) -> PathBuf {
        let name = match entry {
            Entry::Translated(method) => method.name(),
            _ => "random-student",
        };
        self.out.join("translated").join(name)
    }

    fn finetune(&self) -> Result<()> {
        for role in [Role::Tiny, Role::Llm] {
            let job = finetune::Job {
                data: self.data.join("train.jsonl"),
                out: self.finetuned(role),
                role,
                peft: true,
            };
            finetune::run(self.context, self.args, &job)?;
        }
        Ok(())
    }

    fn translate(&self) -> Result<()> {
        for (_, entry) in ENTRIES {
            let method = match entry {
                Entry::Translated(method) => method,
                Entry::RandomStudent => Method::GradTransformer,
                Entry::Base(_) | Entry::Finetuned(_) => continue,
            };
            let job = translate::Job {
                updates: vec![self.finetuned(Role::Tiny).join(UPDATE_FILE)],
                out: self.translated(entry),
                method,
                combine: Combine::Mean,
                random_student: entry == Entry::RandomStudent,
            };
            translate::run(self.context, self.args, &job)?;
        }
        Ok(())
    }

    fn evaluate(&self, entry: Entry) -> Result<evaluate::Score> {
        let (role, adapter, name) = match entry {
            Entry::Base(role) => (role, None, format!("base-{}", role.name())),
            Entry::Finetuned(role) => {
                (role, Some(self.finetuned(role)), format!("finetuned-{}", role.name()))
            }
            Entry::Translated(method) => (Role::Llm, Some(self.translated(entry)), method.name().to_string()),
            Entry::RandomStudent => (Role::Llm, Some(self.translated(entry)), "random-student".into()),
        };
        let job = evaluate::Job {
            data: self.data.join("test.jsonl"),
            out: self.out.join("evaluated").join(name),
            role,
            base: None,
            adapter: adapter.map(|dir| dir.join(ADAPTER_DIR)),
        };
        evaluate::run(self.context, self.args, &job)
    }
}

/// Scores of every model on every client's test data; also the number of examples.
fn score(clients: &[Client<'_>]) -> Result<(Vec<Row>, usize)> {
    let mut rows = vec![];
    let mut examples = 0;
    for (name, entry) in ENTRIES {
        let scores = clients.iter().map(|client| client.evaluate(entry)).collect::<Result<Vec<_>>>()?;
        examples = scores.iter().map(|s| s.examples).sum();
        let scores: Vec<f64> = scores.iter().map(|s| 100.0 * s.exact_match).collect();
        let (mean, interval) = mean_with_interval(&scores);
        rows.push(Row { name, scores, mean, interval, pgr: None });
    }
    let mean_of = |wanted| ENTRIES.iter().position(|(_, e)| *e == wanted).map(|at| rows[at].mean);
    if let (Some(student), Some(teacher)) =
        (mean_of(Entry::Finetuned(Role::Tiny)), mean_of(Entry::Finetuned(Role::Llm)))
    {
        for (row, (_, entry)) in rows.iter_mut().zip(ENTRIES) {
            let translated = matches!(entry, Entry::Translated(_) | Entry::RandomStudent);
            let gap = teacher - student;
            row.pgr = (translated && gap > 0.0).then(|| 100.0 * (row.mean - student) / gap);
        }
    }
    Ok((rows, examples))
}

fn print(context: &Context, rows: &[Row], examples: usize) {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["model", "exact match %", "± 95 %", "PGR", "by client"]);
    for row in rows {
        let clients: Vec<String> = row.scores.iter().map(|s| format!("{s:.1}")).collect();
        table.add_row([
            row.name.to_string(),
            format!("{:.1}", row.mean),
            row.interval.map_or(String::new(), |i| format!("{i:.1}")),
            row.pgr.map_or(String::new(), |p| format!("{p:.1}")),
            clients.join("  "),
        ]);
    }
    for column in 1..=3 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    context.ui.result(table.to_string());
    let clients = rows.first().map_or(0, |row| row.scores.len());
    context.ui.result(format!(
        "{examples} test examples of {clients} clients; ± is the 95 % confidence interval over clients; \
         PGR = 100 · (score − P_S) / (P_T − P_S)."
    ));
}
