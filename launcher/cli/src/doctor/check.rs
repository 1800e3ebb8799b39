//! [`Check`]: one thing that `doctor` checks.

use serde::Serialize;
use serde_json::Value;

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Something that is asked for cannot work.
    Problem,
}

/// One thing that was checked.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was checked.
    pub topic: String,
    /// How it stands.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// The same as numbers, for scripts.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub facts: Value,
}

impl Check {
    /// What was found of a topic.
    pub fn new(topic: &str, level: Level, found: impl Into<String>) -> Self {
        Self { topic: topic.into(), level, found: found.into(), advice: None, facts: Value::Null }
    }

    /// Something that is as it should be.
    pub fn ok(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, Level::Ok, found)
    }

    /// Something worth knowing.
    pub fn note(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, Level::Note, found)
    }

    /// Something that cannot work.
    pub fn problem(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, Level::Problem, found)
    }

    /// With what to do about it.
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// With numbers for scripts.
    pub fn facts(mut self, facts: Value) -> Self {
        self.facts = facts;
        self
    }
}
