//! A page and its fenced blocks.

use std::path::{Component, Path};

/// What the comment before a block says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing.
    None,
    /// It is run.
    Run,
    /// It is what the block before prints.
    Output,
    /// It is the content of a file.
    File(String),
    /// It is not run, for a reason.
    Skip,
    /// It is run and not shown.
    Setup,
}

/// A fenced block, or commands that a page does not show.
#[derive(Clone, Debug)]
pub struct Block {
    /// Line of the page at which it begins, from 1.
    pub line: usize,
    /// The first word after the fence.
    pub language: String,
    /// Its lines.
    pub text: String,
    /// What is done with it.
    pub mark: Mark,
}

impl Block {
    /// Whether a reader would run it.
    pub fn is_program(&self) -> bool {
        matches!(self.language.as_str(), "sh" | "python")
    }
}

/// A page.
#[derive(Debug)]
pub struct Page {
    /// Its path in the repository.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Its blocks.
    pub blocks: Vec<Block>,
}

impl Page {
    /// Reads a page of the repository.
    pub fn read(root: &Path, name: &str) -> Result<Self, String> {
        let text = std::fs::read_to_string(root.join(name)).map_err(|error| format!("{name}: {error}"))?;
        Self::parse(name, &text)
    }

    /// The blocks of a text.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        let lines: Vec<&str> = text.lines().collect();
        let at = |line: usize, why: &str| format!("{name}:{line}: {why}");
        let mut blocks = vec![];
        let mut mark: Option<(usize, Mark)> = None;
        let mut i = 0;
        while i < lines.len() {
            let (line, trimmed) = (i + 1, lines[i].trim());
            if let Some(said) = trimmed.strip_prefix("<!-- test:") {
                if said.trim() == "setup" {
                    let end = (i + 1..lines.len()).find(|&j| lines[j].trim() == "-->");
                    let end = end.ok_or_else(|| at(line, "setup is not closed"))?;
                    let text = lines[i + 1..end].join("\n");
                    blocks.push(Block { line, language: "sh".into(), text, mark: Mark::Setup });
                    i = end;
                } else {
                    mark = Some((line, Mark::of(said).map_err(|why| at(line, &why))?));
                }
            } else if let Some(info) = trimmed.strip_prefix("```") {
                let end = (i + 1..lines.len()).find(|&j| lines[j].trim() == "```");
                let end = end.ok_or_else(|| at(line, "the block is not closed"))?;
                let language = info.split_whitespace().next().unwrap_or_default().to_string();
                // A block within a list is indented as the list is.
                let indent = lines[i].len() - lines[i].trim_start().len();
                let text: Vec<&str> =
                    lines[i + 1..end].iter().map(|l| l.get(indent..).unwrap_or("")).collect();
                let mark = mark.take().map_or(Mark::None, |(_, mark)| mark);
                blocks.push(Block { line, language, text: text.join("\n"), mark });
                i = end;
            } else if let (false, Some((line, _))) = (trimmed.is_empty(), &mark) {
                return Err(at(*line, "there is no block after this mark"));
            }
            i += 1;
        }
        match mark {
            Some((line, _)) => Err(at(line, "there is no block after this mark")),
            None => Ok(Self { name: name.into(), text: text.into(), blocks }),
        }
    }
}

impl Mark {
    /// From the comment's text after `test:`.
    fn of(said: &str) -> Result<Self, String> {
        let said = said.trim().strip_suffix("-->").ok_or("the comment is not closed on its line")?.trim();
        let (word, rest) = said.split_once([' ', ',']).map_or((said, ""), |(word, rest)| (word, rest.trim()));
        match (word, rest) {
            ("run", "") => Ok(Self::Run),
            ("output", "") => Ok(Self::Output),
            ("skip", "") => Err("`skip` needs a reason: `<!-- test: skip, REASON -->`".into()),
            ("skip", _) => Ok(Self::Skip),
            ("file", name) if is_within(name) => Ok(Self::File(name.into())),
            _ => Err(format!("`{said}`: expected run, output, file NAME, skip with a reason, or setup")),
        }
    }
}

/// Whether a file's name stays in the directory of the page.
fn is_within(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}
