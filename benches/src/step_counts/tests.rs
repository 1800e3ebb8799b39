//! Counts against the formulas of the plan, and against the committed measurements of an H100.

use super::*;
use gradtx_plan::cost::tokens::Lengths;
use gradtx_plan::cost::work::{DecoderWork, TranslatorWork};
use std::collections::BTreeMap;

/// Lines of the fourth run on an H100.
fn measured() -> Vec<Value> {
    let results = "results/gpu-check_h100_2026-11-27_fourth/results.jsonl";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(results);
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The line of our step `name` of `model`, and the rates of the same process: the ceilings before it.
fn of_step<'a>(lines: &'a [Value], name: &str, model: &str) -> (&'a Value, Ceilings) {
    let is_it = |line: &Value| line["who"] == "gradtx" && line["name"] == name && line["model"] == model;
    let at = lines.iter().position(is_it).unwrap();
    let before = |name: &str| lines[..at].iter().rev().find(|line| line["name"] == name).unwrap();
    let gemm = before("large gemm")["tflops"].as_f64().unwrap() * 1e12;
    (&lines[at], Ceilings { gemm, copy: before("large copy")["gb_per_s"].as_f64().unwrap() * 1e9 })
}

#[derive(Debug, clap::Parser)]
struct Program {
    #[command(flatten)]
    job: Job,
}

fn job(args: &str) -> Job {
    let program =
        <Program as clap::Parser>::try_parse_from(["counts"].into_iter().chain(args.split_whitespace()));
    program.unwrap().job
}

fn counted(args: &str) -> Vec<Counted> {
    job(args).counted().unwrap()
}

/// Names with their launches.
type Calls = BTreeMap<String, u64>;

fn calls_measured(line: &Value) -> Calls {
    let of = |o: &Value| (o["name"].as_str().unwrap().to_string(), o["calls"].as_u64().unwrap());
    line["operations"].as_array().unwrap().iter().map(of).collect()
}

fn calls_counted(operations: &Operations, times: u64) -> Calls {
    operations.all().iter().map(|o| (o.name.clone(), times * o.calls as u64)).collect()
}

#[test]
fn launches_of_a_lora_step_are_those_of_its_profile() {
    let lines = measured();
    for (model, jobs) in [("qwen2.5-7b", 1), ("qwen2.5-3b", 4)] {
        let (line, _) = of_step(&lines, "finetune", model);
        let found = counted(&format!("--model {model} --jobs {jobs}"));
        assert_eq!(calls_counted(&found[0].operations, 1), calls_measured(line), "{model}");
        assert_eq!(found[0].shape, line["shape"]);
        // With one token less the products have other shapes.
        let other = counted(&format!("--model {model} --jobs {jobs} --tokens 8191"));
        assert_ne!(calls_counted(&other[0].operations, 1), calls_measured(line), "{model}");
    }
}

#[test]
fn launches_of_a_translator_step_are_those_of_its_profile() {
    let lines = measured();
    let (line, _) = of_step(&lines, "train", "flan-t5-large");
    let wanted = calls_measured(line);
    let found = counted("--translator large");
    assert_eq!(calls_counted(&found[0].operations, 1), wanted);
    assert_eq!(found[0].shape, line["shape"]);
    let other = counted("--translator large --tiny 49x12800");
    assert_ne!(calls_counted(&other[0].operations, 1), wanted);
}

#[test]
fn launches_of_generation_are_those_of_its_profile() {
    let lines = measured();
    let (line, _) = of_step(&lines, "generate", "qwen2.5-7b");
    let found = counted("--generate");
    let mut all = calls_counted(&found[0].operations, 1);
    for (name, calls) in calls_counted(&found[1].operations, 127) {
        *all.entry(name).or_default() += calls;
    }
    assert_eq!(all, calls_measured(line));
    assert_eq!(found[1].shape, line["shape"]);
}

