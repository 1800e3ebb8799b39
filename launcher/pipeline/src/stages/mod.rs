//! The stages of the pipeline, a file each. What flows:
//!
//! | stage | in | out |
//! |---|---|---|
//! | [`split`] | a data set, a seed | public and private JSONL files, and who got which rows |
//! | [`curate`] | public data, both models | `TupleStore`: `RUN/shadow` |
//! | [`train`](mod@train) | `TupleStore` | translator: `RUN/translator` |
//! | [`finetune`] | private data, one model | `UpdateVector` and adapter |
//! | [`translate`] | `UpdateVector`s of the TinyLM, translator | `UpdateVector` and adapter of the LLM |
//! | [`refine`] | a translation, its updates of the TinyLM, public prompts | `UpdateVector` and adapter of the LLM |
//! | [`emulate`](mod@emulate) | the LLM, public data | an emulator of the LLM: `RUN/emulator` |
//! | [`plugin`] | the LLM, adapters of an emulator's edge | a model directory |
//! | [`merge`] | a model, an adapter | a model directory |
//! | [`evaluate`] | test data, a model, an adapter | predictions and score |
//!
//! Every stage can be run again: it opens its directory through [`gradtx_run::record`], does
//! what is missing, and leaves alone what is finished and intact. All randomness is
//! keyed by the seed, a purpose and an index, so the same settings give the same bytes.

pub mod curate;
pub mod emulate;
pub mod evaluate;
pub mod finetune;
pub mod merge;
pub mod plugin;
pub mod refine;
pub mod split;
pub mod train;
pub mod translate;

use crate::calibration::Calibrating;
use crate::cross_validation::client::ShadowClient;
use crate::cross_validation::variants::ClientVariant;
use crate::products::Choosing;
use gradtx_run::stage::Facts;

/// What is known of every stage, in the order in which a run goes through them.
pub const STAGES: [Facts; 15] = [
    Facts::of::<split::Splitting<'_>>(),
    Facts::of::<curate::Curation<'_>>(),
    Facts::of::<train::Training<'_>>(),
    Facts::of::<finetune::Finetune<'_>>(),
    Facts::of::<ShadowClient<'_>>(),
    Facts::of::<ClientVariant<'_>>(),
    Facts::of::<Choosing<'_>>(),
    Facts::of::<Calibrating<'_>>(),
    Facts::of::<translate::Translate<'_>>(),
    Facts::of::<refine::Refining<'_>>(),
    Facts::of::<emulate::Collection<'_>>(),
    Facts::of::<emulate::Emulate<'_>>(),
    Facts::of::<plugin::Plugin<'_>>(),
    Facts::of::<merge::Merge<'_>>(),
    Facts::of::<evaluate::Evaluation<'_>>(),
];
