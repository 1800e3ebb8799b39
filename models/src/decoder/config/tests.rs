use super::*;
use crate::decoder::Decoder;
use gradtx_kernels::cpu::Cpu;

fn base() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": [2, 3], "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 64, "max_position_embeddings": 256, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 128,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4",
        "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 131
    })
}

fn parse(value: &Value) -> Result<DecoderConfig> {
    DecoderConfig::parse(Path::new("m/config.json"), &value.to_string())
}

#[test]
fn a_published_file_is_understood_and_written_again() {
    let config = parse(&base()).unwrap();
    assert_eq!((config.q_dim(), config.kv_dim(), config.qkv_dim()), (32, 16, 64));
    assert_eq!((config.rope_theta, config.tied, config.eos.as_slice()), (1e6, true, [2, 3].as_slice()));
    assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
    let is_rotary = |family: &Family| family.traits().positions == Positions::Rotary;
    for family in Family::ALL.into_iter().filter(is_rotary) {
        let config = DecoderConfig { family, ..config.clone() };
        assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
    }
}

#[test]
fn every_unsupported_field_is_named_with_its_value() {
    let cases = [
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 2.0, "surprise": 1})),
        ("partial_rotary_factor", json!(0.5)),
        ("num_local_experts", json!(8)),
        ("num_experts_per_tok", json!(2)),
        ("final_logit_softcapping", json!(30.0)),
        ("quantization_config", json!({"bits": 4})),
        ("embedding_multiplier", json!(12.0)),
        ("query_pre_attn_scalar", json!(256)),
        ("attention_dropout", json!(0.1)),
        ("architectures", json!(["Qwen2ForSequenceClassification"])),
        ("model_type", json!("gemma")),
        ("num_key_value_heads", json!(3)),
        ("hidden_size", json!("32")),
        ("vocab_size", Value::Null),
        ("head_dim", json!(7)),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("layer_types", json!(["full_attention"])),
        ("sliding_window", json!(0)),
        ("is_causal", json!(false)),
        ("quantization", json!({"bits": 4, "group_size": 64})),
        ("rope_theta", json!(1)),
        ("rope_theta", json!(-1e4)),
        ("rms_norm_eps", json!(-1e-6)),
        ("rms_norm_eps", json!(7)),
        ("num_hidden_layers", json!(134_217_728)),
        ("num_hidden_layers", json!(0)),
        ("vocab_size", json!(0)),
        ("head_dim", json!(0)),
        ("num_attention_heads", json!(5)),
        ("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "linear", "type": "yarn", "factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.5})),
        ("rope_scaling", json!({"rope_type": "default", "factor": 2.0})),
        ("rope_scaling", json!({"factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "yarn"})),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7})),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2})),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        ),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5})),
        ("rope_parameters", json!({"rope_type": "linear", "rope_theta": 1e6, "surprise": 1})),
        ("scale_by", json!(0.5)),
    ];
    for (field, value) in cases {
        let mut file = base();
        file[field] = value.clone();
        let message = parse(&file).expect_err(field).to_string();
        assert!(message.contains("config.json") && message.contains(field), "{field}: {message}");
    }
}

#[test]
fn what_cannot_change_a_result_is_accepted() {
    let plain = parse(&base()).unwrap();
    for (field, value) in [
        ("unsloth_fixed", json!(true)),
        ("unsloth_version", json!("2025.9.1")),
        ("is_llama_config", json!(true)),
        ("transformers.js_config", json!({"kv_cache_dtype": {"q4f16": "float16"}})),
        ("rope_interleaved", json!(false)),
        ("neftune_noise_alpha", json!(5)),
        ("auto_map", json!({"AutoConfig": "configuration_x.XConfig"})),
        ("attn_implementation", json!("eager")),
        ("_attn_implementation", json!("sdpa")),
        ("_commit_hash", json!("abc")),
        ("an_entry_of_next_year", Value::Null),
        ("another_entry", json!(false)),
        ("embd_pdrop", json!(0.0)),
        ("pruned_heads", json!({})),
        ("quantization_config", json!({})),
        ("quantization_config", Value::Null),
        ("rope_scaling", Value::Null),
        ("rope_scaling", json!({})),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e6})),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("architectures", json!([])),
        ("temperature", json!(0.7)),
        ("mergekit_version", json!("0.1.2")),
        ("use_cache", json!(false)),
        ("torch_dtype", json!("float64")),
        ("head_dim", json!(8)),
    ] {
        let mut file = base();
        file[field] = value.clone();
        assert_eq!(parse(&file).unwrap_or_else(|e| panic!("{field}: {e}")), plain, "{field} = {value}");
    }
}

