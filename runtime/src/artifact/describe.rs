//! [`describe`]: what a path is that was given as a model or as an adapter.
//!
//! In: a path. Out: its kind, and words that name what is there instead and what helps:
//! used by every error about a directory that cannot be read, and by `inspect`.

use super::{MAX_CONFIG_BYTES, open_file, read_regular_text};
use crate::Error;
use std::path::{Path, PathBuf};

/// What a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectoryKind {
    /// A model with safetensors weights.
    Model,
    /// A PEFT adapter.
    Adapter,
    /// Anything else, or nothing at all.
    Other,
}

/// A path in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// What it is.
    pub kind: DirectoryKind,
    /// The rest of a sentence that begins with the path: "is a PEFT adapter".
    pub what: String,
    /// What to do where a model was expected; empty where nothing is known.
    pub advice: String,
}

/// What fine-tuning of full weights leaves.
const LAYERS: &str = "layers.safetensors";
const WEIGHTS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];
/// Subdirectories that are named in advice, and entries that are read to find them.
const NAMED: usize = 3;
const LISTED: usize = 10_000;

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Describes a path. Only names are read, no file's content.
pub fn describe(path: &Path) -> Directory {
    let names = names(path);
    let has = |name: &str| is_there(&path.join(name));
    if !path.is_dir() {
        return describe_file(path);
    }
    if has("config.json") && WEIGHTS.iter().any(|name| has(name)) {
        return directory(DirectoryKind::Model, "is a model in the Hugging Face layout", "");
    }
    if has("adapter_config.json") {
        let advice = "name its base model as the model, and this directory as the adapter (--adapter), or \
                      merge them with `gradtx merge`";
        return directory(DirectoryKind::Adapter, "is a PEFT adapter, not a model", advice);
    }
    let (what, advice) = of_this_program(path, &names)
        .or_else(|| hub_cache(path, &names))
        .or_else(|| other_weights(path, &names))
        .or_else(|| parent(path, &names))
        .unwrap_or_else(|| unknown(path, &names));
    Directory { kind: DirectoryKind::Other, what, advice }
}

fn directory(kind: DirectoryKind, what: &str, advice: &str) -> Directory {
    Directory { kind, what: what.into(), advice: advice.into() }
}

/// Names of the entries of a directory, sorted; at most [`LISTED`] are read.
fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).into_iter().flatten().take(LISTED).flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn describe_file(path: &Path) -> Directory {
    let other = |what: String, advice: &str| directory(DirectoryKind::Other, &what, advice);
    if let Ok(target) = std::fs::read_link(path)
        && !path.exists()
    {
        return other(
            format!("is a link to {}, which does not exist", target.display()),
            "download it again",
        );
    }
    if !is_there(path) {
        return other("there is no such directory".into(), "");
    }
    let advice = match path.extension().and_then(|e| e.to_str()) {
        Some("gguf") => GGUF,
        Some("safetensors" | "json") => "name the directory that it is in",
        _ => "expected a directory with config.json and model.safetensors",
    };
    other("this is a file, not a directory".into(), advice)
}

/// Directories that stages of this program made.
fn of_this_program(path: &Path, names: &[String]) -> Option<(String, String)> {
    let has = |name: &str| names.iter().any(|n| n == name);
    if has("adapter") && is_there(&path.join("adapter/adapter_config.json")) {
        let advice = format!("its adapter is {}", path.join("adapter").display());
        return Some(("is the result of a stage of gradtx, not a model".into(), advice));
    }
    if has(LAYERS) {
        let advice =
            "put them into their model with `gradtx merge --adapter`, and name what that writes".into();
        return Some((format!("has the full weights of some layers ({LAYERS}), not a model"), advice));
    }
    has("run.toml").then(|| {
        ("is a run directory of gradtx, not a model".into(), "its models are named in its run.toml".into())
    })
}

