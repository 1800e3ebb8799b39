//! Miniature worlds in which the whole method runs in minutes on a laptop.
//!
//! A family of little tasks ([`tasks`]), a tokenizer for them ([`tokenizer`]), and two
//! base models that are pretrained on the family until they are as able as they should
//! be ([`pretrain`]): the LLM knows every operation, the TinyLM about half of them. What
//! differs between tasks is a preference that only fine-tuning can instil, so that an
//! update has something to carry. Three worlds ([`World`]) differ in which tasks the
//! provider's public data and the clients have; two more hold out every task in turn, of which one has tasks
//! that are no sums of preferences; one is for clients that train through an emulator ([`offsite`]); and one is
//! for trying out devices.

pub mod demo;
pub mod offsite;
pub mod parquet;
pub mod pretrain;
pub mod stage;
pub mod tasks;
pub mod tokenizer;

use clap::ValueEnum;
use gradtx_run::role::Role;
use gradtx_run::stage::Facts;
use serde::{Deserialize, Serialize};
use tasks::Task;

/// What is known of the stages that make a world.
pub const STAGES: [Facts; 2] = [Facts::of::<stage::Making<'_>>(), Facts::of::<pretrain::BaseModel<'_>>()];

/// Public examples of one task, where there are many.
const PUBLIC_EXAMPLES: usize = 512;
/// The public data in the world's directory.
pub(crate) const PUBLIC_FILE: &str = "public/train-00000-of-00001.parquet";
/// Test examples of every public task, where the world has them.
pub const TEST_FILE: &str = "test/tasks.jsonl";
/// Test examples with every operation told, where the world has them: what a model is able to do.
pub const SKILL_FILE: &str = "test/skill.jsonl";

/// Which tasks public data and clients have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum World {
    /// Shadow and private data are of one and the same task, so a constant update is as
    /// good as any translation.
    Same,
    /// The public data has many tasks, and every client has one of them.
    #[default]
    Mixed,
    /// The public data has many tasks, and every client has one that is not among them.
    Unseen,
    /// The public data has all tasks, and there are no clients: every task is held out in turn, see
    /// [`gradtx_pipeline::cross_validation`].
    #[serde(rename = "held-out")]
    HeldOut,
    /// As held-out, with tasks in which preferences interact: which of two shifts an example takes
    /// depends on its structure and on the format.
    Interacting,
    /// The public data has every operation told, as base models learn them, and every client has a task: what
    /// GradOT is tried on. The LLM is deeper, and there is no TinyLM.
    Offsite,
    /// The least of everything, and models that have learnt nothing: shows within seconds that
    /// all stages run on a device, and never how well.
    Smoke,
}

