//! A pretended machine for `.ci/setup`: a PATH with only the programs that a test puts there,
//! and a tree in which libclang is searched.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

/// What the scripts use of every system.
const TOOLS: [&str; 35] = [
    "awk", "bash", "cat", "chmod", "cmp", "cp", "cut", "dirname", "env", "find", "getconf", "grep", "head",
    "id", "make", "mkdir", "mktemp", "mv", "od", "paste", "printf", "readlink", "rm", "sed", "sh", "sort",
    "tail", "tee", "timeout", "touch", "tr", "true", "uname", "wc", "xargs",
];

/// A compiler that builds programs which do nothing, quickly.
const COMPILER: &str = r#"#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
printf '#!/bin/sh\nexit 0\n' > "$out"; chmod 755 "$out"
"#;

/// A libclang whose every parse ends with the error of `PROBLEM`, if that is defined; with
/// `WANTS_ISYSTEM`, only where no argument is `-isystem`.
const LIBCLANG: &str = r#"
#include <string.h>
typedef struct { const void *data; unsigned flags; } String;
static unsigned errors;
void *clang_createIndex(int a, int b) { return &errors; }
void *clang_parseTranslationUnit(void *i, const char *f, const char *const *args, int n, void *u, unsigned m, unsigned o) {
#ifdef PROBLEM
    errors = 1;
#endif
#ifdef WANTS_ISYSTEM
    for (int k = 0; k < n; k++) if (!strcmp(args[k], "-isystem")) errors = 0;
#endif
    return &errors;
}
unsigned clang_getNumDiagnostics(void *u) { return errors; }
void *clang_getDiagnostic(void *u, unsigned i) { return &errors; }
int clang_getDiagnosticSeverity(void *d) { return 4; }
String clang_getDiagnosticSpelling(void *d) {
#ifdef PROBLEM
    String s = {PROBLEM, 0};
#else
    String s = {"", 0};
#endif
    return s;
}
const char *clang_getCString(String s) { return s.data; }
"#;

const MPI: &str = r#"
int MPI_Get_library_version(char *version, int *length) {
    for (*length = 0; "Pretended MPI v1.0, 2026"[*length]; ++*length) version[*length] = "Pretended MPI v1.0, 2026"[*length];
    return 0;
}
"#;

const MPI_HEADER: &str = "#define MPI_MAX_LIBRARY_VERSION_STRING 256\n#define MPI_SUCCESS 0\n\
    int MPI_Get_library_version(char *version, int *length);\n";

/// Libraries that are built once for all tests.
struct Libraries {
    dir: tempfile::TempDir,
}

