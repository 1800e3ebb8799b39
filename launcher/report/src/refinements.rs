//! How refinements of translations went.
//!
//! In: `refinement.json` of every directory of `refine`. Out: [`Refinement`]s: on how many public
//! prompts the LLM and the client's TinyLM agreed, round by round.

use super::source::Source;
use crate::table::natural;
use gradtx_pipeline::records::RefineInputs;
use gradtx_pipeline::stages::refine::{REFINEMENT_FILE, Refinement as Found, Round, Synthetic};
use gradtx_runtime::artifact::read_json;
use gradtx_train::baselines::Method;
use serde::Serialize;

/// A refinement of one translation.
#[derive(Debug, Serialize)]
pub struct Refinement {
    /// Its directory.
    pub name: String,
    /// The translator whose result was refined.
    pub method: Option<Method>,
    /// Prompts that were asked.
    pub prompts: usize,
    /// How many of them the LLM wrote, and what of its texts was left out; where it was to write some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<Synthetic>,
    /// Those of which the TinyLM ended its answer.
    pub answered: usize,
    /// Mean probability of the half of these answers that the TinyLM is surest of.
    pub sure: f64,
    /// The rounds: answers that agree (also as a `share` of the prompts), what was trained on,
    /// and the loss of the last step.
    pub rounds: Vec<Round>,
}

/// Of every finished refinement.
pub fn of(source: &mut Source) -> Vec<Refinement> {
    let found: Vec<_> = source
        .inputs::<RefineInputs>()
        .filter(|(stage, _)| !stage.record.outputs.is_empty())
        .map(|(stage, inputs)| (stage.dir.join(REFINEMENT_FILE), stage.name.clone(), inputs.method))
        .collect();
    let mut refinements = vec![];
    for (path, name, method) in found {
        let read = match source.damage(&path) {
            Some(why) => Err(why),
            None => read_json(&path)
                .map_err(|error| error.to_string())
                .and_then(|value| serde_json::from_value(value).map_err(|error| error.to_string())),
        };
        match read {
            Err(why) => source.note(&path, why),
            Ok(Found { prompts, synthetic, answered, sure, rounds }) => {
                refinements.push(Refinement { name, method, prompts, synthetic, answered, sure, rounds });
            }
        }
    }
    refinements.sort_by_cached_key(|refinement: &Refinement| natural(&refinement.name));
    refinements
}
