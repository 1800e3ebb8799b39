//! Answers that end: what is trained to end them, where generation stops, what the model's limits
//! cut off, and what a score sees of them.

use crate::common::Case;
use gradtx_pipeline::score::mean_with_interval;
use serde_json::{Value, json};

/// Takes ChatML's markers from a tokenizer: to it they are ordinary text then.
fn without_markers(case: &Case, model: &str) {
    case.edit(&format!("{model}/tokenizer.json"), |t| {
        let tokens = t["added_tokens"].as_array_mut().unwrap();
        tokens.retain(|token| token["content"] == "<|endoftext|>");
    });
    case.edit(&format!("{model}/tokenizer_config.json"), |c| {
        c["eos_token"] = json!("<|endoftext|>");
        c["added_tokens_decoder"]
            .as_object_mut()
            .unwrap()
            .retain(|_, token| token["content"] == "<|endoftext|>");
        c.as_object_mut().unwrap().remove("additional_special_tokens");
    });
    case.edit(&format!("{model}/config.json"), |c| c["eos_token_id"] = json!(456));
    case.write(&format!("{model}/generation_config.json"), "{\"eos_token_id\": 456}");
}

/// Learns the row by heart, and answers it, right and to the end.
fn learns_to_end(case: &Case, more: &[&str]) {
    case.finetune("one.jsonl", "c", more).well();
    case.evaluate("e", &[more, &["--adapter", "c/adapter"]].concat()).well();
    let score = case.json("e/score.json");
    assert_eq!((score["exact_match"].as_f64(), score["ended"].as_f64()), (Some(1.0), Some(1.0)), "{score}");
}

#[test]
fn the_control_learns_to_end() {
    learns_to_end(&Case::new(), &["--set", "data.prompt=chatml"]);
}

#[test]
fn markers_that_are_ordinary_text_are_refused() {
    let case = Case::new();
    without_markers(&case, "base");
    case.finetune("one.jsonl", "c", &["--set", "data.prompt=chatml"])
        .refused()
        .says(&["im_end", "data.prompt"]);
    case.evaluate("e", &["--set", "data.prompt=chatml"]).refused().says(&["im_end"]);
    assert!(!case.path("c/update.safetensors").exists());
}

/// Without a prompt form in the run file, a tokenizer without markers gets one that ends.
#[test]
fn default_forms_end_without_markers_of_tokenizers() {
    let case = Case::new();
    without_markers(&case, "base");
    case.remove("base/chat_template.jinja");
    learns_to_end(&case, &["--set", "finetune.tiny.max_steps=200"]);
}

#[test]
fn plain_answers_end() {
    let case = Case::new();
    let plain = ["--set", "data.prompt=plain", "--set", "finetune.tiny.max_steps=200"];
    let end = case.finetune("one.jsonl", "c", &plain);
    if end.code != Some(0) {
        end.refused().says(&["plain", "end"]);
        return;
    }
    case.evaluate("e", &[&plain[..], &["--adapter", "c/adapter"]].concat()).well();
    let ended = case.json("e/score.json")["ended"].as_f64() == Some(1.0);
    assert!(ended || end.has("warning|never end"), "{end:#?}");
}

/// A template that ends answers with text is refused, one that ends them with a stop token is not.
#[test]
fn a_template_whose_end_is_no_token_is_refused() {
    let case = Case::new();
    let template = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n### end ###\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}";
    case.write("base/chat_template.jinja", template);
    let set = ["--set", "data.prompt=template"];
    let end = case.finetune("one.jsonl", "c", &set);
    assert!(end.code != Some(0) || end.has("warning"), "{end:#?}");
    let control = Case::new();
    control.write("base/chat_template.jinja", template.replace("\n### end ###\n", "<|endoftext|>"));
    learns_to_end(&control, &set);
}

#[test]
fn the_end_token_may_stand_in_generation_config_alone() {
    let case = Case::new();
    case.edit("base/config.json", |c| drop(c.as_object_mut().unwrap().remove("eos_token_id")));
    learns_to_end(&case, &[]);
}

/// Whoever opens the merged model with another program gets the stop token too.
#[test]
fn a_merged_model_stops_where_the_form_ends() {
    let case = Case::new();
    case.edit("base/config.json", |c| c["eos_token_id"] = json!(456));
    case.write("base/generation_config.json", "{\"eos_token_id\": 456}");
    case.finetune("one.jsonl", "c", &[]).well();
    case.run("merge --run r-c --adapter c/adapter --model tiny --out merged").well();
    let eos = &case.json("merged/generation_config.json")["eos_token_id"];
    let has = |id: u64| *eos == json!(id) || eos.as_array().is_some_and(|ids| ids.contains(&json!(id)));
    assert!(has(458) && has(456), "{eos}");
}

/// An answer that `max_length` cuts has no end: said, with a count.
#[test]
fn answers_that_are_cut_are_counted() {
    let case = Case::new();
    let rows: Vec<Value> = (0..4).map(|i| json!({ "prompt": format!("{i}?"), "response": "word ".repeat(if i == 2 { 200 } else { 2 }) })).collect();
    case.rows("rows.jsonl", &rows);
    let set = ["--set", "data.max_length=128", "--set", "finetune.tiny.max_steps=1"];
    case.finetune("rows.jsonl", "c", &set)
        .ended()
        .says(&["1 of 4|1 example|1 answer|1 cut", "cut|no end|longer"]);
}

