//! What the provider sees of the clients' updates.
//!
//! In: `clients.json` of every directory of `translate`. Out: [`Updates`]: norms, cosines and how far each
//! client is from the shadow updates, once for all translators that were given the same.

use super::source::Source;
use crate::table::natural;
use gradtx_pipeline::clients::{CLIENTS_FILE, Clients};
use gradtx_pipeline::records::TranslateInputs;
use gradtx_runtime::artifact::read_json;
use serde::Serialize;

/// The updates that translations were made of.
#[derive(Debug, Serialize)]
pub struct Updates {
    /// Directories of the translations.
    pub names: Vec<String>,
    /// The clients.
    #[serde(flatten)]
    pub clients: Clients,
}

/// Of every finished translation that has them.
pub fn of(source: &mut Source) -> Vec<Updates> {
    let mut found: Vec<_> = source
        .inputs::<TranslateInputs>()
        .filter(|(stage, _)| stage.record.outputs.contains_key(CLIENTS_FILE))
        .map(|(stage, _)| (stage.dir.join(CLIENTS_FILE), stage.name.clone()))
        .collect();
    found.sort_by_cached_key(|(_, name)| natural(name));
    let mut all: Vec<Updates> = vec![];
    for (path, name) in found {
        let read = match source.damage(&path) {
            Some(why) => Err(why),
            None => read_json(&path)
                .map_err(|error| error.to_string())
                .and_then(|value| serde_json::from_value(value).map_err(|error| error.to_string())),
        };
        match read {
            Err(why) => source.note(&path, why),
            Ok(clients) => match all.iter_mut().find(|updates| updates.clients == clients) {
                Some(updates) => updates.names.push(name),
                None => all.push(Updates { names: vec![name], clients }),
            },
        }
    }
    all
}
