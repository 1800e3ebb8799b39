//! [`TextTokenizer`]: text to token ids and back, by a model's own tokenizer.json.
//!
//! Nothing is added, cut or padded on the way: special tokens stand in the text where
//! a prompt needs them, and the ids of a text are the same for training, generation
//! and evaluation.

use crate::artifact::{MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, no_tokenizer, read_file, read_json, read_text};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::Tokenizer;

/// How many times longer a tokenizer's own rules may make a text.
const MAX_GROWTH: usize = 1000;

/// A model's tokenizer, and what its directory says about special tokens.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// Ids that end a generated text: those of generation_config.json, else of
    /// config.json, else the `eos_token` of tokenizer_config.json.
    eos: Vec<u32>,
    /// What stands in the place of texts that it has no token for.
    unknown: Option<u32>,
    /// Text of the token that ends a text, where it is one token of `eos`.
    end_text: Option<String>,
    chat_template: Option<String>,
    /// `bos_token`, `eos_token` and so on, as text.
    special: Vec<(String, String)>,
}

/// Token ids and where in the text each is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// `[n]`
    pub ids: Vec<u32>,
    /// `[n]` first and one past the last byte of each token.
    pub spans: Vec<(usize, usize)>,
}

impl TextTokenizer {
    /// Loads tokenizer.json and, where they are there, tokenizer_config.json,
    /// chat_template.jinja, generation_config.json and config.json of a directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if path.symlink_metadata().is_err() {
            return Err(no_tokenizer(dir));
        }
        let (inner, unknown) = load_rules(&path)?;
        let settings = optional(dir, "tokenizer_config.json")?;
        let mut tokenizer = Self {
            inner,
            eos: vec![],
            unknown: None,
            end_text: None,
            chat_template: chat_template(&settings, dir)?,
            special: special_tokens(&settings),
        };
        tokenizer.unknown = match unknown {
            Some(Unknown::Id(id)) => Some(id),
            Some(Unknown::Token(token)) => tokenizer.id(&token),
            None => None,
        };
        for name in ["generation_config.json", "config.json"] {
            if tokenizer.eos.is_empty() {
                tokenizer.eos = eos_ids(&optional(dir, name)?["eos_token_id"], &dir.join(name))?;
            }
        }
        let named = tokenizer.special.iter().find(|(name, _)| name == "eos_token");
        let named = named.and_then(|(_, text)| tokenizer.id(text));
        if tokenizer.eos.is_empty() {
            tokenizer.eos.extend(named);
        }
        let size = tokenizer.size();
        if let Some(id) = tokenizer.eos.iter().find(|&&id| id as usize >= size) {
            let why = format!("the end-of-text token {id} is outside its vocabulary of {size}");
            return Err(Error::file(&path, why));
        }
        let end = named.filter(|id| tokenizer.eos.contains(id)).or(tokenizer.eos.first().copied());
        tokenizer.end_text = end.and_then(|id| tokenizer.token(id)).filter(|t| tokenizer.is_one_token(t));
        Ok(tokenizer)
    }

    /// Ids that end a generated text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Text of the token that ends a text; none where the model has no such token, or where
    /// its text is cut into several.
    pub(crate) fn end_text(&self) -> Option<&str> {
        self.end_text.as_deref()
    }

    /// Id of the token that stands for what the tokenizer does not know.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Special tokens by their names in tokenizer_config.json, as text.
    pub fn special(&self) -> &[(String, String)] {
        &self.special
    }

    /// One past the largest token id.
    pub fn size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a token was added to the vocabulary as a whole, such as the markers of a chat:
    /// texts are never merged into it, nor is it cut.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// Whether a text is one known token.
    pub fn is_one_token(&self, text: &str) -> bool {
        let ids = self.encode(text).map(|tokens| tokens.ids).unwrap_or_default();
        ids.len() == 1 && self.id(text) == ids.first().copied() && self.unknown != ids.first().copied()
    }

    /// Tokens of a text, exactly.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        // The text may be private: it stays out of messages.
        let failed =
            |e| Error::invalid("tokenizer", format!("cannot encode a text of {} bytes: {e}", text.len()));
        let encoding = guarded(|| self.inner.encode(text, false)).map_err(failed)?;
        Ok(Tokens { ids: encoding.get_ids().to_vec(), spans: encoding.get_offsets().to_vec() })
    }

    /// Text of tokens; `skip_special` leaves out special ones.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let failed = |e| Error::invalid("tokenizer", format!("cannot decode {} tokens: {e}", ids.len()));
        guarded(|| self.inner.decode(ids, skip_special)).map_err(failed)
    }
}

