//! Prompts from the command line: where answers end, what the model can read, what templates
//! of unknown origin do, and what a score sees.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, stderr, stdout};
use gradtx_tests::{copy_files, fixture};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const RUN: &str = r#"
[models]
tiny = "model"
llm = "model"
[data]
public = "one.jsonl"
max_length = 256
[lora]
r = 16
lora_alpha = 32.0
lora_dropout = 0.0
target_modules = ["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]
[curate]
num_subsets = 1
examples_per_subset = 1
num_snapshots = 1
tiny.max_steps = 1
llm.max_steps = 1
[finetune]
tiny.max_steps = 250
tiny.learning_rate = 0.005
[evaluate]
max_new_tokens = 12
"#;

/// How a command ended, and what it said.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Home {
    /// A model directory, a run file and one example.
    fn of_response(response: &str) -> Self {
        let home = Self::empty();
        copy_files(&fixture("own/llm"), &home.path("model"));
        home.write("run.toml", RUN);
        home.write("one.jsonl", &json!({"prompt": "price?", "response": response}).to_string());
        home
    }

    fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.json(name);
        change(&mut value);
        self.write(name, &value.to_string());
    }

    /// As a pretrained base model: without a template, and its text ends with another token
    /// than ChatML's messages.
    fn base_model(&self) {
        std::fs::remove_file(self.path("model/chat_template.jinja")).unwrap();
        self.edit("model/config.json", |c| c["eos_token_id"] = json!(456));
        self.write("model/generation_config.json", "{\"eos_token_id\": 456}");
        self.edit("model/tokenizer_config.json", |c| c["eos_token"] = json!("<|endoftext|>"));
    }

    fn say(&self, words: &str) -> Said {
        let output = self.gradtx(&words.split_whitespace().collect::<Vec<_>>());
        Said { code: output.status.code(), out: stdout(&output), err: stderr(&output) }
    }

    /// Trains on the example and evaluates it; the score and what was said.
    fn trained(&self, set: &str) -> (Value, Said) {
        let said = self.say(&format!(
            "finetune --run f --config run.toml {set} --data one.jsonl --out c --save-adapter"
        ));
        assert_eq!(said.code, Some(0), "{}", said.err);
        let said =
            self.say("evaluate --run f --data one.jsonl --model tiny --adapter c/adapter --out scores");
        assert_eq!(said.code, Some(0), "{}", said.err);
        (self.json("scores/score.json"), said)
    }
}

impl Said {
    #[track_caller]
    fn fails_with(&self, words: &[&str]) {
        assert!(self.code.is_some_and(|code| code != 0 && code != 101), "{:?}\n{}", self.code, self.err);
        words.iter().for_each(|word| assert!(self.err.contains(word), "{word}: {}", self.err));
    }
}

#[test]
fn base_models_learn_to_end_answers_like_chat_models() {
    let home = Home::of_response("7");
    home.base_model();
    let (score, said) = home.trained("");
    assert_eq!((&score["right"], &score["ended"]), (&json!(1), &json!(1.0)), "{}", said.out);
    assert!(said.out.contains("ChatML; an answer ends with <|im_end|> (id 458), at which"), "{}", said.out);
    assert!(said.out.contains("1 ended by themselves"), "{}", said.out);
    // A merged model stops there by itself, in other programs too.
    let said = home.say("merge --run f --adapter c/adapter --model tiny --out merged");
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert_eq!(home.json("merged/generation_config.json")["eos_token_id"], json!([456, 458]));
}

#[test]
fn a_merged_chat_model_keeps_its_generation_settings() {
    let home = Home::of_response("7");
    let set = "--set finetune.tiny.max_steps=1";
    let said = home
        .say(&format!("finetune --run f --config run.toml {set} --data one.jsonl --out c --save-adapter"));
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert_eq!(home.say("merge --run f --adapter c/adapter --model tiny --out merged").code, Some(0));
    let read = |name: &str| std::fs::read(home.path(name)).unwrap();
    assert_eq!(read("merged/generation_config.json"), read("model/generation_config.json"));
}

