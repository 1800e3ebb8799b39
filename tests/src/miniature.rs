//! A miniature of everything that a run needs: two untrained models, public and private data,
//! and a run file whose stages take seconds together.

use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Decoder, DecoderConfig, Family, InitialWeights, RopeScaling};
use gradtx_run::command_log::COMMANDS_FILE;
use gradtx_runtime::artifact::checksum_file;
use gradtx_world::tasks::{Part, Sampler, Task, id, vocabulary};
use gradtx_world::tokenizer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The run file.
pub const SETTINGS: &str = r#"
seed = 3
[models]
tiny = "tiny"
llm = "llm"
[data]
public = "public.jsonl"
instruction = "none"
prompt = "template"
max_length = 64
[curate]
num_subsets = 5
examples_per_subset = 6
group_by = "task"
num_snapshots = 2
snapshot_steps = 2
jobs_per_batch = 2
[curate.tiny]
max_steps = 4
global_batch_size = 3
learning_rate = 0.02
[curate.llm]
max_steps = 3
global_batch_size = 3
learning_rate = 0.02
[translator]
d_model = 16
d_ff = 24
d_kv = 8
num_heads = 2
num_layers = 1
num_decoder_layers = 1
[train]
max_steps = 6
global_batch_size = 4
per_device_train_batch_size = 2
learning_rate = 0.01
val_set_size = 0.2
eval_steps = 3
[finetune.tiny]
max_steps = 3
global_batch_size = 4
learning_rate = 0.02
[finetune.llm]
max_steps = 3
global_batch_size = 4
learning_rate = 0.02
[evaluate]
answer_extraction = "whole"
max_new_tokens = 4
per_device_eval_batch_size = 3
"#;

/// Writes `tiny/`, `llm/`, `public.jsonl`, `private.jsonl` and `settings.toml` to a directory.
///
/// # Panics
/// When a file cannot be written: a test cannot continue.
pub fn write(home: &Path) {
    write_models(home, [Family::Qwen2; 2]);
    let tasks = &Task::all()[..2];
    let mut sampler = Sampler::new(1);
    let mut row = |task: Task| {
        let sample = sampler.of_task(task, Part::Train);
        json!({ "task": task.name(), "question": sample.question(), "answer": sample.answer() })
    };
    let public: Vec<Value> = (0..20).map(|i| row(tasks[i % 2])).collect();
    let private: Vec<Value> = (0..7).map(|_| row(tasks[1])).collect();
    for (name, rows) in [("public.jsonl", public), ("private.jsonl", private)] {
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(home.join(name), text).unwrap();
    }
    std::fs::write(home.join("settings.toml"), SETTINGS).unwrap();
}

/// Writes `tiny/` and `llm/` of these families.
///
/// # Panics
/// When a file cannot be written: a test cannot continue.
pub fn write_models(home: &Path, families: [Family; 2]) {
    for ((name, hidden, layers), family) in [("tiny", 8, 2), ("llm", 16, 3)].into_iter().zip(families) {
        let dir = home.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let config = DecoderConfig {
            family,
            vocab: vocabulary().len(),
            hidden,
            intermediate: 24,
            layers,
            heads: 2,
            kv_heads: 1,
            head_dim: hidden / 2,
            norm_eps: 1e-6,
            rope_theta: 100.0,
            rope_scaling: RopeScaling::None,
            max_positions: 64,
            window: None,
            tied: false,
            bos: None,
            eos: vec![id(";")],
            pad: None,
            emulator: None,
        };
        // What OPT's file cannot say otherwise.
        let config = match family {
            Family::Opt => DecoderConfig { kv_heads: 2, norm_eps: 1e-5, rope_theta: 1e4, ..config },
            _ => config,
        };
        let initial = InitialWeights { embedding: 1.0, head: 0.3, matrices: None };
        Decoder::<Cpu, f32>::random(&Cpu::new(1), &config, &initial, 7).unwrap().save(&dir, false).unwrap();
        tokenizer::write(&dir).unwrap();
    }
}

/// Checksums of all files below a directory, except for those of times.
///
/// # Panics
/// When a file cannot be read: a test cannot continue.
pub fn checksums(dir: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(dir: &Path, out: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            // Events for TensorBoard and the list of commands have times.
            let of_times = name.starts_with("throughput")
                || name.contains(gradtx_runtime::tensorboard::MARK)
                || name == COMMANDS_FILE;
            if path.is_dir() {
                walk(&path, out);
            } else if !of_times {
                out.insert(path.clone(), checksum_file(&path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(dir, &mut out);
    out
}
