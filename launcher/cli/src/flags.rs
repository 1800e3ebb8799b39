//! Options that had other names.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, Error};

/// Before, now.
const RENAMED: [(&str, &str); 8] = [
    ("public", "public-fraction"),
    ("train", "train-fraction"),
    ("peft", "save-adapter"),
    ("random-student", "random-update"),
    ("evaluations", "scores"),
    ("extra", "sbatch"),
    ("student", "tiny"),
    ("teacher", "llm"),
];

/// The error of an option that the command has under another name, with that name.
pub(crate) fn with_new_name(mut error: Error, program: &Command, typed: &[String]) -> Error {
    let wrong = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(wrong))) => wrong.clone(),
        _ => return error,
    };
    // The innermost subcommand that was typed.
    let command =
        typed.iter().fold(program, |command, word| command.find_subcommand(word).unwrap_or(command));
    let has = |name: &str| command.get_arguments().any(|arg| arg.get_long() == Some(name));
    let before = wrong.trim_start_matches('-').split('=').next().unwrap_or_default();
    if let Some((_, now)) = RENAMED.iter().find(|(name, now)| *name == before && has(now)) {
        error.insert(ContextKind::SuggestedArg, ContextValue::String(format!("--{now}")));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::CommandFactory;

    fn said(words: &[&str]) -> String {
        let typed: Vec<String> = words.iter().map(|word| word.to_string()).collect();
        let error = Args::command().try_get_matches_from(words).unwrap_err();
        with_new_name(error, &Args::command(), &typed).to_string()
    }

    #[test]
    fn old_options_are_answered_with_their_new_names() {
        for (words, now) in [
            (&["gradtx", "split", "--public", "0.5"][..], "'--public-fraction'"),
            (&["gradtx", "finetune", "--peft"], "'--save-adapter'"),
            (&["gradtx", "report", "--run", "r", "--evaluations=d"], "'--scores'"),
            (&["gradtx", "translate", "u", "--random-student"], "'--random-update'"),
            (&["gradtx", "bench", "train", "--student", "3x10"], "'--tiny'"),
        ] {
            let said = said(words);
            assert!(said.contains("unexpected argument") && said.contains(now), "{said}");
        }
        assert!(!said(&["gradtx", "merge", "--peft"]).contains("--save-adapter"), "merge has none");
    }
}
