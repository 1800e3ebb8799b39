//! Two hosts and one directory on a file system without locks: `flock` fails as it does there,
//! by a library that is loaded before the C library.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, PROGRAM, stderr};
use serde_json::json;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

impl Home {
    /// The miniature, with a library of a C library without locks.
    fn without_locks(errno: &str) -> Self {
        let home = Self::miniature();
        let text = format!(
            "#include <errno.h>\nint flock(int f, int o) {{ (void)f; (void)o; errno = {errno}; return -1; }}\n"
        );
        std::fs::write(home.path("no_locks.c"), text).unwrap();
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-o", "no_locks.so", "no_locks.c"])
            .current_dir(home.dir())
            .status();
        assert!(built.unwrap().success());
        home
    }

    /// A fine-tuning of many steps or a few.
    fn finetune_without_locks(&self, steps: u32) -> Command {
        let set = format!("finetune.tiny.max_steps={steps}");
        let run = ["finetune", "--run", "run", "--config", "settings.toml", "--data", "private.jsonl"];
        let mut command = self.command(&run);
        command.args(["--out", "out", "--threads", "1", "--set", &set]);
        command.env("LD_PRELOAD", self.path("no_locks.so"));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn begin(&self, steps: u32) -> Child {
        let child = self.finetune_without_locks(steps).spawn().unwrap();
        let began = Instant::now();
        while !(self.path("out/progress.json").exists() && self.path("out/record.json").exists()) {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }

    fn claims(&self) -> usize {
        let entries = std::fs::read_dir(self.path("out")).unwrap().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".claim-")).count()
    }

    /// Whatever says who works there now says that it is a process of another host.
    fn move_to_another_host(&self) {
        for entry in std::fs::read_dir(self.path("out")).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(".claim-") || name == "progress.json" {
                let text = std::fs::read_to_string(entry.path()).unwrap();
                let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
                value["host"] = json!("another");
                if name == "progress.json" {
                    // Its clock is a day ahead.
                    value["updated"] = json!(value["updated"].as_f64().unwrap() + 86_400.0);
                } else {
                    value["machine"] = json!("another");
                }
                std::fs::write(entry.path(), value.to_string()).unwrap();
            }
        }
    }
}

#[test]
fn second_process_is_refused_until_the_first_dies() {
    for errno in ["ENOLCK", "EOPNOTSUPP", "ENOSYS"] {
        let home = Home::without_locks(errno);
        let mut first = home.begin(1_000_000);
        let second = home.finetune_without_locks(1_000_000).output().unwrap();
        assert_eq!(second.status.code(), Some(4), "{errno}: {}", stderr(&second));
        assert!(stderr(&second).contains(&format!("process {}", first.id())), "{}", stderr(&second));
        assert_eq!(home.claims(), 1);
        first.kill().unwrap();
        first.wait().unwrap();
        // A dead process of this host is taken over at once.
        let began = Instant::now();
        let mut third = home.begin(1_000_000);
        std::thread::sleep(Duration::from_millis(500));
        assert!(third.try_wait().unwrap().is_none(), "it works");
        assert!(began.elapsed() < Duration::from_secs(10));
        third.kill().unwrap();
        third.wait().unwrap();
    }
}

#[test]
fn lost_hosts_are_waited_for_whatever_their_clock() {
    let home = Home::without_locks("ENOLCK");
    let mut first = home.begin(1_000_000);
    first.kill().unwrap();
    first.wait().unwrap();
    std::fs::remove_dir_all(home.path("run")).unwrap();
    home.move_to_another_host();
    let record = home.path("out/record.json");
    std::fs::remove_file(record).unwrap();
    let began = Instant::now();
    let next = home.finetune_without_locks(2).output().unwrap();
    assert!(next.status.success(), "{}", stderr(&next));
    assert!(stderr(&next).contains("no locks") && stderr(&next).contains("15 s"), "{}", stderr(&next));
    assert!(began.elapsed() > Duration::from_secs(14), "{:?}", began.elapsed());
    assert_eq!(home.claims(), 0, "nothing is left of a finished stage");
}

#[test]
fn of_several_starters_at_one_moment_one_works() {
    let home = Home::without_locks("ENOLCK");
    let mut starters: Vec<Child> =
        (0..4).map(|_| home.finetune_without_locks(1_000_000).spawn().unwrap()).collect();
    let began = Instant::now();
    let mut busy = 0;
    while busy < 3 {
        assert!(began.elapsed() < Duration::from_secs(60), "{busy} of 3 were refused");
        std::thread::sleep(Duration::from_millis(50));
        busy = starters
            .iter_mut()
            .filter_map(|child| child.try_wait().unwrap())
            .filter(|s| s.code() == Some(4))
            .count();
    }
    std::thread::sleep(Duration::from_secs(1));
    let alive = starters.iter_mut().map(|child| child.try_wait().unwrap()).filter(Option::is_none).count();
    assert_eq!((alive, home.claims()), (1, 1));
    for mut child in starters {
        let _ = child.kill();
        child.wait().unwrap();
    }
}

#[test]
fn lost_output_is_an_error_and_a_closed_pipe_none() {
    let home = Home::without_locks("ENOLCK");
    let doctor = |out: Stdio| {
        let mut command = Command::new(PROGRAM);
        command.args(["plan", "--config", "settings.toml", "--gpu", "h100", "--tokens-per-example", "9"]);
        command.current_dir(home.dir()).stdout(out).stderr(Stdio::piped()).output().unwrap()
    };
    let full = doctor(std::fs::File::options().write(true).open("/dev/full").unwrap().into());
    assert_eq!(full.status.code(), Some(1), "{}", stderr(&full));
    assert!(stderr(&full).contains("standard output"), "{}", stderr(&full));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let closed = doctor(writer.into());
    assert_eq!((closed.status.code(), stderr(&closed).as_str()), (Some(0), ""));
}
