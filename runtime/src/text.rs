//! Text that comes from files, made fit for a terminal: names, metadata, settings and
//! messages may hold escape sequences that move the cursor, change colours or hide what
//! stands beside them.

use std::borrow::Cow;
use std::path::Path;

/// Whether a terminal, or a reader of its lines, takes a character for more than a letter:
/// C0 (but newline and tab) and C1 controls, DEL, line and paragraph separators, and what
/// embeds, overrides or isolates the direction of writing.
fn is_control(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        c => c.is_control(),
    }
}

/// The text with its control characters as `\u001b`, which is also how JSON writes them: a
/// line of JSON keeps its meaning. Newlines and tabs stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, is_control)
}

/// As [`printable`], in one line: newlines and tabs are written as `\u000a` and `\u0009` too.
/// For names and values that a line is made of.
pub fn printable_line(text: &str) -> Cow<'_, str> {
    escaped(text, |c| is_control(c) || matches!(c, '\n' | '\t'))
}

/// A path as one line of text: names of files may hold anything.
pub fn shown(path: &Path) -> String {
    printable_line(&path.to_string_lossy()).into_owned()
}

fn escaped(text: &str, escape: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&escape) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match escape(c) {
            true => out += &format!("\\u{:04x}", u32::from(c)),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_letters_stay() {
        for (text, want) in [
            ("a\u{1b}[31mred\u{1b}[0m", "a\\u001b[31mred\\u001b[0m"),
            ("bell\u{7}, back\u{8}, return\r", "bell\\u0007, back\\u0008, return\\u000d"),
            ("del\u{7f} csi\u{9b}2J", "del\\u007f csi\\u009b2J"),
            ("evil\u{202e}txt.exe\u{2066}\u{2069}", "evil\\u202etxt.exe\\u2066\\u2069"),
            ("a\u{2028}b\0", "a\\u2028b\\u0000"),
        ] {
            assert_eq!(printable(text), want);
        }
        for text in ["Größe 大小 размер עברית العربية 🦀", "two\nlines\tand a tab", ""]
        {
            assert_eq!(printable(text), text);
        }
        assert_eq!(printable_line("a\nb\tc"), "a\\u000ab\\u0009c");
    }

    #[test]
    fn json_keeps_its_meaning() {
        let value = serde_json::json!({ "name": "x\u{9b}2J\u{202e}\u{7f}\u{1b}\n" });
        let shown = printable(&value.to_string()).into_owned();
        assert!(shown.is_ascii(), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
