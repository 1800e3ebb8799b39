//! [`Entry`]: the model that a row of the table is of.

use gradtx_pipeline::lineage::Kind;
use gradtx_run::role::Role;
use gradtx_train::baselines::Method;
use serde::Serialize;

/// The model that a score is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A base model as it is.
    Base(Role),
    /// Fine-tuned on the private data.
    Finetuned(Role),
    /// The LLM with a translated update; `random_student`: of noise in the update's place.
    Translated {
        /// The translator.
        method: Method,
        /// Whether noise was translated.
        random_student: bool,
    },
    /// The LLM with a translated update that was refined.
    Refined(Method),
    /// With an adapter that gradtx did not make.
    Adapter(Role),
    /// Fine-tuned on the private data in some layers alone, such as the edge of an emulator.
    FinetunedEdge(Role),
    /// An emulator of the LLM.
    Emulator(Tuned),
    /// The LLM with an edge that was trained through an emulator.
    PluggedIn,
}

/// What was trained in an emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tuned {
    /// Nothing.
    Nothing,
    /// The edge, on the private data.
    Edge,
    /// All layers: what an attacker can do with public data.
    Whole,
    /// All layers, and then the edge on the private data.
    WholeThenEdge,
}

impl Entry {
    /// The translation that everything is about.
    pub(crate) const GRAD_TRANSFORMER: Self =
        Self::Translated { method: Method::GradTransformer, random_student: false };
    /// The control: noise through the Grad-Transformer.
    pub const RANDOM_STUDENT: Self =
        Self::Translated { method: Method::GradTransformer, random_student: true };

    /// The LLM with a translator's update.
    pub const fn translated(method: Method) -> Self {
        Self::Translated { method, random_student: false }
    }

    /// What a reader calls it.
    pub fn label(self) -> String {
        match self {
            Self::Base(role) => format!("{}, as it is", display_name(role)),
            Self::Finetuned(Role::Tiny) => "TinyLM fine-tuned (P_S)".into(),
            Self::Finetuned(Role::Llm) => "LLM fine-tuned (P_T)".into(),
            Self::RANDOM_STUDENT => "LLM + random student".into(),
            Self::Translated { method, random_student: false } => format!("LLM + {}", method.label()),
            Self::Translated { method, random_student: true } => {
                format!("LLM + {}, random student", method.label())
            }
            Self::Refined(method) => format!("LLM + {}, refined", method.label()),
            Self::Adapter(role) => format!("{} + another adapter", display_name(role)),
            Self::FinetunedEdge(role) => format!("{}, some layers fine-tuned", display_name(role)),
            Self::Emulator(Tuned::Nothing) => "emulator, as it is".into(),
            Self::Emulator(Tuned::Edge) => "emulator, edge fine-tuned".into(),
            Self::Emulator(Tuned::Whole) => "emulator, all layers fine-tuned".into(),
            Self::Emulator(Tuned::WholeThenEdge) => "emulator, all layers, then edge fine-tuned".into(),
            Self::PluggedIn => "LLM + edge of the emulator".into(),
        }
    }

    /// Which of the two models it is; an emulator is one of the LLM.
    pub fn role(self) -> Role {
        match self {
            Self::Base(role) | Self::Finetuned(role) | Self::Adapter(role) | Self::FinetunedEdge(role) => {
                role
            }
            Self::Translated { .. } | Self::Refined(_) | Self::Emulator(_) | Self::PluggedIn => Role::Llm,
        }
    }

    /// A name of it for files.
    pub fn slug(self) -> String {
        match self {
            Self::Base(role) => format!("base-{}", role.name()),
            Self::Finetuned(role) => format!("finetuned-{}", role.name()),
            Self::FinetunedEdge(role) => format!("edge-of-{}", role.name()),
            Self::Adapter(role) => format!("adapter-{}", role.name()),
            Self::RANDOM_STUDENT => "random-student".into(),
            Self::Translated { method, .. } => method.name().into(),
            Self::Refined(method) => format!("{}-refined", method.name()),
            Self::Emulator(Tuned::Nothing) => "emulator".into(),
            Self::Emulator(Tuned::Edge) => "emulator-edge".into(),
            Self::Emulator(Tuned::Whole) => "emulator-all-layers".into(),
            Self::Emulator(Tuned::WholeThenEdge) => "emulator-all-layers-edge".into(),
            Self::PluggedIn => "plugged-in".into(),
        }
    }

    /// Place in the table: from what a client has to what only the provider could have.
    pub(crate) fn order(self) -> usize {
        const METHODS: usize = Method::ALL.len();
        match self {
            Self::Base(role) => role as usize,
            Self::Finetuned(Role::Tiny) => 2,
            Self::Translated { method, random_student } => {
                3 + 2 * method.order() + 2 * METHODS * usize::from(random_student)
            }
            Self::Refined(method) => 4 + 2 * method.order(),
            Self::Adapter(role) => 3 + 4 * METHODS + role as usize,
            Self::Emulator(tuned) => 5 + 4 * METHODS + tuned as usize,
            Self::PluggedIn => 9 + 4 * METHODS,
            Self::FinetunedEdge(role) => 10 + 4 * METHODS + role as usize,
            Self::Finetuned(Role::Llm) => 12 + 4 * METHODS,
        }
    }
}

impl Serialize for Entry {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields {
            kind: Kind,
            model: Role,
            method: Option<Method>,
            random_student: bool,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            refined: bool,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            emulator: bool,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            healed: bool,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            edge: bool,
        }
        let (kind, method, random_student) = match *self {
            Entry::Base(_) | Entry::Emulator(Tuned::Nothing) => (Kind::Base, None, false),
            Entry::Finetuned(_) | Entry::FinetunedEdge(_) | Entry::Emulator(_) => {
                (Kind::Finetuned, None, false)
            }
            Entry::Adapter(_) => (Kind::Adapter, None, false),
            Entry::Translated { method, random_student } => (Kind::Translated, Some(method), random_student),
            Entry::Refined(method) => (Kind::Translated, Some(method), false),
            Entry::PluggedIn => (Kind::PluggedIn, None, false),
        };
        let model = self.role();
        let refined = matches!(self, Entry::Refined(_));
        let emulator = matches!(self, Entry::Emulator(_));
        let healed = *self == Entry::Emulator(Tuned::WholeThenEdge);
        let edge = healed || matches!(self, Entry::FinetunedEdge(_) | Entry::Emulator(Tuned::Edge));
        Fields { kind, model, method, random_student, refined, emulator, healed, edge }.serialize(to)
    }
}

/// How people call one of the two models.
pub(crate) fn display_name(role: Role) -> &'static str {
    match role {
        Role::Tiny => "TinyLM",
        Role::Llm => "LLM",
    }
}
