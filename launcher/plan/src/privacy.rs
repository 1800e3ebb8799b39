//! `plan --dp-epsilon`: what a private fine-tuning would cost, and how noisy it would be, before anything is spent.
//!
//! In: the settings of a run, the number of a client's examples, and the shape of the TinyLM. Out: noise, steps, ε, and signal to
//! noise. No data is read.

use crate::cost::memory::Model;
use crate::plan::{Job, directory};
use anyhow::Result;
use gradtx_run::config::Config;
use gradtx_run::context::Context;
use gradtx_run::failure::unusable_with;
use gradtx_run::role::Role;
use gradtx_train::privacy::Budget;
use serde_json::json;

/// Plans, and prints.
pub(crate) fn run(context: &Context, job: &Job) -> Result<()> {
    let Some(examples) = job.examples else {
        let hint = "give --examples N: the cost depends on how rarely an example is drawn";
        return Err(unusable_with(
            "--dp-epsilon and --dp-noise-multiplier: the number of examples is not known",
            Some(hint.into()),
        ));
    };
    let mut set = job.privacy.settings();
    set.extend(job.set.iter().cloned());
    let config = Config::look(job.run.as_deref(), job.config.as_deref(), job.preset, &set)?;
    let examples = examples as usize;
    let recipe = config.finetune.tiny.resolved(examples);
    let budget = Budget::new(&config.privacy, &recipe, examples)?;
    let values =
        Model::read(directory(&config, Role::Tiny)?, Role::Tiny, &config.lora)?.layout.trained().len();
    let [one, all] = budget.signal_to_noise(values);
    if context.ui.is_json() {
        let fields = json!({
            "mechanism": budget.mechanism(),
            "steps": recipe.max_steps,
            "epsilon": budget.bound(recipe.max_steps as u64),
            "delta": config.privacy.target_delta,
            "values": values,
            "signal_to_noise": one,
            "signal_to_noise_of_all_steps": all,
            "warnings": budget.warnings(),
        });
        context.ui.result_object("plan", fields);
        return Ok(());
    }
    let mut lines = vec![
        budget.shown(),
        format!(
            "signal to noise at most {one:.4} in a step, {all:.4} over all steps, in an adapter of {values} values: norm \
             of a clipped mean gradient by norm of the noise; more examples of a step (global_batch_size), more examples \
             and fewer values (lora.r) raise it"
        ),
    ];
    lines.extend(budget.warnings().iter().map(|warning| format!("warning: {warning}")));
    context.ui.result(lines.join("\n"));
    Ok(())
}
