//! Model cards, `README.md` as the hub shows it: here that of a merged model, in `adapter` that of an
//! adapter.
//!
//! In: the base model's directory with its own card, and what is known of the adapter. Out: a
//! card with the base model's public name, its licence, how the model was made, and the base
//! model's own card below. No path of this machine gets into it.

mod adapter;

pub(crate) use adapter::write_beside_adapter;
pub use adapter::{Made, write_for_adapter};

use crate::lineage::{Kind, Lineage};
use crate::trained::Change;
use anyhow::Result;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, public_name, read_text, write_atomic};
use std::fmt::Write as _;
use std::path::Path;

/// The card's file.
const CARD: &str = "README.md";
/// Entries of the base model's card that hold for the merged model too.
const KEPT: [&str; 5] = ["license", "license_name", "license_link", "language", "pipeline_tag"];

/// Writes the card of the model that a change makes of `base` into `out`; returns its name.
pub fn write(base: &Path, change: Change<'_>, lineage: &Lineage, out: &Path) -> Result<String> {
    let own = base.join(CARD);
    let own = if own.is_file() { read_text(&own, MAX_CONFIG_BYTES)? } else { String::new() };
    let text = card(&public_name(base), &own, change, lineage);
    write_atomic(&out.join(CARD), |file| std::io::Write::write_all(file, text.as_bytes()))?;
    Ok(CARD.into())
}

fn card(base: &str, own: &str, change: Change<'_>, lineage: &Lineage) -> String {
    let (head, body) = front_matter(own);
    let mut text = String::from("---\n");
    kept(head).for_each(|line| text += &format!("{line}\n"));
    // A name that is not on the hub would be a broken link there.
    if base.contains('/') {
        let _ = writeln!(text, "base_model: {base}\nbase_model_relation: finetune");
    }
    text += "library_name: transformers\ntags:\n";
    let (title, what) = match change {
        Change::Adapter(layout) => {
            text += "- lora\n- merged\n";
            let lora = layout.lora();
            let (rank, alpha, targets) = (lora.rank, lora.alpha, layout.target_names().join(", "));
            let how = origin(lineage);
            (
                "with a LoRA adapter merged into it",
                format!("plus a low-rank adapter (rank {rank}, alpha {alpha}, {targets}), {how}"),
            )
        }
        Change::Layers(layers) => {
            ("with fine-tuned layers", format!("with those of layers {layers:?} fine-tuned"))
        }
    };
    let _ = write!(
        text,
        "- gradtx\n---\n\n# {base}, {title}\n\n\
         The weights of `{base}` {what}. Configuration, \
         tokenizer, chat template and licence files are those of the base model. Merged by gradtx {}.\n",
        env!("CARGO_PKG_VERSION")
    );
    if !body.trim().is_empty() {
        let _ = write!(text, "\nThe base model's own card follows.\n\n---\n\n{}\n", body.trim());
    }
    text
}

/// How the adapter came to be, in words.
fn origin(lineage: &Lineage) -> &'static str {
    match lineage.kind {
        Kind::Finetuned => "which was trained on data of one owner",
        Kind::Translated => "which was translated from the update of a smaller model",
        Kind::Adapter | Kind::Base => "which was given as a PEFT adapter",
        Kind::PluggedIn => "which clients trained in its first and last layers through an emulator",
    }
}

/// What stands between the first two lines of three dashes, and the rest.
fn front_matter(card: &str) -> (&str, &str) {
    let card = card.trim_start_matches('\u{feff}');
    let Some(rest) = card.strip_prefix("---\n").or_else(|| card.strip_prefix("---\r\n")) else {
        return ("", card);
    };
    match rest.find("\n---") {
        Some(at) => (&rest[..at + 1], rest[at + 4..].trim_start_matches('-')),
        None => ("", card),
    }
}

/// The lines of the entries that are kept, with the lists under them.
fn kept(head: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    head.lines().filter(move |line| {
        if !line.starts_with([' ', '-', '\t']) {
            inside = line.split_once(':').is_some_and(|(key, _)| KEPT.contains(&key.trim()));
        }
        inside
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_models::decoder::DecoderConfig;
    use gradtx_models::lora::{BlockLayout, LoraConfig};

    #[test]
    fn a_card_keeps_the_licence_and_holds_no_path() {
        let home = tempfile::tempdir().unwrap();
        let base = home.path().join("models--Org--Base-1B/snapshots/abc");
        std::fs::create_dir_all(&base).unwrap();
        let own = "---\nlicense: other\nlicense_name: org-licence\nlanguage:\n- en\n- fr\nlibrary_name: x\n\
            datasets:\n- secret\n---\n\n# Base\n\nThe makers' words.\n";
        std::fs::write(base.join(CARD), own).unwrap();
        let out = tempfile::tempdir().unwrap();
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let layout = BlockLayout::new(&model, &LoraConfig::default()).unwrap();
        let lineage = Lineage { kind: Kind::Translated, ..Lineage::BASE };
        assert_eq!(write(&base, Change::Adapter(&layout), &lineage, out.path()).unwrap(), CARD);
        let text = std::fs::read_to_string(out.path().join(CARD)).unwrap();
        let begin = "---\nlicense: other\nlicense_name: org-licence\nlanguage:\n- en\n- fr\nbase_model: Org/Base-1B\n";
        assert!(text.starts_with(begin), "{text}");
        for word in ["rank 2, alpha 32, q_proj, v_proj", "translated", "The makers' words.", "gradtx"] {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
        let home = home.path().to_str().unwrap();
        assert!(!text.contains(home) && !text.contains("/srv") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn cards_without_front_matter_or_at_all_are_fine() {
        let change = Change::Layers(&[0, 3]);
        let text = card("base", "# Plain\n", change, &Lineage::BASE);
        assert!(text.contains("layers [0, 3] fine-tuned") && !text.contains("lora"), "{text}");
        assert!(text.contains("# Plain") && !text.contains("base_model:"), "{text}");
        assert!(!card("base", "", change, &Lineage::BASE).contains("own card"));
        let unclosed = "---\nlicense: mit\n# no end";
        assert_eq!(front_matter(unclosed), ("", unclosed));
    }
}
