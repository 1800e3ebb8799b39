//! The table that launches are checked against holds what a compiler sees in the kernels' sources.

use gradtx_emulator::{module_object, on_device};
use gradtx_kernels::cuda::cubin::MODULES;
use gradtx_kernels::cuda::signature::SIGNATURES;
use libloading::os::unix::{Library, Symbol};

/// Sizes of a kernel's parameters, as g++ has them.
fn compiled_sizes(library: &Library, kernel: &str) -> Option<Vec<usize>> {
    let name = format!("emu_parameters_{kernel}\0");
    // SAFETY: `EXPORT` in kernels/emu/emu.h gives the function this type.
    let ask: Symbol<unsafe extern "C" fn(*mut *const usize) -> u32> =
        unsafe { library.get(name.as_bytes()) }.ok()?;
    let mut sizes = std::ptr::null();
    // SAFETY: one pointer is written, to as many sizes as are returned, in the library that is loaded.
    let sizes = unsafe {
        let count = ask(&mut sizes);
        std::slice::from_raw_parts(sizes, count as usize)
    };
    Some(sizes.to_vec())
}

/// Names behind a prefix in the symbols of an object.
fn exported(object: &[u8], prefix: &str) -> usize {
    let needle = [&[0], prefix.as_bytes()].concat();
    object.windows(needle.len()).filter(|window| *window == needle).count()
}

#[test]
fn table_is_what_a_compiler_sees() {
    if on_device() {
        return;
    }
    for (file, _) in MODULES {
        let module = file.trim_end_matches(".cu");
        let path = module_object(module);
        // SAFETY: our own object; loading it runs no code that has requirements.
        let library = unsafe { Library::new(&path) }.expect("a module can be loaded");
        let of_module: Vec<_> = SIGNATURES.iter().filter(|s| s.module == module).collect();
        for signature in &of_module {
            let kernel = signature.kernel;
            let expected: Vec<_> = signature.parameters.iter().map(|p| p.kind.size()).collect();
            assert_eq!(compiled_sizes(&library, kernel), Some(expected), "{file}: {kernel}");
        }
        // None is missing. Names are in the table of exported symbols, and may be in another one.
        let names = exported(&std::fs::read(&path).expect("it was built"), "emu_launch_");
        assert!(
            names > 0 && names.is_multiple_of(of_module.len()),
            "{file}: {names} names, {}",
            of_module.len()
        );
        assert!(names / of_module.len() <= 2, "{file}: {names} names for {} kernels", of_module.len());
    }
}
