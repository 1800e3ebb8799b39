//! Mutations that know a form: JSON, TOML, safetensors, templates and other text.
//!
//! Each gives none where the bytes are not of that form any more; they are then changed as bytes.

use crate::mutate::{Form, NUMBERS};
use crate::random::Random;
use serde_json::{Map, Value, json};

/// Begins and ends text that is put into JSON as it is, whether it is JSON or not.
const RAW: &str = "\u{1}raw:";
/// Begins a key that becomes a second one of the same name.
const SECOND: &str = "\u{1}2:";
/// Literals that no `Value` can hold, or that are hard on readers.
const LITERALS: [&str; 12] = [
    "1e999",
    "-1e999",
    "NaN",
    "-Infinity",
    "18446744073709551616",
    "340282366920938463463374607431768211456",
    "1e-400",
    "-0",
    "007",
    "\"\\ud83d\"",
    "\"\\u0000\\u001b[31m\"",
    "tru",
];
/// Texts that names, paths and numbers in texts are confused by.
const TEXTS: [&str; 14] = [
    "",
    " ",
    "../../x",
    "/etc/passwd",
    "\0",
    "a\nb",
    "\u{1b}[2J",
    "\u{202e}x",
    "-1",
    "9223372036854775808",
    "NaN",
    "none",
    "é三🙂",
    "%s{}",
];

/// One JSON value with a mutation.
pub fn json(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    mutate_value(&mut value, random);
    Some(printed(&value))
}

/// Lines of JSON, one of them with a mutation, doubled, or left out.
pub fn jsonl(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = bytes.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    let at = random.below(lines.len());
    match random.below(8) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[at].clone()),
        2 => lines
            .insert(at, random.pick(&["", " ", "{}", "[]", "null", "7", "\r", "\"a\""]).as_bytes().to_vec()),
        _ => lines[at] = json(&lines[at], random)?,
    }
    Some(lines.join(&b'\n'))
}

fn printed(value: &Value) -> Vec<u8> {
    let mut text = value.to_string();
    let marker = |begin: &str| format!("\"{}", begin.replace('\u{1}', "\\u0001"));
    while let Some(at) = text.find(&marker(RAW)) {
        let begin = at + marker(RAW).len();
        let Some(end) = text[begin..].find('"').map(|n| begin + n) else { break };
        let number: usize = text[begin..end].parse().unwrap_or_default();
        text.replace_range(at..=end, &raw(number));
    }
    text.replace(&marker(SECOND), "\"").into_bytes()
}

/// What stands behind the number of a raw text.
fn raw(number: usize) -> String {
    match number.checked_sub(LITERALS.len()) {
        None => LITERALS[number].into(),
        Some(0) => format!("{}{}", "[".repeat(3000), "]".repeat(3000)),
        Some(1) => format!("{}1{}", "{\"a\":".repeat(3000), "}".repeat(3000)),
        Some(_) => format!("\"{}\"", "x".repeat(100_000)),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// The `at`-th value of a tree, counted from its root.
fn nth<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, at)),
        Value::Object(map) => map.values_mut().find_map(|item| nth(item, at)),
        _ => None,
    }
}

fn mutate_value(root: &mut Value, random: &mut Random) {
    let total = count(root);
    let other = nth(root, &mut random.below(total)).cloned();
    // Mostly not the root itself.
    let mut at = if total > 1 && !random.once_in(16) { 1 + random.below(total - 1) } else { 0 };
    let Some(node) = nth(root, &mut at) else { return };
    match (random.below(10), node) {
        (0, node) => *node = random.pick(&[json!(null), json!(true), json!(0), json!([]), json!({})]).clone(),
        (1 | 2, node) => *node = json!(random.pick(&NUMBERS)),
        (3, node) => *node = json!(*random.pick(&TEXTS)),
        (4, node) => *node = json!(format!("{RAW}{}", random.below(LITERALS.len() + 3))),
        (5, Value::Object(map)) => change_keys(map, random),
        (5, Value::Array(items)) if !items.is_empty() => {
            let item = random.pick(items).clone();
            (0..1 + random.below(3)).for_each(|_| items.push(item.clone()));
        }
        (6, Value::Array(items)) if !items.is_empty() => drop(items.remove(random.below(items.len()))),
        (6, Value::Object(map)) if !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
            map.remove(&key);
        }
        (7, node) => *node = other.unwrap_or(Value::Null),
        (8, Value::String(text)) => *text = changed(text, random),
        (_, Value::Number(number)) => *number = near(number, random),
        (_, Value::String(text)) => *text = changed(text, random),
        (_, Value::Bool(yes)) => *yes = !*yes,
        (_, node) => *node = json!([node.clone()]),
    }
}

