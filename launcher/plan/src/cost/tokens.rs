//! Lengths of examples, which is all that the cost of fine-tuning depends on.
//!
//! In: the public data and a model's tokenizer where they are there, else numbers from the
//! command line. Out: [`Lengths`], and the [`Mean`] example of any of its rows.

use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::config::Config;
use gradtx_run::failure::failed;
use gradtx_train::examples::Data;
use gradtx_train::prompts::Prompts;
use std::path::Path;

/// An example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Tokens.
    pub tokens: usize,
    /// Tokens that are trained on.
    pub labels: usize,
}

/// An example on average.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    /// Tokens, n.
    pub tokens: f64,
    /// Pairs of a token and one that it attends to, n(n + 1)/2: their mean is more than that
    /// of the mean length.
    pub pairs: f64,
    /// Tokens that are trained on.
    pub labels: f64,
}

/// The examples of a data set, as one model sees them.
#[derive(Clone, Debug)]
pub struct Lengths {
    rows: Vec<Length>,
    /// Where they are from, for people.
    pub source: String,
    /// They were counted, and not guessed.
    pub counted: bool,
}

impl Lengths {
    /// Examples that all have the same length.
    pub fn uniform(tokens: usize, labels: usize) -> Self {
        let source = format!("{tokens} tokens per example, {labels} of them trained on");
        Self { rows: vec![Length { tokens, labels }], source, counted: false }
    }

    /// The examples of a file as the model in `dir` sees them.
    pub(crate) fn of_data(data: &Data, config: &Config, dir: &Path, threads: usize) -> Result<Self> {
        if !dir.join("tokenizer.json").is_file() {
            let what = format!("{}: there is no tokenizer.json", dir.display());
            return Err(failed(what, "give --tokens-per-example to plan without a tokenizer"));
        }
        let prompts = Prompts::new(&config.data, dir, &DecoderConfig::read(dir)?, data.records.first())?;
        let (set, warnings) = prompts.examples(&data.records, threads)?;
        let of = |e: &gradtx_runtime::data::Example| Length { tokens: e.tokens.len(), labels: e.labels() };
        let mut source = set.summary.to_string();
        warnings.iter().for_each(|warning| source += &format!("; warning: {warning}"));
        Ok(Self { rows: set.examples.iter().map(of).collect(), source, counted: true })
    }

    /// Examples of these (tokens, labels).
    #[cfg(test)]
    pub(crate) fn of_rows(rows: Vec<(usize, usize)>) -> Self {
        let source = format!("{} examples", rows.len());
        let rows = rows.into_iter().map(|(tokens, labels)| Length { tokens, labels }).collect();
        Self { rows, source, counted: true }
    }

    /// The mean over some rows, or over all of them. Rows of uniform lengths are all alike.
    pub fn mean(&self, rows: Option<&[usize]>) -> Mean {
        let all = || self.rows.iter();
        match rows.filter(|_| self.counted) {
            Some(rows) => mean(rows.iter().filter_map(|&row| self.rows.get(row))),
            None => mean(all()),
        }
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.rows.iter().map(|row| row.tokens).max().unwrap_or(1)
    }

    /// The mean prompt: an example without what is trained on.
    pub fn prompt(&self) -> Mean {
        let prompts: Vec<Length> =
            self.rows.iter().map(|r| Length { tokens: (r.tokens - r.labels).max(1), labels: 0 }).collect();
        mean(prompts.iter())
    }
}

fn mean<'a>(rows: impl Iterator<Item = &'a Length>) -> Mean {
    let (mut sum, mut count) = (Mean::default(), 0.0f64);
    for row in rows {
        let n = row.tokens as f64;
        sum.tokens += n;
        sum.pairs += n * (n + 1.0) / 2.0;
        sum.labels += row.labels as f64;
        count += 1.0;
    }
    let count = count.max(1.0);
    Mean { tokens: sum.tokens / count, pairs: sum.pairs / count, labels: sum.labels / count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_over_the_rows_asked_for() {
        let lengths = Lengths::of_rows(vec![(3, 1), (5, 2), (10, 4)]);
        assert_eq!(lengths.mean(Some(&[0, 1])), Mean { tokens: 4.0, pairs: 10.5, labels: 1.5 });
        assert_eq!(lengths.mean(None).tokens, 6.0);
        assert_eq!(lengths.longest(), 10);
        assert_eq!(
            lengths.prompt(),
            Mean { tokens: 11.0 / 3.0, pairs: (3.0 + 6.0 + 21.0) / 3.0, labels: 0.0 }
        );
        let all_alike = Lengths::uniform(7, 2);
        assert_eq!(all_alike.mean(Some(&[500])), all_alike.mean(None));
        assert!(!all_alike.counted);
    }
}
