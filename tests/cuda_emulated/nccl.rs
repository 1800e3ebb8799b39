//! Values between the devices of several ranks. Ranks are threads of this process, each with a
//! device of its own; NCCL is the stand-in of `kernels/emu/nccl.cpp`. Either what devices exchange
//! is late, or the kernels before it are. On a machine with GPUs it is NCCL itself, with as many
//! ranks as there are GPUs.

use gradtx_emulator::{
    NcclFault, Order, Schedule, break_nccl, configure, device_of_rank, forget_waits, late_kernels, on_device,
    plant_nccl_fault,
};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::{Cuda, devices};
use gradtx_kernels::ops::{AdamWStep, Elementwise};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Buffer, Collective, Device, Elem, Real, Result, bf16};
use gradtx_models::grad_transformer::{GradTransformer, GradTransformerConfig, StartToken, Trainer, Tuples};
use gradtx_models::t5::T5Config;
use gradtx_runtime::comm::{Comm, Local, local};
use gradtx_runtime::parallel::{GradientSums, Shards};
use gradtx_runtime::params::ParamLayout;
use gradtx_train::translator::data_parallel::{DataParallel, LocalStep};
use std::ops::Range;

/// What every rank of `ranks` does, on a thread of its own.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Local) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let run = |rank| {
            scope.spawn(move || {
                configure(Schedule { order: Order::Forward, race: false });
                work(rank)
            })
        };
        let ranks: Vec<_> = local(ranks).into_iter().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

/// Numbers of ranks that there are devices for.
fn worlds() -> Vec<usize> {
    if on_device() { (1..=devices().expect("there are GPUs").len()).collect() } else { vec![1, 2, 3] }
}

fn random(name: &str, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(derive_named(31, name));
    (0..len).map(|_| stream.normal() as f32).collect()
}

/// Groups of odd sizes, with gaps between them: 1472 elements.
fn layout() -> ParamLayout {
    let mut layout = ParamLayout::new();
    for (i, len) in [130, 5, 700, 64, 333].into_iter().enumerate() {
        layout.push([(format!("{i}.a"), vec![len]), (format!("{i}.b"), vec![3])]);
    }
    layout
}

/// Sums that a rank owns in two steps, and all values after it has made its own out of them.
struct Exchanged {
    between_devices: bool,
    sums: Vec<f32>,
    values: Vec<f32>,
    narrow: Vec<bf16>,
}

fn exchange<D: Backend<f32>>(device: &D, comm: &Local, bucket: usize) -> Result<Exchanged> {
    let layout = layout();
    let (rank, total) = (comm.rank(), layout.total());
    let shards = Shards::new(&layout, comm.size(), bucket);
    let own = shards.owned(rank);
    let mut sums = GradientSums::new(comm, device, shards).expect("all ranks are there");
    let mut values = device.buffer_from(&random("values", total))?;
    let mut narrow = device.buffer_from(&vec![bf16::from_f64(0.5); total])?;
    let mut grads = device.zeros::<f32>(total)?;
    let mut found = Exchanged {
        between_devices: sums.is_between_devices(),
        sums: vec![],
        values: vec![],
        narrow: vec![],
    };
    for step in 0..2 {
        for param in layout.params().iter().rev() {
            let range = param.range();
            let part = device.buffer_from(&random(&format!("{rank} {step} {}", param.name), range.len()))?;
            // By a kernel, as gradients come.
            device.axpby(grads.view_mut(range.clone()), 3.0, part.all(), 0.0)?;
            sums.ready(device, &range, grads.all_mut()).expect("gradients in their order");
        }
        sums.finish(device, &mut grads).expect("all ranks send theirs");
        for range in &own {
            let part = grads.view(range.clone());
            found.sums.extend(device.to_host(part)?);
            device.axpby(values.view_mut(range.clone()), 1.0, part, 0.5)?;
            let rounded: Vec<bf16> = found.sums.iter().rev().map(|&x| bf16::from_f32(x)).collect();
            device.upload(narrow.view_mut(range.clone()), &rounded[..range.len()])?;
        }
        sums.gather(device, &mut values).expect("all ranks send theirs");
        sums.gather(device, &mut narrow).expect("all ranks send theirs");
    }
    assert!(sums.take_seconds() > 0.0);
    sums.close(device).expect("all ranks leave");
    found.values = device.to_host(values.all())?;
    found.narrow = device.to_host(narrow.all())?;
    Ok(found)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, d| if d <= worst { worst } else { d })
}

