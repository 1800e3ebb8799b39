//! The model card of an adapter: `README.md` beside `adapter_config.json`.
//!
//! In: the base model, the adapter's settings, how it came to be. Out: a card with the header that the
//! hub reads, the settings, and how the adapter is loaded. Private data has no name in it, and no path
//! of this machine gets into it.

use super::{CARD, front_matter, kept};
use anyhow::Result;
use gradtx_models::lora::BlockLayout;
use gradtx_run::paths::ADAPTER_DIR;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, Privacy, public_name, read_text, write_atomic};
use std::fmt::Write as _;
use std::path::Path;

/// Ranks that vLLM can be told to make room for.
const VLLM_RANKS: [usize; 8] = [8, 16, 32, 64, 128, 256, 320, 512];

/// Writes the card of the adapter that a stage has written below `out`; returns its name there.
pub(crate) fn write_beside_adapter(
    base: &Path,
    layout: &BlockLayout,
    made: &Made,
    out: &Path,
) -> Result<String> {
    write_for_adapter(base, layout, made, &out.join(ADAPTER_DIR))?;
    Ok(format!("{ADAPTER_DIR}/{CARD}"))
}

/// How an adapter came to be.
pub struct Made {
    /// A sentence about it, without its subject: `was trained on …`.
    pub how: String,
    /// Name and value of settings that are worth knowing.
    pub settings: Vec<(&'static str, String)>,
    /// What it guarantees to those whose examples it was trained on.
    pub privacy: Privacy,
}

/// Writes the card of the adapter in `dir`, which is of the model in `base`.
pub fn write_for_adapter(base: &Path, layout: &BlockLayout, made: &Made, dir: &Path) -> Result<()> {
    let own = base.join(CARD);
    let own = if own.is_file() { read_text(&own, MAX_CONFIG_BYTES)? } else { String::new() };
    let text = card(&public_name(base), &own, layout, made);
    Ok(write_atomic(&dir.join(CARD), |file| std::io::Write::write_all(file, text.as_bytes()))?)
}

fn card(base: &str, own: &str, layout: &BlockLayout, made: &Made) -> String {
    let mut text = String::from("---\n");
    kept(front_matter(own).0).for_each(|line| text += &format!("{line}\n"));
    let is_public = base.contains('/');
    // A name that is not on the hub would be a broken link there.
    if is_public {
        let _ = writeln!(text, "base_model: {base}\nbase_model_relation: adapter");
    }
    text += "library_name: peft\ntags:\n- lora\n- gradtx\n";
    if is_public {
        let _ = writeln!(text, "- base_model:adapter:{base}");
    }
    let lora = layout.lora();
    let _ = write!(
        text,
        "---\n\n# LoRA adapter for {base}\n\n\
         A low-rank adapter for `{base}` that {}. Written by gradtx {}.\n\n\
         | setting | value |\n|---|---|\n| rank | {} |\n| alpha | {} |\n| modules | {} |\n",
        made.how,
        env!("CARGO_PKG_VERSION"),
        lora.rank,
        lora.alpha,
        layout.target_names().join(", ")
    );
    made.settings.iter().for_each(|(name, value)| text += &format!("| {name} | {value} |\n"));
    let guarantee = match &made.privacy {
        Privacy::None => "none: an adapter can reveal examples that it was trained on".into(),
        stated => stated.to_string(),
    };
    text += &format!("| privacy guarantee | {guarantee} |\n");
    text += &usage(base, lora.rank);
    text
}

/// How it is loaded, by program.
fn usage(base: &str, rank: usize) -> String {
    let room = VLLM_RANKS.into_iter().find(|room| *room >= rank).unwrap_or(rank);
    format!(
        "\n## Use\n\nWith Transformers and PEFT:\n\n```python\n\
         from peft import PeftModel\n\
         from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         tokenizer = AutoTokenizer.from_pretrained(\"{base}\")\n\
         model = AutoModelForCausalLM.from_pretrained(\"{base}\")\n\
         model = PeftModel.from_pretrained(model, \"path/of/this/adapter\")\n```\n\n\
         With vLLM:\n\n```sh\n\
         vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules own=path/of/this/adapter\n```\n\n\
         With gradtx:\n\n```sh\n\
         gradtx generate --model path/of/the/base/model --adapter path/of/this/adapter\n\
         gradtx merge --help\n```\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_models::decoder::DecoderConfig;
    use gradtx_models::lora::LoraConfig;

    fn layout(rank: usize) -> BlockLayout {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}"#;
        let model = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        BlockLayout::new(&model, &LoraConfig { rank, ..LoraConfig::default() }).unwrap()
    }

    #[test]
    fn a_card_has_the_hub_s_header_and_no_path() {
        let home = tempfile::tempdir().unwrap();
        let base = home.path().join("models--Org--Base-1B/snapshots/abc");
        std::fs::create_dir_all(&base).unwrap();
        std::fs::write(base.join(CARD), "---\nlicense: apache-2.0\ndatasets:\n- secret\n---\n# Base\n")
            .unwrap();
        let out = home.path().join("out");
        std::fs::create_dir_all(out.join(ADAPTER_DIR)).unwrap();
        let made = Made {
            how: "was trained on 7 examples".into(),
            settings: vec![("steps", "12".into())],
            privacy: Privacy::None,
        };
        assert_eq!(write_beside_adapter(&base, &layout(9), &made, &out).unwrap(), "adapter/README.md");
        let text = std::fs::read_to_string(out.join("adapter/README.md")).unwrap();
        let header = "---\nlicense: apache-2.0\nbase_model: Org/Base-1B\nbase_model_relation: adapter\n\
                      library_name: peft\n";
        assert!(text.starts_with(header), "{text}");
        for word in
            ["- base_model:adapter:Org/Base-1B", "| rank | 9 |", "| steps | 12 |", "--max-lora-rank 16 "]
        {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
        let home = home.path().to_str().unwrap();
        assert!(!text.contains(home) && !text.contains("secret"), "{text}");
    }

    #[test]
    fn a_base_without_a_public_name_is_no_link() {
        let made = Made { how: "was made".into(), settings: vec![], privacy: Privacy::None };
        let text = card("qwen-own", "", &layout(2), &made);
        assert!(!text.contains("base_model") && text.contains("# LoRA adapter for qwen-own"), "{text}");
    }
}