/// A base file with these changes; a null removes the field.
fn with(changes: Value) -> Result<DecoderConfig> {
    let mut file = base();
    for (field, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(file.as_object_mut().unwrap().remove(field)),
            value => file[field] = value.clone(),
        }
    }
    parse(&file)
}

#[test]
fn windows_are_carried_and_limit_the_context() {
    let qwen = [
        (json!({}), None),
        (json!({"use_sliding_window": true}), None),
        (json!({"use_sliding_window": true, "max_window_layers": 1}), Some(128)),
        (json!({"use_sliding_window": true, "max_window_layers": 2}), None),
        (json!({"use_sliding_window": true, "max_window_layers": 0, "sliding_window": null}), Some(4096)),
        (
            json!({"use_sliding_window": true, "layer_types": ["full_attention", "sliding_attention"]}),
            Some(128),
        ),
    ];
    for (changes, window) in qwen {
        let config = with(changes.clone()).unwrap();
        assert_eq!(config.window, window, "{changes}");
        assert_eq!(config.longest_context(), window.unwrap_or(256).min(256), "{changes}");
        assert_eq!(parse(&config.to_json("float32")).unwrap(), config, "{changes}");
    }
    let mistral = |positions: usize, window: Value| {
        let mut file = base();
        for field in ["use_sliding_window", "max_window_layers", "architectures", "sliding_window"] {
            file.as_object_mut().unwrap().remove(field);
        }
        file["model_type"] = json!("mistral");
        file["max_position_embeddings"] = json!(positions);
        if window != json!("absent") {
            file["sliding_window"] = window;
        }
        let config = parse(&file).unwrap();
        assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
        config.longest_context()
    };
    // The published version 0.1, later ones, and a file that leaves the default.
    assert_eq!(mistral(32768, json!(4096)), 4096);
    assert_eq!(mistral(32768, Value::Null), 32768);
    assert_eq!(mistral(32768, json!("absent")), 4096);
    assert_eq!(mistral(2048, json!("absent")), 2048);
}

#[test]
fn scaled_positions_are_those_scaling_reaches() {
    let reach = |scaling: Value| with(json!({ "rope_scaling": scaling })).unwrap().longest_context();
    let yarn = |original: usize| {
        reach(json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}))
    };
    assert_eq!((yarn(256), yarn(64)), (1024, 256));
    assert_eq!(reach(json!({"rope_type": "linear", "factor": 2})), 512);
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    assert_eq!(reach(llama3), 256);
}

#[test]
fn a_scaling_stated_twice_must_be_the_same() {
    let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
    let new = |factor: f64| json!({"rope_type": "linear", "factor": factor, "rope_theta": 1e6});
    let both = |old: Value, new: Value| with(json!({"rope_scaling": old, "rope_parameters": new}));
    let config = both(linear(2.0), new(2.0)).unwrap();
    assert_eq!((config.rope_theta, config.rope_scaling), (1e6, RopeScaling::Linear { factor: 2.0 }));
    let message = both(linear(2.0), new(4.0)).unwrap_err().to_string();
    assert!(message.contains("`rope_scaling` and `rope_parameters`"), "{message}");
    let only_new = with(json!({"rope_theta": null, "rope_parameters": {"rope_theta": 5e5}})).unwrap();
    assert_eq!((only_new.rope_theta, only_new.rope_scaling), (5e5, RopeScaling::None));
    let message = with(json!({"rope_parameters": {"rope_theta": 5e5}})).unwrap_err().to_string();
    assert!(
        message.contains("`rope_theta` = 1000000 and `rope_parameters.rope_theta` = 500000"),
        "{message}"
    );
}

