//! `gradtx doctor`: which libraries there are for a CUDA device.

use crate::places::program;
use gradtx_emulator::{library_files, nccl_file, on_device};
use std::process::Command;

/// Of several cuBLASLt the first that starts on this driver: one that is too new loads, and refuses.
#[test]
fn libraries_are_tried_until_one_starts() {
    if on_device() {
        return;
    }
    let home = tempfile::tempdir().expect("a directory");
    let [driver, too_new, fits] = ["driver", "too-new", "fits"].map(|name| home.path().join(name));
    let [libcuda, libcublaslt] = library_files();
    for (directory, file, name) in [
        (&driver, &libcuda, "libcuda.so"),
        (&too_new, &libcublaslt, "libcublasLt.so.12"),
        (&fits, &libcublaslt, "libcublasLt.so.13"),
    ] {
        std::fs::create_dir_all(directory).expect("a directory");
        std::fs::copy(file, directory.join(name)).expect("a library can be copied");
    }
    let multiplied_by = |directories: &[&std::path::Path]| {
        let mut command = Command::new(program());
        let list = std::env::join_paths(directories).expect("paths without colons");
        command.arg("doctor").env("LD_LIBRARY_PATH", &driver).env("GRADTX_CUDA_LIBRARIES", list);
        let output = command.env_remove("GRADTX_CUBLASLT").output().expect("the program runs");
        let text = String::from_utf8(output.stdout).expect("text");
        let line = text.lines().find(|line| line.contains("matrix products by ")).unwrap_or(&text);
        line.rsplit("matrix products by ").next().unwrap_or_default().to_string()
    };
    assert_eq!(multiplied_by(&[&too_new, &fits]), "cuBLASLt 12.4.5");
    let refused = multiplied_by(&[&too_new]);
    assert!(refused.starts_with("kernels of our own") && refused.contains("too-new"), "{refused}");
}

#[test]
fn the_nccl_in_use_is_shown() {
    let file = nccl_file();
    let directory = file.parent().expect("it lies in a directory");
    let asked = |name: &std::ffi::OsStr| {
        let mut command = Command::new(program());
        command.arg("doctor").env("GRADTX_NCCL", name).env("LD_LIBRARY_PATH", directory);
        let output = command.output().expect("the program runs");
        let text = String::from_utf8(output.stdout).expect("text");
        text.lines().find(|line| line.contains("  NCCL  ")).unwrap_or(&text).to_string()
    };
    let found = asked(file.as_os_str());
    assert!(found.starts_with("ok") && found.contains("2.26.2"), "{found}");
    let off = asked("off".as_ref());
    assert!(off.starts_with("note") && off.contains("turned off"), "{off}");
    let absent = asked("/nowhere/libnccl.so.2".as_ref());
    assert!(absent.starts_with("note") && absent.contains("/nowhere/libnccl.so.2"), "{absent}");
}
