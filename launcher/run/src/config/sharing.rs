//! Which results runs can share: hashes of the settings that a result depends on.
//!
//! Only settings that are not as by default are hashed, so that a new version of gradtx with more
//! settings finds what an older one made. Files are known by their paths here; every stage
//! compares their contents.

use super::{Config, DataConfig, Models, diff};
use gradtx_runtime::artifact::checksum;

/// Characters of a hash in the names of directories.
const LENGTH: usize = 12;

impl Config {
    /// The settings that a tuple store depends on, and all others as by default.
    pub fn for_curation(&self) -> Self {
        Self { curate: self.curate.clone(), ..self.for_models() }
    }

    /// The settings that a client's updates and scores depend on, but for the translator.
    fn for_clients(&self) -> Self {
        Self { finetune: self.finetune.clone(), evaluate: self.evaluate.clone(), ..self.for_models() }
    }

    /// The settings on which everything depends that is computed with the two models.
    fn for_models(&self) -> Self {
        Self {
            seed: self.seed,
            models: self.models.clone(),
            device: self.device.clone(),
            data: self.data.clone(),
            lora: self.lora.clone(),
            ..Self::default()
        }
    }

    /// Names the settings that a tuple store depends on: runs with the same name can share one.
    pub fn curation_hash(&self) -> String {
        self.for_curation().hash()
    }

    /// Names the settings that a client's updates and scores depend on, but for the translator.
    pub fn client_hash(&self) -> String {
        self.for_clients().hash()
    }

    fn hash(mut self) -> String {
        // Whether files may be read, never what is computed from them.
        self.models = Models { ignore_fields: vec![], ..self.models };
        self.data = DataConfig { read_limit_mib: 0, ..self.data };
        let differs = diff(&Self::default().table(), &self.table());
        checksum(differs.as_bytes())[..LENGTH].into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(set: &str) -> Config {
        Config::default().with_overrides(&[set.into()]).unwrap()
    }

    #[test]
    fn hashes_depend_on_what_results_depend_on() {
        let base = Config::default();
        let differs = |set| {
            let config = with(set);
            [config.curation_hash() != base.curation_hash(), config.client_hash() != base.client_hash()]
        };
        assert_eq!(differs("seed=2"), [true, true]);
        assert_eq!(differs("data.max_length=77"), [true, true]);
        assert_eq!(differs("models.llm=other"), [true, true]);
        assert_eq!(differs("curate.tiny.weight_decay=0.5"), [true, false]);
        assert_eq!(differs("finetune.llm.weight_decay=0.5"), [false, true]);
        assert_eq!(differs("evaluate.max_new_tokens=7"), [false, true]);
        for set in
            ["train.weight_decay=0.5", "translator.d_ff=8", "translate.lora_r=3", "data.read_limit_mib=9"]
        {
            assert_eq!(differs(set), [false, false], "{set}");
        }
    }
}
