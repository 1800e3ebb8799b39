//! `completions` and `man`: the command line's own description, for shells, for `man`, and as a
//! page of the documentation.
//!
//! In: the command line. Out: a completion script on standard output; `gradtx.1` and
//! `gradtx-COMMAND.1` in a directory; or the text of docs/cli.md.

use crate::environment::VARIABLES;
use crate::help;
use anyhow::{Context as _, Result};
use clap::{Arg, Command};
use clap_complete::Shell;
use clap_mangen::Man;
use gradtx_run::failure::EXIT_CODES;
use gradtx_runtime::artifact::write_atomic;
use std::fmt::Write as _;
use std::path::Path;

/// Prints a shell's completion script.
///
/// # Errors
/// If it is not text.
pub fn completions(mut command: Command, shell: Shell) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut command, "gradtx", &mut script);
    gradtx_run::ui::say(String::from_utf8(script)?.trim_end());
    Ok(())
}

/// Writes a manual page per command.
///
/// # Errors
/// If a page cannot be written.
pub fn pages(mut command: Command, dir: &Path) -> Result<()> {
    gradtx_run::record::make_dir(dir)?;
    command.build();
    let pages = std::iter::once(&command).chain(command.get_subcommands().filter(|c| c.get_name() != "help"));
    for command in pages {
        // `gradtx plan` has the page gradtx-plan(1).
        let name = command.get_display_name().unwrap_or(command.get_name()).to_string();
        let path = dir.join(format!("{name}.1"));
        let text = page(command).with_context(|| format!("{}: cannot be made", path.display()))?;
        write_atomic(&path, |out| std::io::Write::write_all(out, &text))
            .with_context(|| format!("{}: cannot write manual pages", dir.display()))?;
    }
    Ok(())
}

/// A manual page, with the values of options in its synopsis.
fn page(command: &Command) -> std::io::Result<Vec<u8>> {
    let man = Man::new(command.clone());
    let mut out = vec![];
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    let bold = |text: &str| format!("\\fB{}\\fR", roff(text));
    let italic = |text: &str| format!("\\fI{}\\fR", roff(text));
    let words: Vec<String> = synopsis(command, &bold, &italic);
    let name = command.get_bin_name().unwrap_or(command.get_name());
    out.extend(format!(".SH SYNOPSIS\n{} {}\n", bold(name), words.join(" ")).into_bytes());
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut out)?;
    }
    if command.get_after_help().is_some() {
        man.render_extra_section(&mut out)?;
    }
    if command.get_version().is_some() {
        man.render_version_section(&mut out)?;
    }
    Ok(out)
}

/// A text as it stands in a line of a manual page.
fn roff(text: &str) -> String {
    text.replace('\\', "\\\\").replace('-', "\\-").replace('\'', "\\(aq")
}

/// The words after a command's name: options with their values, those that may be left out in brackets.
fn synopsis(
    command: &Command,
    bold: &dyn Fn(&str) -> String,
    italic: &dyn Fn(&str) -> String,
) -> Vec<String> {
    let word = |arg: &Arg| {
        let values: Vec<String> = match arg.get_action().takes_values() {
            true => arg.get_value_names().unwrap_or_default().iter().map(|name| italic(name)).collect(),
            false => vec![],
        };
        let values = values.join(" ");
        let text = match arg.get_long() {
            Some(long) if values.is_empty() => bold(&format!("--{long}")),
            Some(long) => format!("{} {values}", bold(&format!("--{long}"))),
            None => values,
        };
        let many = match arg.get_action() {
            clap::ArgAction::Append => "...",
            _ => "",
        };
        if arg.is_required_set() { format!("{text}{many}") } else { format!("[{text}]{many}") }
    };
    let mut args: Vec<&Arg> = command.get_arguments().filter(|arg| !arg.is_hide_set()).collect();
    // As one types them: what is needed first.
    args.sort_by_key(|arg| (!arg.is_required_set(), arg.is_positional()));
    let mut words: Vec<String> = args.into_iter().map(word).collect();
    if command.has_subcommands() {
        words.push(italic("COMMAND"));
    }
    words
}