/// Operations whose floor is the same in the profile: bytes of each of its views once, which is what has to be moved. Of what is
/// changed in place, of parts of a row, and of attention's five products backwards the profile counts something else.
const SAME_FLOOR: [&str; 6] = [
    "silu_forward",
    "silu_backward",
    "rmsnorm_forward",
    "flash_hopper_forward",
    "attention_delta",
    "gather_rows",
];

#[test]
fn floors_are_those_of_the_profiles() {
    let lines = measured();
    for (name, model, args) in [
        ("finetune", "qwen2.5-7b", "--model qwen2.5-7b"),
        ("finetune", "qwen2.5-3b", "--model qwen2.5-3b --jobs 4"),
        ("train", "flan-t5-large", "--translator large"),
    ] {
        let (line, ceilings) = of_step(&lines, name, model);
        let found = counted(args);
        let mut compared = 0;
        for wanted in line["operations"].as_array().unwrap() {
            let name = wanted["name"].as_str().unwrap();
            let same = SAME_FLOOR.contains(&name)
                || name.starts_with("product ")
                || name.starts_with("t5_attention_");
            let Some(floor) = wanted["floor_s"].as_f64().filter(|_| same) else { continue };
            let operation = found[0].operations.all().iter().find(|o| o.name == name).unwrap();
            let ratio = operation.floor(&ceilings) / floor;
            assert!((0.96..=1.04).contains(&ratio), "{model}: {name}: {ratio}");
            compared += 1;
        }
        assert!(compared >= 17, "{model}: {compared}");
    }
}

/// Seconds that were measured, and those expected of what these arguments ask for.
fn seconds(lines: &[Value], (name, model, args): (&str, &str, &str)) -> (f64, f64) {
    let (line, _) = of_step(lines, name, model);
    let job = job(args);
    let (ceilings, counted) = (job.ceilings().unwrap(), job.counted().unwrap());
    let counted = counted.iter().find(|counted| counted.name == name).unwrap();
    (line["median_s"].as_f64().unwrap(), Sums::of(counted.operations.all(), &ceilings).expected)
}

#[test]
fn expected_times_are_near_those_measured() {
    let lines = measured();
    let near = |(measured, expected): (f64, f64)| (expected / measured - 1.0).abs() <= 0.15;
    for step in [
        ("finetune", "qwen2.5-7b", "--model qwen2.5-7b"),
        ("finetune", "qwen2.5-3b", "--model qwen2.5-3b --jobs 4"),
        ("train", "flan-t5-large", "--translator large"),
        ("generate", "qwen2.5-7b", "--generate"),
        ("generate prompts", "qwen2.5-7b", "--generate"),
    ] {
        let (measured, expected) = seconds(&lines, step);
        println!("{step:?}: {measured} s measured, {expected} s expected");
        assert!(near((measured, expected)), "{step:?}: {measured} s measured, {expected} s expected");
        let (name, model, args) = step;
        // Another device, and a rate that is a third lower, are not near.
        for wrong in ["--gpu a100-80g".to_string(), "--tflops 460 --tbs 2.0".to_string()] {
            assert!(!near(seconds(&lines, (name, model, &format!("{args} {wrong}")))), "{step:?} {wrong}");
        }
    }
}

fn sum(operations: &Operations, is: impl Fn(&str) -> bool, of: impl Fn(&Operation) -> f64) -> f64 {
    operations.all().iter().filter(|o| is(&o.name)).map(of).sum()
}

fn close(found: f64, wanted: f64, part: f64) {
    assert!((found - wanted).abs() <= part * wanted, "{found} is not near {wanted}");
}