/// Rules of a file may make the library panic; that is an error of the file.
fn guarded<T>(
    work: impl FnOnce() -> std::result::Result<T, tokenizers::Error>,
) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| e.to_string()),
        Err(_) => Err("its rules contradict each other (the tokenizers library panicked)".into()),
    }
}

/// What a tokenizer puts in the place of what it does not know.
enum Unknown {
    Id(u32),
    Token(String),
}

/// The parts of tokenizer.json that are looked at here; the library reads them all.
#[derive(Deserialize)]
struct Rules {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: ModelRules,
}

#[derive(Default, Deserialize)]
struct ModelRules {
    unk_token: Option<String>,
    unk_id: Option<u32>,
}

/// The tokenizer of a file, without cutting and padding.
fn load_rules(path: &Path) -> Result<(Tokenizer, Option<Unknown>)> {
    if !path.exists() && path.with_file_name("tokenizer.model").exists() {
        let why = "is not there, only a tokenizer.model; write one with \
            python -c 'import sys; from transformers import AutoTokenizer as T; \
            T.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])' DIRECTORY";
        return Err(Error::file(path, why));
    }
    let bytes = read_file(path, MAX_TOKENIZER_BYTES)?;
    let wrong = |why: String| Error::file(path, format!("not a tokenizer: {why}"));
    let rules: Rules = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    for (name, part) in [
        ("normalizer", &rules.normalizer),
        ("pre_tokenizer", &rules.pre_tokenizer),
        ("decoder", &rules.decoder),
    ] {
        if growth(part) > MAX_GROWTH {
            let why = format!("its {name} may make a text more than {MAX_GROWTH} times as long");
            return Err(Error::file(path, why));
        }
    }
    let mut inner = guarded(|| Tokenizer::from_bytes(bytes)).map_err(wrong)?;
    // Files made for training elsewhere may cut and pad; both would change texts silently.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|e| Error::file(path, e.to_string()))?;
    let unknown = rules.model.unk_token.map(Unknown::Token).or(rules.model.unk_id.map(Unknown::Id));
    Ok((inner, unknown))
}

/// At most so many times longer do rules make a text, one after the other.
fn growth(rules: &Value) -> usize {
    match rules {
        Value::Object(rule) => {
            let inserted =
                ["content", "prepend", "replacement"].iter().filter_map(|key| rule.get(*key)?.as_str());
            let own = inserted.map(str::len).max().unwrap_or(1).max(1);
            rule.values().map(growth).fold(own, usize::saturating_mul)
        }
        Value::Array(items) => items.iter().map(growth).fold(1, usize::saturating_mul),
        _ => 1,
    }
}

/// A JSON file of the directory; null where it is not there.
fn optional(dir: &Path, name: &str) -> Result<Value> {
    let path = dir.join(name);
    if path.exists() { read_json(&path) } else { Ok(Value::Null) }
}

/// A token is given as text, or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

fn special_tokens(settings: &Value) -> Vec<(String, String)> {
    let entries = settings.as_object().into_iter().flatten();
    let tokens = entries.filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"));
    tokens.filter_map(|(name, value)| Some((name.clone(), token_text(value)?.to_owned()))).collect()
}

