//! Files of data as people have them, in `goldens/fixtures/data_forms`: what each is read as, or
//! why it is not.

use gradtx_runtime::data::{Content, Loaded, OnError, Reading, Schema, TrainOn, load, read_rows};
use std::io::Write;
use std::path::{Path, PathBuf};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/fixtures/data_forms").join(name)
}

fn loaded(name: &str, reading: &Reading) -> Result<Loaded, String> {
    load(&[case(name)], reading, false).map_err(|e| e.to_string())
}

/// The prompt of the first record, of one question or of a conversation.
fn first_prompt(found: &Loaded) -> String {
    match &found.records[0].content {
        Content::Pair { prompt, .. } => prompt.clone(),
        Content::Chat(messages) => messages[0].content.clone(),
    }
}

#[test]
fn files_as_people_have_them() {
    for (name, schema, rows, begins, answer_ends) in [
        ("alpaca.jsonl", Schema::Alpaca, 2, "Solve.\nJanet", "#### 18"),
        ("nan.jsonl", Schema::Pair, 2, "Janet", "#### 18"),
        ("openai_messages_multi.jsonl", Schema::Messages, 3, "T.", "#### 18"),
        ("openai_parts.jsonl", Schema::Messages, 2, "Janet", "#### 18"),
        ("prompt_completion.jsonl", Schema::Pair, 2, "Janet", "#### 18"),
        ("seven.jsonl", Schema::Pair, 8, "hi 0", "#### 7"),
        ("sharegpt.json", Schema::Messages, 2, "Janet", "#### 18"),
        ("user_qa.jsonl", Schema::Pair, 10, "What is the capital of France?", "Paris"),
    ] {
        let found = loaded(name, &Reading::default()).unwrap();
        assert_eq!((found.records.len(), found.forms.len()), (rows, 1), "{name}");
        assert_eq!(found.forms[0].schema, schema, "{name}");
        // Nothing is put before what people ask.
        assert!(first_prompt(&found).starts_with(begins), "{name}: {}", first_prompt(&found));
        assert!(found.records[0].content.answer().ends_with(answer_ends), "{name}");
    }
}

#[test]
fn an_answer_that_is_null_is_named_or_left_out() {
    let message = loaded("null_response.jsonl", &Reading::default()).unwrap_err();
    for word in ["null_response.jsonl:8: ", "`response` is null", "data.on_error"] {
        assert!(message.contains(word), "no `{word}` in {message}");
    }
    let skip = Reading { on_error: OnError::Skip, ..Reading::default() };
    let found = loaded("null_response.jsonl", &skip).unwrap();
    assert_eq!((found.records.len(), found.skipped), (9, 1));
}

#[test]
fn a_table_that_ends_within_a_value_is_cut_short() {
    let message = loaded("gsm.csv", &Reading::default()).unwrap_err();
    assert!(message.contains("gsm.csv:2: ") && message.contains("closing quote"), "{message}");
    // The same with its end is read.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gsm.csv");
    let text = std::fs::read_to_string(case("gsm.csv")).unwrap() + "#### 18\"\n";
    std::fs::write(&path, text).unwrap();
    let found = load(&[path], &Reading::default(), false).unwrap();
    assert_eq!((found.records.len(), found.forms[0].schema), (1, Schema::Gsm8k));
}

#[test]
fn earlier_answers_are_learned_on_demand() {
    let learned = |train_on| {
        let reading = Reading { train_on, ..Reading::default() };
        loaded("openai_messages_multi.jsonl", &reading).unwrap().records[0].learned.clone()
    };
    assert_eq!((learned(TrainOn::Last), learned(TrainOn::All)), (vec![], vec![2]));
}

#[test]
fn compressed_files_are_read_and_bombs_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let gzip = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        let mut file =
            flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), Default::default());
        file.write_all(text).unwrap();
        file.finish().unwrap();
        path
    };
    let zstd = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, zstd::encode_all(text, 3).unwrap()).unwrap();
        path
    };
    let (jsonl, csv) = (b"{\"prompt\": \"a\", \"response\": \"b\"}\n", b"prompt,response\na,b\n");
    let list = b"[{\"prompt\": \"a\", \"response\": \"b\"}]";
    for path in [
        gzip("a.jsonl.gz", jsonl),
        gzip("a.csv.gz", csv),
        zstd("a.jsonl.zst", jsonl),
        zstd("a.csv.zst", csv),
        zstd("a.json.zst", list),
        gzip("no-ending", jsonl),
    ] {
        let found = load(std::slice::from_ref(&path), &Reading::default(), false).unwrap();
        assert_eq!(found.records[0].content.answer(), "b", "{}", path.display());
    }
    // A file that ends early is not half a data set.
    let whole = std::fs::read(gzip("b.jsonl.gz", &jsonl.repeat(1000))).unwrap();
    let cut = dir.path().join("cut.jsonl.gz");
    std::fs::write(&cut, &whole[..whole.len() - 20]).unwrap();
    let message = read_rows(&cut).unwrap_err().to_string();
    assert!(message.contains("cut.jsonl.gz: cannot read"), "{message}");
    let small = Reading { limit_mib: Some(4), ..Reading::default() };
    let zeros = vec![b' '; 64 << 20];
    for path in [
        gzip("bomb.jsonl.gz", &zeros),
        zstd("bomb.csv.zst", &zeros),
        gzip("bomb.json.gz", &[b"[".as_slice(), &zeros].concat()),
    ] {
        let message = load(std::slice::from_ref(&path), &small, false).unwrap_err().to_string();
        assert!(message.contains("data.read_limit_mib") || message.contains("longer than"), "{message}");
    }
}

#[test]
fn a_table_that_grows_a_thousandfold_is_refused() {
    let message = loaded("rows_bomb_gzip.parquet", &Reading::default()).unwrap_err();
    assert!(message.contains("rows_bomb_gzip.parquet"), "{message}");
    assert!(message.len() < 2000, "{message}");
}