#[test]
fn steps_have_the_operations_of_the_plan() {
    let is_product = |name: &str| name.starts_with("product ");
    let model = NamedDecoder::find("qwen2.5-7b").unwrap();
    let layout = model.adapters(2, &["q_proj".into(), "v_proj".into()]).unwrap();
    let work = DecoderWork { model: &model.config, layout: &layout, element: 2.0 };

    // The plan has no products with the 64 columns of the adapters, and counts 6 per value of an adapter.
    let step = &counted("")[0].operations;
    let plan = finetune::operations(&work, &[512; 16]) - 6.0 * (layout.total() * 8192) as f64;
    let tails = 28.0 * 2.0 * 2.0 * 8192.0 * 4608.0 * 64.0;
    let attention = 12.0 * 28.0 * 3584.0 * 16.0 * (512.0 * 513.0 / 2.0);
    close(sum(step, is_product, |o| o.count.flops) - tails, plan - attention, 1e-9);

    // Every weight once, and the sequences' keys and values.
    let token = &counted("--generate")[1].operations;
    let plan = work.decoding(64.0, 256.0 + 64.0);
    let is_weight = |name: &str| is_product(name) || name.starts_with("attention_decode");
    close(sum(token, is_weight, |o| o.count.flops), plan.flops, 1e-9);
    // The plan leaves out the activations of 64 rows.
    close(sum(token, is_weight, |o| o.count.bytes), plan.bytes, 0.03);
    let prompts = &counted("--generate")[0].operations;
    let plan = work.reading(&Lengths::uniform(256, 0).mean(None), 64.0);
    close(
        sum(prompts, |name| is_product(name) || name.starts_with("flash"), |o| o.count.flops),
        plan.flops,
        1e-9,
    );

    let args = TranslatorArgs {
        translator: Some("large".into()),
        tiny: "36x12800".parse().unwrap(),
        llm: "28x22528".parse().unwrap(),
    };
    let config = NamedTranslator::find(&args, false).unwrap().config;
    let step = &counted("--translator large")[0].operations;
    let plan = TranslatorWork { config: &config, values: 1.0, element: 2.0 }.training(32.0).flops;
    // The plan counts all pairs of the decoder's own attention, of which half are masked.
    close(sum(step, |_| true, |o| o.count.flops), plan, 5e-3);
}

#[test]
fn kernels_are_those_of_the_device_and_shape() {
    let names = |args: &str| -> Vec<String> {
        counted(args).iter().flat_map(|c| c.operations.all().iter().map(|o| o.name.clone())).collect()
    };
    let has = |args: &str, name: &str| names(args).iter().any(|found| found == name);
    assert!(has("", "flash_hopper_backward") && !has("--gpu a100-80g", "flash_hopper_backward"));
    assert!(has("--gpu a100-80g", "flash_backward_128"));
    assert!(has("--model qwen2.5-0.5b", "flash_forward_64"));
    assert!(!has("--jobs 16", "lora_up_forward") && has("--jobs 17 --tokens 8704", "lora_up_forward"));
    assert!(
        has("--model qwen2.5-14b", "rmsnorm_lora_backward"),
        "its rows are too wide for the kernel of two targets"
    );
    assert!(has("--generate --context 512", "attention_decode_combine_128"));
    assert!(!has("--generate --context 384", "attention_decode_combine_128"));
    assert!(has("--translator large --tiny 97x10", "t5_attention_forward"));
}

#[test]
fn wrong_options_are_refused() {
    for (args, why) in [
        ("--tokens 0", "--tokens"),
        ("--context 1", "--context"),
        ("--jobs 17", "16 examples"),
        ("--targets o_proj", "q_proj, k_proj and v_proj"),
        ("--model qwen9", "config.json"),
        ("--generate --new 1", "--new"),
        ("--translator huge", "small, base, large"),
        ("--batch 0", "--batch"),
    ] {
        let Err(error) = job(args).counted() else { panic!("{args} is not refused") };
        assert!(error.to_string().contains(why), "{args}: {error}");
    }
    for (args, why) in [("--tflops 0", "--tflops"), ("--tbs nan", "--tbs"), ("--gpu cpu", "GPUs")] {
        let Err(error) = job(args).ceilings() else { panic!("{args} is not refused") };
        assert!(error.to_string().contains(why), "{args}: {error}");
    }
    let both = ["counts", "--model", "qwen2.5-3b", "--translator", "large"];
    assert!(<Program as clap::Parser>::try_parse_from(both).is_err());
}
