//! The parameters of every kernel, read from its `KERNEL` line in `cu/*.cu`: what launches are checked against.
//!
//! Entry points are written by macros, so this expands the macros of a module first, as the C++ preprocessor does. `gpu.cuh`
//! is the machine below the kernels and is not read: `KERNEL` and `LAUNCH_BOUNDS` stay as they are.

use std::collections::{HashMap, HashSet};
use std::path::Path;

/// The header whose macros are not expanded.
const MACHINE: &str = "gpu.cuh";

/// An entry point.
pub struct Kernel {
    pub name: String,
    pub parameters: Vec<Parameter>,
}

/// What it is called with: `const float* x` is a pointer to `float` that is not written through.
pub struct Parameter {
    pub name: String,
    pub to: String,
    pub pointer: bool,
    pub constant: bool,
}

/// The entry points of a module, in the order of its file.
///
/// # Errors
/// The file and what of it cannot be read: a directive other than `#include`, `#define` and `#pragma`, or a parameter that
/// is neither a number nor a pointer.
pub fn of_module(path: &Path) -> Result<Vec<Kernel>, String> {
    let mut source = Source { macros: HashMap::new(), seen: HashSet::new(), tokens: Vec::new() };
    source.read(path)?;
    entry_points(&source.tokens).map_err(|why| format!("{}: {why}", path.display()))
}

struct Macro {
    /// None for a macro without parentheses.
    parameters: Option<Vec<String>>,
    body: Vec<String>,
}

struct Source {
    macros: HashMap<String, Macro>,
    /// Headers that have been read.
    seen: HashSet<String>,
    /// Expanded.
    tokens: Vec<String>,
}

impl Source {
    fn read(&mut self, path: &Path) -> Result<(), String> {
        let failed = |why: String| format!("{}: {why}", path.display());
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let mut plain = Vec::new();
        for line in without_comments(&text.replace("\\\n", " ")).lines() {
            let Some(directive) = line.trim().strip_prefix('#') else {
                plain.extend(tokens_of(line));
                continue;
            };
            // Macros are those of the place where they are used.
            let before = std::mem::take(&mut plain);
            self.expand_into(&before)?;
            let (word, rest) = directive.split_once(char::is_whitespace).unwrap_or((directive, ""));
            match word {
                "pragma" => {}
                "define" => self.define(rest),
                "include" => {
                    let name = rest.trim().trim_matches('"');
                    if name != MACHINE && self.seen.insert(name.into()) {
                        self.read(&path.with_file_name(name))?;
                    }
                }
                other => return Err(failed(format!("`#{other}` is not one of #include, #define, #pragma"))),
            }
        }
        self.expand_into(&plain)
    }

    fn define(&mut self, text: &str) {
        let name: String = text.chars().take_while(|c| is_word(*c)).collect();
        let mut rest = &text[name.len()..];
        let mut parameters = None;
        if let Some((inside, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            parameters = Some(inside.split(',').map(|p| p.trim().to_string()).collect());
            rest = after;
        }
        self.macros.insert(name, Macro { parameters, body: tokens_of(rest) });
    }

    fn expand_into(&mut self, tokens: &[String]) -> Result<(), String> {
        let expanded = self.expand(tokens, &mut Vec::new())?;
        self.tokens.extend(expanded);
        Ok(())
    }

    /// These tokens with all macros expanded but those in `inside`, which are being expanded.
    fn expand(&self, tokens: &[String], inside: &mut Vec<String>) -> Result<Vec<String>, String> {
        let mut out = Vec::new();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            let found = self.macros.get(token).filter(|_| !inside.contains(token));
            let Some(definition) = found else {
                out.push(token.clone());
                continue;
            };
            let body = match &definition.parameters {
                None => definition.body.clone(),
                Some(_) if tokens.get(at).is_none_or(|t| t != "(") => {
                    out.push(token.clone());
                    continue;
                }
                Some(parameters) => {
                    let (arguments, end) = arguments(tokens, at)?;
                    at = end;
                    if arguments.len() != parameters.len() {
                        let (wanted, found) = (parameters.len(), arguments.len());
                        return Err(format!("`{token}` takes {wanted} arguments, found {found}"));
                    }
                    self.substitute(definition, parameters, &arguments, inside)?
                }
            };
            inside.push(token.clone());
            out.extend(self.expand(&body, inside)?);
            inside.pop();
        }
        Ok(out)
    }

