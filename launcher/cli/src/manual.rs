//! `completions` and `man`: the command line's own description, for shells and for `man`.
//!
//! In: the command line. Out: a completion script on standard output, or
//! `gradtx.1` and `gradtx-COMMAND.1` in a directory.

use anyhow::{Context as _, Result};
use clap::Command;
use clap_complete::Shell;
use std::path::Path;

/// Prints a shell's completion script.
pub fn completions(mut command: Command, shell: Shell) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut command, "gradtx", &mut script);
    gradtx_run::ui::say(String::from_utf8(script)?.trim_end());
    Ok(())
}

/// Writes a manual page per command.
pub fn pages(command: Command, dir: &Path) -> Result<()> {
    gradtx_run::record::make_dir(dir)?;
    clap_mangen::generate_to(command, dir)
        .with_context(|| format!("{}: cannot write manual pages", dir.display()))
}