/// What ranks exchange between devices is what they exchange through the host.
fn assert_same(found: &[Exchanged], want: &[Exchanged], between_devices: bool) {
    for (rank, (found, want)) in found.iter().zip(want).enumerate() {
        assert_eq!(found.between_devices, between_devices, "rank {rank}");
        assert!(!want.between_devices);
        let sums = largest_difference(&found.sums, &want.sums);
        let values = largest_difference(&found.values, &want.values);
        assert!(sums <= 1e-5 && values <= 1e-5, "rank {rank}: sums differ by {sums}, values by {values}");
        assert!(on_device() || found.narrow == want.narrow, "rank {rank}: rounded values");
    }
    assert!(found.iter().all(|rank| rank.values == found[0].values && rank.narrow == found[0].narrow));
}

fn through_hosts(ranks: usize, bucket: usize) -> Vec<Exchanged> {
    on_ranks(ranks, |comm| exchange(&Cpu::new(1), &comm, bucket).expect("there is memory"))
}

/// With equal shares in all buckets, in all but the last, and in none.
#[test]
fn sums_and_values_are_those_through_the_hosts() {
    for ranks in worlds() {
        for bucket in [736, 200, 5000] {
            let want = through_hosts(ranks, bucket);
            for late in [false, true] {
                let own = |comm: Local| {
                    late_kernels(late);
                    exchange(&device_of_rank(comm.rank()), &comm, bucket).expect("memory")
                };
                assert_same(&on_ranks(ranks, own), &want, true);
            }
        }
    }
}

// ---- a training

fn translator_config() -> GradTransformerConfig {
    GradTransformerConfig {
        student_width: 40,
        student_blocks: 3,
        teacher_width: 50,
        teacher_blocks: 2,
        start_token: StartToken::Embedded,
        targets: Default::default(),
        t5: T5Config {
            d_model: 32,
            d_kv: 8,
            d_ff: 26,
            num_layers: 1,
            num_decoder_layers: 1,
            num_heads: 3,
            relative_attention_num_buckets: 8,
            relative_attention_max_distance: 5,
            layer_norm_epsilon: 1e-6,
            dropout_rate: 0.1,
        },
    }
}

/// Errors and norms of three steps, and all masters on rank 0, after a training of which this
/// rank has a part; and whether devices exchanged values.
fn train<X: Real<Acc = f32>>(device: &Cuda, comm: &Local) -> (bool, Vec<f64>, Vec<f32>)
where
    Cuda: Backend<X>,
{
    let config = translator_config();
    let mut model = GradTransformer::<Cuda, X>::random(device, config.clone(), 1).expect("memory");
    let mut ranks = DataParallel::new(comm, device, model.layout(), 5000).expect("all ranks are there");
    // Through the host, buckets take memory there.
    let between_devices = !format!("{:?}", ranks.plan(4)).contains("between ranks");
    let student = random("student", 5 * config.student_len());
    let teacher = random("teacher", 5 * config.teacher_len());
    let all = Tuples { student: &student, teacher: &teacher, keys: &[21, 22, 23, 24, 25] };
    let part = ranks.part(5);
    let mut trainer = Trainer::of_ranges(&mut model, 1, ranks.owned()).expect("memory");
    let mut numbers = vec![];
    for number in 1..=3 {
        let tuples = all.part(&config, part.start, part.end);
        let scale = 1.0 / (5 * config.teacher_len()) as f64;
        let error = ranks.gradients(&model, &mut trainer, tuples, scale).expect("gradients");
        ranks.finish_gradients(&model, &mut trainer).expect("all ranks are there");
        let squares = trainer.sum_squares(device).expect("squares");
        let local = LocalStep { error, squares, asked: None, due: false, written: 0 };
        let agreed = ranks.exchange(local).expect("all ranks are there");
        let step =
            AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: number };
        let norm = trainer.apply(&mut model, step, Some(1.0), agreed.squares).expect("finite");
        ranks.gather_values(&mut model).expect("all ranks are there");
        numbers.extend([agreed.error * scale, norm]);
    }
    ranks.close(device);
    let mut masters = ranks.masters_on_first(&model, &trainer).expect("masters");
    masters.extend(device.to_host(model.values().all()).expect("values").iter().map(|x| x.to_f64() as f32));
    (between_devices, numbers, masters)
}

