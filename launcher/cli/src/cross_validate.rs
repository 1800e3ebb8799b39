//! `cross-validate`, as typed.

use anyhow::Result;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use gradtx_pipeline::cross_validation;
use gradtx_pipeline::variant::Variant;
use gradtx_report::cross_validation as report;
use gradtx_run::config::RunArgs;
use gradtx_run::context::Context;
use gradtx_train::baselines::Method;
use std::path::PathBuf;

/// What to compare, and on what.
#[derive(Debug, Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    run: RunArgs,
    /// Parts of the groups of shadows, of which one at a time is left out.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = RangedU64ValueParser::<usize>::new().range(2..=1000))]
    folds: usize,
    /// Only the first N folds: their groups alone play clients.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    first: Option<usize>,
    /// Translators to compare. A Grad-Transformer is trained once for every fold; its targets are those
    /// of train.targets, or those that its name has.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["mean", "nearest", "ridge", "products"])]
    methods: Vec<Method>,
    /// Translators whose translations are refined as well; "none" for none.
    #[arg(long, value_delimiter = ',', default_values = ["products"], value_parser = refined)]
    refine: Vec<Option<Method>>,
    /// Test examples with the column curate.group_by; without, a group's public examples on which its
    /// client was not trained.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Test examples of a group at most.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    examples: usize,
    /// How clients differ from the shadows: a row of the table for each.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Variant::AsCurated])]
    clients: Vec<Variant>,
    /// Texts of the public prompts that clients fewer-prompts do not see in a refinement.
    #[arg(long, value_name = "TEXT", value_delimiter = ',', required_if_eq("clients", "fewer-prompts"))]
    without_prompts: Vec<String>,
    /// Texts for clients unseen-value: the groups whose name contains one are held out together.
    #[arg(long, value_name = "TEXT", value_delimiter = ',', required_if_eq("clients", "unseen-value"))]
    leave_out: Vec<String>,
}

/// A translator, or none.
fn refined(text: &str) -> std::result::Result<Option<Method>, String> {
    match (text, Method::named(text)) {
        ("none", _) => Ok(None),
        (_, Some(method)) => Ok(Some(method)),
        (_, None) => {
            let names: Vec<&str> = Method::ALL.into_iter().map(Method::name).collect();
            Err(format!("expected none, {}", names.join(", ")))
        }
    }
}

/// Runs what is missing, and prints the table.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let Job { run, folds, first, methods, refine, data, examples, clients, without_prompts, leave_out } = job;
    let mut variants = vec![];
    for &variant in clients {
        if !variants.contains(&variant) {
            variants.push(variant);
        }
    }
    let job = cross_validation::Job {
        folds: *folds,
        first: *first,
        methods: methods.clone(),
        refined: refine.iter().flatten().copied().collect(),
        data: data.clone(),
        examples: *examples,
        variants,
        without_prompts: without_prompts.clone(),
        leave_out: leave_out.clone(),
    };
    report::run(context, run, &job).map(drop)
}
