//! Files of a run as stages write them, without running anything.

use crate::Report;
use crate::table::Entry;
use gradtx_kernels::rng::Stream;
use gradtx_pipeline::records::{CurateInputs, FinetuneInputs};
use gradtx_run::record::{self, State};
use gradtx_run::stage::Inputs;
use gradtx_runtime::artifact::{
    Privacy, Role as Part, StoreType, TuplePlan, UpdateMeta, UpdateSpace, UpdateVector, assemble, checksum,
    little_endian, write_init, write_shard,
};
use gradtx_train::examples::DataInputs;
use serde_json::{Value, json};
use std::path::PathBuf;

pub(super) const SUBSETS: usize = 6;
pub(super) const SECRET: &str = "what the patient said";
/// A directory's name is somebody else's words.
const RUN: &str = "<script>alert(1)</script>";

fn random(n: usize, key: u64) -> Vec<f32> {
    let mut stream = Stream::new(key);
    (0..n).map(|_| stream.normal() as f32).collect()
}

fn space(part: Part) -> UpdateSpace {
    let (blocks, width) = if part == Part::Student { (2, 5) } else { (3, 7) };
    UpdateSpace {
        blocks,
        width,
        layout: "ll".into(),
        base_model: format!("model of the {part}"),
        targets: vec!["q_proj".into()],
        rank: 2,
        alpha: 32.0,
        freeze_a: false,
        init: checksum(&little_endian(&random(blocks * width, part as u64))),
    }
}

/// Files of a run, without running anything.
pub(super) struct Files {
    pub(super) dir: tempfile::TempDir,
}