fn trainings_agree<X: Real<Acc = f32>>(ranks: usize)
where
    Cuda: Backend<X>,
{
    let devices = on_ranks(ranks, |comm| train::<X>(&device_of_rank(comm.rank()), &comm));
    // All on one device, which rules a group out.
    let hosts = on_ranks(ranks, |comm| train::<X>(&device_of_rank(0), &comm));
    for (rank, (found, want)) in devices.iter().zip(&hosts).enumerate() {
        assert!(found.0 && !want.0, "rank {rank}: between devices, and through the hosts");
        for (a, b) in found.1.iter().zip(&want.1) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "rank {rank}: {a} and {b}");
        }
        let worst = largest_difference(&found.2, &want.2);
        assert!(worst <= 1e-6, "rank {rank} of {ranks}: values differ by {worst}");
    }
}

#[test]
fn a_training_is_the_one_through_the_hosts() {
    for ranks in worlds().into_iter().filter(|&ranks| ranks > 1) {
        trainings_agree::<f32>(ranks);
    }
    if worlds().contains(&2) {
        trainings_agree::<bf16>(2);
    }
}

/// Sums of three ranks depend on their order; with the library's settings for this process it is always the same.
#[test]
fn sums_have_the_same_bits_in_every_run() {
    let Some(ranks) = worlds().into_iter().max().filter(|ranks| *ranks > 1) else { return };
    let run = || {
        on_ranks(ranks, |comm| exchange(&device_of_rank(comm.rank()), &comm, 200).expect("there is memory"))
    };
    let [first, second] = [run(), run()];
    for (first, second) in first.iter().zip(&second) {
        assert!(first.sums == second.sums && first.values == second.values && first.narrow == second.narrow);
    }
}

