//! From rendered text to [`Example`]s, and a summary of them before training starts.

use super::batch::Example;
use super::prompt::{Rendered, Renderer};
use super::schema::{Content, Record};
use super::tokenize::{TextTokenizer, Tokens};
use crate::Result;
use std::fmt;
use std::ops::Range;

/// Examples of a data set and what there is to say about them.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// One per record, in order.
    pub examples: Vec<Example>,
    /// What they are like.
    pub summary: DataSummary,
}

/// Token counts of a data set.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct DataSummary {
    /// Examples.
    pub examples: usize,
    /// Tokens in all.
    pub tokens: usize,
    /// Tokens that are trained on.
    pub trained: usize,
    /// Tokens of the shortest example.
    pub shortest: usize,
    /// Half of the examples have at most this many tokens.
    pub median: usize,
    /// 95 of 100 examples have at most this many tokens.
    pub p95: usize,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Examples that were cut at the maximum length.
    pub truncated: usize,
    /// Where the first of them stands, and how long it is.
    pub first_cut: Option<String>,
    /// Tokens that would be trained on and were cut off.
    pub lost_labels: usize,
    /// Tokens of what the tokenizer does not know.
    pub unknown: usize,
    /// Examples in which one token spans the end of the prompt and the begin of the
    /// answer: it is trained on, but generation starts from other tokens.
    pub straddling: usize,
}

impl DataSummary {
    /// Trained tokens as a share of all.
    pub fn trained_share(&self) -> f64 {
        self.trained as f64 / self.tokens.max(1) as f64
    }

    /// Cut-off labels as a share of all.
    pub fn lost_share(&self) -> f64 {
        self.lost_labels as f64 / (self.trained + self.lost_labels).max(1) as f64
    }
}

impl fmt::Display for DataSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} examples, {} tokens ({} to {}, median {}, 95 % at most {}), {:.1} % trained on",
            self.examples,
            self.tokens,
            self.shortest,
            self.longest,
            self.median,
            self.p95,
            100.0 * self.trained_share()
        )?;
        if self.truncated > 0 {
            write!(f, "; {} cut at the maximum length", self.truncated)?;
            if let Some(first) = &self.first_cut {
                write!(f, " (first: {first})")?;
            }
        }
        if self.straddling > 0 {
            write!(f, "; in {} a token spans prompt and answer", self.straddling)?;
        }
        if self.unknown > 0 {
            write!(f, "; {} tokens are unknown to the tokenizer", self.unknown)?;
        }
        Ok(())
    }
}

/// One example and what happened to it.
struct Built {
    example: Example,
    /// Where it stands and how long it was, if it was cut.
    cut: Option<String>,
    /// Labels that were cut off.
    lost: usize,
    straddling: bool,
    unknown: usize,
}

/// Renders and tokenizes records; `max_length` tokens of each are kept. `threads`
/// share the work; the result does not depend on their number.
pub fn build_examples(
    records: &[Record],
    renderer: &Renderer,
    tokenizer: &TextTokenizer,
    max_length: Option<usize>,
    threads: usize,
) -> Result<Dataset> {
    let share = records.len().div_ceil(threads.max(1)).max(1);
    let part = |records: &[Record]| -> Result<Vec<Built>> {
        let one = |record| {
            let rendered = renderer.render(record)?;
            let earlier = earlier_answers(record, renderer, &rendered)?;
            build(record, &rendered, &earlier, tokenizer, max_length)
        };
        records.iter().map(one).collect()
    };
    let built: Vec<Built> = std::thread::scope(|scope| {
        let workers: Vec<_> = records.chunks(share).map(|r| scope.spawn(move || part(r))).collect();
        let parts: Result<Vec<_>> =
            workers.into_iter().map(|w| w.join().expect("tokenizing does not panic")).collect();
        parts.map(|parts| parts.into_iter().flatten().collect())
    })?;
    Ok(Dataset { summary: summarise(&built), examples: built.into_iter().map(|b| b.example).collect() })
}

/// The tokens that generation starts from.
pub fn prompt_tokens(record: &Record, renderer: &Renderer, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    let ids = tokenizer.encode(renderer.render(record)?.prompt())?.ids;
    if ids.is_empty() { Err(record.origin.error("its prompt has no tokens")) } else { Ok(ids) }
}