/// The cache of the hub's client: `hub/models--ORG--NAME/snapshots/REVISION`.
fn hub_cache(path: &Path, names: &[String]) -> Option<(String, String)> {
    let has = |name: &str| names.iter().any(|n| n == name);
    if has("snapshots") {
        let snapshots = path.join("snapshots");
        let main = read_regular_text(&path.join("refs/main"), MAX_CONFIG_BYTES).unwrap_or_default();
        let main = main.trim();
        let all = self::names(&snapshots);
        let chosen = all.iter().find(|name| *name == main).or(all.last());
        let advice = match chosen {
            Some(name) => format!("name the snapshot in it: {}", snapshots.join(name).display()),
            None => "there is no snapshot in it: download the model again".into(),
        };
        return Some(("is a model's place in the hub's cache, not the model".into(), advice));
    }
    let in_snapshots = path.file_name().is_some_and(|name| name == "snapshots");
    if in_snapshots && let Some(last) = names.last() {
        let advice = format!("name one of them: {}", path.join(last).display());
        return Some(("is a directory of snapshots".into(), advice));
    }
    let cached = names.iter().filter(|name| name.starts_with("models--"));
    let examples: Vec<&str> = cached.take(NAMED).map(String::as_str).collect();
    if examples.is_empty() {
        // One level up is `hub`, where HF_HOME was given.
        let hub = path.join("hub");
        return (has("hub") && self::names(&hub).iter().any(|name| name.starts_with("models--")))
            .then(|| hub_cache(&hub, &self::names(&hub)))
            .flatten();
    }
    let advice = format!("name a snapshot of one model in it, such as {}/snapshots/REVISION", examples[0]);
    Some((format!("is the cache of the hub's client ({}, …)", examples.join(", ")), advice))
}

const GGUF: &str =
    "GGUF files are for inference in other programs; download the original model in safetensors";

/// Weights in another format than safetensors, or without config.json.
fn other_weights(path: &Path, names: &[String]) -> Option<(String, String)> {
    let find = |found: &dyn Fn(&str) -> bool| names.iter().find(|name| found(name)).map(String::as_str);
    let has = |name: &str| names.iter().any(|n| n == name);
    let place = path.display();
    if let Some(name) = find(&|n| WEIGHTS.contains(&n)) {
        let advice = "download config.json of the same model into it".to_string();
        return Some((format!("has weights ({name}) but no config.json"), advice));
    }
    if let Some(name) = find(&|n| n.starts_with("pytorch_model") && n.contains(".bin")) {
        let advice = format!(
            "convert them: python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
             M.from_pretrained('{place}').save_pretrained('NEW', safe_serialization=True); \
             T.from_pretrained('{place}').save_pretrained('NEW')\", then name NEW"
        );
        return Some((format!("has its weights in pickled files ({name}), which are not read"), advice));
    }
    if let Some(name) = find(&|n| n.ends_with(".gguf")) {
        return Some((format!("has its weights in GGUF ({name}), which is not read"), GGUF.into()));
    }
    if let Some(name) = find(&|n| n.starts_with("consolidated.") || n == "params.json") {
        let advice = "download the model's files in the Hugging Face layout (config.json, model*.safetensors), \
                      or convert them with the script that transformers has for this family";
        return Some((format!("has its weights in the maker's own layout ({name})"), advice.into()));
    }
    let foreign = [
        ("model_index.json", "is a diffusion pipeline"),
        ("tf_model.h5", "has its weights in TensorFlow's format"),
        ("flax_model.msgpack", "has its weights in Flax's format"),
        ("weights.npz", "has its weights in MLX's format"),
        ("adapter_model.safetensors", "has an adapter's tensors but no adapter_config.json"),
    ];
    if let Some((_, what)) = foreign.iter().find(|(name, _)| has(name)) {
        return Some((
            (*what).into(),
            "expected config.json and model.safetensors of a language model".into(),
        ));
    }
    if let Some(name) = find(&|n| n.ends_with(".incomplete") || n.ends_with(".part") || n.ends_with(".aria2"))
    {
        return Some((format!("is an incomplete download ({name})"), "finish the download".into()));
    }
    if has("config.json") {
        let what = match find(&|n| n.ends_with(".safetensors")) {
            Some(other) => format!("has no {} and no {} (only {other})", WEIGHTS[0], WEIGHTS[1]),
            None => format!("has a config.json but no weights ({} or {})", WEIGHTS[0], WEIGHTS[1]),
        };
        return Some((what, "expected a whole model; download its weights too".into()));
    }
    let only_tokenizer = has("tokenizer.json") || has("tokenizer.model") || has("tokenizer_config.json");
    only_tokenizer
        .then(|| ("has a tokenizer but no model".into(), "download config.json and the weights".into()))
}

