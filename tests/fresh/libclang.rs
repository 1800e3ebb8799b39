//! libclang is what bindgen loads: searched where it searches, loaded, and given a header to parse.

use crate::machine::{Machine, Mpi, library};
use std::fs;

const LEFT_OUT: &str = "leaves out the feature `mpi`";
const NOT_FOUND: &str = "missing: libclang: libclang is not found (libclang-cpp is another library)";

/// A machine with MPI, and these libraries at these places.
fn with(libraries: &[(&str, &str)]) -> Machine {
    let machine = Machine::new();
    machine.mpi("mpicc", Mpi::Whole);
    for (name, path) in libraries {
        machine.put(name, path);
    }
    machine
}

#[test]
fn libclang_cpp_is_not_libclang() {
    let cpp = [
        ("good.so", "usr/lib/test-linux-gnu/libclang-cpp.so.14"),
        ("good.so", "usr/lib/llvm-14/lib/libclang-cpp.so"),
        ("good.so", "usr/lib/llvm-14/lib/libclang-cpp.so.14"),
    ];
    with(&cpp).setup().expect(0, &[NOT_FOUND, LEFT_OUT]).features("cuda");
    let both = [&cpp[..], &[("good.so", "usr/lib/llvm-14/lib/libclang-14.so.1")]].concat();
    with(&both).setup().expect(0, &[]).features("mpi cuda").without("missing");
}

#[test]
fn it_is_found_where_the_build_searches() {
    for path in [
        "usr/lib/libclang.so",
        "usr/lib64/libclang.so.18.1",
        "usr/lib/test-linux-gnu/libclang-18.so.18",
        "usr/lib/llvm-18/lib/libclang.so.1",
        "usr/lib64/llvm18/lib/libclang.so.18",
        "usr/local/lib/libclang.so",
        "usr/local/llvm18/lib/libclang.so.18",
    ] {
        let setup = with(&[("good.so", path)]).setup().expect(0, &[]).features("mpi cuda");
        assert!(!setup.makefile.contains("LIBCLANG_PATH"), "{path}: {}", setup.makefile);
    }
    for path in [
        "opt/llvm/lib/libclang.so",
        "usr/lib/a/b/c/libclang.so",
        "usr/lib/libclang.a",
        "usr/lib/xlibclang.so",
    ] {
        with(&[("good.so", path)]).setup().expect(0, &[NOT_FOUND]).features("cuda");
    }
}

#[test]
fn a_file_of_another_word_size_or_kind_is_none() {
    let machine = with(&[("good.so", "usr/lib/libclang.so.1")]);
    let path = machine.path("root/usr/lib/libclang.so.1");
    let mut bytes = fs::read(&path).unwrap();
    bytes[4] = 1;
    fs::write(&path, &bytes).unwrap();
    machine.setup().expect(0, &[NOT_FOUND]).features("cuda");
    fs::write(&path, "/* GNU ld script */").unwrap();
    machine.setup().expect(0, &[NOT_FOUND]).features("cuda");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("gone", &path).unwrap();
    machine.setup().expect(0, &[NOT_FOUND]).features("cuda");
}

#[test]
fn a_library_that_cannot_be_used_is_none() {
    let path = "usr/lib/libclang.so.1";
    with(&[("other.so", path)])
        .setup()
        .expect(0, &["it lacks functions of libclang", LEFT_OUT])
        .features("cuda");
    with(&[("broken.so", path)])
        .setup()
        .expect(0, &["libclang.so.1 does not work: broken", LEFT_OUT])
        .features("cuda");
    let machine = with(&[("good.so", path)]);
    let whole = fs::read(library("good.so")).unwrap();
    fs::write(machine.path("root").join(path), &whole[..200]).unwrap();
    machine.setup().expect(0, &["does not work", LEFT_OUT]).features("cuda");
}