    /// The body of a macro with its arguments in the place of its parameters, and tokens pasted at `##`.
    fn substitute(
        &self,
        definition: &Macro,
        parameters: &[String],
        arguments: &[Vec<String>],
        inside: &mut Vec<String>,
    ) -> Result<Vec<String>, String> {
        let mut out: Vec<String> = Vec::new();
        let body = &definition.body;
        let mut paste = false;
        for (at, token) in body.iter().enumerate() {
            if token == "##" {
                paste = true;
                continue;
            }
            let mut piece = match parameters.iter().position(|p| p == token) {
                None => vec![token.clone()],
                // Beside `##` an argument goes in as it was written.
                Some(n) if paste || body.get(at + 1).is_some_and(|t| t == "##") => arguments[n].clone(),
                Some(n) => self.expand(&arguments[n], inside)?,
            };
            // An empty argument leaves the other side of `##` alone.
            if paste && !piece.is_empty() && !out.is_empty() {
                let first = piece.remove(0);
                if let Some(last) = out.last_mut() {
                    last.push_str(&first);
                }
            }
            paste = false;
            out.extend(piece);
        }
        Ok(out)
    }
}

/// The arguments in the parentheses that open at `at`, and where the tokens after them begin.
fn arguments(tokens: &[String], at: usize) -> Result<(Vec<Vec<String>>, usize), String> {
    let mut arguments = vec![Vec::new()];
    let mut depth = 0;
    for (n, token) in tokens.iter().enumerate().skip(at) {
        match token.as_str() {
            "(" | "{" | "[" if depth > 0 => depth += 1,
            "(" => {
                depth = 1;
                continue;
            }
            ")" | "}" | "]" => depth -= 1,
            "," if depth == 1 => {
                arguments.push(Vec::new());
                continue;
            }
            _ => {}
        }
        if depth == 0 {
            return Ok((arguments, n + 1));
        }
        if let Some(last) = arguments.last_mut() {
            last.push(token.clone());
        }
    }
    Err("a parenthesis is not closed".into())
}

/// The entry points in expanded tokens.
fn entry_points(tokens: &[String]) -> Result<Vec<Kernel>, String> {
    let mut kernels = Vec::new();
    for (mut at, _) in tokens.iter().enumerate().filter(|(_, token)| *token == "KERNEL") {
        at += 1;
        if tokens.get(at).is_some_and(|t| t == "LAUNCH_BOUNDS") {
            at = arguments(tokens, at + 1)?.1;
        }
        let name = tokens.get(at).cloned().unwrap_or_default();
        if tokens.get(at + 1).is_none_or(|t| t != "(") {
            return Err(format!("`KERNEL {name}` has no parameters"));
        }
        let (parameters, _) = arguments(tokens, at + 1)?;
        let parameters: Result<Vec<_>, _> = parameters.iter().map(|p| parameter(p)).collect();
        kernels
            .push(Kernel { parameters: parameters.map_err(|why| format!("kernel `{name}`: {why}"))?, name });
    }
    Ok(kernels)
}

fn parameter(tokens: &[String]) -> Result<Parameter, String> {
    let unknown = || format!("`{}` is not `type name`, `type* name` or `const type* name`", tokens.join(" "));
    let (name, of) = tokens.split_last().ok_or_else(unknown)?;
    let (constant, of) = match of.split_first() {
        Some((first, rest)) if first == "const" => (true, rest),
        _ => (false, of),
    };
    let (pointer, of) = match of.split_last() {
        Some((last, rest)) if last == "*" => (true, rest),
        _ => (false, of),
    };
    match of {
        [to] if name.chars().all(is_word) => {
            Ok(Parameter { name: name.clone(), to: to.clone(), pointer, constant })
        }
        _ => Err(unknown()),
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Words, `##`, strings, and single characters.
fn tokens_of(line: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        let len = match first {
            c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            '"' => rest[1..].find('"').map_or(rest.len(), |end| end + 2),
            '#' if rest.starts_with("##") => 2,
            c => c.len_utf8(),
        };
        tokens.push(rest[..len].to_string());
        rest = rest[len..].trim_start();
    }
    tokens
}

/// Without `//` comments: these files have no others.
fn without_comments(text: &str) -> String {
    text.lines().flat_map(|line| [line.split("//").next().unwrap_or_default(), "\n"]).collect()
}
