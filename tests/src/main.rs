//! The program as tests run it: the same entry as `gradtx`.

fn main() -> std::process::ExitCode {
    gradtx_launcher::run(std::env::args_os())
}
