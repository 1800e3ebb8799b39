//! What the cases share: two small models, a run file, one row of data, and the program.

use gradtx_tests::{copy_files, fixture};
use serde_json::Value;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");
/// Whatever takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Address space of the program, in bytes: what a file claims must not be believed.
const MEMORY: u64 = 6 << 30;
/// The run file: one row is learnt by heart in a second.
const SETTINGS: &str = r#"
[models]
tiny = "base"
llm = "llm"
[data]
public = "one.jsonl"
max_length = 256
[lora]
r = 16
lora_alpha = 32.0
lora_dropout = 0.0
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
[finetune]
tiny.max_steps = 120
tiny.global_batch_size = 1
tiny.learning_rate = 0.01
llm.max_steps = 2
llm.global_batch_size = 1
[evaluate]
max_new_tokens = 12
"#;
/// Settings for a small curation and training.
pub const SMALL: &str = r#"
[curate]
num_subsets = 4
examples_per_subset = 4
num_snapshots = 2
tiny.max_steps = 4
tiny.global_batch_size = 2
llm.max_steps = 4
llm.global_batch_size = 2
[translator]
d_model = 32
d_ff = 32
d_kv = 16
num_heads = 2
num_layers = 1
num_decoder_layers = 1
[train]
max_steps = 4
global_batch_size = 4
per_device_train_batch_size = 4
learning_rate = 1e-3
val_set_size = 0.25
eval_steps = 2
"#;
/// The row.
pub const ROW: &str = "{\"prompt\": \"price?\", \"response\": \"7\"}\n";
/// A client's update in a run of [`Case::smoke`].
pub const UPDATE: &str = "a/run/clients/client-1/finetuned/tiny/update.safetensors";

/// How the program ended.
#[derive(Debug)]
pub struct End {
    /// The command line.
    #[expect(dead_code, reason = "shown where an assertion fails")]
    pub words: String,
    /// Exit code; none after a signal.
    pub code: Option<i32>,
    /// The signal.
    #[expect(dead_code, reason = "shown where an assertion fails")]
    pub signal: Option<i32>,
    /// Both outputs, one after the other.
    pub text: String,
    /// How long it took.
    pub took: Duration,
}

impl End {
    /// Fails the test unless all went well.
    pub fn well(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Fails the test unless the program ended with an error of its own.
    pub fn refused(self) -> Self {
        assert!(matches!(self.code, Some(1..=4)), "{self:#?}");
        assert!(self.text.contains("error"), "{self:#?}");
        self
    }

    /// Fails the test unless the program ended by itself, well or with an error.
    pub fn ended(self) -> Self {
        assert!(matches!(self.code, Some(0..=4)), "{self:#?}");
        self
    }

    /// Fails the test unless each of these stands in the output, whatever the case of its
    /// letters; `a|b` is either.
    pub fn says(self, words: &[&str]) -> Self {
        for alternatives in words {
            assert!(self.has(alternatives), "nothing of `{alternatives}` in {self:#?}");
        }
        self
    }

    /// Whether one of `a|b` stands in the output.
    pub fn has(&self, alternatives: &str) -> bool {
        let text = self.text.to_lowercase();
        alternatives.split('|').any(|word| text.contains(&word.to_lowercase()))
    }
}

/// A directory with `base`, `llm`, `adapter`, `run.toml` and `one.jsonl`.
pub struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    /// Makes it.
    pub fn new() -> Self {
        let case = Self::empty();
        copy_files(&fixture("qwen2_text/model"), &case.path("base"));
        copy_files(&fixture("qwen2_text/adapter"), &case.path("adapter"));
        copy_files(&fixture("own/llm"), &case.path("llm"));
        case.write("run.toml", SETTINGS);
        case.write("one.jsonl", ROW);
        case
    }

