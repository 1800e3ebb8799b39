//! What the benchmarks share: measuring a step several times, and telling where the
//! time went.

use anyhow::{Result, ensure};
use gradtx_kernels::cpu::Cpu;
use serde_json::{Value, json};
use std::time::Instant;

/// Measures `step` (which returns its loss) after `warmup` calls; prints a line of JSON
/// with the median, and the share of time of every operation in the runs measured.
pub fn measure(
    cpu: &Cpu,
    name: &str,
    tokens: usize,
    warmup: usize,
    runs: usize,
    mut step: impl FnMut() -> Result<f64>,
) -> Result<()> {
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..warmup + runs {
        if run == warmup {
            cpu.start_profile();
        }
        let begin = Instant::now();
        let loss = step()?;
        let took = begin.elapsed().as_secs_f64();
        ensure!(loss.is_finite(), "{name}: the loss is {loss}");
        if run >= warmup {
            seconds.push(took);
        }
    }
    let profile = cpu.stop_profile();
    let total: f64 = seconds.iter().sum();
    let mut ops: Vec<(&str, f64)> =
        profile.iter().map(|(op, t)| (*op, t.time.as_secs_f64() / total)).collect();
    ops.sort_by(|a, b| b.1.total_cmp(&a.1));
    let rest = 1.0 - ops.iter().map(|(_, share)| share).sum::<f64>();
    ops.push(("outside operations", rest));
    let shares: serde_json::Map<String, Value> =
        ops.iter().map(|(op, share)| (op.to_string(), json!(round(*share, 4)))).collect();
    let median = median(&mut seconds.clone());
    let line = json!({
        "name": name,
        "median_s": round(median, 4),
        "tokens_per_s": round(tokens as f64 / median, 2),
        "runs": seconds.iter().map(|&s| round(s, 4)).collect::<Vec<_>>(),
        "threads": cpu.threads(),
        "share_of_time": shares,
    });
    println!("{line}");
    Ok(())
}

/// The middle value (the mean of the two middle ones for an even number).
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

fn round(x: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (x * scale).round() / scale
}
