//! T5 and Grad-Transformer against what transformers computes on the same weights.
//!
//! The fixtures and how they were made are described beside them.

use crate::common::fixture;
use crate::common::relative_error;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::{AdamWStep, Out};
use gradtx_models::grad_transformer::{
    Activations, Generator, GradTransformer, GradTransformerConfig, StartToken, Trainer, Tuples,
};
use gradtx_models::t5::{
    DecodeCache, Grads, Keep, Pass, Side, Stack, StackActs, StackShape, T5Config, weights,
};
use gradtx_runtime::artifact::{TensorFile, TensorSource};
use gradtx_runtime::optim::FlatAdamW;
use gradtx_runtime::params::ParamLayout;

const TOLERANCE: f64 = 1e-4;
const STEPS: usize = 10;
const ACCUMULATION: usize = 4;

/// The golden tensors of a fixture.
struct Golden(TensorFile);

impl Golden {
    fn open(name: &str) -> Self {
        Self(TensorFile::open(&fixture(&format!("{name}/golden.safetensors"))).unwrap())
    }

    fn get(&self, name: &str) -> Vec<f32> {
        self.0.tensor(name).unwrap().to_f32().unwrap()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.0.tensor(name).unwrap().to_u32().unwrap()
    }

    fn error(&self, name: &str, found: &[f32]) -> f64 {
        relative_error(&wide(found), &wide(&self.get(name)))
    }

