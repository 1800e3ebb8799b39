//! [`TextTokenizer`]: text to token ids and back, by a model's own tokenizer.json.
//!
//! Nothing is added, cut or padded on the way: special tokens stand in the text where
//! a prompt needs them, and the ids of a text are the same for training, generation
//! and evaluation.

use crate::artifact::{MAX_TOKENIZER_BYTES, no_tokenizer, read_file, read_json};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;
use tokenizers::Tokenizer;

/// A model's tokenizer, and what its directory says about special tokens.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// Ids that end a generated text: those of generation_config.json, else of
    /// config.json, else the `eos_token` of tokenizer_config.json.
    eos: Vec<u32>,
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
        let bytes = read_file(&path, MAX_TOKENIZER_BYTES)?;
        let mut inner =
            Tokenizer::from_bytes(bytes).map_err(|e| Error::file(&path, format!("not a tokenizer: {e}")))?;
        // Files made for training elsewhere may cut and pad; both would change texts silently.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(&path, e.to_string()))?;
        let optional = |name: &str| {
            let path = dir.join(name);
            if path.is_file() { read_json(&path) } else { Ok(Value::Null) }
        };
        let settings = optional("tokenizer_config.json")?;
        let special = special_tokens(&settings);
        let template = dir.join("chat_template.jinja");
        let chat_template = if template.is_file() {
            Some(std::fs::read_to_string(&template).map_err(|e| Error::io("read", &template, e))?)
        } else {
            chat_template(&settings, dir)?
        };
        let mut eos = vec![];
        for name in ["generation_config.json", "config.json"] {
            if eos.is_empty() {
                eos = eos_ids(&optional(name)?["eos_token_id"], &dir.join(name))?;
            }
        }
        if eos.is_empty() {
            let text = special.iter().find(|(name, _)| name == "eos_token");
            eos.extend(text.and_then(|(_, text)| inner.token_to_id(text)));
        }
        let tokenizer = Self { inner, eos, chat_template, special };
        let size = tokenizer.size();
        match tokenizer.eos.iter().find(|&&id| id as usize >= size) {
            None => Ok(tokenizer),
            Some(id) => {
                let why = format!("the end-of-text token {id} is outside its vocabulary of {size}");
                Err(Error::file(&path, why))
            }
        }
    }

    /// Ids that end a generated text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
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

    /// Tokens of a text, exactly.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        // The text may be private: it stays out of messages.
        let failed =
            |e| Error::invalid("tokenizer", format!("cannot encode a text of {} bytes: {e}", text.len()));
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        Ok(Tokens { ids: encoding.get_ids().to_vec(), spans: encoding.get_offsets().to_vec() })
    }

    /// Text of tokens; `skip_special` leaves out special ones.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let failed = |e| Error::invalid("tokenizer", format!("cannot decode {} tokens: {e}", ids.len()));
        self.inner.decode(ids, skip_special).map_err(failed)
    }
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

/// `chat_template` is a text, or a list of named ones, of which `default` counts.
fn chat_template(settings: &Value, dir: &Path) -> Result<Option<String>> {
    match &settings["chat_template"] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default");
            Ok(default.and_then(|t| t["template"].as_str()).map(str::to_owned))
        }
        _ => {
            let path = dir.join("tokenizer_config.json");
            Err(Error::file(&path, "`chat_template` is neither a text nor a list of named ones"))
        }
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
}
