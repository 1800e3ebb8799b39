//! Which modules an adapter of PEFT is of: lists of names, full paths, regular expressions and
//! `all-linear`, with exclusions, as PEFT matches them against the paths of a model.
//!
//! In: the fields of `adapter_config.json`, and the model's sizes. Out: the blocks, and the modules, the same
//! in every one of these. An adapter of other modules in one block than in another has no place in the layout and is
//! refused.

use super::Module;
use crate::decoder::DecoderConfig;
use crate::foreign::{is_off, shown};
use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;

/// The field that cannot be honoured, and why.
type Refusal = (&'static str, String);

/// What is adapted.
pub(super) struct Adapted {
    /// The modules of every adapted block.
    pub(super) modules: Vec<Module>,
    /// The adapted blocks, in order.
    pub(super) layers: Vec<usize>,
    /// The modules' paths in the model, in these blocks.
    pub(super) places: Vec<String>,
}

/// A condition on paths, as PEFT understands it.
enum Condition {
    /// A path is one of these, or ends with one after a dot.
    Names(Vec<String>),
    /// The whole path matches.
    Pattern(Box<Regex>),
    /// Every linear layer of the blocks.
    AllLinear,
}

impl Condition {
    fn parse(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) if text.eq_ignore_ascii_case("all-linear") => Ok(Self::AllLinear),
            Value::String(text) => Ok(Self::Pattern(Box::new(whole(text)?))),
            Value::Array(list) => {
                let names = list.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
                names.map(Self::Names).ok_or_else(|| format!("{} is not a list of names", shown(value)))
            }
            _ => Err(format!(
                "{} is not supported; expected a list of module names such as [\"q_proj\", \"v_proj\"], a \
                 regular expression over module paths, or \"all-linear\"",
                shown(value)
            )),
        }
    }

    fn holds(&self, path: &str) -> Result<bool, String> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| {
                path.strip_suffix(name.as_str())
                    .is_some_and(|before| before.is_empty() || before.ends_with('.'))
            })),
            Self::Pattern(pattern) => is_match(pattern, path),
            Self::AllLinear => Ok(path.contains(".layers.")),
        }
    }
}

/// Python's `re.fullmatch`: the expression alone must be valid, and match everything.
fn whole(text: &str) -> Result<Regex, String> {
    compile(text)?;
    compile(&format!(r"\A(?:{text})\z"))
}

fn compile(text: &str) -> Result<Regex, String> {
    const LONGEST: usize = 1 << 16;
    if text.len() > LONGEST {
        return Err(format!("a regular expression of {} bytes; at most {LONGEST} are read", text.len()));
    }
    let regex = RegexBuilder::new(text).backtrack_limit(100_000).build();
    regex.map_err(|e| format!("{} is not a valid regular expression: {e}", shown(&text.into())))
}

fn is_match(pattern: &Regex, path: &str) -> Result<bool, String> {
    pattern.is_match(path).map_err(|e| format!("the regular expression takes too long on `{path}`: {e}"))
}

/// What `[target_modules, exclude_modules, layers_to_transform]` select.
pub(super) fn adapted_modules(
    model: &DecoderConfig,
    [targets, excluded, layers]: &[Value; 3],
) -> Result<Adapted, Refusal> {
    let targets = Condition::parse(targets).map_err(|why| ("target_modules", why))?;
    let excluded = match is_off(excluded) {
        true => Condition::Names(vec![]),
        false => Condition::parse(excluded).map_err(|why| ("exclude_modules", why))?,
    };
    let layers = transformed_layers(layers, model.layers)?;
    let is_adapted = |path: &str| -> Result<bool, Refusal> {
        Ok(targets.holds(path).map_err(|why| ("target_modules", why))?
            && !excluded.holds(path).map_err(|why| ("exclude_modules", why))?)
    };
    for path in model.family.modules_outside() {
        if is_adapted(&path)? {
            let why = format!("it adapts `{path}`; adapters of the modules inside the blocks are supported");
            return Err(("target_modules", why));
        }
    }
    let path = |layer: usize, module: Module| model.family.tensor(layer, module, "");
    let mut adapted = Adapted { modules: vec![], layers: vec![], places: vec![] };
    let mut chosen = vec![];
    for module in model.family.modules() {
        let mut own = vec![];
        for &layer in &layers {
            if is_adapted(&path(layer, module))? {
                own.push(layer);
            }
        }
        if !own.is_empty() {
            adapted.modules.push(module);
            adapted.places.extend(own.iter().map(|layer| path(*layer, module)));
            chosen.push((module, own));
        }
    }
    // The blocks are those of the module that has most.
    if let Some((most, blocks)) = chosen.iter().max_by_key(|(_, own)| own.len()) {
        if let Some((module, own)) = chosen.iter().find(|(_, own)| own != blocks) {
            let is_target = |layer: &usize| targets.holds(&path(*layer, *module)).unwrap_or(false);
            let field = if blocks.iter().all(is_target) { "exclude_modules" } else { "target_modules" };
            let why = format!(
                "it adapts {} in {} of {} blocks, and {} in {}; supported are adapters of the same modules in every \
                 adapted block",
                model.family.module_name(*module),
                own.len(),
                model.layers,
                model.family.module_name(*most),
                blocks.len()
            );
            return Err((field, why));
        }
        adapted.layers = blocks.clone();
    }
    if adapted.modules.is_empty() {
        let known: Vec<&str> = model.family.modules().map(|m| model.family.module_name(m)).collect();
        let known = known.join(", ");
        return Err(("target_modules", format!("it names no module of a block; those are {known}")));
    }
    Ok(adapted)
}

/// The blocks that `layers_to_transform` names; all where it names none.
fn transformed_layers(value: &Value, layers: usize) -> Result<Vec<usize>, Refusal> {
    let index = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let named = match value {
        Value::Null => return Ok((0..layers).collect()),
        Value::Array(list) if list.is_empty() => return Ok((0..layers).collect()),
        Value::Array(list) => list.iter().map(index).collect::<Option<Vec<_>>>(),
        one => index(one).map(|n| vec![n]),
    };
    let mut named =
        named.ok_or_else(|| ("layers_to_transform", format!("{} names no layers", shown(value))))?;
    named.retain(|&layer| layer < layers);
    named.sort_unstable();
    named.dedup();
    Ok(named)
}

/// What `rank_pattern` or `alpha_pattern` gives to the adapted modules, which must be one number
/// for all: the first key that matches a path as PEFT matches it, else the default.
pub(super) fn scale_of_all(pattern: &Value, default: f64, places: &[String]) -> Result<f64, String> {
    if is_off(pattern) {
        return Ok(default);
    }
    let entries = pattern.as_object().ok_or_else(|| format!("{} is not an object", shown(pattern)))?;
    let mut keys = vec![];
    for (key, value) in entries {
        compile(key)?;
        let number = value.as_f64().ok_or_else(|| format!("`{key}` = {} is not a number", shown(value)))?;
        keys.push((compile(&format!(r"\A(?:(?:.*\.)?(?:{key}))\z"))?, number));
    }
    let mut found: Option<(f64, &String)> = None;
    for path in places {
        let mut own = default;
        for (key, number) in &keys {
            if is_match(key, path)? {
                own = *number;
                break;
            }
        }
        match found {
            Some((before, other)) if before != own => {
                return Err(format!(
                    "it gives {own} to `{path}` and {before} to `{other}`; one number for all modules is supported"
                ));
            }
            _ => found = Some((own, path)),
        }
    }
    Ok(found.map_or(default, |(number, _)| number))
}
