//! The world's tokenizer in the files that Hugging Face libraries read: one token per
//! word, words parted by white space.

use crate::tasks::{END, vocabulary};
use anyhow::Result;
use gradtx_runtime::artifact::write_json;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Writes tokenizer.json, tokenizer_config.json and generation_config.json into a model directory.
pub fn write(dir: &Path) -> Result<()> {
    let words = vocabulary();
    let vocab: Map<String, Value> =
        words.iter().enumerate().map(|(id, w)| (w.to_string(), json!(id))).collect();
    let special: Vec<Value> = ["<unk>", "<bos>"]
        .iter()
        .map(|word| {
            json!({
                "id": crate::tasks::id(word), "content": word, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special,
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    // A question's words between <bos> and >, and the answer's after them.
    let template = "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }} \
                    {{ message.content }} >{% else %} {{ message.content }}{% endif %}{% endfor %}";
    let config = json!({
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": END,
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 128,
    });
    let generation = json!({
        "bos_token_id": crate::tasks::id("<bos>"),
        "eos_token_id": crate::tasks::id(END),
        "pad_token_id": crate::tasks::id("<unk>"),
        "do_sample": false,
    });
    write_json(&dir.join("tokenizer.json"), &tokenizer)?;
    write_json(&dir.join("tokenizer_config.json"), &config)?;
    write_json(&dir.join("generation_config.json"), &generation)?;
    Ok(())
}
