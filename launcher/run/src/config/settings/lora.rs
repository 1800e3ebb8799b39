//! `[lora]`: the adapters of both models.

use super::bounds::Findings;
use gradtx_models::lora::{MAX_RANK, Module};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::path::PathBuf;

/// LoRA adapters, with the names and meanings of PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    /// Rank of the adapters. Update vectors and the translator's ends grow with it.
    pub r: usize,
    /// α: the adapter's output is scaled by α/r.
    pub lora_alpha: f64,
    /// Dropout probability on the adapter's input while training.
    pub lora_dropout: f64,
    /// Modules that have an adapter, in every block: a list of names, or `"all-linear"` for all seven. OPT's `out_proj`,
    /// `fc1` and `fc2` are the others' `o_proj`, `up_proj` and `down_proj`, under either name; what a model lacks is left
    /// out. More modules learn more, and make longer update vectors.
    pub target_modules: TargetModules,
    /// Layers that have an adapter, numbered from 0. Empty: all; of an emulator, those of its edge.
    pub layers_to_transform: Vec<usize>,
    /// Train B alone, and keep A where it starts (FFA-LoRA): update vectors are of B alone, and weighted sums of them
    /// are weighted sums of what adapters do.
    pub freeze_a: bool,
    /// PEFT directory of the adapter that the TinyLM starts from. Empty: drawn from the seed.
    pub init_adapter_tiny: PathBuf,
    /// PEFT directory of the adapter that the LLM starts from. Empty: drawn from the seed.
    pub init_adapter_llm: PathBuf,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            r: 2,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: TargetModules(vec![Module::Q, Module::V]),
            layers_to_transform: vec![],
            freeze_a: false,
            init_adapter_tiny: PathBuf::new(),
            init_adapter_llm: PathBuf::new(),
        }
    }
}

impl AdapterConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        findings.whole("lora.r", self.r, 1..=MAX_RANK as u64);
        findings.positive("lora.lora_alpha", self.lora_alpha, 1e6);
        findings.part("lora.lora_dropout", self.lora_dropout);
        findings.expect(
            !self.target_modules.modules().is_empty(),
            "lora.target_modules: expected at least one module",
        );
    }
}

/// The word for all modules.
const ALL_LINEAR: &str = "all-linear";

/// Modules that have an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Vec<String>")]
pub struct TargetModules(Vec<Module>);

impl TargetModules {
    /// The modules, in the order in which they were written.
    pub fn modules(&self) -> &[Module] {
        &self.0
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|module| module.name().into()).collect()
    }
}

impl From<Vec<Module>> for TargetModules {
    fn from(modules: Vec<Module>) -> Self {
        Self(modules)
    }
}

/// As it stands in a file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a list of modules, or \"all-linear\"")]
enum Written {
    Word(String),
    List(Vec<String>),
}

impl TryFrom<Written> for TargetModules {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let list = match written {
            Written::Word(word) if word == ALL_LINEAR => return Ok(Self(Module::ALL.into())),
            Written::Word(word) => {
                return Err(format!("`{word}`: expected a list of modules, or \"{ALL_LINEAR}\""));
            }
            Written::List(list) => list,
        };
        let module = |name: &String| {
            let known = Module::known_names().join(", ");
            let why =
                format!("`{name}` is no module of a block; expected one of {known}, or \"{ALL_LINEAR}\"");
            Module::from_name(name).ok_or(why)
        };
        list.iter().map(module).collect::<Result<_, _>>().map(Self)
    }
}

impl From<TargetModules> for Vec<String> {
    fn from(modules: TargetModules) -> Self {
        modules.names()
    }
}

impl JsonSchema for TargetModules {
    fn schema_name() -> Cow<'static, str> {
        "TargetModules".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names = Module::known_names();
        json_schema!({
            "anyOf": [
                { "type": "array", "items": { "type": "string", "enum": names } },
                { "type": "string", "const": ALL_LINEAR, "description": "All seven." },
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Result<AdapterConfig, String> {
        toml::from_str(&format!("target_modules = {value}")).map_err(|error| error.to_string())
    }

    #[test]
    fn modules_are_a_list_or_all() {
        let names = |value| read(value).unwrap().target_modules.names();
        assert_eq!(names("[\"v_proj\", \"q_proj\"]"), ["v_proj", "q_proj"]);
        assert_eq!(names("\"all-linear\"").len(), 7);
        assert_eq!(names("[\"out_proj\", \"fc1\", \"fc2\"]"), ["o_proj", "up_proj", "down_proj"]);
        for (value, words) in [
            ("[\"query\"]", ["`query`", "q_proj, k_proj"]),
            ("\"q_proj\"", ["`q_proj`", "list of modules"]),
            ("3", ["list of modules", "all-linear"]),
        ] {
            let said = read(value).unwrap_err();
            assert!(words.iter().all(|word| said.contains(word)), "{value}: {said}");
        }
    }
}
