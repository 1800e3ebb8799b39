//! The program `gradtx`: everything is in the library, so that tests and tools can call it too.

fn main() -> std::process::ExitCode {
    gradtx::run(std::env::args_os())
}
