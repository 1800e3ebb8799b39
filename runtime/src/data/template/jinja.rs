//! Jinja with the settings and additions that transformers gives to chat templates.

use super::values::{text, to_json};
use super::{Request, Source};
use chrono::NaiveDate;
use chrono::format::{Item, StrftimeItems};
use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, context};
use minijinja_contrib::pycompat;

const NAME: &str = "chat_template";

/// Instructions of one conversation at most; published templates need below 100 per message.
const FUEL: u64 = 5_000_000;
/// Bytes of a rendered conversation at most.
const MAX_TEXT_BYTES: usize = 64 << 20;

type Found = std::result::Result<Value, Error>;

fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why.into())
}

/// A compiled template.
pub(super) struct Jinja {
    environment: Environment<'static>,
    special: Value,
}

impl Jinja {
    /// Compiles; the error says what is wrong and where.
    pub fn new(source: &Source) -> Result<Self, String> {
        let mut environment = environment(&source.date)?;
        environment
            .add_template_owned(NAME, without_generation_tags(&source.template))
            .map_err(|e| explained(&e))?;
        Ok(Self { environment, special: Value::from_serialize(&source.special) })
    }

    /// The text of a conversation, or why there is none.
    pub fn render(&self, request: &Request) -> Result<String, String> {
        let template = self.environment.get_template(NAME).map_err(|e| explained(&e))?;
        let unset = Value::from(());
        let context = context! {
            messages => request.messages,
            add_generation_prompt => request.add_generation_prompt,
            tools => unset,
            documents => unset,
            ..self.special.clone()
        };
        let text = template.render(context).map_err(|e| explained(&e))?;
        match text.len() {
            0..=MAX_TEXT_BYTES => Ok(text),
            bytes => Err(format!("it makes {bytes} bytes of text; at most {MAX_TEXT_BYTES} are taken")),
        }
    }
}

/// An error in the words of somebody who has the template before them.
fn explained(error: &Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => {
            format!("it runs more than {FUEL} instructions for one conversation; it may never end")
        }
        _ => error.to_string(),
    }
}

fn environment(date: &str) -> Result<Environment<'static>, String> {
    let mut jinja = Environment::new();
    jinja.set_trim_blocks(true);
    jinja.set_lstrip_blocks(true);
    jinja.set_fuel(Some(FUEL));
    jinja.set_unknown_method_callback(method);
    jinja.set_formatter(|out, _state, value| {
        if let Some(text) = value.as_str() {
            return out.write_str(text).map_err(Error::from);
        }
        let mut printed = String::new();
        text(value, &mut printed)?;
        out.write_str(&printed).map_err(Error::from)
    });
    // Prints every variable, of whatever size.
    jinja.remove_global("debug");
    jinja.add_function("raise_exception", |why: String| -> Found {
        Err(invalid(format!("the template refuses this conversation: {why}")))
    });
    let date = match date {
        "" => None,
        given => Some(parse_date(given)?),
    };
    jinja.add_function("strftime_now", move |format: &str| -> Found {
        let date = date.ok_or_else(|| invalid("it asks for the date; set data.date to one"))?;
        strftime(date, format).map(Value::from)
    });
    jinja.add_filter("tojson", |value: &Value, options| to_json(value, options));
    jinja.add_filter("string", |value: &Value| -> Found {
        let mut printed = String::new();
        text(value, &mut printed)?;
        Ok(Value::from(printed))
    });
    // Python's texts are sequences, and so are its mappings to Jinja's test.
    jinja.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    jinja.add_test("iterable", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map)
    });
    Ok(jinja)
}

/// A date as settings have it.
fn parse_date(text: &str) -> Result<NaiveDate, String> {
    NaiveDate::parse_from_str(text, "%Y-%m-%d")
        .map_err(|_| format!("the date `{text}` is not of the form 2026-11-27"))
}

/// Python's `strftime` of a date; times of day are midnight's.
fn strftime(date: NaiveDate, format: &str) -> std::result::Result<String, Error> {
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if format.len() > 1000 || items.contains(&Item::Error) {
        return Err(invalid(format!(
            "strftime_now: the format `{format:.100}` has a code that is not known"
        )));
    }
    let midnight = date.and_time(chrono::NaiveTime::MIN).and_utc();
    let mut out = String::new();
    std::fmt::Write::write_fmt(&mut out, format_args!("{}", midnight.format_with_items(items.iter())))
        .map_err(|_| invalid(format!("strftime_now: the format `{format}` cannot be written")))?;
    Ok(out)
}