#[test]
fn evaluate_says_how_many_ended() {
    let case = Case::new();
    case.evaluate("e", &[]).well().says(&["ended"]);
}

/// The answer is not forgotten: an example of whose answer nothing is left is an error.
#[test]
fn an_example_whose_answer_is_cut_off_is_named() {
    let case = Case::new();
    case.rows(
        "rows.jsonl",
        &[
            json!({ "prompt": "a", "response": "b" }),
            json!({ "prompt": "word ".repeat(400), "response": "b" }),
        ],
    );
    case.finetune("rows.jsonl", "c", &["--set", "finetune.tiny.max_steps=1"])
        .refused()
        .says(&["rows.jsonl:2|line 2"]);
}

#[test]
fn new_tokens_beyond_the_positions_are_named() {
    let case = Case::new();
    case.evaluate("e", &["--set", "evaluate.max_new_tokens=1000"]).ended().says(&["256"]);
}

#[test]
fn curation_knows_the_model_s_positions() {
    let case = Case::new();
    let rows: Vec<Value> = (0..8).map(|i| json!({ "prompt": format!("{} {i}", "How many? ".repeat(if i == 5 { 200 } else { 1 })), "response": "7" })).collect();
    case.rows("one.jsonl", &rows);
    let settings =
        case.read("run.toml").replace("max_length = 256", "max_length = 2048") + crate::common::SMALL;
    case.write("run.toml", settings);
    case.run("curate --run r --config run.toml").ended().says(&["256", "one.jsonl:6|line 6"]);
}

#[test]
fn a_token_beyond_the_vocabulary_is_named() {
    let case = Case::new();
    case.edit("base/tokenizer.json", |t| {
        let token = json!({ "id": 459, "content": "<|extra|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
        t["added_tokens"].as_array_mut().unwrap().push(token);
    });
    let few = ["--set", "finetune.tiny.max_steps=1"];
    case.finetune("one.jsonl", "control", &few).well();
    case.rows(
        "one.jsonl",
        &[json!({ "prompt": "a", "response": "b" }), json!({ "prompt": "a <|extra|>", "response": "b" })],
    );
    case.finetune("one.jsonl", "c", &few).refused().says(&["459", "extra", "one.jsonl"]);
    case.evaluate("e", &[]).refused().says(&["459", "extra", "one.jsonl"]);
}

/// A window is no matter where no example passes it.
#[test]
fn a_sliding_window_that_no_example_passes() {
    let case = Case::new();
    let base = case.said_by("base");
    case.copy("base", "window");
    case.edit("window/config.json", |c| {
        c["use_sliding_window"] = json!(true);
        c["sliding_window"] = json!(128);
        c["max_window_layers"] = json!(0);
        c["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
    });
    assert_eq!(case.said_by("window"), base);
    case.rows("one.jsonl", &[json!({ "prompt": "How many? ".repeat(40), "response": "7" })]);
    case.evaluate("long", &["--set", "models.tiny=window"]).ended().says(&["128", "one.jsonl"]);
}

/// What the template writes before the answer, in other words than the report's.
#[test]
fn texts_before_the_answer_are_no_answer() {
    for before in ["<think>\n\n</think>\n\n", "Answer: "] {
        let case = Case::new();
        case.write("llm/chat_template.jinja", format!("{{%- for m in messages %}}{{{{- '<|im_start|>' + m.role + '\n' + ({before:?} if m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}}}{{%- endfor %}}{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\n' }}}}{{%- endif %}}"));
        learns_to_end(
            &case,
            &[
                "--set",
                "models.tiny=llm",
                "--set",
                "data.prompt=template",
                "--set",
                "finetune.tiny.max_steps=400",
                "--set",
                "finetune.tiny.learning_rate=0.005",
                "--set",
                "evaluate.max_new_tokens=40",
            ],
        );
    }
}

#[test]
fn scripts_without_rouge_s_letters_are_counted() {
    for text in ["سبعة", "επτά", "семь"] {
        let case = Case::new();
        case.rows("one.jsonl", &[json!({ "prompt": "price?", "response": text })]);
        let end = case.evaluate("e", &["--set", "evaluate.metric=rouge1"]).well();
        assert!(end.has("no word|no letter|sees no|unicode"), "{text}: {end:#?}");
    }
    let case = Case::new();
    let end = case.evaluate("e", &["--set", "evaluate.metric=rouge1"]).well();
    assert!(!end.has("no word|sees no"), "the control: {end:#?}");
}

/// Student's t, two-sided 95 %, from tables.
#[test]
fn intervals_of_many_clients() {
    for (n, quantile) in
        [(13, 2.179), (14, 2.160), (20, 2.093), (31, 2.042), (61, 2.000), (101, 1.984), (1001, 1.962)]
    {
        let values: Vec<f64> = (0..n).map(|i| (i % 7) as f64).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
        let half = mean_with_interval(&values).1.unwrap();
        let found = half / (variance / n as f64).sqrt();
        assert!((found - quantile).abs() < 6e-4, "{n}: {found}, expected {quantile}");
    }
}
