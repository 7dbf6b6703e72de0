//! The agent's log: into the kernel's when there is one, so that the host finds both on the console.

use std::fs::OpenOptions;
use std::io;
use std::sync::Mutex;

use tracing::Level;

/// Installs the log once. An unknown level is said and replaced by `info`.
pub(crate) fn install(level: Option<&str>) {
    let (parsed, unknown) = match level.map(|text| text.parse::<Level>().map_err(|_| text)) {
        None => (Level::INFO, None),
        Some(Ok(level)) => (level, None),
        Some(Err(text)) => (Level::INFO, Some(text)),
    };
    let format = tracing_subscriber::fmt().with_max_level(parsed).with_ansi(false).with_target(false);
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        // Each event is one write, which the kernel takes as one record with its own time.
        Ok(log) if std::process::id() == 1 => format.without_time().with_writer(Mutex::new(log)).init(),
        _ => format.with_writer(io::stderr).init(),
    }
    if let Some(text) = unknown {
        tracing::warn!("agent.log={text}: expected error, warn, info, debug or trace");
    }
}
