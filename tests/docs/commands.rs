//! Command lines of blocks: each must be one that the program takes.

use crate::page::{Mark, Page};
use clap::CommandFactory;
use clap::error::ErrorKind;
use gradtx::args::Args;

/// Command lines and `make` targets that do not exist.
pub fn faults(page: &Page, makefile: &str) -> Vec<String> {
    let mut faults = vec![];
    let shell = page.blocks.iter().filter(|block| block.language == "sh" && block.mark != Mark::Setup);
    for block in shell {
        for (offset, words) in commands(&block.text) {
            let place = format!("{}:{}", page.name, block.line + 1 + offset);
            if let Some(why) = fault(&words, makefile) {
                faults.push(format!("{place}: {}: {why}", words.join(" ")));
            }
        }
    }
    faults
}

/// Why a command cannot be run, if it cannot.
fn fault(words: &[String], makefile: &str) -> Option<String> {
    let is_gradtx = |word: &String| word == "gradtx" || word.ends_with("/gradtx");
    // What a launcher or a variable before it starts counts too.
    if words.first().is_some_and(|first| first != "echo" && first != "cargo")
        && let Some(at) = words.iter().position(is_gradtx)
    {
        let error = Args::command().try_get_matches_from(&words[at..]).err()?;
        let shows = [ErrorKind::DisplayHelp, ErrorKind::DisplayVersion];
        return (!shows.contains(&error.kind())).then(|| error.to_string().trim().replace('\n', " "));
    }
    if words.first().is_some_and(|first| first == "make") {
        let is_target = |word: &&String| !word.starts_with('-') && !word.contains('=');
        let there = |target: &str| {
            let named = |line: &str| {
                line.split_once(':').is_some_and(|(names, _)| {
                    !line.starts_with(['\t', '#', ' ']) && names.split_whitespace().any(|name| name == target)
                })
            };
            makefile.lines().any(named)
        };
        let lacking = words[1..].iter().filter(is_target).find(|target| !there(target));
        return lacking.map(|target| format!("the Makefile has no target `{target}`"));
    }
    None
}

/// The simple commands of a script, by words, with the line of each from 0.
fn commands(script: &str) -> Vec<(usize, Vec<String>)> {
    let mut found: Vec<(usize, Vec<String>)> = vec![];
    let mut words: Vec<String> = vec![];
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let (mut line, mut began) = (0, 0);
    let mut chars = script.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\n' {
            line += 1;
        }
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '\\') => match chars.next() {
                Some('\n') | None => line += 1,
                Some(c) => word.get_or_insert_default().push(c),
            },
            (None, '#') if word.is_none() => {
                while chars.peek().is_some_and(|c| *c != '\n') {
                    chars.next();
                }
            }
            (None, ' ' | '\t') => words.extend(word.take()),
            (None, '\n' | ';' | '|' | '&' | '(' | ')') => {
                words.extend(word.take());
                if !words.is_empty() {
                    found.push((began, std::mem::take(&mut words)));
                }
            }
            (None, '>' | '<') => {
                // Where its output goes, or its input comes from, is no argument.
                words.extend(word.take());
                while chars.peek() == Some(&' ') {
                    chars.next();
                }
                while chars.peek().is_some_and(|c| !c.is_whitespace()) {
                    chars.next();
                }
            }
            (None, c) => word.get_or_insert_default().push(c),
        }
        if words.is_empty() && word.is_none() {
            began = line;
        }
    }
    words.extend(word);
    if !words.is_empty() {
        found.push((began, words));
    }
    found
}