    fn assert(&self, name: &str, found: &[f32]) {
        let error = self.error(name, found);
        assert!(error <= TOLERANCE, "{name}: relative error {error:e}");
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

fn adamw(step: usize, weight_decay: f64) -> AdamWStep {
    AdamWStep { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, step: step as u32 + 1 }
}

/// Encoder and decoder with the fixture's weights.
struct T5 {
    cpu: Cpu,
    config: T5Config,
    layout: ParamLayout,
    encoder: Stack,
    decoder: Stack,
    values: <Cpu as Device>::Buf<f32>,
}

/// Activations of both stacks.
struct Acts(StackActs<Cpu, f32>, StackActs<Cpu, f32>);

impl T5 {
    fn load() -> Self {
        let cpu = Cpu::new(2);
        let config = T5Config::open(&fixture("t5/model/config.json")).unwrap();
        let mut layout = ParamLayout::new();
        let encoder = Stack::new(&config, Side::Encoder, &mut layout, "");
        let decoder = Stack::new(&config, Side::Decoder, &mut layout, "");
        let mut values = cpu.zeros(layout.total()).unwrap();
        let source = TensorSource::open(&fixture("t5/model")).unwrap();
        weights::load::<Cpu, f32>(&cpu, &mut values, &layout, "", &source, &weights::UNUSED).unwrap();
        Self { cpu, config, layout, encoder, decoder, values }
    }

    fn pass<'a>(&'a self, keys: &'a [u64]) -> Pass<'a, Cpu, f32> {
        Pass { dev: &self.cpu, values: &self.values, keys, batch: keys.len(), dropout: 0.0 }
    }

    fn acts(&self, batch: usize, source: usize, target: usize) -> Acts {
        let shape = StackShape { batch, tokens: source, memory: 0 };
        let enc = StackActs::new(&self.cpu, &self.encoder, shape, Keep::ForBackward).unwrap();
        let shape = StackShape { batch, tokens: target, memory: source };
        let dec = StackActs::new(&self.cpu, &self.decoder, shape, Keep::ForBackward).unwrap();
        Acts(enc, dec)
    }

    fn forward(&self, acts: &mut Acts, batch: usize, enc_in: &[f32], dec_in: &[f32]) -> Vec<f32> {
        let keys = vec![0; batch];
        acts.0.input_mut(batch).copy_from_slice(enc_in);
        acts.1.input_mut(batch).copy_from_slice(dec_in);
        self.encoder.forward(&self.pass(&keys), &mut acts.0, None).unwrap();
        self.decoder.forward(&self.pass(&keys), &mut acts.1, Some(&acts.0)).unwrap();
        acts.1.output(batch).to_vec()
    }

    /// Adds the gradients of `weight` times the mean squared error to `buf`; returns the error.
    fn backward(
        &self,
        acts: &mut Acts,
        (batch, weight): (usize, f64),
        target: &[f32],
        buf: &mut <Cpu as Device>::Buf<f32>,
    ) -> f64 {
        let keys = vec![0; batch];
        let out = acts.1.output(batch).to_vec();
        let count = out.len() as f64;
        let mut loss = 0.0;
        let d_out = acts.1.d_output_mut(batch).unwrap();
        for ((d, x), y) in d_out.iter_mut().zip(&out).zip(target) {
            let difference = *x as f64 - *y as f64;
            loss += difference * difference / count;
            *d = (2.0 * weight * difference / count) as f32;
        }
        let mut ignore = |_: std::ops::Range<usize>, _: &mut [f32]| Ok(());
        let pass = self.pass(&keys);
        let mut grads: Grads<'_, Cpu, f32> = Grads::new(pass.dev, buf, Out::Add, &mut ignore);
        self.decoder.backward(&pass, &mut acts.1, Some(&acts.0), &mut grads).unwrap();
        acts.0.d_output_mut(batch).unwrap().copy_from_slice(acts.1.d_memory(batch).unwrap());
        self.encoder.backward(&pass, &mut acts.0, None, &mut grads).unwrap();
        loss
    }
}

#[test]
fn t5_outputs_loss_and_gradients() {
    let (golden, t5) = (Golden::open("t5"), T5::load());
    let mut acts = t5.acts(3, 5, 7);
    let out = t5.forward(&mut acts, 3, &golden.get("enc_in"), &golden.get("dec_in"));
    golden.assert("out", &out);
    golden.assert("enc_out", acts.0.output(3));
    let mut grads = t5.cpu.zeros(t5.layout.total()).unwrap();
    let loss = t5.backward(&mut acts, (3, 1.0), &golden.get("target"), &mut grads);
    golden.assert("loss", &[loss as f32]);
    for param in t5.layout.params() {
        golden.assert(&format!("grad.{}", param.name), &grads[param.range()]);
    }
    golden.assert("grad.enc_in", acts.0.d_input(3).unwrap());
    golden.assert("grad.dec_in", acts.1.d_input(3).unwrap());
}

#[test]
fn t5_beyond_the_largest_distance() {
    let (golden, t5) = (Golden::open("t5"), T5::load());
    let mut acts = t5.acts(1, 150, 140);
    let out = t5.forward(&mut acts, 1, &golden.get("long.enc_in"), &golden.get("long.dec_in"));
    golden.assert("long.enc_out", acts.0.output(1));
    golden.assert("long.out", &out);
}

#[test]
fn t5_ten_losses_of_training() {
    let (golden, mut t5) = (Golden::open("t5"), T5::load());
    let (enc, dec, target) = (golden.get("train_enc"), golden.get("train_dec"), golden.get("train_target"));
    let (enc_len, dec_len) = (5 * t5.config.d_model, 7 * t5.config.d_model);
    let (mut losses, mut norms) = (vec![], vec![]);
    let mut acts = t5.acts(1, 5, 7);
    let mut optimizer = FlatAdamW::<Cpu, f32>::new(&t5.cpu, 1, t5.layout.total()).unwrap();
    for step in 0..STEPS {
        let mut grads = t5.cpu.zeros(t5.layout.total()).unwrap();
        let mut loss = 0.0;
        for i in step * ACCUMULATION..(step + 1) * ACCUMULATION {
            let part = i * dec_len..(i + 1) * dec_len;
            t5.forward(&mut acts, 1, &enc[i * enc_len..(i + 1) * enc_len], &dec[part.clone()]);
            let weight = 1.0 / ACCUMULATION as f64;
            loss += weight * t5.backward(&mut acts, (1, weight), &target[part], &mut grads);
        }
        losses.push(loss as f32);
        let norm = optimizer.step(&t5.cpu, &mut t5.values, &grads, adamw(step, 0.01), Some(1.0)).unwrap();
        norms.push(norm[0] as f32);
    }
    golden.assert("train_losses", &losses);
    golden.assert("train_grad_norms", &norms);
    for name in [
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.1.layer.2.DenseReluDense.wi_0.weight",
    ] {
        golden.assert(&format!("final.{name}"), &t5.values[t5.layout.range(name).unwrap()]);
    }
}

#[test]
fn t5_greedy_tokens() {
    let (golden, t5) = (Golden::open("t5"), T5::load());
    let source = TensorSource::open(&fixture("t5/model")).unwrap();
    let embedding = source.tensor("shared.weight").unwrap().to_f32().unwrap();
    let head = source.tensor("lm_head.weight").unwrap().to_f32().unwrap();
    let d = t5.config.d_model;
    let embed = |id: u32| &embedding[id as usize * d..(id as usize + 1) * d];
    let ids = golden.ids("greedy_input_ids");
    let keys = [0];
    let pass = t5.pass(&keys);
    let shape = StackShape { batch: 1, tokens: ids.len(), memory: 0 };
    let mut enc = StackActs::new(&t5.cpu, &t5.encoder, shape, Keep::Nothing).unwrap();
    for (row, &id) in enc.input_mut(1).chunks_mut(d).zip(&ids) {
        row.copy_from_slice(embed(id));
    }
    t5.encoder.forward(&pass, &mut enc, None).unwrap();
    let expected = golden.ids("greedy_tokens");
    let shape = StackShape { batch: 1, tokens: expected.len(), memory: ids.len() };
    let mut cache = DecodeCache::new(&t5.cpu, &t5.decoder, shape).unwrap();
    t5.decoder.start_decoding(&pass, &mut cache, &enc).unwrap();
    let (mut token, mut tokens) = (0, vec![]);
    for _ in 0..expected.len() {
        cache.input_mut(1).copy_from_slice(embed(token));
        t5.decoder.decode_step(&pass, &mut cache).unwrap();
        let logit = |row: &[f32]| row.iter().zip(cache.output(1)).map(|(w, x)| w * x).sum::<f32>();
        let logits: Vec<f32> = head.chunks(d).map(logit).collect();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        token = best as u32;
        tokens.push(token);
    }
    assert_eq!(tokens, expected);
    assert!(t5.decoder.decode_step(&pass, &mut cache).is_err(), "the cache is full");
}

fn translator(start_token: StartToken) -> GradTransformer<Cpu, f32> {
    let dir = fixture("grad_transformer/model");
    if start_token == StartToken::Embedded {
        return GradTransformer::load(&Cpu::new(2), &dir).unwrap();
    }
    // The same weights beside a configuration with another start.
    let (config, mode) = GradTransformerConfig::open(&dir.join("config.json")).unwrap();
    let config = GradTransformerConfig { start_token, ..config };
    let changed = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("model.safetensors"), changed.path().join("model.safetensors")).unwrap();
    std::fs::write(changed.path().join("config.json"), config.to_json(mode).to_string()).unwrap();
    GradTransformer::load(&Cpu::new(2), changed.path()).unwrap()
}

fn predict(model: &GradTransformer<Cpu, f32>, golden: &Golden) -> Activations<Cpu, f32> {
    let (student, teacher) = (golden.get("student"), golden.get("teacher"));
    let config = model.config();
    let mut acts = Activations::new(model, 3).unwrap();
    let tuples = Tuples {
        student: &student[..3 * config.student_len()],
        teacher: &teacher[..3 * config.teacher_len()],
        keys: &[0; 3],
    };
    model.load_batch(&mut acts, tuples).unwrap();
    model.forward(&mut acts, true).unwrap();
    acts
}

#[test]
fn grad_transformer_outputs_loss_and_gradients() {
    let (golden, model) = (Golden::open("grad_transformer"), translator(StartToken::Embedded));
    let mut acts = predict(&model, &golden);
    golden.assert("pred", acts.pred(model.config()));
    let scale = 1.0 / (3 * model.config().teacher_len()) as f64;
    let sum = model.loss_sum(&mut acts, scale).unwrap();
    golden.assert("loss", &[(sum as f64 * scale) as f32]);
    let mut buf = model.device().zeros::<f32>(model.layout().total()).unwrap();
    let mut ignore = |_: std::ops::Range<usize>, _: &mut [f32]| Ok(());
    let mut grads: Grads<'_, Cpu, f32> = Grads::new(model.device(), &mut buf, Out::Add, &mut ignore);
    model.backward(&mut acts, true, &mut grads).unwrap();
    for param in model.layout().params() {
        golden.assert(&format!("grad.{}", param.name), &buf[param.range()]);
    }
    let zero = translator(StartToken::Zero);
    golden.assert("train_start_released", predict(&zero, &golden).pred(zero.config()));
    // Negative control: the other start is another function.
    let pred = acts.pred(model.config()).to_vec();
    assert!(golden.error("train_start_released", &pred) > TOLERANCE);
}

#[test]
fn grad_transformer_ten_losses_of_training() {
    let (golden, mut model) = (Golden::open("grad_transformer"), translator(StartToken::Embedded));
    let (student, teacher) = (golden.get("student"), golden.get("teacher"));
    let (s, t) = (model.config().student_len(), model.config().teacher_len());
    let mut trainer = Trainer::new(&mut model, 1).unwrap();
    let (mut losses, mut norms) = (vec![], vec![]);
    for step in 0..STEPS {
        let (from, to) = (step * ACCUMULATION, (step + 1) * ACCUMULATION);
        let tuples = Tuples {
            student: &student[from * s..to * s],
            teacher: &teacher[from * t..to * t],
            keys: &[0; ACCUMULATION],
        };
        let report = trainer.train_step(&mut model, tuples, adamw(step, 0.0), Some(1.0)).unwrap();
        losses.push(report.loss as f32);
        norms.push(report.grad_norm as f32);
    }
    golden.assert("train_losses", &losses);
    golden.assert("train_grad_norms", &norms);
    for name in ["embed_proj.bias", "t5.decoder.block.0.layer.1.EncDecAttention.k.weight"] {
        golden.assert(&format!("final.{name}"), &model.values()[model.layout().range(name).unwrap()]);
    }
}

#[test]
fn grad_transformer_generation_with_both_starts() {
    let golden = Golden::open("grad_transformer");
    for (start, name) in [(StartToken::Embedded, "generated"), (StartToken::Released, "generated_released")] {
        let model = translator(start);
        let student = golden.get("student");
        let mut generator = Generator::new(&model, 2).unwrap();
        let students = &student[..3 * model.config().student_len()];
        golden.assert(name, &generator.generate(&model, students).unwrap());
    }
    // The released setting differs in generation only.
    let released = translator(StartToken::Released);
    golden.assert("pred", predict(&released, &golden).pred(released.config()));
}

#[test]
fn translator_directories() {
    let model = translator(StartToken::Embedded);
    let with_unused = fixture("grad_transformer/model_with_unused");
    let same = GradTransformer::<Cpu, f32>::load(&Cpu::new(1), &with_unused).unwrap();
    assert_eq!(same.values()[..], model.values()[..]);
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path()).unwrap();
    let again = GradTransformer::<Cpu, f32>::load(&Cpu::new(1), dir.path()).unwrap();
    assert_eq!(again.values()[..], model.values()[..]);
    assert_eq!(again.config(), model.config());

