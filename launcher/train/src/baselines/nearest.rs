//! The teacher of the shadow student that points in the most similar direction from the mean
//! student.

use super::baseline::{About, Baseline, Kind, Pairs, mean_of};
use anyhow::{Result, ensure};
use rayon::prelude::*;

/// The teacher of the student whose difference from the mean student has the largest
/// cosine with the client's.
pub struct Nearest;

impl Baseline for Nearest {
    fn about(&self) -> &'static About {
        &About {
            name: "nearest",
            help: "The LLM's update of the shadow pair whose TinyLM update is the most similar",
            label: "nearest shadow",
            kind: Kind::Rival,
            called: "the nearest shadow pair",
            what: "The LLM's update of the nearest shadow pair",
            as_good: "Looking up a shadow pair is enough here: this does not show that translation takes a \
                      transformer.",
            worse: "looking up a shadow pair is not enough",
        }
    }

    fn translate(&self, pairs: &dyn Pairs, client: &[f32]) -> Result<Vec<f32>> {
        let all: Vec<usize> = (0..pairs.count()).collect();
        let center = mean_of(&all, |pair| pairs.student(pair))?;
        let similarity = |pair: usize| -> Result<f64> {
            let student = pairs.student(pair)?;
            ensure!(
                student.len() == client.len(),
                "the update has {} values, the TinyLM's shadow updates have {}",
                client.len(),
                student.len()
            );
            let (mut dot, mut norm) = (0.0, 0.0);
            for ((&s, &c), &m) in student.iter().zip(client).zip(&center) {
                let (s, c) = ((s - m) as f64, (c - m) as f64);
                dot += s * c;
                norm += s * s;
            }
            Ok(dot / norm.sqrt().max(f64::MIN_POSITIVE))
        };
        let scores = all.into_par_iter().map(similarity).collect::<Result<Vec<f64>>>()?;
        // The first of equals, so that the choice is the same everywhere.
        let best = (0..scores.len()).reduce(|best, i| if scores[i] > scores[best] { i } else { best });
        pairs.teacher(best.ok_or_else(|| anyhow::anyhow!("there is no shadow pair"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::baseline::tests::linear_world;

    #[test]
    fn nearest_returns_the_teacher_of_a_shadow_student() {
        let (pairs, _) = linear_world();
        for (student, teacher) in pairs.0.iter().take(5) {
            assert_eq!(&Nearest.translate(&pairs, student).unwrap(), teacher);
        }
        assert!(Nearest.translate(&pairs, &[1.0]).is_err());
    }
}
