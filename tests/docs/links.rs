//! Links between pages: files and headings that are there.

use crate::page::Page;
use std::path::Path;

/// Links to files or headings that do not exist. Addresses elsewhere are not asked for.
pub fn faults(page: &Page, root: &Path) -> Vec<String> {
    let dir = root.join(&page.name).parent().map(Path::to_owned).unwrap_or_default();
    let mut faults = vec![];
    for (line, target) in targets(&page.text) {
        if target.contains("://") || target.starts_with("mailto:") {
            continue;
        }
        let (file, anchor) = target.split_once('#').map_or((target.as_str(), None), |(f, a)| (f, Some(a)));
        let path = if file.is_empty() { root.join(&page.name) } else { dir.join(file) };
        let text = if file.is_empty() { Ok(page.text.clone()) } else { read(&path) };
        let why = match (text, anchor) {
            (Err(why), _) => Some(why),
            (Ok(text), Some(anchor)) if !anchors(&text).iter().any(|a| a == anchor) => {
                Some(format!("{file} has no heading `#{anchor}`"))
            }
            _ => None,
        };
        faults.extend(why.map(|why| format!("{}:{line}: the link to {target}: {why}", page.name)));
    }
    faults
}

/// The text of a file; nothing of a directory.
fn read(path: &Path) -> Result<String, String> {
    match path.is_dir() {
        true => Ok(String::new()),
        false => std::fs::read(path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|_| "there is no such file".into()),
    }
}

/// Targets of links and images, with their lines from 1; not those in code.
fn targets(text: &str) -> Vec<(usize, String)> {
    let mut found = vec![];
    for (number, line) in outside_blocks(text) {
        // Every second part is between backticks.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("``");
        let mut rest = prose.as_str();
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            let Some(end) = rest.find(')') else { break };
            let target = rest[..end].split_whitespace().next().unwrap_or_default();
            found.push((number, target.to_string()));
            rest = &rest[end..];
        }
        for attribute in ["src=\"", "srcset=\"", "href=\""] {
            for rest in prose.split(attribute).skip(1) {
                found.push((number, rest.split('"').next().unwrap_or_default().to_string()));
            }
        }
    }
    found
}

/// Lines outside of fenced blocks, with their numbers from 1.
fn outside_blocks(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut inside = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let is_fence = line.trim().starts_with("```");
        inside ^= is_fence;
        !inside && !is_fence
    })
}

/// Anchors of headings, as the forge makes them: lower case, no punctuation, hyphens for spaces.
fn anchors(text: &str) -> Vec<String> {
    let heading = |line: &str| {
        let title = line.trim_start_matches('#');
        let is_heading = title.len() < line.len() && title.starts_with(' ');
        let kept = title.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        is_heading.then(|| kept.collect::<String>().to_lowercase().replace(' ', "-"))
    };
    outside_blocks(text).filter_map(|(_, line)| heading(line)).collect()
}
