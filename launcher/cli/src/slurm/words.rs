//! Which words may stand in a batch script.
//!
//! In: names, times, options and paths as they were typed. Out: an error for each that sbatch or
//! a shell could read as anything but one plain word: a line break would begin a command of the
//! script, a quote or a blank another option. Everything is checked against a list of what is
//! allowed in its place; nothing is repaired, since the jobs would then run something else than
//! what was asked for.

use anyhow::Result;
use gradtx_run::failure::unusable_with;
use std::path::Path;

/// Options of sbatch that ask for GPUs.
const GPU_OPTIONS: [&str; 3] = ["--gpus", "--gres=gpu", "--tres-per-task=gres"];
/// Events that SLURM sends mail about.
const MAIL_TYPES: [&str; 12] = [
    "NONE",
    "BEGIN",
    "END",
    "FAIL",
    "REQUEUE",
    "ALL",
    "INVALID_DEPEND",
    "STAGE_OUT",
    "TIME_LIMIT",
    "TIME_LIMIT_90",
    "TIME_LIMIT_80",
    "TIME_LIMIT_50",
];
/// Beside letters and digits of any script, what a path in a batch script may have.
const PATH_CHARACTERS: &str = " -_./=:,;@%+~^()[]&!#";
/// Beside ASCII letters and digits, what the value of an option of sbatch may have.
const VALUE_CHARACTERS: &str = "-_./=:,@%+~^()[]&|*!<>?";

/// An error about a word of the command line.
fn refused(option: &str, found: &str, expected: &str) -> anyhow::Error {
    // In its escaped form: what is wrong with it may be invisible.
    let what = format!("{option} {}: expected {expected}", found.escape_debug());
    let hint = "only plain words are written into batch scripts; sbatch reads anything else as further options or \
                commands";
    unusable_with(what, Some(hint.into()))
}

/// Checks the name of a partition, an account or the like; several are separated by commas.
pub(crate) fn check_name(option: &str, name: &str) -> Result<()> {
    let inner = |c: char| c.is_ascii_alphanumeric() || "-_.@+".contains(c);
    let is_name = |part: &str| !part.starts_with('-') && !part.is_empty() && part.chars().all(inner);
    match name.split(',').all(is_name) {
        true => Ok(()),
        false => Err(refused(option, name, "a name of letters, digits, `-`, `_`, `.`, `@` and `+`")),
    }
}

/// Checks a time limit in one of sbatch's forms.
pub(crate) fn check_time(option: &str, time: &str) -> Result<()> {
    let digits = |part: &str| (1..=9).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
    let is_clock = |text: &str| text.split(':').count() <= 3 && text.split(':').all(digits);
    let is_time = match time.split_once('-') {
        Some((days, rest)) => digits(days) && is_clock(rest),
        None => is_clock(time) || ["infinite", "unlimited"].contains(&time.to_ascii_lowercase().as_str()),
    };
    match is_time {
        true => Ok(()),
        false => Err(refused(option, time, "minutes, HH:MM:SS, DAYS-HOURS or DAYS-HH:MM:SS")),
    }
}

/// Checks an amount of memory: megabytes, or a number with K, M, G or T.
pub fn check_memory(option: &str, memory: &str) -> Result<()> {
    let number = memory.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(memory);
    match (1..=9).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit()) {
        true => Ok(()),
        false => {
            Err(refused(option, memory, "megabytes, or a number with K, M, G or T, e.g. 480G; 0 for all"))
        }
    }
}

/// Checks the events that mail is sent about.
pub(crate) fn check_mail_type(option: &str, types: &str) -> Result<()> {
    match types.split(',').all(|one| MAIL_TYPES.contains(&one)) {
        true => Ok(()),
        false => Err(refused(option, types, &format!("one or more of {}", MAIL_TYPES.join(",")))),
    }
}

/// Checks the value of an option of sbatch that has no form of its own.
pub(crate) fn check_value(option: &str, value: &str) -> Result<()> {
    match !value.is_empty() && value.chars().all(is_plain_value) {
        true => Ok(()),
        false => Err(refused(option, value, "one word without blanks and quotes")),
    }
}

fn is_plain_value(c: char) -> bool {
    c.is_ascii_alphanumeric() || VALUE_CHARACTERS.contains(c)
}

/// Checks one further option of sbatch; which jobs are arrays is not decided by such.
pub(crate) fn check_sbatch(option: &str, word: &str) -> Result<()> {
    check_option(option, word)?;
    let name = word.split('=').next().unwrap_or_default();
    let hint = match name {
        "--array" => "--array and --client make arrays; --array-limit says how many of one run at once",
        "--wrap" => "the jobs run their own scripts",
        "--job-name" | "--output" | "--error" => "`gradtx logs` finds logs by the names that submit gives",
        _ => return Ok(()),
    };
    Err(unusable_with(format!("{option} {word}: {name} is not passed on to sbatch"), Some(hint.into())))
}

/// Whether an option of sbatch asks for GPUs.
pub(crate) fn asks_for_gpus(option: &str) -> bool {
    GPU_OPTIONS.iter().any(|start| option.starts_with(start))
}