#[test]
fn forms_that_end_in_plain_text_are_refused() {
    let home = Home::of_response("7");
    home.base_model();
    // As with the tokenizers of Llama and Mistral: ChatML's markers are no tokens.
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let text = std::fs::read_to_string(home.path("model").join(name)).unwrap();
        home.write(&format!("model/{name}"), &text.replace("<|im_end|>", "<|other|>"));
    }
    let set = "--config run.toml --set data.prompt=chatml";
    let words = ["<|im_end|>", "ordinary tokens", "data.prompt"];
    home.say(&format!("finetune --run e {set} --data one.jsonl --out d")).fails_with(&words);
    home.say(&format!("curate --run g {set}")).fails_with(&words);
    home.say(&format!("evaluate --run h {set} --data one.jsonl --out s")).fails_with(&words);
    assert!(!home.path("d/update.safetensors").exists());
    home.write("chatml.toml", &RUN.replace("max_length", "prompt = \"chatml\"\nmax_length"));
    let said = home.say("doctor --run chatml.toml");
    assert!(
        said.out.contains("PROBLEM  prompt tiny") && said.out.contains("ordinary tokens"),
        "{}",
        said.out
    );
    home.say("plan --config chatml.toml --gpu a100-80g").fails_with(&words);
    // What the model knows works: plain text, and its own end. That it learns to end such answers,
    // `cases` tests on a model with weights that can.
    let said = home.say("evaluate --run i --config run.toml --data one.jsonl --model tiny --out scores");
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.out.contains("plain text; an answer ends with <|endoftext|>"), "{}", said.out);
}

#[test]
fn template_text_before_an_answer_is_no_part_of_it() {
    let home = Home::of_response("7");
    let template = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + \
        ('<think></think>' if m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}{%- endfor %}\
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";
    home.write("model/chat_template.jinja", template);
    let set = "--set finetune.tiny.max_steps=400 --set evaluate.max_new_tokens=32";
    let (score, said) = home.trained(set);
    assert_eq!((&score["right"], &score["rouge1"]), (&json!(1), &json!(1.0)), "{}", said.out);
    let predictions = std::fs::read_to_string(home.path("scores/predictions.jsonl")).unwrap();
    assert!(predictions.contains("<think></think>7"), "the prediction as it was: {predictions}");
}

#[test]
fn a_score_that_sees_no_word_says_so() {
    let home = Home::of_response("三");
    let (score, said) = home.trained("--set evaluate.metric=rouge1");
    assert_eq!((&score["score"], &score["exact_match"]), (&json!(0.0), &json!(1.0)));
    assert_eq!((&score["wordless_references"], &score["rouge_tokens"]), (&json!(1), &json!("rouge_score")));
    assert!(
        said.err.contains("no word in 1 of 1 references") && said.err.contains("unicode"),
        "{}",
        said.err
    );
    let home = Home::of_response("三");
    let (score, said) = home.trained("--set evaluate.metric=rouge1 --set evaluate.rouge_tokenizer=unicode");
    assert_eq!((&score["score"], &score["wordless_references"]), (&json!(1.0), &json!(0)));
    assert!(!said.err.contains("warning"), "{}", said.err);
}

#[test]
fn predictions_that_do_not_end_are_said() {
    let home = Home::of_response("seven apples are left, and some more of them");
    let said = home
        .say("evaluate --run f --config run.toml --data one.jsonl --set evaluate.max_new_tokens=1 --out s");
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.err.contains("0 of 1 predictions ended by themselves"), "{}", said.err);
}

#[test]
fn inputs_longer_than_the_model_are_named() {
    let home = Home::of_response("3");
    let long = |n: usize| {
        json!({"prompt": "How many apples are left? ".repeat(n), "response": "#### 3"}).to_string()
    };
    home.write("one.jsonl", &format!("{}\n{}\n", json!({"prompt": "a", "response": "b"}), long(90)));
    let said = home.say("evaluate --run e --config run.toml --data one.jsonl --out s");
    said.fails_with(&["one.jsonl:2", "256 positions"]);
    let set = "--config run.toml --set data.max_length=2048 --set finetune.tiny.max_steps=2";
    let said = home.say(&format!("finetune --run f {set} --data one.jsonl --out c"));
    said.fails_with(&["one.jsonl:2", "cut at 256"]);
    home.say("curate --run g --config run.toml").fails_with(&["one.jsonl:2"]);
    // Where there is room for a part of an answer, it is said how many are cut.
    let answers = |length: usize| json!({"prompt": "a", "response": "b ".repeat(length)}).to_string();
    home.write("one.jsonl", &[answers(3), answers(4), answers(400)].join("\n"));
    let said =
        home.say(&format!("finetune --run h {set} --set data.max_lost_labels=0.5 --data one.jsonl --out d"));
    assert_eq!(said.code, Some(0), "{}", said.err);
    for words in
        ["1 of 3 examples are longer than 256 tokens", "one.jsonl:3", "positions", "1 of 3 answers are cut"]
    {
        assert!(said.err.contains(words), "{words}: {}", said.err);
    }
    // A prompt that leaves less room than asked for is evaluated as far as the model reads.
    home.write("one.jsonl", &answers(1));
    let said = home
        .say("evaluate --run i --config run.toml --set evaluate.max_new_tokens=512 --data one.jsonl --out t");
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.err.contains("1 of 1 prompts leave room for fewer"), "{}", said.err);
}

