//! The settings that a client needs: those that fine-tuning of the TinyLM depends on.

use super::{Config, DataPaths, DeviceKind, DtypeKind};
use std::path::{Path, PathBuf};
use toml::Table;

impl Config {
    /// A run file for clients. Places of the provider are left out, and so is everything about the LLM;
    /// training starts from the adapter in `initial`, beside the run file.
    pub fn client_run_file(&self, initial: &str) -> String {
        let mut config = self.clone();
        config.models.tiny = PathBuf::new();
        config.data.public = DataPaths::default();
        config.lora.init_adapter_tiny = Path::new(initial).into();
        // Each client has devices of its own.
        (config.device.kind, config.device.dtype) = (DeviceKind::Auto, DtypeKind::Auto);
        let mut all = config.table();
        let mut keep = |section: &str, left_out: &[&str]| {
            let mut value = all.remove(section)?;
            if let Some(table) = value.as_table_mut() {
                left_out.iter().for_each(|key| _ = table.remove(*key));
            }
            Some((section.to_owned(), value))
        };
        let kept = [
            keep("seed", &[]),
            keep("models", &["llm"]),
            keep("device", &[]),
            keep("data", &["public"]),
            keep("lora", &["init_adapter_llm"]),
            keep("finetune", &["llm"]),
            keep("evaluate", &[]),
        ];
        let table: Table = kept.into_iter().flatten().collect();
        toml::to_string(&table).expect("a configuration has only values that TOML has")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_what_fine_tuning_needs_and_no_places() {
        let mut config = Config { seed: 7, ..Config::default() };
        config.models.tiny = "/provider/tiny".into();
        config.models.llm = "/provider/llm".into();
        config.data.public = DataPaths::One("/provider/public.jsonl".into());
        config.data.date = "2026-11-27".into();
        config.data.max_length = 99;
        config.lora.r = 3;
        config.lora.init_adapter_llm = "/provider/adapter".into();
        config.finetune.tiny.learning_rate = 0.5;
        config.device.kind = DeviceKind::Cuda;
        config.curate.num_subsets = 17;
        let text = config.client_run_file("initial");
        assert!(!text.contains("provider") && !text.contains("curate") && !text.contains("17"), "{text}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        let read = Config::read(&path).unwrap();
        read.check().unwrap();
        let mut wanted = Config { seed: 7, data: config.data.clone(), ..Config::default() };
        wanted.data.public = DataPaths::default();
        wanted.lora.r = 3;
        wanted.lora.init_adapter_tiny = dir.path().join("initial");
        wanted.finetune.tiny.learning_rate = 0.5;
        assert_eq!(read, wanted);
    }
}