/// A directory above one or several models.
fn parent(path: &Path, names: &[String]) -> Option<(String, String)> {
    let is_model = |dir: &PathBuf| {
        is_there(&dir.join("config.json"))
            || is_there(&dir.join("adapter_config.json"))
            || is_there(&dir.join("snapshots"))
    };
    let mut inside = names.iter().map(|name| path.join(name)).filter(is_model);
    let first = inside.next()?;
    let more: Vec<String> = inside.by_ref().take(NAMED - 1).map(|dir| dir.display().to_string()).collect();
    let what = "is a directory above models, not a model".into();
    Some((
        what,
        match more.as_slice() {
            [] => format!("name the one in it: {}", first.display()),
            more => format!("name one of those in it: {}, {}", first.display(), more.join(", ")),
        },
    ))
}

fn unknown(path: &Path, names: &[String]) -> (String, String) {
    let advice = "expected config.json, tokenizer.json and model.safetensors in it".to_string();
    if names.is_empty() {
        let why = match std::fs::read_dir(path) {
            Ok(_) => "is an empty directory: there is no config.json in it".into(),
            Err(e) => format!("cannot be listed ({e})"),
        };
        return (why, advice);
    }
    ("is no model directory: there is no config.json in it".into(), advice)
}

/// The error for a path that is no readable model.
pub fn not_a_model(path: &Path) -> Error {
    let Directory { kind, what, advice } = describe(path);
    match kind {
        DirectoryKind::Model => {
            let files = ["config.json"].iter().chain(&WEIGHTS).map(|name| path.join(name));
            let unreadable = files.filter(|file| is_there(file)).find_map(|file| open_file(&file).err());
            unreadable.unwrap_or_else(|| Error::file(path, "is a model that cannot be read"))
        }
        _ if advice.is_empty() => Error::file(path, format!("{what}; expected a model directory")),
        _ => Error::file(path, format!("{what}; {advice}")),
    }
}

/// The error for a path that is no readable adapter.
pub fn not_an_adapter(path: &Path) -> Error {
    let has = |name: &str| is_there(&path.join(name));
    if has(LAYERS) || path.ends_with(LAYERS) {
        let why = format!(
            "has the full weights of layers ({LAYERS}), not a PEFT adapter; put them into their model with `gradtx \
             merge`, or into an emulator's LLM with `gradtx plugin`"
        );
        return Error::file(path, why);
    }
    if has("adapter_model.bin") {
        let file = path.join("adapter_model");
        let why = format!(
            "has its tensors in a pickled file (adapter_model.bin), which is not read; convert it: python -c \
             \"import torch; from safetensors.torch import save_file; \
             save_file({{k: v.contiguous() for k, v in torch.load('{0}.bin', map_location='cpu', \
             weights_only=True).items()}}, '{0}.safetensors')\"",
            file.display()
        );
        return Error::file(path, why);
    }
    if has("adapter_config.json") {
        return Error::file(path, "has an adapter_config.json but no adapter_model.safetensors; copy it too");
    }
    if has("adapter_model.safetensors") {
        return Error::file(path, "has an adapter_model.safetensors but no adapter_config.json; copy it too");
    }
    let Directory { kind, what, advice } = describe(path);
    let mut checkpoints =
        names(path).into_iter().filter(|name| is_there(&path.join(name).join("adapter_config.json")));
    let why = match (kind, checkpoints.next_back()) {
        (DirectoryKind::Model, _) => {
            "is a whole model, not a PEFT adapter: there is no adapter_config.json in it; name it as the model, without an adapter".to_string()
        }
        (_, Some(inside)) => {
            format!("is no PEFT adapter; name the one in it: {}", path.join(inside).display())
        }
        _ if path.is_dir() => {
            "is no PEFT adapter: expected adapter_config.json and adapter_model.safetensors".to_string()
        }
        _ if advice.is_empty() => format!("{what}; expected the directory of a PEFT adapter"),
        _ => format!("{what}; expected the directory of a PEFT adapter, with adapter_config.json in it"),
    };
    Error::file(path, why)
}