/// A key more, one renamed, or one twice.
fn change_keys(map: &mut Map<String, Value>, random: &mut Random) {
    let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
    let value = map.get(&key).cloned().unwrap_or_default();
    match random.below(3) {
        0 => drop(map.insert(format!("{SECOND}{key}"), json!(random.pick(&NUMBERS)))),
        1 => {
            map.remove(&key);
            map.insert(changed(&key, random), value);
        }
        _ => drop(map.insert((*random.pick(&TEXTS)).into(), value)),
    }
}

fn near(number: &serde_json::Number, random: &mut Random) -> serde_json::Number {
    if let Some(x) = number.as_i64() {
        return match random.below(6) {
            0 => x.wrapping_add(1),
            1 => x.wrapping_sub(1),
            2 => x.wrapping_neg(),
            3 => x.wrapping_mul(2),
            4 => x.wrapping_mul(1_000_000_007),
            _ => *random.pick(&NUMBERS),
        }
        .into();
    }
    let x = number.as_f64().unwrap_or_default();
    let other = *random.pick(&[-x, x * 1e9, x * 1e300, 0.0, 1e-320, x + 1.0]);
    serde_json::Number::from_f64(other).unwrap_or_else(|| 0.into())
}

fn changed(text: &str, random: &mut Random) -> String {
    let at = text.char_indices().map(|(i, _)| i).nth(random.below(text.chars().count())).unwrap_or_default();
    match random.below(5) {
        0 => format!("{}{}{}", &text[..at], random.pick(&TEXTS), &text[at..]),
        1 => text[..at].into(),
        2 => text.repeat(2 + random.below(50)),
        3 => text.to_uppercase(),
        _ => (*random.pick(&TEXTS)).into(),
    }
}

/// Safetensors with a mutation of the header's length, its JSON, or the data.
pub fn tensors(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?) as usize;
    let header = bytes.get(8..length.checked_add(8)?)?;
    let mut data = bytes[8 + length..].to_vec();
    let mut header: Value = serde_json::from_slice(header).ok()?;
    let mut stated = None;
    match random.below(8) {
        0 => stated = Some(*random.pick(&NUMBERS) as u64),
        1 if !data.is_empty() => {
            let at = random.below(data.len()) / 4 * 4;
            let value = random.pick(&[f32::NAN, f32::INFINITY, 0.0, f32::MAX, -1.0]).to_le_bytes();
            data.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = from);
        }
        2 => data.truncate(random.below(data.len())),
        3 | 4 => change_tensor(&mut header, random),
        _ => mutate_value(&mut header, random),
    }
    let header = printed(&header);
    let length = stated.unwrap_or(header.len() as u64);
    Some([&length.to_le_bytes()[..], &header, &data].concat())
}

