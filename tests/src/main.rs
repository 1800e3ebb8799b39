//! The program as tests run it: the same entry as `gradtx`.

fn main() -> std::process::ExitCode {
    gradtx::run(std::env::args_os())
}
