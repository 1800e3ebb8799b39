//! [`JobCheckpoint`]: a group of shadow jobs that was stopped on its way, to be resumed later.
//!
//! In: adapters, their moments, and what the jobs have given so far. Out: one checkpoint file,
//! and from it the same again, bit by bit. Which examples a step has, and dropout, are
//! functions of the step, so nothing else is needed.

use crate::lora::trainer::JobResult;
use anyhow::Result;
use gradtx_kernels::{Backend, Buffer, Real};
use gradtx_models::lora::MultiLora;
use gradtx_runtime::checkpoint::{self, Checkpoint, Values};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// Where a group's work is checkpointed.
pub struct JobCheckpoint {
    /// The file.
    pub path: PathBuf,
    /// What the work is, settings and inputs: work of anything else is not resumed.
    pub of: Value,
    /// How often, beside when it is stopped.
    pub every: Duration,
}

impl JobCheckpoint {
    /// Writes the state after `steps` steps.
    pub fn save<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        device: &D,
        adapters: &mut MultiLora<D, X>,
        steps: u32,
        trained: &[JobResult],
    ) -> Result<()> {
        let mut values = vec![];
        for job in 0..adapters.jobs() {
            values.extend(adapters.adapter(job)?);
        }
        let (first, second) = adapters.optimizer().moments();
        let (first, second) = (device.to_host(first.all())?, device.to_host(second.all())?);
        // As bits, since decimal numbers may lose their last one.
        let bits = |of: fn(&JobResult) -> &Vec<f64>| -> Vec<u64> {
            trained.iter().flat_map(of).map(|number| number.to_bits()).collect()
        };
        let (losses, norms) = (bits(|t| &t.losses), bits(|t| &t.grad_norms));
        let tokens: Vec<u64> = trained.iter().flat_map(|t| &t.tokens).copied().collect();
        let updates: Vec<f32> = trained.iter().flat_map(|t| &t.updates).copied().collect();
        let buffers = [
            ("adapters", Values::F32(&values)),
            ("first_moments", Values::F32(&first)),
            ("second_moments", Values::F32(&second)),
            ("losses", Values::U64(&losses)),
            ("grad_norms", Values::U64(&norms)),
            ("tokens", Values::U64(&tokens)),
            ("updates", Values::F32(&updates)),
        ];
        let state = json!({ "of": self.of, "steps": steps, "updates": updates.len() });
        Ok(checkpoint::save(&self.path, &buffers, &state)?)
    }

    /// Fills in what the checkpoint holds, and returns how many steps were done; none if there is
    /// nothing, or nothing that can be used: then the group begins again.
    pub fn restore<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        device: &D,
        adapters: &mut MultiLora<D, X>,
        trained: &mut [JobResult],
    ) -> Result<u32> {
        if !self.path.is_file() {
            return Ok(0);
        }
        let saved = match Checkpoint::load(&self.path) {
            Ok(saved) if saved.state()["of"] == self.of => saved,
            Ok(_) => return Ok(0),
            Err(error) => {
                tracing::warn!("{error}; these jobs start over");
                return Ok(0);
            }
        };
        let state = saved.state();
        let (steps, updates) = (state["steps"].as_u64(), state["updates"].as_u64());
        let (jobs, found) = (trained.len(), (saved.len_of("losses")?, saved.len_of("updates")?));
        // Older versions did not keep these.
        let [norms, tokens] = ["grad_norms", "tokens"].map(|name| saved.len_of(name).unwrap_or_default());
        // What is there, before room is made for what is claimed.
        let (Some(steps), Some(updates)) = (steps, updates) else { return Ok(0) };
        if (steps.checked_mul(jobs as u64), updates) != (Some(found.0 as u64), found.1 as u64)
            || [norms, tokens] != [found.0; 2]
        {
            tracing::warn!("{}: of other sizes than it says; these jobs start over", self.path.display());
            return Ok(0);
        }
        let mut values = vec![0.0; adapters.adapters_mut().len()];
        saved.read_f32("adapters", &mut values)?;
        device.upload(adapters.adapters_mut().all_mut(), &values)?;
        let (first, second) = adapters.optimizer().moments_mut();
        for (name, buffer) in [("first_moments", first), ("second_moments", second)] {
            saved.read_f32(name, &mut values)?;
            device.upload(buffer.all_mut(), &values)?;
        }
        let (mut losses, mut norms, mut tokens) = (vec![0; found.0], vec![0; found.0], vec![0; found.0]);
        saved.read_u64("losses", &mut losses)?;
        saved.read_u64("grad_norms", &mut norms)?;
        saved.read_u64("tokens", &mut tokens)?;
        let mut all = vec![0.0; updates as usize];
        saved.read_f32("updates", &mut all)?;
        for (job, trained) in trained.iter_mut().enumerate() {
            let part = |len: usize| job * (len / jobs)..(job + 1) * (len / jobs);
            let numbers =
                |bits: &[u64]| bits[part(bits.len())].iter().map(|&bits| f64::from_bits(bits)).collect();
            (trained.losses, trained.grad_norms) = (numbers(&losses), numbers(&norms));
            trained.tokens = tokens[part(tokens.len())].to_vec();
            trained.updates = all[part(all.len())].to_vec();
        }
        Ok(steps as u32)
    }
}