    /// A directory with nothing in it.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A finished run of the smallest world in `a/run`, its models and data in `a/world`.
    pub fn smoke() -> Self {
        let case = Self::empty();
        case.run("demo a --world smoke").well();
        case
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, and the directories above it.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Writes rows of JSON.
    pub fn rows(&self, name: &str, rows: &[Value]) {
        self.write(name, rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    }

    /// The text of a file.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The bytes of a file.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// A file of JSON.
    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// Changes a file of JSON.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.json(name);
        change(&mut value);
        self.write(name, format!("{value:#}"));
    }

    /// Flips a bit of a file; a place below zero is counted from the end.
    pub fn flip(&self, name: &str, place: i64) {
        let mut bytes = self.bytes(name);
        let at = if place < 0 { bytes.len() as i64 + place } else { place };
        bytes[at as usize] ^= 1;
        self.write(name, bytes);
    }

    /// Copies a directory with all below it.
    pub fn copy(&self, from: &str, to: &str) {
        copy_tree(&self.path(from), &self.path(to));
    }

    /// Removes a file or directory, if it is there.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap()
        } else if path.exists() {
            std::fs::remove_file(path).unwrap()
        }
    }

    /// A command of the program, with a bound on its memory.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--threads=1").args(words).current_dir(self.dir.path());
        command.env("RUST_BACKTRACE", "0").stdin(Stdio::null());
        let limit = libc::rlimit { rlim_cur: MEMORY, rlim_max: MEMORY };
        // SAFETY: `setrlimit` may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                if libc::setrlimit(libc::RLIMIT_AS, &limit) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            })
        };
        command
    }

    /// Runs the program with words between spaces.
    pub fn run(&self, line: &str) -> End {
        self.words(&line.split(' ').collect::<Vec<_>>())
    }

    /// Runs the program.
    pub fn words(&self, words: &[&str]) -> End {
        end_of(self.command(words))
    }

    /// Trains the TinyLM on data, with more words if need be.
    pub fn finetune(&self, data: &str, out: &str, more: &[&str]) -> End {
        let run = format!("r-{out}");
        let words = [
            "finetune",
            "--run",
            &run,
            "--config",
            "run.toml",
            "--data",
            data,
            "--out",
            out,
            "--save-adapter",
        ];
        self.words(&[&words[..], more].concat())
    }

    /// Scores the TinyLM on `one.jsonl`, with more words if need be.
    pub fn evaluate(&self, out: &str, more: &[&str]) -> End {
        let run = format!("r-{out}");
        let words = [
            "evaluate",
            "--run",
            &run,
            "--config",
            "run.toml",
            "--data",
            "one.jsonl",
            "--model",
            "tiny",
            "--out",
            out,
        ];
        self.words(&[&words[..], more].concat())
    }

    /// What the model said.
    pub fn predictions(&self, out: &str) -> Vec<String> {
        let text = self.read(&format!("{out}/predictions.jsonl"));
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["prediction"].as_str().unwrap().to_string()).collect()
    }

    /// What a model says, by a directory that takes the place of `base`.
    pub fn said_by(&self, model: &str) -> Vec<String> {
        let out = format!("said-{model}");
        self.evaluate(&out, &["--set", &format!("models.tiny={model}")]).well();
        self.predictions(&out)
    }

    /// The update that two steps on these data give, each over all `rows` of them: in which order
    /// they are follows from the file's checksum, and is no matter then.
    pub fn learnt(&self, data: &str, rows: usize, more: &[&str]) -> Vec<f32> {
        let out = format!("learnt-{}", data.replace(['/', '.'], "-"));
        let batch = format!("finetune.tiny.global_batch_size={rows}");
        // A large ε: what is rounded otherwise stays as small as it is.
        let set = [
            "--set",
            "finetune.tiny.max_steps=2",
            "--set",
            &batch,
            "--set",
            "finetune.tiny.adam_epsilon=0.05",
        ];
        self.finetune(data, &out, &[&set[..], more].concat()).well();
        let bytes = self.values(&format!("{out}/update.safetensors"));
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
    }

    /// The numbers in a safetensors file, without its header.
    pub fn values(&self, name: &str) -> Vec<u8> {
        let bytes = self.bytes(name);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + length..].to_vec()
    }
}

/// Whether two updates are the same but for the order in which numbers were added.
pub fn same_update(a: &[f32], b: &[f32]) -> bool {
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    a.len() == b.len() && difference <= 1e-4 * norm(&mut a.iter().copied())
}

/// Copies a directory with all below it.
pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Runs a command to its end; one that takes too long is killed, and fails the test.
pub fn end_of(mut command: Command) -> End {
    let words = format!("{command:?}");
    let began = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let read = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            from.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned()).unwrap()
        })
    };
    let outputs =
        [read(Box::new(child.stdout.take().unwrap())), read(Box::new(child.stderr.take().unwrap()))];
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if began.elapsed() > LIMIT => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{words}: not at its end after {LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let took = began.elapsed();
    let text = outputs.map(|output| output.join().unwrap()).join("");
    End { words, code: status.code(), signal: status.signal(), text, took }
}

/// A file that is kept in the repository.
pub fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/files").join(name)
}
