//! The administrator's tool.

use std::process::ExitCode;

fn main() -> ExitCode {
    runtime_rs::ctl::main()
}
