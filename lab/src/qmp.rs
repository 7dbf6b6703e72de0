//! Talks to a machine's QEMU (QEMU's `docs/interop/qmp-spec.rst`).

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::Error;

/// How long QEMU may take for an answer.
const LIMIT: Duration = Duration::from_secs(180);

/// A connection to QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came before the answer to a request.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to QEMU's socket and waits until QEMU answers.
    pub(crate) fn connect(socket: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).map_err(Error::Connection)?;
        let mut qmp = Self { stream: BufReader::new(stream), events: VecDeque::new() };
        // The greeting.
        qmp.message(Instant::now() + LIMIT)?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Does one request and answers what it returns.
    pub(crate) fn execute(&mut self, request: &str, arguments: &Value) -> Result<Value, Error> {
        let line = format!("{}\n", json!({ "execute": request, "arguments": arguments }));
        self.stream.get_mut().write_all(line.as_bytes()).map_err(Error::Connection)?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut message = self.message(deadline)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let answer = error["desc"].as_str().unwrap_or("without a reason").to_owned();
                return Err(Error::Qmp { request: request.to_owned(), answer });
            }
            self.events.push_back(message);
        }
    }

    /// Starts a migration by `request` and waits for its end. The machine must be paused.
    pub(crate) fn migrate(&mut self, request: &str, uri: &str) -> Result<(), Error> {
        // Events, so that the end is told; shared memory stays in its file, so that only device state moves.
        let capabilities =
            ["events", "x-ignore-shared"].map(|capability| json!({ "capability": capability, "state": true }));
        self.execute("migrate-set-capabilities", &json!({ "capabilities": capabilities }))?;
        self.execute(request, &json!({ "uri": uri }))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self.message(deadline)?,
            };
            if message["event"] != "MIGRATION" {
                continue;
            }
            match message["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => {
                    let answer = self.execute("query-migrate", &json!({}))?;
                    let answer = answer["error-desc"].as_str().unwrap_or("see its log").to_owned();
                    return Err(Error::Qmp { request: format!("{request} {uri}"), answer });
                }
                _ => {}
            }
        }
    }

    /// The next message.
    fn message(&mut self, deadline: Instant) -> Result<Value, Error> {
        let timeout = || Error::Timeout { what: "An answer of QEMU".to_owned(), limit: LIMIT };
        let left =
            deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()).ok_or_else(timeout)?;
        self.stream.get_ref().set_read_timeout(Some(left)).map_err(Error::Connection)?;
        let mut line = String::new();
        let ended = |problem: &str| Error::Qemu { problem: problem.to_owned(), log: String::new() };
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(ended("has ended")),
            Ok(_) => serde_json::from_str(&line).map_err(|error| ended(&format!("says {line:?}: {error}"))),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(timeout()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Err(ended("has ended")),
            Err(error) => Err(Error::Connection(error)),
        }
    }
}