impl Files {
    pub(super) fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir_all(files.run()).unwrap();
        files
    }

    pub(super) fn run(&self) -> PathBuf {
        // A slash would make two directories of it.
        self.dir.path().join(RUN.replace('/', "\u{2215}"))
    }

    pub(super) fn put(&self, name: &str, text: &str) {
        let path = self.run().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(super) fn lines(&self, name: &str, lines: impl IntoIterator<Item = Value>) {
        self.put(name, &lines.into_iter().map(|line| format!("{line}\n")).collect::<String>());
    }

    pub(super) fn record(&self, dir: &str, stage: &str, settings: Value) {
        let dir = self.run().join(dir);
        let State::Open(output) = record::open(&dir, stage, settings).unwrap() else { panic!("finished") };
        std::fs::write(dir.join("file"), "").unwrap();
        output.finish(&["file".into()]).unwrap();
    }

    pub(super) fn settings(&self) {
        let public = self.dir.path().join("public.jsonl");
        let row = |i: usize| json!({ "task": format!("t{}", i % 2), "prompt": SECRET, "response": SECRET });
        std::fs::write(&public, (0..12).map(|i| format!("{}\n", row(i))).collect::<String>()).unwrap();
        self.put(
            "run.toml",
            &format!(
                "seed = 7\n[data]\npublic = {public:?}\n[curate]\nnum_subsets = {SUBSETS}\nexamples_per_subset = 2\n\
                 group_by = \"task\"\nnum_snapshots = 2\n[curate.tiny]\nmax_steps = 4\n[curate.llm]\nmax_steps = 3\n\
                 [train]\nmax_steps = 9\n"
            ),
        );
    }

    pub(super) fn shadow(&self) {
        let public = self.dir.path().join("public.jsonl");
        let sum = gradtx_runtime::artifact::checksum_file(&public).unwrap();
        let inputs = CurateInputs {
            data: DataInputs { data: sum, ..DataInputs::default() },
            ..CurateInputs::default()
        };
        self.record("shadow", "curate", inputs.value().unwrap());
        let subsets: Vec<Vec<usize>> = (0..SUBSETS).map(|k| vec![k % 2, k % 2 + 2 * k]).collect();
        self.put("shadow/subsets.json", &json!(subsets).to_string());
        for (role, steps) in [("tiny", 4), ("llm", 3)] {
            let line = |i: usize| {
                let (subset, step) = (i / steps, i % steps + 1);
                json!({ "subset": subset, "step": step, "loss": 2.0 / step as f64 })
            };
            self.lines(&format!("shadow/metrics/{role}-00000.jsonl"), (0..SUBSETS * steps).map(line));
        }
        let rate = json!({ "step": 4, "jobs": 6, "tokens": 100, "seconds": 0.5, "tokens_per_s": 200.0 });
        self.lines("shadow/throughput-tiny.jsonl", [rate.clone(), rate]);
        let plan = TuplePlan {
            shadows: SUBSETS,
            steps: 2,
            dtype: StoreType::F32,
            student: space(Part::Student),
            teacher: space(Part::Teacher),
        };
        let dir = self.run().join("shadow");
        for part in Part::BOTH {
            let values = plan.space(part).values();
            write_init(&dir, part, plan.space(part), &random(values, part as u64)).unwrap();
            for k in 0..SUBSETS {
                // Updates of one task resemble each other.
                let task = random(2 * values, 50 + (k % 2) as u64);
                let own = random(2 * values, 90 + k as u64);
                let updates: Vec<f32> = task.iter().zip(&own).map(|(a, b)| a + 0.2 * b).collect();
                write_shard(&dir, &plan, part, k, &updates).unwrap();
            }
        }
        assemble(&dir, &plan, Value::Null).unwrap();
    }

    pub(super) fn translator(&self) {
        self.record("translator", "train", Value::Null);
        let line = |step: u64| {
            // A step that diverged is written as null.
            let loss = if step == 4 { Value::Null } else { json!(1.0 / step as f64) };
            let mut line = json!({ "step": step, "loss": loss, "grad_norm": 3.0 });
            if step.is_multiple_of(3) {
                let error = [0.9, 0.4, 0.5][step as usize / 3 - 1];
                line["validation"] = json!({
                    "mse": 0.1, "relative_error": error, "relative_error_by_block": [error, null, 0.3]
                });
            }
            line
        };
        self.lines("translator/metrics.jsonl", (1..=9).map(line));
        self.lines("translator/throughput.jsonl", [json!({ "step": 9, "tuples_per_s": 64.0 })]);
    }

    pub(super) fn client(&self, client: usize) {
        for (role, part) in [("tiny", Part::Student), ("llm", Part::Teacher)] {
            let dir = format!("clients/{client}/{role}");
            let inputs = FinetuneInputs {
                model: space(part).base_model,
                data: DataInputs { data: format!("train-{client}"), ..DataInputs::default() },
                ..FinetuneInputs::default()
            };
            self.record(&dir, "finetune", inputs.value().unwrap());
            let loss = |step: u64| json!({ "step": step, "loss": 1.0 / (step as f64 + client as f64) });
            self.lines(&format!("{dir}/metrics.jsonl"), (1..=30).map(loss));
            let meta =
                UpdateMeta { space: space(part), examples: 8, privacy: Privacy::None, refinement: false };
            let values = random(meta.space.values(), 7 + client as u64);
            let path = self.run().join(&dir).join("update.safetensors");
            UpdateVector { meta, values }.write(&path).unwrap();
        }
    }

    pub(super) fn score(&self, client: usize, entry: Entry, score: Option<f64>) {
        self.score_in(&format!("clients/{client}"), client, entry, score);
    }

    pub(super) fn score_in(&self, home: &str, client: usize, entry: Entry, score: Option<f64>) {
        let dir = format!("{home}/evaluated/{}", entry.label().replace(' ', "-"));
        let mut file = json!({
            "examples": 50, "metric": "exact_match", "score": score,
            "data": format!("test-{client}"), "data_name": format!("client-{client}/test"),
        });
        let of_entry = json!(entry);
        file.as_object_mut().unwrap().extend(of_entry.as_object().unwrap().clone());
        self.put(&format!("{dir}/score.json"), &file.to_string());
        self.put(&format!("{dir}/predictions.jsonl"), &json!({ "prediction": SECRET }).to_string());
    }

    pub(super) fn whole() -> Self {
        use gradtx_run::role::Role::{Llm, Tiny};
        let files = Self::new();
        files.settings();
        files.shadow();
        files.translator();
        for client in 1..=3 {
            files.client(client);
            files.score(client, Entry::Finetuned(Tiny), Some(0.5));
            files.score(client, Entry::Finetuned(Llm), Some(0.8 + 0.02 * client as f64));
            files.score(client, Entry::GRAD_TRANSFORMER, Some(0.8));
            files.score(client, Entry::RANDOM_STUDENT, Some(0.1));
        }
        files
    }

    pub(super) fn report(&self) -> Report {
        Report::of(&self.run(), &[]).unwrap()
    }
}