impl World {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Same, Self::Mixed, Self::Unseen, Self::HeldOut, Self::Interacting, Self::Offsite, Self::Smoke];

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Mixed => "mixed",
            Self::Unseen => "unseen",
            Self::HeldOut => "held-out",
            Self::Interacting => "interacting",
            Self::Offsite => "offsite",
            Self::Smoke => "smoke",
        }
    }

    /// All tasks of the family.
    pub fn tasks(self) -> Vec<Task> {
        if self == Self::Interacting { Task::interacting() } else { Task::all() }
    }

    /// Whether there are no clients, and every task is held out in turn.
    pub fn holds_tasks_out(self) -> bool {
        matches!(self, Self::HeldOut | Self::Interacting)
    }

    /// Shadow subsets of a quick demo, where every task is held out in turn.
    pub fn quick_subsets(self) -> usize {
        if self == Self::Interacting { 36 } else { 72 }
    }

    /// Tasks of the public data; the family's others occur in pretraining only.
    pub(crate) fn public_tasks(self) -> usize {
        match self {
            Self::Same => 1,
            Self::Mixed | Self::Unseen => 27,
            Self::HeldOut | Self::Interacting => 36,
            Self::Offsite => 0,
            Self::Smoke => 2,
        }
    }

    /// Public examples of one task.
    pub(crate) fn public_examples(self) -> usize {
        match self {
            Self::Same => 8 * PUBLIC_EXAMPLES,
            Self::Mixed | Self::Unseen | Self::HeldOut | Self::Interacting => PUBLIC_EXAMPLES,
            Self::Offsite => 0,
            Self::Smoke => 8,
        }
    }

    /// Public examples of the whole family.
    pub(crate) fn family_examples(self) -> usize {
        if self == Self::Offsite { 8192 } else { 0 }
    }

    /// Test examples of the whole family, with every operation told.
    pub(crate) fn skill_tests(self) -> usize {
        if self == Self::Offsite { 400 } else { 0 }
    }

    /// Which base models there are.
    pub(crate) fn roles(self) -> &'static [Role] {
        if self == Self::Offsite { &[Role::Llm] } else { &[Role::Tiny, Role::Llm] }
    }

    /// Private training examples of one client.
    pub(crate) fn private_examples(self) -> usize {
        if self == Self::Smoke { 6 } else { 256 }
    }

    /// Private test examples of one client.
    pub fn test_examples(self) -> usize {
        if self == Self::Smoke { 3 } else { 250 }
    }

    /// Test examples of every public task.
    pub(crate) fn public_tests(self) -> usize {
        if self.holds_tasks_out() { 100 } else { 0 }
    }

    /// Clients. Scores on unseen tasks vary much from task to task, so there are more of them.
    pub fn clients(self) -> usize {
        match self {
            Self::Same | Self::Mixed | Self::Offsite => 4,
            Self::Unseen => 9,
            Self::HeldOut | Self::Interacting => 0,
            Self::Smoke => 1,
        }
    }

    /// The task of a client (from 0), as its place in the order of this world's tasks.
    pub fn task_of(self, client: usize) -> usize {
        match self {
            Self::Same => 0,
            Self::Mixed | Self::HeldOut | Self::Interacting | Self::Offsite | Self::Smoke => client,
            Self::Unseen => self.public_tasks() + client,
        }
    }

    /// The text of the run file.
    pub fn run_file(self, seed: u64) -> String {
        // (subsets, steps of the translator, its dropout, augmentation, noise)
        let (subsets, steps, dropout, augment, noise) = match self {
            Self::Same => ("27", "400", "0.1", "0.0", "0.0"),
            Self::Mixed => ("54", "400", "0.1", "0.0", "0.0"),
            Self::Unseen => ("135", "1200", "0.0", "0.5", "0.1"),
            Self::HeldOut => ("180", "1200", "0.0", "0.5", "0.1"),
            Self::Interacting => ("108", "1200", "0.0", "0.5", "0.1"),
            Self::Offsite => return include_str!("offsite.toml").replace("@seed@", &seed.to_string()),
            Self::Smoke => return include_str!("smoke.toml").replace("@seed@", &seed.to_string()),
        };
        // A shift that depends on the structure takes longer to learn.
        let finetuning = if self == Self::Interacting { "200" } else { "60" };
        let values = [
            ("@world@", self.name()),
            ("@finetuning_steps@", finetuning),
            ("@seed@", &seed.to_string()),
            ("@subsets@", subsets),
            ("@steps@", steps),
            ("@dropout@", dropout),
            ("@augment@", augment),
            ("@student_noise@", noise),
        ];
        values
            .iter()
            .fold(include_str!("settings.toml").to_string(), |text, (key, value)| text.replace(key, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_run::config::Config;
    use gradtx_run::paths::RUN_FILE_OF_WORLD;

    #[test]
    fn run_files_are_configurations() {
        for world in World::ALL {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(RUN_FILE_OF_WORLD);
            std::fs::write(&path, world.run_file(7)).unwrap();
            let config = Config::read(&path).unwrap();
            config.check().unwrap();
            assert_eq!(config.seed, 7);
            for &role in world.roles() {
                let model = [&config.models.tiny, &config.models.llm][role as usize];
                assert_eq!(*model, dir.path().join(role.name()));
            }
        }
    }

    #[test]
    fn clients_tasks_are_new_where_they_should_be() {
        let count = tasks::Task::all().len();
        for world in World::ALL {
            for client in 0..world.clients() {
                assert!(world.task_of(client) < count);
                let is_new = matches!(world, World::Unseen | World::Offsite);
                assert_eq!(world.task_of(client) >= world.public_tasks(), is_new);
            }
        }
    }
}
