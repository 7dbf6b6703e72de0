//! The command, run.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What a command printed, and its exit code.
#[derive(Debug)]
pub(crate) struct Printed {
    pub(crate) out: String,
    pub(crate) errors: String,
    pub(crate) code: i32,
}

impl Printed {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// `kata-ctl` with these arguments; its configuration is this file.
pub(crate) fn command(configuration: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kata-ctl"));
    command.args(arguments).env("KATA_CONF_FILE", configuration).stdin(Stdio::null());
    command
}

/// Runs it to its end, beside the event loop that serves the shims of this test.
pub(crate) async fn run(mut command: Command) -> Printed {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    Printed {
        out: String::from_utf8(output.stdout).unwrap(),
        errors: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code().unwrap(),
    }
}
