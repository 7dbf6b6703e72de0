//! The shim that containerd starts for every pod.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use runtime_rs::machine::Dragonball;
use runtime_rs::paths::RUN_DIR;

fn main() -> ExitCode {
    runtime_rs::run(std::env::args_os().skip(1), Path::new(RUN_DIR), Arc::new(Dragonball))
}