#[test]
fn the_newest_is_taken_as_the_build_takes_it() {
    // 19 is newest, but broken: the build is told another one.
    let machine = with(&[
        ("good.so", "usr/lib/llvm-9/lib/libclang.so.9"),
        ("broken.so", "usr/lib/llvm-19/lib/libclang-19.so.1"),
        ("good.so", "usr/lib/llvm-18/lib/libclang-18.so.18"),
    ]);
    let setup = machine.setup().expect(0, &[]).features("mpi cuda");
    assert!(setup.makefile.contains("export LIBCLANG_PATH := "), "{}", setup.makefile);
    assert!(setup.makefile.contains("llvm-18/lib/libclang-18.so.18\n"), "{}", setup.makefile);

    // 9 is older than 19, although its name sorts behind it.
    let machine = with(&[
        ("broken.so", "usr/lib/llvm-9/lib/libclang.so.9"),
        ("good.so", "usr/lib/llvm-19/lib/libclang.so.19"),
    ]);
    let setup = machine.setup().expect(0, &[]).features("mpi cuda");
    assert!(!setup.makefile.contains("LIBCLANG_PATH"), "{}", setup.makefile);
}

#[test]
fn headers_of_the_c_compiler_stand_in_for_clang_s() {
    let path = "usr/lib/libclang.so.1";
    let setup = with(&[("headerless.so", path)]).setup().expect(0, &[]).features("mpi cuda");
    assert!(setup.makefile.contains("export BINDGEN_EXTRA_CLANG_ARGS := -isystem /"), "{}", setup.makefile);

    let mut machine = with(&[("headerless.so", path)]);
    machine.set("BINDGEN_EXTRA_CLANG_ARGS", "-DOWN=1");
    let setup = machine.setup().expect(0, &[]).features("mpi cuda");
    assert!(setup.makefile.contains("ARGS := -DOWN=1 -isystem /"), "{}", setup.makefile);

    // A clang program knows where its headers are; bindgen asks it.
    let machine = with(&[("headerless.so", path)]);
    let script = "#!/bin/sh\nprintf '#include <...> search starts here:\\n /usr/include\\nEnd of search list.\\n' >&2\n";
    machine.program("clang", script);
    let setup = machine.setup().expect(0, &[]).features("mpi cuda");
    assert!(!setup.makefile.contains("BINDGEN"), "{}", setup.makefile);
}

#[test]
fn libclang_path_is_the_only_place_where_it_is_set() {
    let mut machine = with(&[("good.so", "usr/lib/libclang.so.1")]);
    machine.set("LIBCLANG_PATH", "/nowhere");
    machine
        .setup()
        .expect(0, &["LIBCLANG_PATH names /nowhere, where no libclang is", LEFT_OUT])
        .features("cuda");

    for name in ["opt/lib", "opt/lib/libclang.so.18"] {
        let mut machine = with(&[("good.so", "opt/lib/libclang.so.18")]);
        let path = machine.path("root").join(name);
        machine.set("LIBCLANG_PATH", path.to_str().unwrap());
        let setup = machine.setup().expect(0, &[]).features("mpi cuda");
        assert!(!setup.makefile.contains("LIBCLANG_PATH"), "{}", setup.makefile);
    }
}

#[test]
fn llvm_config_and_the_loader_s_path_are_asked() {
    let machine = with(&[("good.so", "opt/llvm/lib64/libclang.so.18")]);
    let prefix = machine.path("root/opt/llvm");
    machine.program("llvm-config", &format!("#!/bin/sh\necho '{}'\n", prefix.display()));
    let setup = machine.setup().expect(0, &[]).features("mpi cuda");
    assert!(!setup.makefile.contains("LIBCLANG_PATH"), "{}", setup.makefile);

    let mut machine = with(&[("good.so", "opt/llvm/lib/libclang.so.18")]);
    let path = format!("/nowhere:{}", machine.path("root/opt/llvm/lib").display());
    machine.set("LIBRARY_PATH", &path);
    machine.setup().expect(0, &[]).features("mpi cuda");
}

#[test]
fn libclang_of_conda_is_named_to_the_build() {
    let mut machine = with(&[("good.so", "conda/lib/libclang.so.18")]);
    let prefix = machine.path("root/conda");
    machine.set("CONDA_PREFIX", prefix.to_str().unwrap());
    let setup = machine.setup().expect(0, &[]).features("mpi cuda");
    let line = format!("export LIBCLANG_PATH := {}/lib/libclang.so.18\n", prefix.display());
    assert!(setup.makefile.contains(&line), "{}", setup.makefile);
}