/// docs/cli.md: commands, options, exit codes and environment variables.
pub fn markdown(mut command: Command) -> String {
    command.build();
    let mut text = String::from(
        "# Commands\n\nMade from the program's own description: `UPDATE_DOCS=1 cargo test -p gradtx manual` \
         writes it again.\n",
    );
    for (title, commands) in help::grouped(&command) {
        let _ = write!(text, "\n**{title}**\n\n| command | |\n|---|---|\n");
        for (name, about) in commands {
            let link = if name == "help" {
                format!("`gradtx {name}`")
            } else {
                format!("[`gradtx {name}`](#gradtx-{name})")
            };
            let _ = writeln!(text, "| {link} | {} |", cell(&about));
        }
    }
    let _ = write!(text, "\n## Exit codes\n\n| code | meaning |\n|---|---|\n");
    for (code, meaning) in EXIT_CODES {
        let _ = writeln!(text, "| {code} | {} |", cell(meaning));
    }
    let _ = write!(
        text,
        "\n## Environment variables\n\nWithout a variable, what is in brackets holds.\n\n| variable | meaning |\n|---|---|\n"
    );
    for variable in VARIABLES {
        let _ = writeln!(text, "| `{}` | {} |", variable.name, cell(variable.meaning));
    }
    let _ = write!(text, "\n## Options of every command\n\n");
    options(&mut text, &command, false);
    for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
        section(&mut text, command);
    }
    text
}

/// A command's own section.
fn section(text: &mut String, command: &Command) {
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    let plain = |text: &str| text.to_string();
    let words = synopsis(command, &plain, &plain);
    // Those of every command are listed once.
    let own = |word: &String| {
        !["[--threads N]", "[--quiet]", "[--json]", "[--help]", "[--verbose]"].contains(&word.as_str())
    };
    let words: Vec<String> = words.into_iter().filter(own).collect();
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let _ = write!(text, "\n## gradtx {}\n\n{}\n\n```text\n{name}", command.get_name(), about.trim());
    let mut column = name.len();
    for word in &words {
        if column + 1 + word.len() > 96 {
            text.push_str("\n   ");
            column = 3;
        }
        let _ = write!(text, " {word}");
        column += 1 + word.len();
    }
    text.push_str("\n```\n\n");
    options(text, command, true);
    for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
        let about = inner.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = write!(text, "\n**`{} {}`**: {about}\n\n", name, inner.get_name());
        options(text, inner, true);
    }
}

/// A line for every option. With `own`, without those of every command.
fn options(text: &mut String, command: &Command, own: bool) {
    let listed = |arg: &&Arg| !arg.is_hide_set() && arg.get_id() != "help" && !(own && arg.is_global_set());
    for arg in command.get_arguments().filter(listed) {
        let values = arg.get_value_names().unwrap_or_default().join(" ");
        let names =
            [arg.get_short().map(|c| format!("-{c}")), arg.get_long().map(|name| format!("--{name}"))];
        let mut names = names.into_iter().flatten().collect::<Vec<_>>().join(", ");
        if arg.get_action().takes_values() {
            names = format!("{names} {values}").trim().to_string();
        }
        let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(text, "* `{names}`: {}{}", help.replace('\n', " ").trim(), choices(arg));
    }
}

/// The values that an option may have, and its default.
fn choices(arg: &Arg) -> String {
    let possible: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|v| !v.is_hide_set())
        .map(|v| format!("`{}`", v.get_name()))
        .collect();
    let takes = arg.get_action().takes_values();
    let mut parts = vec![];
    if takes && !possible.is_empty() {
        parts.push(format!("one of {}", possible.join(", ")));
    }
    let defaults: Vec<String> =
        arg.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
    if takes && !defaults.is_empty() {
        parts.push(format!("default {}", defaults.join(" ")));
    }
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join("; ")) }
}

/// A text as it stands in a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docs_cli_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
        let text = markdown(help::command());
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = text.lines().zip(written.lines()).find(|(a, b)| a != b);
        assert!(
            text == written,
            "docs/cli.md: UPDATE_DOCS=1 cargo test -p gradtx manual; first: {differs:?}"
        );
    }

    #[test]
    fn a_page_has_values_in_its_synopsis() {
        let mut command = help::command();
        command.build();
        let text = |name: &str| {
            let page = page(command.find_subcommand(name).unwrap()).unwrap();
            String::from_utf8(page).unwrap()
        };
        let synopsis = |name: &str| {
            let text = text(name);
            let start = text.find(".SH SYNOPSIS\n").unwrap();
            text[start..].lines().nth(1).unwrap().to_string()
        };
        let train = synopsis("train");
        assert!(
            train.starts_with(
                "\\fBgradtx train\\fR \\fB\\-\\-run\\fR \\fIDIR\\fR [\\fB\\-\\-config\\fR \\fIFILE\\fR]"
            ),
            "{train}"
        );
        assert!(synopsis("inspect").contains("\\fIPATH\\fR"), "{}", synopsis("inspect"));
        assert!(text("train").contains(".SH OPTIONS"));
    }
}