#[test]
fn tokens_that_the_model_has_no_row_for_are_named() {
    let home = Home::of_response("7");
    home.edit("model/tokenizer.json", |file| {
        let added = json!({"id": 470, "content": "<extra>", "special": false, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false});
        file["added_tokens"].as_array_mut().unwrap().push(added);
    });
    let home_says = |prompt: &str, command: &str| {
        home.write("one.jsonl", &json!({"prompt": prompt, "response": "7"}).to_string());
        home.say(command)
    };
    let set = "--config run.toml --set finetune.tiny.max_steps=1";
    let words = ["one.jsonl:1", "<extra>", "vocabulary of 459"];
    home_says("a <extra>", &format!("finetune --run f {set} --data one.jsonl --out c")).fails_with(&words);
    home_says("a <extra>", &format!("evaluate --run e {set} --data one.jsonl --out s")).fails_with(&words);
    home_says("a <extra>", &format!("curate --run g {set}")).fails_with(&words);
    let said = home.say("doctor --run run.toml");
    assert!(said.out.contains("embedding 459 rows"), "{}", said.out);
    let said = home_says("a", &format!("finetune --run h {set} --data one.jsonl --out d"));
    assert_eq!(said.code, Some(0), "tokens that do not occur change nothing: {}", said.err);
}

#[test]
fn the_date_of_a_template_is_a_setting_of_the_run() {
    let home = Home::of_response("7");
    let template = "{%- set today = strftime_now('%d %B %Y') %}{{ '<|im_start|>system\n' + today + '<|im_end|>\n' }}\
        {%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}\
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}";
    home.write("model/chat_template.jinja", template);
    let evaluate = |run: &str, more: &str, out: &str| {
        home.say(&format!("evaluate --run {run} --config run.toml {more} --data one.jsonl --out {out}"))
    };
    let said = evaluate("r", "--set data.date='2026-02-03'", "s");
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.out.contains("contains the date, 2026-02-03"), "{}", said.out);
    // The run keeps its date; a result of another one is another result.
    assert!(std::fs::read_to_string(home.path("r/run.toml")).unwrap().contains("date = \"2026-02-03\""));
    assert!(evaluate("r", "", "s").out.contains("is finished"));
    let other = "--set data.date=2026-02-04";
    evaluate("r", other, "s").fails_with(&["other settings", "- prompt.date", "+ prompt.date"]);
    assert!(std::fs::read_to_string(home.path("r/run.toml")).unwrap().contains("date = \"2026-02-03\""));
    assert_eq!(evaluate("r", other, "t").code, Some(0));
    // Without a setting it is the day on which the run is made.
    let said = evaluate("q", "", "u");
    assert_eq!(said.code, Some(0), "{}", said.err);
    let text = std::fs::read_to_string(home.path("q/run.toml")).unwrap();
    assert!(text.lines().any(|line| line.starts_with("date = \"20") && line.len() == 19), "{text}");
    evaluate("p", "--set data.date=today", "v").fails_with(&["data.date", "2026-11-27"]);
}

/// Every template ends within seconds, as an error that says so, and takes no more than its
/// share of memory with it.
#[test]
fn templates_that_never_end_are_errors() {
    let long_sum = format!("{{{{ 1{} }}}}", "+1".repeat(100_000));
    let nested = format!("{{% set x = {}1{} %}}x", "[".repeat(100_000), "]".repeat(100_000));
    let chain = "{% if 0 %}".to_string() + &"{% elif 0 %}".repeat(30_000) + "{% endif %}x";
    let templates = [
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = (ns.s + ns.s)|list %}{% endfor %}x",
        "{{ range(99999)|join('x'*100000)|length }}",
        "{{ ('a'*9999999)|replace('a', 'b'*9999999)|length }}",
        "{{ 'a\n'|indent(9999999999) }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns ~ '' }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a == [ns.a] or ns.a|string|length }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
        "{% include 'chat_template' %}",
        "{{ raise_exception('no') }}",
        &long_sum,
        &nested,
        &chain,
    ];
    let home = Home::of_response("7");
    for (i, template) in templates.iter().enumerate() {
        home.write("model/chat_template.jinja", template);
        let started = Instant::now();
        let said = home.say(&format!("evaluate --run r --config run.toml --data one.jsonl --out s{i}"));
        assert!(started.elapsed() < Duration::from_secs(60), "{template:.80}");
        let fine = said.code == Some(0);
        assert!(fine || said.code == Some(1) || said.code == Some(2), "{template:.80}: {:?}", said.code);
        assert!(!fine || i >= 14, "{template:.80} ends with a text");
        assert!(fine || said.err.contains("chat template"), "{template:.80}: {}", said.err);
    }
    // A good one still works.
    copy_files(&fixture("own/llm"), &home.path("model"));
    assert_eq!(home.say("evaluate --run r --config run.toml --data one.jsonl --out good").code, Some(0));
}
