//! Names with characters that mean something to a shell or to sbatch.

use super::{options_of, sandbox};
use crate::home::Home;
use std::process::Command;

#[test]
fn hostile_names_are_refused_before_any_write() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let home = Home::with_client();
    let bin = sandbox(&home);
    let before = std::fs::read_dir(home.dir()).unwrap().count();
    let words: Vec<Vec<OsString>> = [
        vec!["--run", "x\ntouch PWNED\n#"],
        vec!["--run", "x\r\ntouch PWNED"],
        vec!["--run", "x\" --wrap=\"touch PWNED"],
        vec!["--run", "x'; touch PWNED; '"],
        vec!["--run", "x\\"],
        vec!["--run", "$(touch PWNED)"],
        vec!["--run", "`touch PWNED`"],
        vec!["--run=-x\u{1b}[2J"],
        vec!["--run", "run", "--partition", "a\ntouch PWNED"],
        vec!["--run", "run", "--partition", "a --wrap=x"],
        vec!["--run", "run", "--account", "a\"\n#SBATCH --uid=0"],
        vec!["--run", "run", "--account", ""],
        vec!["--run", "run", "--time", "1\ntouch PWNED"],
        vec!["--run", "run", "--time", "10 --exclusive"],
        vec!["--run", "run", "--sbatch=--qos=a --wrap=x"],
        vec!["--run", "run", "--sbatch=--comment=a\ntouch PWNED"],
        vec!["--run", "run", "--sbatch=--comment='a b'"],
        vec!["--run", "run", "--sbatch=-d afterok:1"],
        vec!["--run", "run", "--sbatch=--"],
        vec!["--run", "run", "--array", "3%"],
        vec!["--run", "run", "--array", "0-3"],
    ]
    .into_iter()
    .map(|words| words.into_iter().map(OsString::from).collect())
    .chain([vec!["--run".into(), OsStr::from_bytes(b"x\xff\xfe").to_owned()]])
    .collect();
    for words in words {
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        for dry in [&[][..], &[OsStr::new("--dry-run")]] {
            let output = home.submit_in(&bin, &[&words[..], dry].concat());
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
            assert!(!said.contains("\u{1b}") && !said.contains('\r'), "{words:?}: {said:?}");
        }
    }
    assert!(home.submitted().is_empty());
    assert_eq!(std::fs::read_dir(home.dir()).unwrap().count(), before, "nothing is written");
}

#[test]
fn odd_names_that_are_plain_arrive_as_they_are() {
    let allowed = [
        "--job-name=",
        "--output=",
        "--nodes=",
        "--ntasks-per-node=",
        "--cpus-per-task=",
        "--time=",
        "--array=",
        "--partition=",
        "--account=",
        "--requeue",
        "--signal=",
        "--open-mode=",
        "--constraint=",
    ];
    for run in ["a b", "50%j", "läufe (1)", "semi;touch PWNED;", "#run", "&touch PWNED&", "-dash", "{x"] {
        let home = Home::with_client();
        let bin = sandbox(&home);
        let words = [
            &format!("--run=./{run}"),
            "--partition=a100,h100",
            "--account=lab_1",
            "--sbatch=--constraint=a&b|c",
        ];
        let words: Vec<&std::ffi::OsStr> = words.iter().map(|word| std::ffi::OsStr::new(*word)).collect();
        let output = home.submit_in(&bin, &words);
        if run == "{x" {
            assert_eq!(output.status.code(), Some(2), "braces end a word of the script");
            continue;
        }
        assert!(output.status.success(), "{run}: {}", String::from_utf8_lossy(&output.stderr));
        let script = home.submitted().remove(0);
        let options = options_of(&script);
        let known = |word: &String| allowed.iter().any(|start| word.starts_with(start));
        assert!(options.iter().all(known), "{run}: {options:?}");
        let log = options.iter().find_map(|word| word.strip_prefix("--output=")).unwrap();
        let wanted =
            format!("{}/logs/gradtx-curate-%j.log", home.path(run).display().to_string().replace('%', "%%"));
        assert_eq!(log, wanted);
        // The script itself, in an empty directory: it does what it should, and nothing that a name says.
        let place = home.path("place");
        std::fs::create_dir(&place).unwrap();
        std::fs::write(home.path("script"), &script).unwrap();
        let seen = home.path("seen");
        let path = format!("{}:/usr/bin:/bin", bin.display());
        let ran = Command::new("bash")
            .arg(home.path("script"))
            .current_dir(&place)
            .env("PATH", path)
            .env("SEEN", &seen)
            .env("SLURM_JOB_ID", "7")
            .env("SLURM_JOB_NAME", "gradtx-curate")
            .env("SLURM_JOB_NODELIST", "n1")
            .env_remove("GRADTX")
            .output()
            .unwrap();
        assert!(ran.status.success(), "{run}: {}", String::from_utf8_lossy(&ran.stderr));
        let seen = std::fs::read_to_string(seen).unwrap();
        assert!(seen.lines().any(|word| word == home.path(run).to_str().unwrap()), "{run}: {seen}");
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "{run}: something else was run");
        assert!(!home.path("PWNED").exists() && !home.path(run).join("PWNED").exists());
    }
}
