//! What the tests of CUDA operations share: one case, run by the CPU in f64 and by the
//! device in f32 and in bf16, in several orders of threads and under the race checker.

use gradtx_emulator::record;
use gradtx_emulator::{
    Order, Schedule, Variant, configure, cublaslt, device, device_with, on_device, schedules,
};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::Cuda;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Buffer, Device, Elem, Real, Result, bf16};

/// The type that a case's inputs can be held in, whatever type it is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
}

/// Where a case's inputs come from: random numbers, the same for the CPU and the device.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    precision: Precision,
}

impl Inputs {
    /// Those that this precision can hold.
    pub fn new(precision: Precision) -> Self {
        Self { precision }
    }

    /// `len` normal random numbers of activations' and weights' type, others for every name.
    pub fn values<X: Real>(&self, name: &str, len: usize) -> Vec<X> {
        let round = |x: f64| match self.precision {
            Precision::F32 => x as f32 as f64,
            Precision::Bf16 => bf16::from_f64(x).to_f64(),
        };
        random(name, len).into_iter().map(|x| X::from_f64(round(x))).collect()
    }

    /// The same of the accumulators' type.
    pub fn sums<A: Real>(&self, name: &str, len: usize) -> Vec<A> {
        random(name, len).into_iter().map(|x| A::from_f64(x as f32 as f64)).collect()
    }
}

/// `len` normal random numbers.
pub fn random(name: &str, len: usize) -> Vec<f64> {
    let mut stream = Stream::new(derive_named(2028, name));
    (0..len).map(|_| stream.normal()).collect()
}

/// `len` random integers below `n`.
pub fn random_ids(name: &str, len: usize, n: usize) -> Vec<u32> {
    let mut stream = Stream::new(derive_named(2029, name));
    (0..len).map(|_| stream.below(n) as u32).collect()
}

/// What an output that is assigned holds before.
pub fn nan<X: Real>(len: usize) -> Vec<X> {
    vec![X::from_f64(f64::NAN); len]
}

/// Named results, as numbers.
#[derive(Debug, Default, PartialEq)]
pub struct Results(Vec<(String, Vec<f64>)>);

impl Results {
    /// Takes a buffer's values from the device.
    pub fn take<D: Device, X: Real>(&mut self, device: &D, name: &str, buf: &D::Buf<X>) -> Result<()> {
        let values = device.to_host(buf.all())?;
        self.0.push((name.into(), values.iter().map(|x| x.to_f64()).collect()));
        Ok(())
    }

    /// The same of rows at a stride; what lies between them must still be NaN.
    pub fn take_rows<D: Device, X: Real>(
        &mut self,
        device: &D,
        name: &str,
        buf: &D::Buf<X>,
        cols: usize,
        stride: usize,
    ) -> Result<()> {
        let values = device.to_host(buf.all())?;
        let mut rows = Vec::new();
        for row in values.chunks(stride) {
            let used = cols.min(row.len());
            rows.extend(row[..used].iter().map(|x| x.to_f64()));
            assert!(row[used..].iter().all(|x| x.to_f64().is_nan()), "`{name}` was written between rows");
        }
        self.0.push((name.into(), rows));
        Ok(())
    }

    /// Adds what a test has put together.
    pub fn add(&mut self, name: &str, values: Vec<f64>) {
        self.0.push((name.into(), values));
    }

    /// Takes integers.
    pub fn take_ids<D: Device>(&mut self, device: &D, name: &str, buf: &D::Buf<u32>) -> Result<()> {
        let values = device.to_host(buf.all())?;
        self.0.push((name.into(), values.into_iter().map(f64::from).collect()));
        Ok(())
    }
}

/// A call of an operation that can be made on any device, in any type.
pub trait Case {
    /// Runs it, and takes all its outputs.
    fn run<D: Backend<X>, X: Real>(&self, device: &D, inputs: Inputs) -> Result<Results>;
}

/// Largest error that is taken for rounding. Norms are compared, and single elements against
/// their own size and the root mean square of all.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub f32: f64,
    pub bf16: f64,
}

impl Tolerance {
    /// Results of one rounding to X at the end, and sums of a few hundred terms in f32.
    pub const ROUNDING: Self = Self { f32: 1e-6, bf16: 4e-3 };
}