/// Bytes of the text at which answers before the last stand, for conversations of which
/// these are learned as well.
fn earlier_answers(record: &Record, renderer: &Renderer, rendered: &Rendered) -> Result<Vec<Range<usize>>> {
    let Content::Chat(messages) = &record.content else { return Ok(vec![]) };
    let range = |&at: &usize| {
        let until = Record { content: Content::Chat(messages[..=at].to_vec()), ..record.clone() };
        let part = renderer.render(&until)?;
        if !rendered.text.starts_with(&part.text) {
            return Err(record.origin.error(format!(
                "the prompt form writes message {at} differently once others follow, so it cannot be learned; set \
                 data.train_on = \"last\", or choose another prompt form"
            )));
        }
        Ok(part.answer..part.text.len())
    };
    record.learned.iter().map(range).collect()
}

fn build(
    record: &Record,
    rendered: &Rendered,
    earlier: &[Range<usize>],
    tokenizer: &TextTokenizer,
    max_length: Option<usize>,
) -> Result<Built> {
    let full = tokenizer.encode(&rendered.text)?;
    let prompt = tokenizer.encode(rendered.prompt())?;
    let (first, straddling) = answer_start(&full, &prompt.ids, rendered.answer);
    let keep = full.ids.len().min(max_length.unwrap_or(usize::MAX));
    let mut trained: Vec<bool> = (0..full.ids.len()).map(|i| i >= first).collect();
    for answer in earlier {
        let inside = |&(start, end): &(usize, usize)| start < answer.end && end > answer.start;
        trained.iter_mut().zip(&full.spans).for_each(|(trained, span)| *trained |= inside(span));
    }
    let mut tokens = full.ids;
    let whole = tokens.len();
    let labels = trained.iter().filter(|&&is| is).count();
    trained.truncate(keep);
    tokens.truncate(keep);
    let example = Example { tokens, trained };
    if example.labels() > 0 {
        let cut = (keep < whole).then(|| format!("{}, {whole} tokens", record.origin));
        let unknown = example.tokens.iter().filter(|&&id| Some(id) == tokenizer.unknown()).count();
        let lost = labels - example.labels();
        return Ok(Built { example, cut, lost, straddling, unknown });
    }
    Err(record.origin.error(if keep < whole {
        format!("cut at {keep} of {whole} tokens, no token of its answer is left (its prompt has {first})")
    } else {
        "its answer has no token to train on".into()
    }))
}

/// The first token of the answer: the one after the prompt's tokens. Where the text is
/// tokenized otherwise once the answer follows, the first that reaches into the
/// answer; true if it also holds some of the prompt.
fn answer_start(full: &Tokens, prompt: &[u32], answer: usize) -> (usize, bool) {
    if full.ids.starts_with(prompt) {
        return (prompt.len(), false);
    }
    let first = full.spans.iter().position(|&(_, end)| end > answer).unwrap_or(full.ids.len());
    (first, full.spans.get(first).is_some_and(|&(start, _)| start < answer))
}

fn summarise(built: &[Built]) -> DataSummary {
    let mut lengths: Vec<usize> = built.iter().map(|b| b.example.tokens.len()).collect();
    lengths.sort_unstable();
    let at = |share: f64| {
        let place = (share * lengths.len() as f64).ceil() as usize;
        lengths.get(place.max(1) - 1).copied().unwrap_or(0)
    };
    DataSummary {
        examples: built.len(),
        tokens: lengths.iter().sum(),
        trained: built.iter().map(|b| b.example.labels()).sum(),
        shortest: at(0.0),
        median: at(0.5),
        p95: at(0.95),
        longest: at(1.0),
        truncated: built.iter().filter(|b| b.cut.is_some()).count(),
        first_cut: built.iter().find_map(|b| b.cut.clone()),
        lost_labels: built.iter().map(|b| b.lost).sum(),
        unknown: built.iter().map(|b| b.unknown).sum(),
        straddling: built.iter().filter(|b| b.straddling).count(),
    }
}

/// Fails when a token of a record is outside the model's vocabulary, which is the rows of
/// its embedding: tokenizer and model do not belong together, or a token was added to the
/// one and not to the other.
pub fn expect_vocabulary(
    record: &Record,
    tokens: &[u32],
    tokenizer: &TextTokenizer,
    vocabulary: usize,
) -> Result<()> {
    let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocabulary) else { return Ok(()) };
    let token = tokenizer.token(id).unwrap_or_default();
    Err(record.origin.error(format!(
        "token {id} ({token:?}) of the tokenizer is outside the model's vocabulary of {vocabulary} (rows of its \
         embedding); take the tokenizer.json that belongs to this model, or a model whose embedding was \
         enlarged for the added tokens"
    )))
}