/// The error for a model directory without tokenizer.json, and how to make one.
pub(crate) fn no_tokenizer(dir: &Path) -> Error {
    let old = ["tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "tekken.json"];
    let place = dir.display();
    let why = match old.iter().find(|name| is_there(&dir.join(name))) {
        Some(name) => format!(
            "there is no tokenizer.json, only {name}; make it: python -c \"from transformers import AutoTokenizer; \
             AutoTokenizer.from_pretrained('{place}', use_fast=True).save_pretrained('{place}')\""
        ),
        None => "there is no tokenizer.json: download the tokenizer's files of the same model".into(),
    };
    Error::file(dir, why)
}

/// The name that others know a model by: never a path of this machine. In this order: what the
/// hub's cache says, what `config.json` says where that is a name on the hub, the directory's name.
pub fn public_name(dir: &Path) -> String {
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    for path in [dir, &absolute] {
        let parts = path.components().filter_map(|part| part.as_os_str().to_str());
        if let Some(cached) = parts.filter_map(|part| part.strip_prefix("models--")).next_back() {
            return cached.replacen("--", "/", 1);
        }
    }
    let config = super::read_json(&dir.join("config.json")).ok();
    let stated = config.as_ref().and_then(|config| config.get("_name_or_path")?.as_str());
    if let Some(name) = stated.filter(|name| is_hub_name(name)) {
        return name.to_owned();
    }
    let last = [dir, &absolute].into_iter().find_map(|path| path.file_name());
    last.map_or_else(|| "base model".into(), |name| name.to_string_lossy().into_owned())
}

/// `organisation/model`: two words, not a path.
fn is_hub_name(name: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.starts_with(['.', '~', '-'])
            && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.len() <= 96
        && name.split_once('/').is_some_and(|(organisation, model)| is_word(organisation) && is_word(model))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with these (empty) files.
    fn dir(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        dir
    }

    #[test]
    fn what_was_given_as_a_model_is_said_with_what_helps() {
        let cases: [(&[&str], &[&str]); 17] = [
            (&["adapter_config.json"], &["PEFT adapter", "gradtx merge"]),
            (&["config.json", "pytorch_model.bin"], &["pickled", "safe_serialization=True"]),
            (&["config.json", "pytorch_model-00001-of-00002.bin"], &["pickled", "NEW"]),
            (&["model-q4_k_m.gguf"], &["GGUF", "safetensors"]),
            (&["params.json", "consolidated.safetensors"], &["maker's own layout", "config.json"]),
            (&["consolidated.00.pth", "tokenizer.model"], &["maker's own layout"]),
            (&["config.json", "tf_model.h5"], &["TensorFlow"]),
            (&["config.json", "weights.npz"], &["MLX"]),
            (&["model_index.json", "unet/config.json"], &["diffusion"]),
            (&["config.json", "tokenizer.json"], &["no weights"]),
            (&["tokenizer.json"], &["tokenizer but no model"]),
            (&["model.safetensors"], &["no config.json"]),
            (&["snapshots/abc/config.json", "refs/main", "blobs/1"], &["hub's cache", "snapshots/abc"]),
            (&["models--a--b/snapshots/1/config.json"], &["cache", "models--a--b"]),
            (&["tiny/config.json", "large/config.json"], &["above models", "/large", "/tiny"]),
            (&["adapter/adapter_config.json", "record.json"], &["stage of gradtx", "/adapter"]),
            (&["notes.txt"], &["no config.json", "tokenizer.json"]),
        ];
        for (files, words) in cases {
            let dir = dir(files);
            let message = not_a_model(dir.path()).to_string();
            words
                .iter()
                .for_each(|word| assert!(message.contains(word), "{files:?}: no `{word}` in {message}"));
        }
        assert!(not_a_model(dir(&[]).path()).to_string().contains("empty directory"));
        assert!(not_a_model(Path::new("/no/such/place")).to_string().contains("no such directory"));
        let model = dir(&["config.json", "model.safetensors"]);
        assert_eq!(describe(model.path()).kind, DirectoryKind::Model);
        assert!(not_a_model(&model.path().join("config.json")).to_string().contains("this is a file"));
    }

    #[test]
    fn wrong_adapter_directories_are_named_with_a_hint() {
        let cases: [(&[&str], &[&str]); 7] = [
            (&["layers.safetensors", "metrics.jsonl"], &["full weights of layers", "gradtx merge"]),
            (&["adapter_config.json", "adapter_model.bin"], &["adapter_model.bin", "save_file"]),
            (&["adapter_config.json"], &["no adapter_model.safetensors"]),
            (&["adapter_model.safetensors"], &["no adapter_config.json"]),
            (&["config.json", "model.safetensors"], &["whole model", "without an adapter"]),
            (
                &["checkpoint-10/adapter_config.json", "checkpoint-20/adapter_config.json"],
                &["/checkpoint-20"],
            ),
            (&["adapter/adapter_config.json", "update.safetensors"], &["name the one in it", "/adapter"]),
        ];
        for (files, words) in cases {
            let dir = dir(files);
            let message = not_an_adapter(dir.path()).to_string();
            words
                .iter()
                .for_each(|word| assert!(message.contains(word), "{files:?}: no `{word}` in {message}"));
        }
    }

    #[test]
    fn other_tokenizers_get_a_command_that_converts() {
        for file in ["tokenizer.model", "vocab.json", "tekken.json"] {
            let message = no_tokenizer(dir(&[file]).path()).to_string();
            assert!(message.contains(file) && message.contains("AutoTokenizer"), "{message}");
        }
        assert!(no_tokenizer(dir(&[]).path()).to_string().contains("download"));
    }

    #[test]
    fn public_names_hold_no_path() {
        let root =
            dir(&["models--Qwen--Qwen2.5-0.5B/snapshots/abc/config.json", "home/me/qwen-base/config.json"]);
        let cached = root.path().join("models--Qwen--Qwen2.5-0.5B/snapshots/abc");
        assert_eq!(public_name(&cached), "Qwen/Qwen2.5-0.5B");
        let own = root.path().join("home/me/qwen-base");
        assert_eq!(public_name(&own), "qwen-base");
        for (stated, name) in [
            ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
            ("/data/secret/llama", "qwen-base"),
            ("../models", "qwen-base"),
            ("./x/y", "qwen-base"),
            ("C:\\models\\x", "qwen-base"),
            ("a/b/c", "qwen-base"),
        ] {
            let text = serde_json::json!({ "_name_or_path": stated }).to_string();
            std::fs::write(own.join("config.json"), text).unwrap();
            assert_eq!(public_name(&own), name);
        }
        assert_eq!(public_name(&own.join("..").join("qwen-base").join(".")), "qwen-base");
    }
}