/// Checks one further option of sbatch or srun: `--name` or `--name=value`, a single word.
pub(crate) fn check_option(option: &str, word: &str) -> Result<()> {
    let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
    let is_name = name.strip_prefix("--").is_some_and(|name| {
        name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    });
    match is_name && value.is_none_or(|value| !value.is_empty() && value.chars().all(is_plain_value)) {
        true => Ok(()),
        false => {
            let expected = "an option as one word without blanks and quotes, e.g. --sbatch=--qos=high";
            Err(refused(option, word, expected))
        }
    }
}

/// Checks a path that stands in a batch script; `what` says whose it is.
pub(crate) fn check_path<'a>(what: &str, path: &'a Path) -> Result<&'a str> {
    let is_plain = |c: char| c.is_alphanumeric() || PATH_CHARACTERS.contains(c);
    if let Some(text) = path.to_str().filter(|text| text.chars().all(is_plain)) {
        return Ok(text);
    }
    let odd = path.to_str().and_then(|text| text.chars().find(|c| !is_plain(*c)));
    let why = match odd {
        Some(c) if c.is_control() => format!("has a control character (U+{:04X})", u32::from(c)),
        Some(c) => format!("has the character `{}`", c.escape_debug()),
        None => "is not valid UTF-8".into(),
    };
    let path = path.to_string_lossy();
    let found = format!("{what} {}: {why}, which batch scripts cannot hold safely", path.escape_debug());
    let hint = "move it to a path of letters, digits, blanks, `-`, `_` and `.`";
    Err(unusable_with(found, Some(hint.into())))
}

/// Checks a directory that is mounted: runtimes separate several by commas, and names by colons.
///
/// # Errors
/// If it is not absolute, or cannot be distinguished from its neighbours.
pub(crate) fn check_mount(label: &str, dir: &Path) -> Result<()> {
    let text = check_path(label, dir)?;
    match dir.is_absolute() && !text.contains([',', ':']) {
        true => Ok(()),
        false => Err(refused(label, text, "an absolute path without commas and colons")),
    }
}

/// Checks an argument that the script gets in single quotes, where all but control characters is safe.
pub(crate) fn check_argument<'a>(what: &str, path: &'a Path) -> Result<&'a str> {
    match path.to_str().filter(|text| !text.chars().any(char::is_control)) {
        Some(text) => Ok(text),
        None => check_path(what, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn plain_names_pass_and_others_are_named() {
        for name in ["a100", "gpu-long", "gpu,cpu", "ada@lab", "proj_1.2"] {
            check_name("--partition", name).unwrap();
        }
        for name in ["", "a b", "a\nb", "a\"b", "$(x)", "-p", "a,,b", "a;b", "a#b", "é\u{202e}", "a\\b"] {
            let message = check_name("--partition", name).unwrap_err().to_string();
            assert!(message.contains("--partition") && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn times_are_those_of_sbatch() {
        for time in ["90", "90:00", "12:00:00", "1-0", "2-12:30", "2-12:30:00", "UNLIMITED"] {
            check_time("--time", time).unwrap();
        }
        for time in ["", "1h", "1:2:3:4", "-1", "1-", "1\n2", "10 --wrap=x", "1-2-3", "1:\u{661}"] {
            assert!(check_time("--time", time).is_err(), "{time:?}");
        }
    }

    #[test]
    fn an_option_is_one_word() {
        for word in
            ["--qos=high", "--exclusive", "--constraint=a100&nvlink|(h100*2)", "--gres=gpu:a100:4", "--mem=0"]
        {
            check_option("--sbatch", word).unwrap();
        }
        for word in
            ["oops", "-d", "--", "--qos high", "--a=b\n#SBATCH --wrap=x", "--a='b'", "--a=\"b", "--A=b"]
        {
            assert!(check_option("--sbatch", word).is_err(), "{word:?}");
        }
        for word in
            ["--a=$(x)", "--a=`x`", "--a=b#c", "--a=b\\c", "--a=", "--a=b;c", "--a=b\tc", "--a\u{a0}=b"]
        {
            assert!(check_option("--sbatch", word).is_err(), "{word:?}");
        }
    }

    #[test]
    fn paths_are_kept_as_they_are_or_refused() {
        for path in ["/runs/50%", "/runs/a b", "/home/ürsel/läufe", "/a/(1) [x]/--run"] {
            assert_eq!(check_path("--run", Path::new(path)).unwrap(), path);
        }
        for path in [
            "/a\nb",
            "/a\rb",
            "/a'b",
            "/a\"b",
            "/a\\b",
            "/a$(b)",
            "/a`b`",
            "/a}b",
            "/a\u{202e}b",
            "/a\u{2028}b",
        ] {
            let message = check_path("--run", Path::new(path)).unwrap_err().to_string();
            assert!(message.starts_with("--run ") && !message.contains('\n'), "{message}");
        }
        let odd = Path::new(OsStr::from_bytes(b"/a\xffb"));
        assert!(check_path("--run", odd).unwrap_err().to_string().contains("UTF-8"));
        assert_eq!(check_argument("--client", Path::new("/it's")).unwrap(), "/it's");
        assert!(check_argument("--client", Path::new("/a\nb")).is_err());
        assert!(check_argument("--client", odd).is_err());
    }
}
