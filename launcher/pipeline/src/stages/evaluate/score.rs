//! `score.json`: all answers in numbers.

use super::answers::Answer;
use super::choices::ScoredChoices;
use crate::lineage::Lineage;
use crate::score::has_words;
use gradtx_run::config::{AnswerForm, Config, RougeTokens};
use gradtx_run::role::Role;
use gradtx_runtime::data::Metric;
use serde::{Deserialize, Serialize};

/// The content of score.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Score {
    /// Examples.
    pub examples: usize,
    /// Which number is the score.
    pub metric: Metric,
    /// The score, from 0 to 1.
    pub score: f64,
    /// Right answers as a part of all.
    pub exact_match: f64,
    /// Mean ROUGE-1 F1.
    pub rouge1: f64,
    /// Right answers.
    pub right: usize,
    /// Continuations that ended by themselves, as a part of all.
    pub ended: f64,
    /// What ROUGE-1 takes for a word.
    #[serde(default)]
    pub rouge_tokens: RougeTokens,
    /// References in which ROUGE-1 sees no word.
    #[serde(default)]
    pub wordless_references: usize,
    /// Predictions in which ROUGE-1 sees no word.
    #[serde(default)]
    pub wordless_predictions: usize,
    /// Which part of a text was the answer.
    pub answer: AnswerForm,
    /// Which of the two models.
    pub model: Role,
    /// What was done to it.
    #[serde(flatten)]
    pub lineage: Lineage,
    /// Questions whose right choice is the likeliest, as a part of all; where choices were scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc: Option<f64>,
    /// The same by likelihood per character.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// Checksum of the examples.
    pub data: String,
    /// The examples by their place: directory and file without extension.
    pub data_name: String,
}

impl Score {
    /// All answers in numbers.
    pub(super) fn of(
        config: &Config,
        metric: Metric,
        answers: &[Answer],
        role: Role,
        lineage: Lineage,
        checksum: &str,
        name: String,
    ) -> Self {
        let part = |count: usize| count as f64 / answers.len() as f64;
        let right = answers.iter().filter(|a| a.right).count();
        let rouge1 = answers.iter().map(|a| a.rouge1).sum::<f64>() / answers.len() as f64;
        let accuracy = |way: usize| {
            let scored: Vec<&ScoredChoices> = answers.iter().filter_map(|a| a.choices.as_ref()).collect();
            (!scored.is_empty()).then(|| part(scored.iter().filter(|choices| choices.right[way]).count()))
        };
        let wordless = |text: fn(&Answer) -> &str| {
            answers.iter().filter(|a| !has_words(text(a), config.evaluate.rouge_tokenizer)).count()
        };
        Self {
            examples: answers.len(),
            metric,
            score: match metric {
                Metric::ExactMatch | Metric::MultipleChoice | Metric::MultipleChoiceNorm => part(right),
                Metric::Rouge1 => rouge1,
            },
            exact_match: part(right),
            rouge1,
            right,
            ended: part(answers.iter().filter(|a| a.ended).count()),
            rouge_tokens: config.evaluate.rouge_tokenizer,
            wordless_references: wordless(|a| &a.reference),
            wordless_predictions: wordless(|a| &a.prediction),
            answer: config.evaluate.answer_extraction,
            model: role,
            lineage,
            acc: accuracy(0),
            acc_norm: accuracy(1),
            data: checksum.into(),
            data_name: name,
        }
    }

    pub(super) fn in_words(&self) -> String {
        let percent = 100.0 * self.score;
        let score = match self.metric {
            Metric::ExactMatch => format!("{percent:.1} % of {} right", self.examples),
            Metric::Rouge1 => format!("ROUGE-1 {percent:.2} over {}", self.examples),
            Metric::MultipleChoice | Metric::MultipleChoiceNorm => {
                let [acc, acc_norm] = [self.acc, self.acc_norm].map(|a| 100.0 * a.unwrap_or_default());
                return format!("acc {acc:.1} %, acc_norm {acc_norm:.1} % of {}", self.examples);
            }
        };
        format!("{score}, {} ended by themselves", self.ended_by_themselves())
    }

    fn ended_by_themselves(&self) -> usize {
        (self.ended * self.examples as f64).round() as usize
    }

    /// What makes the score mean less than it seems to.
    pub(super) fn warnings(&self, config: &Config) -> Vec<String> {
        let mut warnings = vec![];
        let ended = self.ended_by_themselves();
        if 2 * ended < self.examples {
            warnings.push(format!(
                "{ended} of {} predictions ended by themselves, the others were cut at evaluate.max_new_tokens = \
                 {}: right answers among them may count as wrong. Raise it; or the model was not trained to end \
                 its answers in this prompt form (data.prompt)",
                self.examples, config.evaluate.max_new_tokens
            ));
        }
        if self.metric == Metric::Rouge1 && self.wordless_references > 0 {
            let hint = match self.rouge_tokens {
                RougeTokens::RougeScore => {
                    "; evaluate.rouge_tokenizer = \"unicode\" sees the letters of every script"
                }
                RougeTokens::Unicode => "",
            };
            warnings.push(format!(
                "ROUGE-1 sees no word in {} of {} references (and in {} predictions), which score 0 even where \
                 both texts are equal{hint}",
                self.wordless_references, self.examples, self.wordless_predictions
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    #[test]
    fn a_score_reads_back_as_it_was_written() {
        let lineage = Lineage::of_adapter(Path::new("nowhere"), &[], "").unwrap();
        let answer = |right, rouge1| {
            let text = String::new();
            let (prompt, prediction) = (text.clone(), text.clone());
            Answer {
                line: 1,
                prompt,
                prediction,
                reference: text,
                right,
                rouge1,
                ended: right,
                choices: None,
            }
        };
        let answers = [answer(true, 1.0), answer(false, 0.5), answer(false, 0.0), answer(false, 0.1)];
        let config = Config::default();
        for (metric, name, want) in
            [(Metric::ExactMatch, "exact_match", 0.25), (Metric::Rouge1, "rouge1", 0.4)]
        {
            let score =
                json!(Score::of(&config, metric, &answers, Role::Tiny, lineage, "c", "client-2/test".into()));
            assert_eq!((&score["metric"], &score["score"]), (&json!(name), &json!(want)));
            assert_eq!(
                (&score["right"], &score["model"], &score["kind"]),
                (&json!(1), &json!("tiny"), &json!("adapter"))
            );
            assert_eq!((&score["method"], &score["data_name"]), (&json!(null), &json!("client-2/test")));
            let again: Score = serde_json::from_value(score.clone()).unwrap();
            assert_eq!(json!(again), score);
        }
    }
}