/// Another type, shape or place of one tensor.
fn change_tensor(header: &mut Value, random: &mut Random) {
    let Some(map) = header.as_object_mut().filter(|map| !map.is_empty()) else { return };
    let at = random.below(map.len());
    let Some(tensor) = map.values_mut().nth(at).and_then(Value::as_object_mut) else { return };
    match random.below(4) {
        0 => drop(tensor.insert(
            "dtype".into(),
            json!(random.pick(&["F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "X"])),
        )),
        1 => drop(tensor.insert("shape".into(), json!([random.pick(&NUMBERS), random.pick(&NUMBERS)]))),
        2 => {
            drop(tensor.insert("data_offsets".into(), json!([random.pick(&NUMBERS), random.pick(&NUMBERS)])))
        }
        _ => {
            let Some(dims) = tensor.get_mut("shape").and_then(Value::as_array_mut) else { return };
            if dims.len() > 1 && random.once_in(2) { dims.swap(0, 1) } else { dims.push(json!(1)) }
        }
    }
}

/// Values that a setting may be given.
const SETTINGS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "9223372036854775807",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "1000000000",
    "\"\"",
    "\"x\"",
    "true",
    "[]",
    "{}",
    "[[[[[[]]]]]]",
    "\"../../x\"",
    "\"\\u001b[31m\"",
    "1979-05-27",
];

/// TOML with a mutation of a line.
pub fn toml(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut lines: Vec<String> = text.lines().map(Into::into).collect();
    let at = random.below(lines.len());
    let key = lines.get(at)?.split_once('=').map(|(key, _)| key.trim_end().to_string());
    match (random.below(9), key) {
        (0, _) => drop(lines.remove(at)),
        (1, _) => lines.insert(at, lines[at].clone()),
        (2, _) => {
            lines.insert(at, random.pick(&["[a.b]", "[[sweep]]", "[train]", "x = 1", "= 1", "]"]).to_string())
        }
        (3, _) => {
            let other = random.below(lines.len());
            lines.swap(at, other);
        }
        (4, Some(key)) => lines[at] = format!("{key} = {}{}", "[".repeat(500), "]".repeat(500)),
        (5, Some(key)) => lines[at] = format!("{}= {}", changed(&key, random), random.pick(&SETTINGS)),
        (_, Some(key)) => lines[at] = format!("{key} = {}", random.pick(&SETTINGS)),
        (_, None) => lines[at] = changed(&lines[at], random),
    }
    Some(lines.join("\n").into_bytes())
}

/// Pieces of templates.
const JINJA: [&str; 32] = [
    "{{ messages }}",
    "{{ messages[0]['content'] * 1000000 }}",
    "{{ range(1000000000) }}",
    "{{ range(99999)|join('x'*9999) }}",
    "{% for i in range(99999) %}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if true %}",
    "{% endif %}",
    "{% set ns = namespace(x='a') %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{% set ns.x = ns %}",
    "{{ ns }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}",
    "{{ f(3) }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% block a %}",
    "{% endblock %}",
    "{% raw %}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ 'x'|indent(1000000000) }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ 1 // 0 }}",
    "{{ 'abc'[::0] }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{{ raise_exception('\u{1b}[31m') }}",
    "{{ strftime_now('%Y%Q%') }}",
    "{{ 'a'.split('') }}",
    "{{ ((((((((((((1)))))))))))) }}",
    "{%- generation -%}",
];
/// Pieces of tables and prompts.
const PIECES: [&str; 14] = [
    "\"",
    "\"\"",
    ",",
    "\n",
    "\r\n",
    "\r",
    "\t",
    "\0",
    ",,,,",
    "\u{feff}",
    "\u{1b}[31m",
    "é三🙂",
    "\"a\nb\",",
    "NaN",
];
/// Words of command lines.
const WORDS: [&str; 40] = [
    "inspect",
    "status",
    "doctor",
    "plan",
    "split",
    "sweep",
    "evaluate",
    "translate",
    "merge",
    "report",
    "finetune",
    "completions",
    "--run",
    "--data",
    "--out",
    "--config",
    "--set",
    "--gpu",
    "--json",
    "--quiet",
    "--threads",
    "--nodes",
    "--clients",
    "--tokens-per-example",
    "--help",
    "run",
    "out",
    "model",
    "adapter",
    "world/settings.toml",
    "train.learning_rate=nan",
    "seed=-1",
    "=",
    "0",
    "-1",
    "18446744073709551616",
    "cpu",
    "",
    "\u{1b}[31m\n",
    "bash",
];

/// Text with pieces put in, taken out, moved, or repeated until it is long.
pub fn text(form: Form, bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut text = std::str::from_utf8(bytes).ok()?.to_string();
    if form == Form::Words {
        let mut words: Vec<&str> = text.lines().collect();
        let at = random.below(words.len() + 1);
        match random.below(4) {
            0 if at < words.len() => drop(words.remove(at)),
            1 if at < words.len() => words[at] = *random.pick(&WORDS),
            _ => words.insert(at, *random.pick(&WORDS)),
        }
        return Some(words.join("\n").into_bytes());
    }
    let pieces: &[&str] = if form == Form::Template { &JINJA } else { &PIECES };
    let bounds: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
    let at = *random.pick(&bounds);
    let end = *random.pick(&bounds);
    let (from, to) = (at.min(end), at.max(end));
    match random.below(7) {
        0 => text.replace_range(from..to, ""),
        1 => {
            let part = text[from..to].to_string();
            text.insert_str(from, &part);
        }
        2 => {
            let times = 1 + 300_000 / (to - from).max(1);
            let part = text[from..to].repeat(times.min(1 + random.below(5000)));
            text.insert_str(from, &part);
        }
        3 => text = format!("{}{text}{}", random.pick(pieces), random.pick(pieces)),
        _ => text.insert_str(at, random.pick::<&str>(pieces)),
    }
    Some(text.into_bytes())
}