/// The largest relative error of an output.
///
/// # Errors
/// Why `found` is not `expected`.
pub fn difference(found: &Results, expected: &Results, tolerance: f64) -> std::result::Result<f64, String> {
    if found.0.len() != expected.0.len() {
        return Err("another number of outputs".into());
    }
    let mut worst = 0.0f64;
    for ((name, found), (_, expected)) in found.0.iter().zip(&expected.0) {
        if found.len() != expected.len() {
            return Err(format!("`{name}` has {} elements, not {}", found.len(), expected.len()));
        }
        let square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let norm = square(expected).sqrt();
        let errors: Vec<f64> = found.iter().zip(expected).map(|(f, e)| f - e).collect();
        let error = square(&errors).sqrt();
        // NaN is not within anything.
        let within = error <= tolerance * norm;
        if !within {
            return Err(format!("`{name}`: relative error {:e} above {tolerance:e}", error / norm));
        }
        if norm > 0.0 {
            worst = worst.max(error / norm);
        }
        let typical = norm / (expected.len() as f64).sqrt();
        for (i, (error, expected)) in errors.iter().zip(expected).enumerate() {
            let within = error.abs() <= 4.0 * tolerance * (expected.abs() + typical);
            if !within {
                return Err(format!("`{name}`[{i}] is {}, not {expected}", found[i]));
            }
        }
    }
    Ok(worst)
}

/// The schedules that every case runs in: three orders, and one of them under the race checker.
pub const SCHEDULES: [Schedule; 4] = [
    Schedule { order: Order::Forward, race: false },
    Schedule { order: Order::Reverse, race: false },
    Schedule { order: Order::Random(7), race: false },
    Schedule { order: Order::Random(8), race: true },
];

/// The case on the device, in one schedule and type: its error, or what is wrong.
pub fn attempt<X: Real>(
    case: &impl Case,
    cuda: &Cuda,
    schedule: Schedule,
    precision: Precision,
    tolerance: f64,
) -> std::result::Result<f64, String>
where
    Cuda: Backend<X>,
{
    let inputs = Inputs::new(precision);
    let expected = case.run::<Cpu, f64>(&Cpu::new(1), inputs).map_err(|e| format!("on the CPU: {e}"))?;
    configure(schedule);
    let found = case.run::<Cuda, X>(cuda, inputs).map_err(|e| e.to_string())?;
    difference(&found, &expected, tolerance)
}

/// Fails unless the device agrees with the CPU in one schedule, in both types.
fn check_on(name: &str, case: &impl Case, cuda: &Cuda, schedule: Schedule, tolerance: Tolerance) {
    let f32 = attempt::<f32>(case, cuda, schedule, Precision::F32, tolerance.f32);
    let bf16 = attempt::<bf16>(case, cuda, schedule, Precision::Bf16, tolerance.bf16);
    for (dtype, bound, found) in [("f32", tolerance.f32, f32), ("bf16", tolerance.bf16, bf16)] {
        record(name, dtype, *found.as_ref().unwrap_or(&f64::INFINITY), bound);
        found.unwrap_or_else(|why| panic!("{name} in {dtype}, {schedule:?}: {why}"));
    }
}

/// Fails unless the device agrees with the CPU, in both types and all schedules.
pub fn check(name: &str, case: &impl Case, tolerance: Tolerance) {
    let plain = device(Variant::PLAIN);
    for &schedule in schedules(&SCHEDULES) {
        match schedule.race {
            false => check_on(name, case, &plain, schedule, tolerance),
            true => check_on(name, case, &device(Variant { race: true, plant: None }), schedule, tolerance),
        }
    }
}

/// Fails unless the device with cuBLASLt agrees with the CPU, in both types.
pub fn check_with_library(name: &str, case: &impl Case, tolerance: Tolerance) {
    if on_device() && cublaslt().describe().is_err() {
        return; // A machine may have a GPU and no cuBLASLt.
    }
    let cuda = device_with(Variant::PLAIN, &cublaslt());
    assert!(cuda.gemm_backend().starts_with("cuBLASLt 1"), "{}", cuda.gemm_backend());
    check_on(&format!("{name} by cuBLASLt"), case, &cuda, SCHEDULES[0], tolerance);
}

/// A buffer with these values.
pub fn put<D: Device, T: Elem>(device: &D, values: &[T]) -> Result<D::Buf<T>> {
    device.buffer_from(values)
}

/// Contiguous rows at a stride, NaN between them; the last row ends at its last value.
pub fn spread<X: Real>(packed: &[X], cols: usize, stride: usize) -> Vec<X> {
    let mut out = nan(packed.len() / cols * stride + cols - stride);
    for (i, row) in packed.chunks(cols).enumerate() {
        out[i * stride..][..cols].copy_from_slice(row);
    }
    out
}
