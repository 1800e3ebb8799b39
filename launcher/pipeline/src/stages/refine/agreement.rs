//! Which answers agree.
//!
//! In: two models' answers to the same prompts. Out: the prompts whose answers are taken for the same.
//!
//! | answers | the same |
//! |---|---|
//! | whole texts | the texts without white space around them are equal |
//! | after `####` | what follows the last `####` is equal, as a number or a text, whatever stands before it |
//! | summaries | they are among the half with the largest ROUGE-1 between the two models' texts |
//!
//! An answer that was cut at the limit, or that is empty, agrees with nothing.

use super::answers::Answer;
use crate::score::{MARK, answer, exact_match, rouge1};
use gradtx_run::config::{AnswerForm, RougeTokens};
use gradtx_runtime::data::Metric;

/// How answers are compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison {
    pub(super) metric: Metric,
    pub(super) form: AnswerForm,
    pub(super) words: RougeTokens,
}

/// What a comparison finds.
#[derive(Debug, PartialEq)]
pub(super) struct Agreement {
    /// Numbers of the prompts with answers that agree, in order.
    pub(super) prompts: Vec<usize>,
    /// Mean ROUGE-1 between the two answers over all prompts that both have ended; for summaries.
    pub(super) rouge1: Option<f64>,
}

impl Comparison {
    /// Compares the TinyLM's answers with the LLM's.
    pub(super) fn of(self, tiny: &[Answer], llm: &[Answer]) -> Agreement {
        let both: Vec<usize> = (0..llm.len()).filter(|&i| llm[i].ended && tiny[i].ended).collect();
        if self.metric == Metric::Rouge1 {
            return self.most_alike(&both, tiny, llm);
        }
        let is_same = |&i: &usize| self.is_same(&tiny[i].text, &llm[i].text);
        Agreement { prompts: both.into_iter().filter(is_same).collect(), rouge1: None }
    }

    fn is_same(self, tiny: &str, llm: &str) -> bool {
        // The LLM's text is trained on: it must mark its answer where the client's model does.
        let is_marked = self.form == AnswerForm::Whole || llm.contains(MARK) || !tiny.contains(MARK);
        is_marked && !answer(llm, self.form).trim().is_empty() && exact_match(tiny, llm, self.form)
    }

    /// The half whose two texts are most alike; of texts that are equally alike the first ones.
    fn most_alike(self, both: &[usize], tiny: &[Answer], llm: &[Answer]) -> Agreement {
        let alike = |i: usize| rouge1(&llm[i].text, &tiny[i].text, self.words);
        let mut scored: Vec<(f64, usize)> = both.iter().map(|&i| (alike(i), i)).collect();
        let mean = scored.iter().map(|(score, _)| score).sum::<f64>() / scored.len().max(1) as f64;
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        scored.truncate(scored.len().div_ceil(2));
        let mut prompts: Vec<usize> =
            scored.into_iter().filter(|(score, _)| *score > 0.0).map(|(_, i)| i).collect();
        prompts.sort_unstable();
        Agreement { prompts, rouge1: Some(mean) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(texts: &[&str]) -> Vec<Answer> {
        let of = |text: &&str| Answer { tokens: vec![], text: (*text).into(), ended: *text != "cut" };
        texts.iter().map(of).collect()
    }

    fn agreed(metric: Metric, form: AnswerForm, pairs: &[[&str; 2]]) -> Agreement {
        let [tiny, llm] =
            [0, 1].map(|side| answers(&pairs.iter().map(|pair| pair[side]).collect::<Vec<_>>()));
        Comparison { metric, form, words: RougeTokens::default() }.of(&tiny, &llm)
    }

    #[test]
    fn long_answers_agree_by_what_follows_the_mark() {
        let pairs = [
            ["2 and 2 is 4\n#### 4", "I add: 2 + 2 = 4\n#### 4.0"],
            ["2 and 2 is 4\n#### 4", "2 and 2 is 4\n#### 5"],
            // Half-way results are not the answer.
            ["#### 4 no #### 5", "#### 5 no #### 4"],
            ["#### $1,000", "so it costs #### 1000."],
            ["#### (b)", "because of it #### (B)"],
            // Nothing after the mark, or no end.
            ["####", "####"],
            ["cut", "cut"],
            ["#### 4", "cut"],
        ];
        assert_eq!(agreed(Metric::ExactMatch, AnswerForm::AfterHashes, &pairs).prompts, [0, 3, 4]);
        // Whole texts are compared as such.
        assert_eq!(agreed(Metric::ExactMatch, AnswerForm::Whole, &pairs).prompts, [5]);
    }

    #[test]
    fn an_answer_without_the_client_s_mark_is_not_learned() {
        let pairs = [["#### 4", "4"], ["4", "it is #### 4"], ["4", "4"]];
        assert_eq!(agreed(Metric::ExactMatch, AnswerForm::AfterHashes, &pairs).prompts, [1, 2]);
    }

    #[test]
    fn of_summaries_the_upper_half_agrees() {
        let pairs = [
            ["ann meets bob at noon", "bob meets ann at noon"],
            ["ann meets bob", "the train is late"],
            ["ann is late", "ann is late today"],
            ["cut", "ann meets bob"],
            ["rain", "snow"],
        ];
        let found = agreed(Metric::Rouge1, AnswerForm::AfterHashes, &pairs);
        assert_eq!(found.prompts, [0, 2]);
        // 1, 0, 6/7 and 0 of the four that both ended.
        assert!((found.rouge1.unwrap() - (1.0 + 6.0 / 7.0) / 4.0).abs() < 1e-9, "{found:?}");
        // Nothing in common is never agreement, whatever the half would be.
        assert_eq!(agreed(Metric::Rouge1, AnswerForm::Whole, &pairs[4..]).prompts, [0; 0]);
        let none = agreed(Metric::Rouge1, AnswerForm::Whole, &[]);
        assert_eq!(none, Agreement { prompts: vec![], rouge1: Some(0.0) });
    }
}
