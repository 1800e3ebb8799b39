//! `--help` of the program as a whole: commands in groups, environment variables, examples, and
//! exit codes.
//!
//! In: the command line's own description. Out: the same with this text; completions, manual pages
//! and docs/cli.md are made from it too.

use crate::args::Args;
use crate::environment::VARIABLES;
use clap::{Command, CommandFactory};
use gradtx_run::failure::exit_codes;

/// Width of the lines.
const WIDTH: usize = 100;

/// Groups of commands, in the order of their use.
pub const GROUPS: [(&str, &[&str]); 4] = [
    (
        "Pipeline",
        &[
            "init",
            "split",
            "preview",
            "curate",
            "train",
            "init-clients",
            "finetune",
            "translate",
            "refine",
            "merge",
            "emulate",
            "plugin",
            "evaluate",
            "report",
            "generate",
            "convert",
            "cross-validate",
        ],
    ),
    ("Inspect", &["status", "inspect", "audit", "diff", "compare", "doctor"]),
    ("Cluster", &["plan", "sweep", "submit", "logs", "cancel"]),
    ("Tools", &["config", "world", "demo", "bench", "completions", "man", "help"]),
];

/// What a user types first.
pub const EXAMPLES: [(&str, &str); 7] = [
    ("gradtx demo", "the whole pipeline on a miniature world, in the directory demo"),
    ("gradtx doctor --run run.toml", "whether this machine can do what a run file asks for"),
    ("gradtx curate --run run --config run.toml", "begin a run; the same command again resumes it"),
    ("gradtx train --run run", "the next stage"),
    ("gradtx plan --config run.toml --nodes 8 --gpus-per-node 8 --gpu h100", "time, GPU hours, memory"),
    ("gradtx submit --run run --config run.toml --stage pipeline --nodes 8", "all stages as SLURM jobs"),
    ("gradtx status run", "how far it is; `gradtx logs run --follow` shows what it says"),
];

/// The command line with its help.
pub fn command() -> Command {
    let command = Args::command();
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{}\n\nOptions:\n{{options}}{{after-help}}",
        commands(&command)
    );
    command.help_template(template).after_help(after_help())
}

/// Names of a command's subcommands with what they do, those of a group together. What is in no
/// group comes last.
pub fn grouped(command: &Command) -> Vec<(&'static str, Vec<(String, String)>)> {
    let about = |name: &str| match name {
        "help" => Some("Print the help of a command.".to_string()),
        _ => command.find_subcommand(name).and_then(Command::get_about).map(ToString::to_string),
    };
    let entry = |name: &str| about(name).map(|about| (name.to_string(), about));
    let mut groups: Vec<(&str, Vec<(String, String)>)> = GROUPS
        .iter()
        .map(|(title, names)| (*title, names.iter().filter_map(|name| entry(name)).collect()))
        .collect();
    let known = |name: &str| GROUPS.iter().any(|(_, names)| names.contains(&name));
    let others = command.get_subcommands().map(Command::get_name).filter(|name| !known(name));
    let others: Vec<(String, String)> = others.filter_map(entry).collect();
    if !others.is_empty() {
        groups.push(("Other", others));
    }
    groups
}

fn commands(command: &Command) -> String {
    let groups = grouped(command);
    let widest = groups.iter().flat_map(|(_, all)| all).map(|(name, _)| name.len()).max().unwrap_or(0);
    let text = |(title, all): &(&str, Vec<(String, String)>)| {
        format!("{title}:\n{}", list(all.iter().map(|(a, b)| (a.as_str(), b.as_str())), widest))
    };
    groups.iter().map(text).collect::<Vec<_>>().join("\n\n")
}

fn after_help() -> String {
    let variables = VARIABLES.iter().map(|variable| (variable.name, variable.meaning));
    let widest = VARIABLES.iter().map(|variable| variable.name.len()).max().unwrap_or(0);
    let examples: Vec<String> =
        EXAMPLES.iter().map(|(line, what)| format!("  {line}\n      {what}")).collect();
    format!(
        "Environment:\n{}\n\n{}\n\nExamples:\n{}",
        list(variables, widest),
        exit_codes(),
        examples.join("\n")
    )
}

/// Terms with their explanations, wrapped beside them.
fn list<'a>(terms: impl Iterator<Item = (&'a str, &'a str)>, widest: usize) -> String {
    let left = widest + 4;
    let line = |(term, text): (&str, &str)| {
        let wrapped = wrap(text, WIDTH - left).join(&format!("\n{}", " ".repeat(left)));
        format!("  {term:widest$}  {wrapped}")
    };
    terms.map(line).collect::<Vec<_>>().join("\n")
}

/// A text in lines of at most so many characters, where its words allow it.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("there is always a line");
        match last.is_empty() || last.chars().count() + 1 + word.chars().count() <= width {
            true if last.is_empty() => last.push_str(word),
            true => *last = format!("{last} {word}"),
            false => lines.push(word.into()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_is_in_a_group() {
        let groups = grouped(&command());
        let others: Vec<_> = groups.iter().filter(|(title, _)| *title == "Other").collect();
        assert!(others.is_empty(), "add them to GROUPS: {others:?}");
    }

    #[test]
    fn help_has_groups_examples_codes_in_narrow_lines() {
        let help = command().render_long_help().to_string();
        let titles = [
            "Pipeline:",
            "Inspect:",
            "Cluster:",
            "Tools:",
            "Options:",
            "Environment:",
            "Exit codes:",
            "Examples:",
        ];
        let places: Vec<usize> = titles
            .iter()
            .map(|title| help.find(&format!("{title}\n")).unwrap_or_else(|| panic!("{title}: {help}")))
            .collect();
        assert!(places.is_sorted(), "{help}");
        assert!(help.lines().all(|line| line.chars().count() <= WIDTH), "{help}");
        for variable in VARIABLES {
            assert!(help.contains(variable.name));
        }
    }

    #[test]
    fn examples_are_command_lines() {
        for (line, _) in EXAMPLES {
            let parsed = command().try_get_matches_from(line.split_whitespace());
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
    }

    #[test]
    fn words_are_wrapped() {
        assert_eq!(wrap("a bc def g", 4), ["a bc", "def", "g"]);
        assert_eq!(wrap("longer than that", 3), ["longer", "than", "that"]);
    }
}