#[cfg(test)]
mod tests {
    use super::super::prompt::tests::pair;
    use super::super::prompt::{PromptForm, Renderer};
    use super::super::schema::Message;
    use super::super::tokenize::tests::{merging, words};
    use super::*;

    fn built(records: &[Record], max_length: Option<usize>) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = words(dir.path(), &["?", " ", "a", "b", "c"]);
        let renderer = Renderer::new(PromptForm::Plain, &tokenizer).unwrap();
        build_examples(records, &renderer, &tokenizer, max_length, 2)
    }

    #[test]
    fn labels_stand_on_the_answer_only() {
        let data = built(&[pair("a b ", "c<eos>"), pair("b", " a c b<eos>"), pair("a ", "c")], None).unwrap();
        assert_eq!(data.examples[0].tokens, [5, 4, 6, 4, 7, 2]);
        assert_eq!(data.examples[0].trained, [false, false, false, false, true, true]);
        assert_eq!(data.examples[1].trained.iter().filter(|&&t| t).count(), 7);
        let want = DataSummary {
            examples: 3,
            tokens: 17,
            trained: 10,
            shortest: 3,
            median: 6,
            p95: 8,
            longest: 8,
            ..Default::default()
        };
        assert_eq!(data.summary, want);
        assert!(data.summary.to_string().contains("58.8 % trained"), "{}", data.summary);
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = words(dir.path(), &["?", " ", "a", "b", "c"]);
        let outside =
            |size| expect_vocabulary(&pair("a b ", "c<eos>"), &data.examples[0].tokens, &tokenizer, size);
        assert!(outside(8).is_ok());
        let message = outside(7).unwrap_err().to_string();
        for word in ["token 7 (\"c\")", "d.jsonl:4", "vocabulary of 7"] {
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn all_answers_of_a_conversation_can_be_learned() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = words(dir.path(), &["?", "a", "b", "c", "d"]);
        let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
        let messages = turns.map(|(role, text)| Message { role: role.into(), content: text.into() });
        let mut record = Record { content: Content::Chat(messages.to_vec()), ..pair("", "") };
        let texts = |record: &Record| {
            let renderer = Renderer::new(PromptForm::ChatMl, &tokenizer).unwrap();
            let rendered = renderer.render(record).unwrap();
            let ranges = earlier_answers(record, &renderer, &rendered).unwrap();
            let earlier: Vec<String> =
                ranges.into_iter().map(|range| rendered.text[range].to_string()).collect();
            let data = build_examples(std::slice::from_ref(record), &renderer, &tokenizer, None, 1).unwrap();
            (earlier, data.examples[0].labels())
        };
        let (none, last) = texts(&record);
        assert!(none.is_empty());
        record.learned = vec![1];
        let (earlier, both) = texts(&record);
        assert_eq!(earlier, ["b<|im_end|>"]);
        assert_eq!(both, 2 * last);
    }

    #[test]
    fn truncation_that_leaves_no_label_names_the_example() {
        let data = built(&[pair("a b ", "c<eos>")], Some(5)).unwrap();
        assert_eq!((data.examples[0].labels(), data.summary.truncated), (1, 1));
        assert_eq!((data.summary.lost_labels, data.summary.lost_share()), (1, 0.5));
        assert!(data.summary.to_string().contains("d.jsonl:4, 6 tokens"), "{}", data.summary);
        let message = built(&[pair("a b ", "c<eos>")], Some(4)).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4") && message.contains("cut at 4 of 6"), "{message}");
        let message = built(&[pair("a b", "")], None).unwrap_err().to_string();
        assert!(message.contains("d.jsonl:4") && message.contains("no token"), "{message}");
    }

    #[test]
    fn tokens_across_the_border_are_trained_on() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = merging(dir.path());
        let renderer = Renderer::new(PromptForm::Plain, &tokenizer).unwrap();
        let data = build_examples(&[pair("ca", "bc")], &renderer, &tokenizer, None, 1).unwrap();
        assert_eq!(data.examples[0].tokens, [3, 2, 3]);
        assert_eq!(data.examples[0].trained, [false, true, true]);
        assert_eq!(data.summary.straddling, 1);
        assert_eq!(prompt_tokens(&pair("ca", "bc"), &renderer, &tokenizer).unwrap(), [3, 0]);
        assert!(prompt_tokens(&pair("", "bc"), &renderer, &tokenizer).is_err());
    }
}
