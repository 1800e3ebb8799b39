//! `completions` and `man`: the command line's own description, for shells and for `man`.
//!
//! In: nothing but [`Args`]. Out: a completion script on standard output, or
//! `gradtx.1` and `gradtx-COMMAND.1` in a directory.

use crate::args::Args;
use anyhow::{Context as _, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::Path;

/// Prints a shell's completion script.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut Args::command(), "gradtx", &mut script);
    gradtx_run::ui::say(String::from_utf8(script)?.trim_end());
    Ok(())
}

/// Writes a manual page per command.
pub fn pages(dir: &Path) -> Result<()> {
    gradtx_run::record::make_dir(dir)?;
    clap_mangen::generate_to(Args::command(), dir)
        .with_context(|| format!("{}: cannot write manual pages", dir.display()))
}
