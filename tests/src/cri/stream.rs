//! Sessions with processes of containers, as `kubectl exec` and `kubectl attach` have them: containerd answers the address
//! of a server, and the process's streams are channels of a WebSocket (`v4.channel.k8s.io`): a message's first byte is the
//! channel's number.

use anyhow::{Context as _, Result, bail, ensure};
use futures::{SinkExt as _, StreamExt as _};
use k8s_cri::v1::{AttachRequest, ExecRequest};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;

use super::client::Cri;
use super::pod::Container;

const PROTOCOL: HeaderValue = HeaderValue::from_static("v4.channel.k8s.io");

/// The channels.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A session that is open.
#[derive(Debug)]
pub struct Session<'a> {
    cri: &'a Cri,
    socket: WebSocketStream<TcpStream>,
    /// What has come of the process's streams, and how it ended.
    pub seen: Seen,
}

/// What came of a session.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The standard output; for a terminal, all of it.
    pub stdout: Vec<u8>,
    /// The standard error.
    pub stderr: Vec<u8>,
    /// The exit code, once it is known.
    pub code: Option<i32>,
}

impl Seen {
    /// The standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Takes a message; its first byte is its channel.
    fn take(&mut self, message: &[u8]) -> Result<()> {
        match message.split_first() {
            Some((&STDOUT, bytes)) => self.stdout.extend_from_slice(bytes),
            Some((&STDERR, bytes)) => self.stderr.extend_from_slice(bytes),
            Some((&STATUS, bytes)) => self.code = Some(exit_code(bytes)?),
            _ => {}
        }
        Ok(())
    }
}

/// The exit code that a status tells: none is told for success.
fn exit_code(status: &[u8]) -> Result<i32> {
    let status: Value = serde_json::from_slice(status).context("The session's status is no JSON")?;
    if status["status"] == "Success" {
        return Ok(0);
    }
    let mut causes = status["details"]["causes"].as_array().into_iter().flatten();
    let code = causes.find(|cause| cause["reason"] == "ExitCode").and_then(|cause| cause["message"].as_str());
    code.with_context(|| format!("The session failed: {status}"))?.parse().context("The exit code is no number")
}

impl Container<'_> {
    /// Runs `program` in it with all streams; with a terminal, `stderr` is its stdout.
    ///
    /// # Errors
    /// When containerd refuses or nobody answers at the address that it says.
    pub fn session(&self, program: &[&str], tty: bool) -> Result<Session<'_>> {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: program.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let url = self.cri.call("Exec", self.cri.service().exec(request))?.url;
        Session::open(self.cri, &url)
    }

    /// Joins its first process.
    ///
    /// # Errors
    /// When containerd refuses or nobody answers at the address that it says.
    pub fn attach(&self) -> Result<Session<'_>> {
        let request = AttachRequest {
            container_id: self.id.clone(),
            stdin: true,
            stdout: true,
            stderr: true,
            ..AttachRequest::default()
        };
        let url = self.cri.call("Attach", self.cri.service().attach(request))?.url;
        Session::open(self.cri, &url)
    }
}

/// Opens the WebSocket of a session's address.
pub(super) fn open(cri: &Cri, url: &str) -> Result<WebSocketStream<TcpStream>> {
    let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL);
    let host = request.uri().authority().with_context(|| format!("{url} has no host"))?.to_string();
    let socket = cri.within(async {
        let connection = TcpStream::connect(host).await?;
        let (socket, _) = tokio_tungstenite::client_async(request, connection).await?;
        Ok(socket)
    });
    socket.with_context(|| url.to_owned())
}

impl<'a> Session<'a> {
    fn open(cri: &'a Cri, url: &str) -> Result<Self> {
        Ok(Self { cri, socket: open(cri, url)?, seen: Seen::default() })
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = Message::binary([&[channel], bytes].concat());
        self.cri.within(async { Ok(self.socket.send(message).await?) })
    }

    /// Gives the process input.
    ///
    /// # Errors
    /// When the session is over.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.send(STDIN, bytes)
    }

    /// Gives its terminal a size.
    ///
    /// # Errors
    /// When the session is over.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        self.send(RESIZE, format!("{{\"Width\":{columns},\"Height\":{rows}}}").as_bytes())
    }

    /// Reads until the standard output has `text`.
    ///
    /// # Errors
    /// When the session ends without, or takes longer than the patience.
    pub fn until(&mut self, text: &str) -> Result<()> {
        let Self { cri, socket, seen } = self;
        let found = cri.within(async {
            while !seen.text().contains(text) {
                let Some(message) = socket.next().await else { bail!("The session has ended") };
                seen.take(&message?.into_data())?;
            }
            Ok(())
        });
        found.with_context(|| format!("{text:?} does not come: {seen:?}"))
    }

    /// Reads to the end of the process.
    ///
    /// # Errors
    /// When the session ends without a status, or takes longer than the patience.
    pub fn finish(mut self) -> Result<Seen> {
        let Self { cri, socket, seen } = &mut self;
        cri.within(async {
            while let Some(Ok(message)) = socket.next().await {
                if message.is_binary() {
                    seen.take(&message.into_data())?;
                }
            }
            Ok(())
        })?;
        ensure!(self.seen.code.is_some(), "The session tells no exit code: {:?}", self.seen);
        Ok(self.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_among_the_causes_of_a_failure() {
        let failed = br#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"4"}]}}"#;
        assert_eq!(exit_code(failed).unwrap(), 4);
        assert_eq!(exit_code(br#"{"metadata":{},"status":"Success"}"#).unwrap(), 0);
        assert!(exit_code(br#"{"status":"Failure","message":"no such container"}"#).is_err());
    }
}