/// Whatever numbers a file has: an error, or sizes whose sums and products have room.
#[test]
fn no_number_makes_the_reader_fail_otherwise() {
    let numbers: Vec<Value> = [
        "0",
        "1",
        "-1",
        "2",
        "3",
        "128",
        "4096",
        "65537",
        "134217728",
        "268435455",
        "268435456",
        "2147483648",
        "9223372036854775807",
        "18446744073709551615",
        "1e300",
        "-1e-300",
        "0.5",
        "true",
        "null",
        "\"8\"",
        "[]",
        "{}",
    ]
    .iter()
    .map(|text| serde_json::from_str(text).unwrap())
    .collect();
    let fields: Vec<String> = base().as_object().unwrap().keys().cloned().collect();
    let mut stream = gradtx_kernels::rng::Stream::new(5);
    let mut read = 0;
    for _ in 0..20_000 {
        let mut file = base();
        for _ in 0..1 + stream.below(3) {
            let field = &fields[stream.below(fields.len())];
            file[field] = numbers[stream.below(numbers.len())].clone();
        }
        if let Ok(config) = parse(&file) {
            read += 1;
            let sizes = [config.q_dim(), config.qkv_dim(), config.longest_context()];
            assert!(sizes.iter().all(|&n| n > 0) && config.parameters() <= MAX_PARAMETERS, "{file}");
            if config.layers <= 8 {
                let layout = Decoder::<Cpu, f32>::layout_of(&config);
                assert!((layout.count() as u128) >= config.parameters(), "{file}");
            }
            assert_eq!(parse(&config.to_json("float32")).unwrap(), config, "{file}");
        }
    }
    assert!(read > 100, "{read} files were read: the others prove little");
}

/// The published file of OPT's smallest model, with these changes.
fn opt(changes: Value) -> Result<DecoderConfig> {
    let mut file = json!({
        "_name_or_path": "facebook/opt-125m", "activation_dropout": 0.0, "activation_function": "relu",
        "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
        "do_layer_norm_before": true, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072,
        "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
        "model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0",
        "use_cache": true, "vocab_size": 50272, "word_embed_proj_dim": 768
    });
    changes.as_object().unwrap().iter().for_each(|(field, value)| file[field] = value.clone());
    parse(&file)
}

#[test]
fn opt_is_understood_and_written_again() {
    let config = opt(json!({})).unwrap();
    assert_eq!((config.family, config.tied, config.head_dim, config.norm_eps), (Family::Opt, true, 64, 1e-5));
    assert_eq!((config.bos, config.pad, config.longest_context()), (Some(2), Some(1), 2048));
    let untied = opt(json!({"tie_word_embeddings": false})).unwrap();
    assert!(!untied.tied);
    for config in [config, untied] {
        assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
    }
}

/// Parameters as published: 125 million, 1.3, 2.7, 6.7, 13 and 30 billion, and what PyTorch counts of them.
#[test]
fn published_opt_models_have_their_parameters() {
    for (hidden, layers, heads, want) in [
        (768, 12, 12, 125_239_296),
        (2048, 24, 32, 1_315_758_080),
        (2560, 32, 32, 2_651_596_800),
        (4096, 32, 32, 6_658_473_984),
        (5120, 40, 40, 12_853_473_280),
        (7168, 48, 56, 29_974_540_288usize),
    ] {
        let config = opt(json!({
            "hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads,
        }));
        assert_eq!(Decoder::<Cpu, f32>::layout_of(&config.unwrap()).count(), want, "{hidden}");
    }
}

#[test]
fn what_opt_has_in_other_forms_is_refused() {
    for (field, value, want) in [
        ("do_layer_norm_before", json!(false), "true"),
        ("word_embed_proj_dim", json!(512), "768"),
        ("activation_function", json!("gelu"), "\"relu\""),
        ("enable_bias", json!(false), "true"),
        ("layer_norm_elementwise_affine", json!(false), "true"),
        ("_remove_final_layer_norm", json!(true), "false"),
        ("attention_dropout", json!(0.1), "0.0"),
        ("architectures", json!(["OPTModel"]), "[\"OPTForCausalLM\"]"),
        ("ffn_dim", json!(0), "a positive integer"),
    ] {
        let message = opt(json!({ field: value.clone() })).expect_err(field).to_string();
        let found = format!("m/config.json: field `{field}` = {value} is not supported; expected {want}");
        assert!(message.contains(&found), "{field}: {message}");
    }
    for (changes, words) in [
        (json!({"hidden_size": 770, "word_embed_proj_dim": 770}), "`num_attention_heads` = 12"),
        (json!({"ffn_dim": null}), "`ffn_dim` is missing"),
        (json!({"layerdrop": 0.1}), "unknown field `layerdrop`"),
        (json!({"rope_theta": 1e4}), "unknown field `rope_theta`"),
    ] {
        let message = opt(changes.clone()).unwrap_err().to_string();
        assert!(message.contains("m/config.json") && message.contains(words), "{changes}: {message}");
    }
}
