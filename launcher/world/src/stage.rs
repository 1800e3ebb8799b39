//! `world`: a miniature world in files that any other data and models could have.
//!
//! In: a seed. Out, in the world's directory:
//!
//! ```text
//! tiny/, llm/                          base models in Hugging Face form, with tokenizer (offsite: llm alone)
//! public/*.parquet                     question, answer, task: the provider's data
//! private/client-N/{train,test}.jsonl  {"question", "answer"}: a client's data, one task
//! test/tasks.jsonl                     with a task column: of every public task, where tasks are held out
//! test/skill.jsonl                     with every operation told, where clients train through an emulator
//! world.json                           who got which task
//! settings.toml                        the run file
//! ```

use crate::parquet::write_texts;
use crate::pretrain::HIDE;
use crate::tasks::{Part, Sample, Sampler, Task};
use crate::{PUBLIC_FILE, SKILL_FILE, TEST_FILE, World, pretrain};
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_run::config::{DeviceConfig, DeviceKind, DtypeKind};
use gradtx_run::context::Context;
use gradtx_run::device::take;
use gradtx_run::paths::RUN_FILE_OF_WORLD;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::{write_atomic, write_json};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

/// Makes what is missing of a world.
pub fn run(context: &Context, dir: &Path, world: World, seed: u64, device: DeviceKind) -> Result<()> {
    // A device that is not there must not leave a directory that is bound to it.
    let asked = DeviceConfig { kind: device, dtype: DtypeKind::F32, ..DeviceConfig::default() };
    let device = take(&asked, &context.place)?.settings.kind;
    stage::run(context, &Making { dir, world, seed, device }).map(drop)
}

/// What a world depends on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorldInputs {
    /// Which tasks there are.
    pub world: World,
    /// Seed of everything in it.
    pub seed: u64,
    /// Where its models were made: the CPU goes without saying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceKind>,
}

impl Inputs for WorldInputs {
    const STAGE: &'static str = "world";
}

/// A world that is to be made.
pub struct Making<'a> {
    dir: &'a Path,
    world: World,
    seed: u64,
    device: DeviceKind,
}

impl Stage for Making<'_> {
    type Inputs = WorldInputs;
    type Output = ();
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        self.dir
    }

    fn inputs(&self) -> Result<WorldInputs> {
        let device = Some(self.device).filter(|device| *device != DeviceKind::Cpu);
        Ok(WorldInputs { world: self.world, seed: self.seed, device })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let &Self { dir, world, seed, device } = self;
        let key = derive_named(seed, "world");
        let mut files = write_tasks(dir, world, key)?;
        let text = world.run_file(seed);
        write_atomic(&dir.join(RUN_FILE_OF_WORLD), |out| out.write_all(text.as_bytes()))?;
        files.push(RUN_FILE_OF_WORLD.into());
        for &role in world.roles() {
            pretrain::make(context, device, &dir.join(role.name()), world, role, seed)?;
            files.push(format!("{}/model.safetensors", role.name()));
        }
        Ok((files, ()))
    }

    fn report(&self, context: &Context, (): &()) -> Result<()> {
        let text = format!("world: {}", self.dir.display());
        context.ui.done("world", self.dir, json!({ "seed": self.seed }), text);
        Ok(())
    }
}