/// The template that transformers takes where none is asked for by name:
/// chat_template.jinja, else chat_template.json, else tokenizer_config.json's, which is a
/// text or several named ones, of which `default` counts.
fn chat_template(settings: &Value, dir: &Path) -> Result<Option<String>> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        return read_text(&file, MAX_CONFIG_BYTES).map(Some);
    }
    let own = optional(dir, "chat_template.json")?;
    let (name, entry) = match &own["chat_template"] {
        Value::Null => ("tokenizer_config.json", &settings["chat_template"]),
        entry => ("chat_template.json", entry),
    };
    match entry {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default");
            Ok(default.and_then(|t| t["template"].as_str()).map(str::to_owned))
        }
        Value::Object(named) => Ok(named.get("default").and_then(Value::as_str).map(str::to_owned)),
        _ => Err(Error::file(&dir.join(name), "`chat_template` is neither a text nor several named ones")),
    }
}

/// `eos_token_id` is a number, a list of numbers, or not there.
fn eos_ids(value: &Value, path: &Path) -> Result<Vec<u32>> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value {
        Value::Null => Some(vec![]),
        Value::Array(list) => list.iter().map(one).collect(),
        single => one(single).map(|id| vec![id]),
    };
    ids.ok_or_else(|| Error::file(path, format!("`eos_token_id` is {value}, not one or several token ids")))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    /// Words between spaces, and the special tokens of a chat; optionally merges of letters.
    pub(in crate::data) fn words(dir: &Path, words: &[&str]) -> TextTokenizer {
        let special = ["<|im_start|>", "<|im_end|>", "<eos>"];
        let vocab: serde_json::Map<String, Value> =
            special.iter().chain(words).enumerate().map(|(i, w)| (w.to_string(), json!(i))).collect();
        let added = |(id, content): (usize, &&str)| {
            json!({"id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        };
        let tokenizer = json!({
            "version": "1.0", "normalizer": null, "post_processor": null, "decoder": null,
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": special.iter().enumerate().map(added).collect::<Vec<_>>(),
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s"}, "behavior": "Isolated", "invert": false},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]},
        });
        std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        TextTokenizer::load(dir).unwrap()
    }

    /// Letters a, b and the pair ab as one token.
    pub(in crate::data) fn merging(dir: &Path) -> TextTokenizer {
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]],
                "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false},
        });
        std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        TextTokenizer::load(dir).unwrap()
    }

    #[test]
    fn texts_are_neither_cut_nor_padded_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = words(dir.path(), &["?", " ", "a", "b", "\n"]);
        let tokens = tokenizer.encode("<|im_start|>a b\na<|im_end|>").unwrap();
        assert_eq!(tokens.ids, [0, 5, 4, 6, 7, 5, 1]);
        assert_eq!(tokens.spans[1], (12, 13));
        assert_eq!(tokenizer.size(), 8);
        assert_eq!(tokenizer.id("<eos>"), Some(2));
        assert!(tokenizer.decode(&[5, 1], true).unwrap().trim() == "a");
    }

    #[test]
    fn end_of_text_comes_from_the_most_specific_file() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, value: Value| {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        };
        assert!(words(dir.path(), &["?"]).eos().is_empty());
        write("tokenizer_config.json", json!({"eos_token": {"content": "<eos>"}, "add_bos_token": false}));
        let tokenizer = TextTokenizer::load(dir.path()).unwrap();
        assert_eq!((tokenizer.eos(), tokenizer.special().len()), (&[2][..], 1));
        write("config.json", json!({"eos_token_id": 1}));
        assert_eq!(TextTokenizer::load(dir.path()).unwrap().eos(), [1]);
        write("generation_config.json", json!({"eos_token_id": [1, 2]}));
        assert_eq!(TextTokenizer::load(dir.path()).unwrap().eos(), [1, 2]);
        write("generation_config.json", json!({"eos_token_id": 99}));
        assert!(TextTokenizer::load(dir.path()).unwrap_err().to_string().contains("99"));
        write("generation_config.json", json!({"eos_token_id": "x"}));
        assert!(TextTokenizer::load(dir.path()).is_err());
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        assert!(TextTokenizer::load(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
    }

    #[test]
    fn the_unknown_token_is_no_token_of_a_text() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = words(dir.path(), &["?", "a"]);
        assert_eq!(tokenizer.unknown(), Some(3));
        assert!(tokenizer.is_one_token("<eos>") && tokenizer.is_one_token("a"));
        assert!(
            !tokenizer.is_one_token("b") && !tokenizer.is_one_token("?") && !tokenizer.is_one_token("a a")
        );
        assert!(tokenizer.is_added(1) && !tokenizer.is_added(4));
        assert_eq!(merging(dir.path()).unknown(), None);
    }

    #[test]
    fn templates_are_found_where_transformers_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, value: Value| {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        };
        words(dir.path(), &["?"]);
        let found = || TextTokenizer::load(dir.path()).map(|t| t.chat_template().map(str::to_owned));
        assert_eq!(found().unwrap(), None);
        for (entry, want) in [
            (json!("one"), Some("one")),
            (
                json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]),
                Some("two"),
            ),
            (json!([{"name": "rag", "template": "x"}]), None),
            (json!({"default": "three"}), Some("three")),
            (json!(null), None),
        ] {
            write("tokenizer_config.json", json!({"chat_template": entry}));
            assert_eq!(found().unwrap().as_deref(), want);
        }
        write("tokenizer_config.json", json!({"chat_template": 3}));
        assert!(found().unwrap_err().to_string().contains("tokenizer_config.json"));
        write("chat_template.json", json!({"chat_template": "four"}));
        assert_eq!(found().unwrap().as_deref(), Some("four"));
        std::fs::write(dir.path().join("chat_template.jinja"), "five").unwrap();
        assert_eq!(found().unwrap().as_deref(), Some("five"));
    }

    /// A tokenizer's file with one part changed, loaded.
    fn changed(change: impl FnOnce(&mut Value)) -> Result<TextTokenizer> {
        let dir = tempfile::tempdir().unwrap();
        words(dir.path(), &["?", "a"]);
        let path = dir.path().join("tokenizer.json");
        let mut file = read_json(&path).unwrap();
        change(&mut file);
        std::fs::write(&path, file.to_string()).unwrap();
        TextTokenizer::load(dir.path())
    }

    #[test]
    fn hostile_files_are_errors_and_no_panics() {
        assert!(changed(|_| ()).is_ok());
        let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(200)});
        let bomb = json!({"type": "Sequence", "normalizers": vec![replace; 8]});
        let message = changed(|f| f["normalizer"] = bomb).unwrap_err().to_string();
        assert!(message.contains("normalizer") && message.contains("times as long"), "{message}");
        for (name, value) in [
            ("model", json!({"type": "WordLevel", "vocab": {"a": 4294967296u64}, "unk_token": "a"})),
            ("model", json!({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7})),
            ("model", json!({"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]})),
            ("model", json!(3)),
            ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
            (
                "pre_tokenizer",
                json!({"type": "Split", "pattern": {"Regex": "(((a{999}){999}){999}"},
                "behavior": "Isolated", "invert": false}),
            ),
            ("decoder", json!({"type": "None such"})),
        ] {
            let message = changed(|f| f[name] = value.clone()).map(|t| t.encode("a a").map(drop));
            let failed = !matches!(message, Ok(Ok(())));
            assert!(failed, "{name} {value}");
        }
    }

    #[test]
    fn odd_files_that_can_be_used_are_used() {
        // The largest id that there is takes no room; an added token without text is nothing.
        let tokenizer = changed(|f| {
            f["model"]["vocab"]["b"] = json!(4294967295u32);
            f["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<eos>"});
            f["added_tokens"].as_array_mut().unwrap().push(json!({"id": 9, "content": "", "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
        });
        let tokenizer = tokenizer.unwrap();
        assert_eq!(tokenizer.encode("ab").unwrap().ids.len(), 1);
        assert_eq!(tokenizer.size(), 1 << 32);
        // Backtracking without end: the answer is wrong or an error, and there at once.
        let slow = changed(|f| f["pre_tokenizer"]["pattern"]["Regex"] = json!("(?=(a+)+$)(a+)+b"));
        let started = std::time::Instant::now();
        let _ = slow.map(|t| t.encode(&"a".repeat(2000)).map(drop));
        assert!(started.elapsed().as_secs() < 10);
    }

    #[test]
    fn lone_sentencepiece_models_are_named_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
        let message = TextTokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.model") && message.contains("save_pretrained"), "{message}");
    }
}
