//! The `vellum` command. Everything is in the library beside it, from which man pages and completions are made too.

fn main() -> std::process::ExitCode {
    vellum_cli::main()
}