/// Writes all task files; returns their names.
fn write_tasks(dir: &Path, world: World, key: u64) -> Result<Vec<String>> {
    let mut tasks = world.tasks();
    let order = Stream::new(derive_named(key, "tasks")).permutation(tasks.len());
    tasks = order.into_iter().map(|i| tasks[i]).collect();
    let public = &tasks[..world.public_tasks()];
    let mut seen = HashSet::new();
    let mut rows: Vec<(Sample, String)> = vec![];
    let mut family = Sampler::new(derive_named(key, "public family"));
    rows.extend(
        family
            .new_of_family(Part::Train, HIDE, world.family_examples(), &mut seen)
            .into_iter()
            .map(|sample| (sample, "family".into())),
    );
    for (i, &task) in public.iter().enumerate() {
        let mut sampler = Sampler::new(derive(derive_named(key, "public"), i as u64));
        let samples = sampler.new_of_task(task, Part::Train, world.public_examples(), &mut seen);
        rows.extend(samples.into_iter().map(|sample| (sample, task.name())));
    }
    // Neighbours in the file are of different tasks, as in any mixed data set.
    let order = Stream::new(derive_named(key, "public order")).permutation(rows.len());
    let column = |text: fn(&(Sample, String)) -> String| order.iter().map(|&i| text(&rows[i])).collect();
    let columns = [
        ("question", column(|(sample, _)| sample.question())),
        ("answer", column(|(sample, _)| sample.answer())),
        ("task", column(|(_, task)| task.clone())),
    ];
    make_dir(&dir.join("public"))?;
    write_texts(&dir.join(PUBLIC_FILE), &columns)?;
    let mut files = vec![PUBLIC_FILE.to_string(), "world.json".to_string()];

    let mut tests = |file: &str, samples: &[(Sample, String)]| -> Result<()> {
        make_dir(&dir.join("test"))?;
        write_atomic(&dir.join(file), |out| {
            samples.iter().try_for_each(|(sample, task)| {
                let (question, answer) = (sample.question(), sample.answer());
                writeln!(out, "{}", json!({ "question": question, "answer": answer, "task": task }))
            })
        })?;
        files.push(file.into());
        Ok(())
    };
    if world.public_tests() > 0 {
        let mut samples = vec![];
        for (i, &task) in public.iter().enumerate() {
            let mut sampler = Sampler::new(derive(derive_named(key, "test"), i as u64));
            let of_task = sampler.new_of_task(task, Part::HeldOut, world.public_tests(), &mut seen);
            samples.extend(of_task.into_iter().map(|sample| (sample, task.name())));
        }
        tests(TEST_FILE, &samples)?;
    }
    if world.skill_tests() > 0 {
        let mut sampler = Sampler::new(derive_named(key, "skill"));
        let told = sampler.new_of_family(Part::HeldOut, 0.0, world.skill_tests(), &mut seen);
        let samples: Vec<_> = told.into_iter().map(|sample| (sample, "skill".to_owned())).collect();
        tests(SKILL_FILE, &samples)?;
    }
    let mut clients = vec![];
    for client in 1..=world.clients() {
        let task = tasks[world.task_of(client - 1)];
        let place = format!("private/client-{client}");
        make_dir(&dir.join(&place))?;
        let mut sampler = Sampler::new(derive(derive_named(key, "private"), client as u64));
        for (name, part, count) in
            [("train", Part::Train, world.private_examples()), ("test", Part::HeldOut, world.test_examples())]
        {
            let samples = sampler.new_of_task(task, part, count, &mut seen);
            let file = format!("{place}/{name}.jsonl");
            write_atomic(&dir.join(&file), |out| {
                samples.iter().try_for_each(|sample| {
                    let row = json!({ "question": sample.question(), "answer": sample.answer() });
                    writeln!(out, "{row}")
                })
            })?;
            files.push(file);
        }
        clients.push(json!({ "client": client, "task": task.name() }));
    }
    let names = |tasks: &[Task]| tasks.iter().map(|t| t.name()).collect::<Vec<_>>();
    let description = json!({
        "world": world,
        "public_tasks": names(public),
        "other_tasks": names(&tasks[world.public_tasks()..]),
        "clients": clients,
    });
    write_json(&dir.join("world.json"), &description)?;
    Ok(files)
}

fn make_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot make", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_runtime::data::{Row, read_rows};

    fn made(world: World, key: u64) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write_tasks(dir.path(), world, key).unwrap();
        dir
    }

    #[test]
    fn task_files_are_a_function_of_the_seed() {
        let dirs = [7, 7, 8].map(|key| made(World::Mixed, key));
        for name in [PUBLIC_FILE, "private/client-2/train.jsonl", "world.json"] {
            let [one, same, other] = [0, 1, 2].map(|i| std::fs::read(dirs[i].path().join(name)).unwrap());
            assert!(one == same && one != other, "{name}");
        }
    }

    #[test]
    fn no_two_files_share_an_example() {
        for world in World::ALL {
            let dir = made(world, 7);
            let examples = |name: &str| -> HashSet<(String, String)> {
                let rows = read_rows(&dir.path().join(name)).unwrap();
                let text = |row: &Row, column: &str| row.columns[column].as_str().unwrap().to_string();
                rows.iter().map(|row| (text(row, "question"), text(row, "answer"))).collect()
            };
            let public = examples(PUBLIC_FILE);
            let of_tasks = world.public_tasks() * world.public_examples();
            assert_eq!(public.len(), of_tasks + world.family_examples());
            for client in 1..=world.clients() {
                let train = examples(&format!("private/client-{client}/train.jsonl"));
                let test = examples(&format!("private/client-{client}/test.jsonl"));
                assert_eq!((train.len(), test.len()), (world.private_examples(), world.test_examples()));
                assert!(train.is_disjoint(&test) && train.is_disjoint(&public) && test.is_disjoint(&public));
            }
        }
    }
}
