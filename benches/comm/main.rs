//! Bandwidth between ranks: sums and gathers over sizes and numbers of ranks.
//!
//! ```text
//! cargo bench -p gradtx-benches --bench comm [--features mpi] -- [--ranks 1,2,4] [--bytes 4096,…] [--runs N]
//! ```
//!
//! Ranks are threads of one process (`local`) and, with the feature `mpi`, processes: the
//! program starts itself under mpirun. Under `srun` or `mpirun` it measures the ranks that
//! it was started with instead, also on several nodes.
//!
//! One line of JSON each. `bytes` is the whole vector, f32; a call takes as long as its
//! slowest rank. `gb_per_s` is bytes by time; `wire_gb_per_s` is what one rank sends by
//! time, which can be held against the network's rate: (N − 1)/N of the bytes for
//! reduce-scatter and all-gather, twice that for all-reduce.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gradtx_benches::median;
use gradtx_runtime::comm::{Collectives, Comm, Launch, local};
use serde_json::json;
use std::time::Instant;

/// What to measure, and how often.
#[derive(Parser)]
struct Args {
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    ranks: Vec<usize>,
    /// Sizes of the whole vector.
    #[arg(long, value_delimiter = ',', default_values_t = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20])]
    bytes: Vec<usize>,
    /// Calls that are counted; one more comes before them.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// What cargo passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.runs > 0 && !args.ranks.contains(&0), "--runs and --ranks begin at 1");
    if Launch::find().is_some() {
        return among_processes(&args);
    }
    for &size in &args.ranks {
        std::thread::scope(|scope| -> Result<()> {
            let measure = |comm| measure(&comm, "local", &args);
            let ranks: Vec<_> = local(size).into_iter().map(|c| scope.spawn(move || measure(c))).collect();
            ranks.into_iter().try_for_each(|rank| rank.join().expect("measuring does not panic"))
        })?;
        if cfg!(feature = "mpi") {
            under_mpirun(size)?;
        }
    }
    Ok(())
}

/// Starts this program again as `size` processes, with the same arguments.
fn under_mpirun(size: usize) -> Result<()> {
    let mut command = std::process::Command::new("mpirun");
    command.args(["-n", &size.to_string()]).arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
    // Ranks may be more than cores, and the user the only one of a container.
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        ("OMPI_MCA_mpi_yield_when_idle", "1"),
    ] {
        if std::env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    let status = command.status().context("cannot start mpirun")?;
    ensure!(status.success(), "mpirun -n {size}: {status}");
    Ok(())
}

#[cfg(feature = "mpi")]
fn among_processes(args: &Args) -> Result<()> {
    measure(&gradtx_runtime::comm::Mpi::init()?, "mpi", args)
}

#[cfg(not(feature = "mpi"))]
fn among_processes(_args: &Args) -> Result<()> {
    anyhow::bail!("this benchmark was built without the feature `mpi`")
}

/// Measures every operation and size; rank 0 prints.
fn measure(comm: &dyn Comm, over: &str, args: &Args) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    for &bytes in &args.bytes {
        // So many that ranks can share them evenly.
        let share = (bytes / size_of::<f32>()).div_ceil(size);
        let mut whole: Vec<f32> = (0..share * size).map(|i| (i % 97) as f32 + rank as f32).collect();
        let mut part = vec![1.0f32; share];
        let others = (size - 1) as f64 / size as f64;
        timed(comm, args, over, "all-reduce", whole.len(), 2.0 * others, || comm.all_reduce_sum(&mut whole))?;
        timed(comm, args, over, "reduce-scatter", whole.len(), others, || {
            comm.reduce_scatter_sum(&whole, &mut part)
        })?;
        timed(comm, args, over, "all-gather", whole.len(), others, || comm.all_gather(&part, &mut whole))?;
    }
    Ok(())
}

fn timed(
    comm: &dyn Comm,
    args: &Args,
    over: &str,
    name: &str,
    values: usize,
    sent: f64,
    mut call: impl FnMut() -> gradtx_runtime::Result<()>,
) -> Result<()> {
    let mut seconds = Vec::with_capacity(args.runs);
    for run in 0..=args.runs {
        comm.barrier()?;
        let begin = Instant::now();
        call()?;
        let own = begin.elapsed().as_secs_f64();
        let mut all = vec![0.0; comm.size()];
        comm.all_gather(&[own], &mut all)?;
        if run > 0 {
            seconds.push(all.into_iter().fold(0.0, f64::max));
        }
    }
    if comm.rank() == 0 {
        let bytes = values * size_of::<f32>();
        let median = median(&mut seconds);
        let rate = bytes as f64 / median / 1e9;
        let line = json!({
            "name": name,
            "over": over,
            "ranks": comm.size(),
            "ranks_per_node": comm.place().local_size,
            "bytes": bytes,
            "median_s": rounded(median),
            "fastest_s": rounded(seconds[0]),
            "gb_per_s": rounded(rate),
            "wire_gb_per_s": rounded(rate * sent),
            "runs": args.runs,
        });
        println!("{line}");
    }
    Ok(())
}

/// Four significant digits.
fn rounded(x: f64) -> f64 {
    format!("{x:.3e}").parse().expect("a number in scientific notation is a number")
}
