//! Programs of this repository that the lab builds when it needs them.

use std::path::{Path, PathBuf};
use std::process::Command;

use tool::run;

use crate::error::Error;
use crate::progress::Progress;

/// The directory of a package under the lab's.
pub(crate) fn package(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Builds a package's program, static, so that it runs anywhere; answers its path.
pub(crate) fn build(name: &str, what: &str) -> Result<PathBuf, Error> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let progress = Progress::start(&format!("Building {what}"), 0);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--message-format=json-render-diagnostics", "--target", TARGET])
        .arg("--manifest-path")
        .arg(package(name).join("Cargo.toml"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    let messages = run("cargo", &mut command)?;
    drop(progress);
    String::from_utf8_lossy(&messages)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| Error::Format { path: package(name), problem: "builds no program".to_owned() })
}