    let t5_dir = fixture("t5/model");
    let around =
        GradTransformer::<Cpu, f32>::from_t5(&Cpu::new(1), model.config().clone(), &t5_dir, 1).unwrap();
    let t5 = T5::load();
    let name = "encoder.block.1.layer.1.DenseReluDense.wo.weight";
    let here = around.layout().range(&format!("t5.{name}")).unwrap();
    assert_eq!(around.values()[here], t5.values[t5.layout.range(name).unwrap()]);
    let bound = (6.0f32 / (20.0 + 32.0)).sqrt();
    let weight = &around.values()[around.layout().range("input_proj.weight").unwrap()];
    assert!(weight.iter().all(|w| w.abs() <= bound) && weight.iter().any(|w| w.abs() > 0.9 * bound));
    assert!(around.values()[around.layout().range("input_proj.bias").unwrap()].iter().all(|&b| b == 0.0));
    let mut other = model.config().clone();
    other.t5.d_ff = 47;
    let message = GradTransformer::<Cpu, f32>::from_t5(&Cpu::new(1), other, &t5_dir, 1).err().unwrap();
    assert!(message.to_string().contains("config.json"), "{message}");
}

#[test]
fn damaged_translators_are_named() {
    let model = translator(StartToken::Embedded);
    let dir = tempfile::tempdir().unwrap();
    let config_path = dir.path().join("config.json");
    let load = || GradTransformer::<Cpu, f32>::load(&Cpu::new(1), dir.path()).err().unwrap().to_string();
    let with_config = |change: &dyn Fn(&mut serde_json::Value)| {
        model.save(dir.path()).unwrap();
        let mut config = model.config().to_json(model.normalization().mode());
        change(&mut config);
        std::fs::write(&config_path, config.to_string()).unwrap();
        load()
    };
    let wide = with_config(&|c| c["teacher_width"] = 29.into());
    assert!(wide.contains("embed_proj.weight") && wide.contains("[32, 28]"), "{wide}");
    let deep = with_config(&|c| c["t5"]["num_layers"] = 3.into());
    assert!(deep.contains("t5.encoder.block.2"), "{deep}");
    let shallow = with_config(&|c| c["t5"]["num_layers"] = 1.into());
    assert!(shallow.contains("t5.encoder.block.1") && shallow.contains("unknown"), "{shallow}");
    let unknown = with_config(&|c| c["t5"]["scale"] = 2.into());
    assert!(unknown.contains("t5.scale"), "{unknown}");
    let start = with_config(&|c| c["start_token"] = "begin".into());
    assert!(start.contains("start_token") && start.contains("begin"), "{start}");
    let statistics = with_config(&|c| c["normalization"] = "scalar".into());
    assert!(statistics.contains("normalization.safetensors"), "{statistics}");
}