/// Faults, which only stand-ins can have.
mod planted {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// Runs the test of this name again, in a process of its own with these variables.
    fn again(test: &str, variables: &[(&str, &str)]) -> (bool, String) {
        let mut command = Command::new(std::env::current_exe().expect("this program is a file"));
        command.args(["--exact", test, "--nocapture"]).envs(variables.iter().copied());
        let output = command.output().expect("this program runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// NVLink SHARP, turned on by the user, is left on: then the stand-in adds in another order in every call.
    #[test]
    fn what_the_user_sets_is_kept() {
        let (passed, text) =
            again("nccl::sums_have_the_same_bits_in_every_run", &[("NCCL_NVLS_ENABLE", "1")]);
        assert!(!passed && text.contains("first.sums == second.sums"), "{text}");
    }

    /// What ranks exchange, with devices from this number on; about the second of them this is wrong.
    fn exchange_with(fault: NcclFault, first: usize) {
        plant_nccl_fault(first + 1, fault);
        let own = |comm: Local| exchange(&device_of_rank(first + comm.rank()), &comm, 200).expect("memory");
        let begin = Instant::now();
        assert_same(&on_ranks(3, own), &through_hosts(3, 200), false);
        assert!(begin.elapsed() < Duration::from_secs(40), "{fault:?}: {:?}", begin.elapsed());
    }

    #[test]
    fn ranks_use_hosts_where_one_cannot_join() {
        exchange_with(NcclFault::Join, 3);
    }

    const LIMIT: (&str, &str) = ("GRADTX_NCCL_TIMEOUT", "2");

    /// Nobody hears of the rank that has failed.
    #[test]
    fn waits_end_at_the_time_limit() {
        if std::env::var_os(LIMIT.0).is_none() {
            let (passed, text) = again("nccl::planted::waits_end_at_the_time_limit", &[LIMIT]);
            assert!(passed && text.contains("1 passed"), "{text}");
            return;
        }
        exchange_with(NcclFault::SilentJoin, 3);
        exchange_with(NcclFault::Sums, 6);
        let found = on_ranks(2, |comm| {
            let mut member = join(&comm, comm.rank()).expect("a group");
            if comm.rank() == 0 {
                member.start(&[0..2, 2..4]).expect("sums");
                let why =
                    member.cuda.finish_group(&mut member.group).expect_err("rank 1 never comes").to_string();
                let after = member.start(&[0..2, 2..4]).expect_err("it was aborted").to_string();
                comm.barrier().expect("both are there");
                return (why, after);
            }
            comm.barrier().expect("both are there");
            Default::default()
        });
        let (why, after) = &found[0];
        assert!(why.contains("within 2 s") && why.contains(LIMIT.0), "{why}");
        assert!(after.contains("failed before"), "{after}");
    }

    /// A rank that fails between two exchanges leaves at once, although the others wait for it.
    #[test]
    fn a_rank_that_fails_elsewhere_waits_for_nobody() {
        let found = on_ranks(2, |comm| {
            let mut member = join(&comm, comm.rank()).expect("a group");
            member.start(&[0..2, 2..4]).expect("sums");
            member.cuda.finish_group(&mut member.group).expect("both ranks wait");
            let begin = Instant::now();
            if comm.rank() == 1 {
                drop(member);
            }
            comm.barrier().expect("both are there");
            begin.elapsed()
        });
        assert!(found.iter().all(|time| *time < Duration::from_secs(30)), "{found:?}");
    }

    #[test]
    fn a_group_is_closed_by_all_ranks() {
        let found = on_ranks(2, |comm| {
            let Member { mut group, mut values, cuda, .. } = join(&comm, comm.rank()).expect("a group");
            cuda.start_sums(&mut group, values.all_mut(), &[0..2, 2..4]).expect("sums");
            cuda.close_group(group).expect("both finish and leave");
            cuda.to_host(values.all()).expect("they can be read")
        });
        assert_eq!(found, [[2.0, 4.0, 3.0, 4.0], [1.0, 2.0, 6.0, 8.0]]);
    }

    #[test]
    fn ranks_use_hosts_without_a_library_or_own_device() {
        let lacking = |comm: Local| {
            let device = device_of_rank(comm.rank());
            if comm.rank() == 1 {
                break_nccl();
            }
            exchange(&device, &comm, 200).expect("memory")
        };
        assert_same(&on_ranks(3, lacking), &through_hosts(3, 200), false);
        let shared = |comm: Local| exchange(&device_of_rank(comm.rank() % 2), &comm, 200).expect("memory");
        assert_same(&on_ranks(3, shared), &through_hosts(3, 200), false);
    }

    /// A device, its place in a group, and four values there that a kernel has written.
    struct Member {
        group: <Cuda as Collective>::Group,
        values: <Cuda as Device>::Buf<f32>,
        written_from: <Cuda as Device>::Buf<f32>,
        cuda: Cuda,
    }

    fn join(comm: &Local, ordinal: usize) -> Result<Member> {
        let cuda = device_of_rank(ordinal);
        let mut id = if comm.rank() == 0 { cuda.new_group()? } else { vec![] };
        comm.broadcast_bytes(0, &mut id).expect("all ranks are there");
        let group = cuda.join_group(&id, comm.rank(), comm.size())?;
        let mut values = cuda.zeros(4)?;
        let start = cuda.buffer_from(&[1.0f32, 2.0, 3.0, 4.0])?;
        cuda.axpby(values.all_mut(), 1.0, start.all(), 0.0)?;
        Ok(Member { group, values, written_from: start, cuda })
    }

    impl Member {
        fn start(&mut self, shares: &[Range<usize>]) -> Result<()> {
            self.cuda.start_sums(&mut self.group, self.values.all_mut(), shares)
        }

        fn values<T: Elem>(&self, of: &<Cuda as Device>::Buf<T>) -> Vec<T> {
            self.cuda.to_host(of.all()).expect("they can be read")
        }
    }

    #[test]
    fn who_forgets_to_wait_for_the_group_finds_old_values() {
        let found = on_ranks(2, |comm| {
            let mut member = join(&comm, comm.rank()).expect("a group");
            member.start(&[0..2, 2..4]).expect("sums");
            let early = member.values(&member.values);
            member.cuda.finish_group(&mut member.group).expect("both ranks wait");
            (early, member.values(&member.values))
        });
        let early = vec![1.0, 2.0, 3.0, 4.0];
        assert_eq!(found[0], (early.clone(), vec![2.0, 4.0, 3.0, 4.0]));
        assert_eq!(found[1], (early, vec![1.0, 2.0, 6.0, 8.0]));
    }

    /// Kernels that are late have not written the values when sums of them are taken.
    #[test]
    fn groups_that_do_not_wait_for_kernels_sum_old_values() {
        let sums = |forgets: bool| {
            on_ranks(2, |comm| {
                late_kernels(true);
                let mut member = join(&comm, comm.rank()).expect("a group");
                if forgets {
                    forget_waits();
                }
                let (values, ones) = (member.values.all_mut(), member.written_from.all());
                member.cuda.axpby(values, 1.0, ones, 1.0).expect("a kernel");
                member.start(&[0..2, 2..4]).expect("sums");
                member.cuda.finish_group(&mut member.group).expect("both ranks wait");
                member.values(&member.values)
            })
        };
        assert_eq!(sums(false), [[4.0, 8.0, 6.0, 8.0], [2.0, 4.0, 12.0, 16.0]]);
        let wrong = sums(true);
        assert!(wrong[0][..2] != [4.0, 8.0] && wrong[1][2..] != [12.0, 16.0], "{wrong:?}");
    }

    #[test]
    fn shares_that_do_not_fit_are_an_error_on_all_ranks() {
        let found = on_ranks(2, |comm| {
            let mut member = join(&comm, comm.rank()).expect("a group");
            let why = member.start(&[0..2, 2..3]).expect_err("one value is in no share").to_string();
            assert!(why.contains("cannot be shared between 2 ranks"), "{why}");
            member.start(&[0..1 + comm.rank(), 1 + comm.rank()..4]).expect("each alone is right");
            member.cuda.finish_group(&mut member.group).expect_err("they differ").to_string()
        });
        for why in &found {
            assert!(why.contains("rank 0 brings 2 operations, rank 1 1"), "{why}");
        }
        let found = on_ranks(2, |comm| {
            let mut member = join(&comm, comm.rank()).expect("a group");
            member.start(&[0..3 * comm.rank(), 3 * comm.rank()..4]).expect("each alone is right");
            member.cuda.finish_group(&mut member.group).expect_err("they differ").to_string()
        });
        for why in &found {
            let named = why.contains("rank 0 calls reduce of 4") && why.contains("rank 1 reduce of 3");
            assert!(named || why.contains("operations"), "{why}");
        }
    }

    /// It panics, or returns early: the others are told instead of waiting for it.
    #[test]
    fn a_rank_that_leaves_in_the_middle_ends_the_group() {
        let found = on_ranks(3, |comm| {
            let mut member = join(&comm, comm.rank()).expect("a group");
            member.start(&[0..2, 2..3, 3..4]).expect("sums");
            if comm.rank() == 2 {
                return String::new();
            }
            member.cuda.finish_group(&mut member.group).expect_err("rank 2 is gone").to_string()
        });
        for why in &found[..2] {
            assert!(why.contains("rank 2 has given up") && why.contains("NCCL_DEBUG"), "{why}");
        }
    }

    /// What the ranks' agreement prevents.
    #[test]
    fn a_group_of_one_device_twice_is_refused() {
        let found = on_ranks(2, |comm| join(&comm, 0).err().expect("one device for both").to_string());
        assert!(found.iter().any(|why| why.contains("the same device")), "{found:?}");
    }
}
