//! QEMU's control: JSON objects, one per line (QEMU's `docs/interop/qmp-spec.rst`).

use std::collections::VecDeque;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::lines::Lines;

/// A connection to a QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    lines: Lines,
    /// What QEMU told unasked, and nobody has waited for yet.
    events: VecDeque<Value>,
    limit: Duration,
}

impl Qmp {
    /// Connects; each answer may take `limit`.
    ///
    /// # Errors
    /// When nobody answers at `socket`.
    pub(super) fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("Cannot reach QEMU")?;
        let lines = Lines::new(stream.try_clone().context("Cannot reach QEMU")?.into());
        let mut qmp = Self { stream, lines, events: VecDeque::new(), limit };
        qmp.receive()?;
        qmp.execute("qmp_capabilities", &serde_json::json!({}))?;
        Ok(qmp)
    }

    /// Runs a command to its answer.
    ///
    /// # Errors
    /// QEMU's own, or when it does not answer.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let request = serde_json::json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream, "{request}").context("Cannot write to QEMU")?;
        loop {
            let message = self.receive()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("without a reason"));
            }
            if message.get("return").is_some() {
                return Ok(());
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event, which may have come before.
    ///
    /// # Errors
    /// When it does not come.
    pub(super) fn await_event(&mut self, name: &str, is_it: impl Fn(&Value) -> bool) -> Result<()> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive()?,
            };
            if event["event"] == name && is_it(&event["data"]) {
                return Ok(());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let line = self.lines.next(self.limit).context("QEMU says nothing")?;
        serde_json::from_str(&line).with_context(|| format!("QEMU says what is no JSON: {line}"))
    }
}
