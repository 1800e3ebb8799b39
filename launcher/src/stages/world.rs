//! `world`: a miniature world in files that any other data and models could have.
//!
//! In: a seed. Out, in the world's directory:
//!
//! ```text
//! tiny/, llm/                          base models in Hugging Face form, with tokenizer
//! public.jsonl                         {"task", "prompt", "response"}: the provider's data
//! private/client-N/{train,test}.jsonl  {"prompt", "response"}: a client's data, one task
//! world.json                           who got which task
//! mixed.toml                           the run file
//! ```

use crate::args::Role;
use crate::config::DeviceConfig;
use crate::record::{self, State};
use crate::stages::Context;
use crate::world::tasks::{Part, Sample, Sampler, Task};
use crate::world::{
    CLIENTS, PRIVATE_EXAMPLES, PUBLIC_EXAMPLES, PUBLIC_TASKS, RUN_FILE_OF_WORLD, RUN_SETTINGS, TEST_EXAMPLES,
    pretrain,
};
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_runtime::artifact::{write_atomic, write_json};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

/// Makes what is missing of a world.
pub fn run(context: &Context, dir: &Path, seed: u64) -> Result<()> {
    let State::Open(output) = record::open(dir, "world", json!({ "world": "mixed", "seed": seed }))? else {
        context.ui.done("world", dir, json!({}), format!("world: {} is finished", dir.display()));
        return Ok(());
    };
    let key = derive_named(seed, "world");
    let mut files = write_tasks(dir, key)?;
    let text = format!("seed = {seed}\n\n{RUN_SETTINGS}");
    write_atomic(&dir.join(RUN_FILE_OF_WORLD), |out| out.write_all(text.as_bytes()))?;
    files.push(RUN_FILE_OF_WORLD.into());
    for role in [Role::Tiny, Role::Llm] {
        pretrain::make(context, &DeviceConfig::default(), &dir.join(role.name()), role, seed)?;
        files.push(format!("{}/model.safetensors", role.name()));
    }
    output.finish(&files)?;
    context.ui.done("world", dir, json!({ "seed": seed }), format!("world: {}", dir.display()));
    Ok(())
}

/// Writes all task files; returns their names.
fn write_tasks(dir: &Path, key: u64) -> Result<Vec<String>> {
    let mut tasks = Task::all();
    let order = Stream::new(derive_named(key, "tasks")).permutation(tasks.len());
    tasks = order.into_iter().map(|i| tasks[i]).collect();
    let public = &tasks[..PUBLIC_TASKS];
    let mut seen = HashSet::new();
    let mut rows = vec![];
    for (i, &task) in public.iter().enumerate() {
        let mut sampler = Sampler::new(derive(derive_named(key, "public"), i as u64));
        for sample in sampler.new_of_task(task, Part::Train, PUBLIC_EXAMPLES, &mut seen) {
            rows.push(row(&sample, Some(task)));
        }
    }
    // Neighbours in the file are of different tasks, as in any mixed data set.
    let order = Stream::new(derive_named(key, "public order")).permutation(rows.len());
    let rows: Vec<Value> = order.into_iter().map(|i| rows[i].clone()).collect();
    let mut files = vec!["public.jsonl".to_string(), "world.json".to_string()];
    write_rows(&dir.join("public.jsonl"), &rows)?;

    let mut clients = vec![];
    for client in 1..=CLIENTS {
        let task = public[client - 1];
        let place = format!("private/client-{client}");
        std::fs::create_dir_all(dir.join(&place)).with_context(|| format!("{place}: cannot make"))?;
        let mut sampler = Sampler::new(derive(derive_named(key, "private"), client as u64));
        for (name, part, count) in
            [("train", Part::Train, PRIVATE_EXAMPLES), ("test", Part::HeldOut, TEST_EXAMPLES)]
        {
            let samples = sampler.new_of_task(task, part, count, &mut seen);
            let rows: Vec<Value> = samples.iter().map(|sample| row(sample, None)).collect();
            let file = format!("{place}/{name}.jsonl");
            write_rows(&dir.join(&file), &rows)?;
            files.push(file);
        }
        clients.push(json!({ "client": client, "task": task.name() }));
    }
    let names = |tasks: &[Task]| tasks.iter().map(|t| t.name()).collect::<Vec<_>>();
    let world = json!({
        "world": "mixed",
        "public_tasks": names(public),
        "other_tasks": names(&tasks[PUBLIC_TASKS..]),
        "clients": clients,
    });
    write_json(&dir.join("world.json"), &world)?;
    Ok(files)
}

fn row(sample: &Sample, task: Option<Task>) -> Value {
    let (prompt, response) = (sample.prompt_text(), sample.response_text());
    match task {
        Some(task) => json!({ "task": task.name(), "prompt": prompt, "response": response }),
        None => json!({ "prompt": prompt, "response": response }),
    }
}

fn write_rows(path: &Path, rows: &[Value]) -> Result<()> {
    write_atomic(path, |out| rows.iter().try_for_each(|row| writeln!(out, "{row}")))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_files_are_a_function_of_the_seed_and_share_no_example() {
        let dirs = [7, 7, 8].map(|key| {
            let dir = tempfile::tempdir().unwrap();
            write_tasks(dir.path(), key).unwrap();
            dir
        });
        let text = |i: usize, name: &str| std::fs::read_to_string(dirs[i].path().join(name)).unwrap();
        for name in ["public.jsonl", "private/client-2/train.jsonl", "world.json"] {
            assert_eq!(text(0, name), text(1, name));
            assert_ne!(text(0, name), text(2, name));
        }
        let example = |line: &str| -> (String, String) {
            let row: Value = serde_json::from_str(line).unwrap();
            (row["prompt"].as_str().unwrap().into(), row["response"].as_str().unwrap().into())
        };
        let public: HashSet<_> = text(0, "public.jsonl").lines().map(example).collect();
        assert_eq!(public.len(), PUBLIC_TASKS * PUBLIC_EXAMPLES);
        for client in 1..=CLIENTS {
            let train: HashSet<_> =
                text(0, &format!("private/client-{client}/train.jsonl")).lines().map(example).collect();
            let test: HashSet<_> =
                text(0, &format!("private/client-{client}/test.jsonl")).lines().map(example).collect();
            assert_eq!((train.len(), test.len()), (PRIVATE_EXAMPLES, TEST_EXAMPLES));
            assert!(train.is_disjoint(&test) && train.is_disjoint(&public) && test.is_disjoint(&public));
        }
    }
}