static LIBRARIES: LazyLock<Libraries> = LazyLock::new(|| {
    let libraries = Libraries { dir: tempfile::tempdir().unwrap() };
    let build = |name: &str, source: &str, options: &[&str]| {
        let path = libraries.dir.path().join(name);
        let source_path = path.with_extension("c");
        fs::write(&source_path, source).unwrap();
        let mut command = Command::new("cc");
        command.args(["-w", "-fPIC"]).args(options).arg(&source_path).arg("-o").arg(&path);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    build("good.so", LIBCLANG, &["-shared"]);
    let problem = r#"-DPROBLEM="'stddef.h' file not found""#;
    build("headerless.so", LIBCLANG, &["-shared", problem, "-DWANTS_ISYSTEM"]);
    build("broken.so", LIBCLANG, &["-shared", r#"-DPROBLEM="broken""#]);
    build("other.so", "int llvm;", &["-shared"]);
    build("libmpi.so", MPI, &["-shared"]);
    build("mpi.o", MPI, &["-c"]);
    libraries
});

/// A library for the tree of a machine: `good.so`, `headerless.so` (clang's own headers are
/// missing), `broken.so`, `other.so` (no libclang).
pub fn library(name: &str) -> PathBuf {
    LIBRARIES.dir.path().join(name)
}

/// How complete a pretended MPI is.
#[derive(Clone, Copy, PartialEq)]
pub enum Mpi {
    Whole,
    WithoutHeader,
    WithoutLibrary,
    /// The library is found when a program is linked, and not when it starts.
    Shared,
}

/// What set-up said, and how it ended.
pub struct Setup {
    pub code: i32,
    pub text: String,
    /// What it left for the Makefile; empty if nothing.
    pub makefile: String,
}

impl Setup {
    /// Fails unless it ended with `code` and said all `parts`.
    #[track_caller]
    pub fn expect(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}", self.text);
        for part in parts {
            assert!(self.text.contains(part), "no {part:?} in:\n{}", self.text);
        }
        self
    }

    /// Fails unless the build gets these features.
    #[track_caller]
    pub fn features(self, features: &str) -> Self {
        let line = format!("SETUP_FEATURES := {features}\n");
        assert!(self.makefile.contains(&line), "{}\n{}", self.makefile, self.text);
        self
    }

    /// Fails if it said `part`.
    #[track_caller]
    pub fn without(self, part: &str) -> Self {
        assert!(!self.text.contains(part), "{part:?} in:\n{}", self.text);
        self
    }
}

/// A pretended machine.
pub struct Machine {
    dir: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl Machine {
    /// With compilers and Rust, without MPI, libclang, pip or a package manager; run by root.
    pub fn new() -> Self {
        let machine = Self { dir: tempfile::tempdir().unwrap(), environment: vec![] };
        for dir in ["bin", "root/usr/lib", "root/usr/sbin", "root/etc", "home"] {
            fs::create_dir_all(machine.path(dir)).unwrap();
        }
        fs::write(machine.path("root/etc/os-release"), "ID=test\n").unwrap();
        for tool in TOOLS {
            std::os::unix::fs::symlink(find(tool), machine.path("bin").join(tool)).unwrap();
        }
        let path = std::env::var("PATH").unwrap();
        let cc = find("cc").display().to_string();
        // Set-up's first trial is answered quickly; libclang and MPI are tried with the real compiler.
        let (quick, real) =
            (COMPILER.trim_start_matches("#!/bin/sh\n"), format!("PATH='{path}' exec '{cc}' \"$@\""));
        machine.program("cc", &format!("#!/bin/sh\ncase $1 in */c.c) ;; *) {real} ;; esac\n{quick}"));
        machine.program("g++", COMPILER);
        machine.rust("1.95.0", "1.95.0");
        machine.program("sleep", "#!/bin/sh\n");
        machine.program("id", "#!/bin/sh\necho 0\n");
        machine
    }

    /// The same with MPI and libclang, which work.
    pub fn complete() -> Self {
        let machine = Self::new();
        machine.mpi("mpicc", Mpi::Whole);
        machine.put("good.so", "usr/lib/test-linux-gnu/libclang-14.so.1");
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a script on the PATH.
    pub fn program(&self, name: &str, script: &str) {
        write_program(&self.path("bin").join(name), script);
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path("bin").join(name)).unwrap();
    }

    /// Puts a library (see [`library`]) into the tree.
    pub fn put(&self, name: &str, path: &str) {
        let path = self.path("root").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(library(name), path).unwrap();
    }

    pub fn rust(&self, rustc: &str, cargo: &str) {
        self.program("rustc", &format!("#!/bin/sh\necho 'rustc {rustc} (abc 2026-01-01)'\n"));
        self.program("cargo", &format!("#!/bin/sh\necho 'cargo {cargo} (abc 2026-01-01)'\n"));
    }

    /// A user without root's rights, and without sudo.
    pub fn plain_user(&self) {
        self.program("id", "#!/bin/sh\necho 1000\n");
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.into(), value.into()));
    }

    /// Header, library and flags of a pretended MPI.
    pub fn mpi_flags(&self, mpi: Mpi) -> String {
        let dir = self.path("mpi with a space");
        fs::create_dir_all(dir.join("include")).unwrap();
        fs::create_dir_all(dir.join("lib")).unwrap();
        if mpi != Mpi::WithoutHeader {
            fs::write(dir.join("include/mpi.h"), MPI_HEADER).unwrap();
        }
        match mpi {
            Mpi::WithoutLibrary => {}
            Mpi::Shared => _ = fs::copy(library("libmpi.so"), dir.join("lib/libpretendedmpi.so")).unwrap(),
            Mpi::Whole | Mpi::WithoutHeader => {
                let mut archive = Command::new("ar");
                archive.arg("rcs").arg(dir.join("lib/libpretendedmpi.a")).arg(library("mpi.o"));
                assert!(archive.status().unwrap().success());
            }
        }
        let dir = dir.display();
        format!("-I\"{dir}/include\" -L\"{dir}/lib\" -lpretendedmpi -Wl,-rpath -Wl,/nowhere")
    }

    /// Puts a compiler of MPI on the PATH.
    pub fn mpi(&self, name: &str, mpi: Mpi) {
        let flags = self.mpi_flags(mpi);
        let script = format!(
            "#!/bin/sh\n[ \"$1\" != -show ] || {{ echo 'gcc {flags}'; exit 0; }}\nexec cc \"$@\" {flags}\n"
        );
        self.program(name, &script);
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", self.path("bin")).env("HOME", self.path("home"));
        command.env("CARGO_TARGET_DIR", self.path("target")).env("GRADTX_SETUP_ROOT", self.path("root"));
        command.envs(self.environment.iter().cloned()).current_dir(repository());
        command
    }

    /// Runs `.ci/setup`.
    pub fn setup(&self) -> Setup {
        self.run(self.command("bash").arg(".ci/setup"))
    }

    /// Runs `make GOAL`.
    pub fn make(&self, words: &[&str]) -> Setup {
        self.run(self.command("make").args(words))
    }

    fn run(&self, command: &mut Command) -> Setup {
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        Setup {
            code: output.status.code().unwrap(),
            text: String::from_utf8_lossy(&text).into_owned(),
            makefile: fs::read_to_string(self.path("target/setup.mk")).unwrap_or_default(),
        }
    }
}

pub fn write_program(path: &Path, script: &str) {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, script).unwrap();
    fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(unfinished, path).unwrap();
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// A program of the real PATH.
fn find(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.exists());
    found.unwrap_or_else(|| panic!("{name} is not on the PATH"))
}
