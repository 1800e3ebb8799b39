//! What is missing is named as this system's package manager names it; only apt is used by itself,
//! with root's rights, and it waits for its lock.

use crate::machine::{Machine, Mpi};
use std::fs;

/// apt as it looks from the outside: it knows packages, and runs `actions` when it installs.
fn apt(machine: &Machine, packages: &str, actions: &str) {
    let log = machine.path("apt.log");
    let log = log.display();
    machine.program(
        "apt-get",
        &format!("#!/bin/sh\necho \"$@\" >> '{log}'\ncase $* in *install*) {actions} ;; esac\n"),
    );
    let script = format!(
        "#!/bin/sh\ncase $1 in\npkgnames) printf '%s\\n' {packages} | grep \"^$2\" ;;\n\
         madison) case ' {packages} ' in *\" $2 \"*) echo \"$2 | 1.0\" ;; esac ;;\nesac\n"
    );
    machine.program("apt-cache", &script);
}

const KNOWN: &str = "openmpi-bin libopenmpi-dev libclang1-14 libclang1-9 libclang-common-14-dev g++";

#[test]
fn packages_have_their_names_on_every_system() {
    for (manager, command, packages) in [
        ("dnf", "dnf install", "gcc-c++ openmpi-devel clang-libs"),
        ("yum", "dnf install", "gcc-c++ openmpi-devel clang-libs"),
        ("zypper", "zypper install", "gcc-c++ openmpi4-devel libclang13"),
        ("pacman", "pacman -S", "gcc openmpi clang"),
        ("apk", "apk add", "build-base openmpi openmpi-dev clang-libclang"),
    ] {
        let machine = Machine::new();
        machine.remove("g++");
        machine.program(manager, "#!/bin/sh\necho 'it was run'\n");
        let line = format!("to install it, {command} {packages}\n");
        machine.setup().expect(1, &["only apt is used by itself", &line]).without("it was run");
    }
    Machine::new().setup().expect(0, &["there is no package manager that is known here"]).features("cuda");
}

#[test]
fn environments_of_a_user_are_named_too() {
    let mut machine = Machine::new();
    machine.plain_user();
    apt(&machine, KNOWN, "");
    machine.set("CONDA_PREFIX", "/home/ada/conda");
    machine.set("MODULEPATH", "/opt/modules");
    let parts = [
        "as an administrator: apt-get install openmpi-bin libopenmpi-dev libclang1-14 libclang-common-14-dev\n",
        "conda install -c conda-forge openmpi-mpicc libclang\n",
        "module load gcc openmpi llvm",
    ];
    machine.setup().expect(0, &parts).features("cuda");
}

#[test]
fn a_user_without_sudo_resumes_without_mpi() {
    let machine = Machine::new();
    machine.plain_user();
    apt(&machine, KNOWN, "");
    let said =
        ["nothing is installed: this user is not root, and there is no sudo", "leaves out the feature `mpi`"];
    machine.setup().expect(0, &said).features("cuda");
    assert!(!machine.path("apt.log").exists());

    // sudo that would ask for a password which nobody can type.
    machine.program("sudo", "#!/bin/sh\nexit 1\n");
    machine.setup().expect(0, &["sudo asks for a password, and there is no terminal"]).features("cuda");
    assert!(!machine.path("apt.log").exists());

    // Without what is needed, it fails before anything is compiled.
    machine.remove("g++");
    machine
        .setup()
        .expect(1, &["as an administrator: apt-get install g++ openmpi-bin", "error: nothing can be built"]);
}

#[test]
fn no_install_only_looks() {
    let mut machine = Machine::new();
    apt(&machine, KNOWN, "");
    machine.set("GRADTX_NO_INSTALL", "1");
    machine
        .setup()
        .expect(0, &["nothing is installed: GRADTX_NO_INSTALL is set", "NVRTC is not here"])
        .features("cuda");
    assert!(!machine.path("apt.log").exists());
}

#[test]
fn what_apt_installed_is_tried_again() {
    let machine = Machine::new();
    // The library appears once its package is installed.
    machine.mpi("mpicc", Mpi::Whole);
    machine.put("good.so", "parts/libclang.so");
    let from = machine.path("root/parts/libclang.so");
    let to = machine.path("root/usr/lib/libclang-14.so.1");
    apt(&machine, KNOWN, &format!("cp '{}' '{}'", from.display(), to.display()));
    let said = ["installing libclang1-14 libclang-common-14-dev\n", "ready"];
    machine.setup().expect(0, &said).features("mpi cuda");
    let log = fs::read_to_string(machine.path("apt.log")).unwrap();
    assert!(log.contains("install -y --no-install-recommends libclang1-14"), "{log}");
    assert!(!log.contains("mpi"), "{log}");
    assert!(!machine.path("root/usr/sbin/policy-rc.d").exists());
}

#[test]
fn what_apt_does_not_know_is_left_out() {
    let machine = Machine::new();
    fs::write(machine.path("root/etc/os-release"), "ID=ubuntu\n").unwrap();
    apt(&machine, "libclang1-14 libclang-common-14-dev", "");
    let unknown = "apt does not know the package libopenmpi-dev (is the component \"universe\" enabled?)";
    machine.setup().expect(0, &[unknown, "leaves out the feature `mpi`"]).features("cuda");

    apt(&machine, KNOWN, "echo 'E: Unable to fetch some archives' >&2; exit 100");
    let said = ["could not be installed: E: Unable to fetch some archives", "leaves out"];
    machine.setup().expect(0, &said).features("cuda");
}

#[test]
fn the_package_manager_s_lock_is_waited_for() {
    let lock = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt-get)";
    let machine = Machine::new();
    let count = machine.path("count");
    let count = count.display();
    let actions =
        format!("echo x >> '{count}'; [ $(wc -l < '{count}') -gt 3 ] || {{ echo '{lock}' >&2; exit 100; }}");
    apt(&machine, KNOWN, &actions);
    let said = ["another process holds the package manager's lock; waiting for it"];
    let setup = machine.setup().expect(0, &said).without("could not be installed");
    assert_eq!(setup.text.matches("waiting for it").count(), 1, "{}", setup.text);

    let mut machine = Machine::new();
    apt(&machine, KNOWN, &format!("echo '{lock}' >&2; exit 100"));
    machine.set("GRADTX_LOCK_SECONDS", "10");
    machine
        .setup()
        .expect(0, &["waiting for it", "could not be installed: E: Could not get lock"])
        .features("cuda");
}

#[test]
fn mpi_of_a_module_is_not_replaced_by_a_package() {
    let machine = Machine::new();
    machine.put("good.so", "usr/lib/libclang.so.1");
    machine.mpi("mpicc", Mpi::WithoutLibrary);
    apt(&machine, KNOWN, "");
    machine.setup().expect(0, &["does not link", "leaves out"]).features("cuda");
    assert!(!machine.path("apt.log").exists());
}