/// Methods of Python's texts and mappings. Places in texts are counted in characters.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Found {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    let place = |byte: usize| text[..byte].chars().count() as i64;
    let one = || from_args::<(&str,)>(args).map(|(what,)| what);
    Ok(match name {
        "find" => Value::from(text.find(one()?).map_or(-1, place)),
        "rfind" => Value::from(text.rfind(one()?).map_or(-1, place)),
        "index" => Value::from(text.find(one()?).map(place).ok_or_else(|| invalid("substring not found"))?),
        "rindex" => Value::from(text.rfind(one()?).map(place).ok_or_else(|| invalid("substring not found"))?),
        "count" => match one()? {
            "" => Value::from(text.chars().count() + 1),
            what => Value::from(text.matches(what).count()),
        },
        "removeprefix" => Value::from(text.strip_prefix(one()?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(one()?).unwrap_or(text)),
        "partition" => {
            let what = one()?;
            let parts = text.split_once(what).map(|(before, after)| [before, what, after]);
            parts.unwrap_or([text, "", ""]).into_iter().map(Value::from).collect()
        }
        "rpartition" => {
            let what = one()?;
            let parts = text.rsplit_once(what).map(|(before, after)| [before, what, after]);
            parts.unwrap_or(["", "", text]).into_iter().map(Value::from).collect()
        }
        "rsplit" => {
            let (separator, most): (&str, Option<usize>) = from_args(args)?;
            let mut parts: Vec<&str> = match most {
                Some(most) => text.rsplitn(most.saturating_add(1), separator).collect(),
                None => text.rsplit(separator).collect(),
            };
            parts.reverse();
            parts.into_iter().map(Value::from).collect()
        }
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// `{% generation %}` marks the assistant's text for other trainers and prints nothing.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length + 2;
        let inside = &rest[start + 2..end - 2];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        if matches!(word, "generation" | "endgeneration") {
            // A comment keeps the whitespace rules of the tag that it stands for.
            let mark = |present: bool| if present { "-" } else { "" };
            out.push_str(&rest[..start]);
            let (left, right) = (mark(inside.starts_with('-')), mark(inside.ends_with('-')));
            out.push_str(&format!("{{#{left} {right}#}}"));
        } else {
            out.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::super::super::schema::Message;
    use super::*;
    use serde_json::json;

    fn compiled(template: &str) -> Result<Jinja, String> {
        let special = serde_json::Map::from_iter([("bos_token".to_string(), json!("<s>"))]);
        Jinja::new(&Source { template: template.into(), special, date: "2026-02-03".into() })
    }

    fn rendered(template: &str, turns: &[(&str, &str)]) -> Result<String, String> {
        let message =
            |(role, content): &(&str, &str)| Message { role: (*role).into(), content: (*content).into() };
        let messages = turns.iter().map(message).collect();
        compiled(template)?.render(&Request { messages, add_generation_prompt: true })
    }

    /// What a template without messages prints.
    fn printed(template: &str) -> String {
        rendered(template, &[]).unwrap_or_else(|why| panic!("{template}: {why}"))
    }

    /// Expected text from Jinja2 with the extensions that chat templates are written for.
    #[test]
    fn whitespace_json_and_tags_are_as_in_python() {
        let template = r#"{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        [A]
        {% generation %}
        {{ m.content.strip() }}</s>
        {% endgeneration %}

        tail
    {%- generation -%}
        x
    {%- endgeneration -%}
        y
    {%- else %}
[{{ m['role'].upper()[0] }}] {{ m.content | tojson }}{{ {'k': [1, 'é<', none, true]} | tojson }}{{ [1,{'a':2}] | tojson(indent=2) }}
        {% if loop.index > 5 %}{% break %}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and tools is none %}
[G] {{ messages|length ~ '-' ~ messages[-1].content.split('<')[0] }}{% endif %}
"#;
        let turns = [("user", "a<b & \"c\" 'd'"), ("assistant", " yes "), ("user", "ü")];
        let found = rendered(template, &turns).unwrap();
        let want = "<s>[U] \"a<b & \\\"c\\\" 'd'\"{\"k\": [1, \"é<\", null, true]}[\n  1,\n  {\n    \"a\": 2\n  }\n]\n        \
            [A]\n        yes</s>\n\n        tailxy\
            [U] \"ü\"{\"k\": [1, \"é<\", null, true]}[\n  1,\n  {\n    \"a\": 2\n  }\n]\n[G] 3-ü";
        assert_eq!(found, want);
    }

    #[test]
    fn the_date_is_a_setting() {
        assert_eq!(printed("{{ strftime_now('%Y-%m-%d') }}"), "2026-02-03");
        assert_eq!(
            printed("{{ strftime_now('%d %b %Y, %A %B %-d %H:%M:%S %y %j %%') }}"),
            "03 Feb 2026, Tuesday February 3 00:00:00 26 034 %"
        );
        for format in ["%Q", "%", "%!"] {
            let why = rendered(&format!("{{{{ strftime_now('{format}') }}}}"), &[]).unwrap_err();
            assert!(why.contains("strftime_now") && why.contains(format), "{why}");
        }
        let source = |date: &str| Source {
            template: "{{ strftime_now('%Y') }}".into(),
            special: Default::default(),
            date: date.into(),
        };
        let request = Request { messages: vec![], add_generation_prompt: false };
        let why = Jinja::new(&source("")).and_then(|jinja| jinja.render(&request)).unwrap_err();
        assert!(why.contains("data.date"), "{why}");
        assert!(Jinja::new(&source("27.11.2026")).err().is_some_and(|why| why.contains("27.11.2026")));
    }

    #[test]
    fn values_are_printed_as_python_does() {
        for (template, want) in [
            ("{{ true }} {{ none }} {{ 1.0 }} {{ undefined_name }}|", "True None 1.0 |"),
            (
                "{{ ['a', \"it's\", {'k': none, 'b': [1, false]}] }}",
                "['a', \"it's\", {'k': None, 'b': [1, False]}]",
            ),
            ("{{ 'x' ~ 1 ~ ['q']|string }}", "x1['q']"),
            ("{{ {'b': 1, 'a': 'é'} | tojson }}", "{\"b\": 1, \"a\": \"é\"}"),
            (
                "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true) }}",
                "{\"a\": \"\\u00e9\", \"b\": 1}",
            ),
            ("{{ {'b': [], 'a': [1]} | tojson(separators=(',', ':')) }}", "{\"b\":[],\"a\":[1]}"),
            ("{{ [1, {}] | tojson(indent=2) }}", "[\n  1,\n  {}\n]"),
            ("{{ '<a&\\'\"\\n' | tojson }}", "\"<a&'\\\"\\n\""),
        ] {
            assert_eq!(printed(template), want, "{template}");
        }
    }

    #[test]
    fn methods_count_in_characters_as_python_does() {
        for (template, want) in [
            ("{{ 'äöx'.find('x') }} {{ 'äöx'.rfind('ö') }} {{ 'a'.find('b') }}", "2 1 -1"),
            ("{% set t = 'ä</t> b' %}{{ t[t.find('</t>') + 4:] }}", " b"),
            ("{{ 'abc'.count('') }} {{ 'aXbX'.count('X') }}", "4 2"),
            ("{{ 'a-b-c'.rsplit('-', 1) }} {{ 'a-b-c'.partition('-') }}", "['a-b', 'c'] ['a', '-', 'b-c']"),
            ("{{ 'abc'.removeprefix('a').removesuffix('c') }} {{ 'abc'[::-1] }}", "b cba"),
            (
                "{{ 'a' is sequence }} {{ {} is iterable }} {{ 'a' is mapping }} {{ 1 is iterable }}",
                "True True False False",
            ),
            ("{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "b1a2"),
            ("{{ {'a': 1}.get('b', 3) }} {{ 'ab' * 2 }} {{ '%s-%d' | format('x', 3) }}", "3 abab x-3"),
        ] {
            assert_eq!(printed(template), want, "{template}");
        }
    }

    #[test]
    fn what_never_ends_is_stopped() {
        for (template, say) in [
            ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "never end"),
            (
                "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
                "never end",
            ),
            ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
            ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", "contains itself"),
            ("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns | tojson }}", "contains itself"),
            ("{{ range(10 ** 9) }}", "too many"),
            ("{{ 'x' * 10 ** 12 }}", "too large"),
            ("{{ raise_exception('no system') }}", "refuses this conversation: no system"),
            ("{{ no_such_function() }}", "no_such_function"),
        ] {
            let why = rendered(template, &[]).unwrap_err();
            assert!(why.contains(say), "{template}: {why}");
        }
    }
}
