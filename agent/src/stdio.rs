//! The standard streams of a process: pipes or a terminal on its side, stream connections on the host's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::task::{AbortHandle, spawn_local};

use crate::error::{Error, Result};
use crate::sys;
use crate::transport::{self, Endpoint};

/// What a stream moves at once, and all that a busy stream holds in memory; an idle one holds nothing.
const CHUNK: usize = 32 << 10;

/// A descriptor that the event loop watches.
pub(crate) type Watched = AsyncFd<OwnedFd>;

/// The stdio fields of a Create or Exec request. `None`: the process gets /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StdioRequest {
    pub(crate) stdin: Option<u64>,
    pub(crate) stdout: Option<u64>,
    pub(crate) stderr: Option<u64>,
    pub(crate) terminal: bool,
}

impl StdioRequest {
    /// Reads the fields as they stand in the request.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a field is neither empty nor `stream:<id>`, or a terminal has a stderr of its own.
    pub(crate) fn parse(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Result<Self> {
        let stdio = Self {
            stdin: stream_id("stdin", stdin)?,
            stdout: stream_id("stdout", stdout)?,
            stderr: stream_id("stderr", stderr)?,
            terminal,
        };
        if terminal && stdio.stderr.is_some() {
            return Err(Error::invalid("a terminal has one output: stderr must be empty with terminal=true"));
        }
        Ok(stdio)
    }
}

fn stream_id(name: &str, field: &str) -> Result<Option<u64>> {
    if field.is_empty() {
        return Ok(None);
    }
    let id = field.strip_prefix(protocols::STREAM_SCHEME).and_then(|id| id.parse().ok());
    id.map(Some).ok_or_else(|| Error::invalid(format!("{name} {field:?} is neither empty nor \"stream:<number>\"")))
}

/// Stream connections to the host that are not joined to a process yet.
pub(crate) struct HostStreams {
    stdin: Option<Watched>,
    stdout: Option<Watched>,
    stderr: Option<Watched>,
}

impl HostStreams {
    /// Dials all streams of a request at once.
    pub(crate) async fn open(endpoint: &Endpoint, request: &StdioRequest) -> Result<Self> {
        let open = async |id: Option<u64>| match id {
            Some(id) => open_stream(endpoint, id).await.map(Some),
            None => Ok(None),
        };
        let (stdin, stdout, stderr) =
            futures::try_join!(open(request.stdin), open(request.stdout), open(request.stderr))?;
        Ok(Self { stdin, stdout, stderr })
    }
}

/// Dials the host and names the stream.
pub(crate) async fn open_stream(endpoint: &Endpoint, id: u64) -> Result<Watched> {
    let stream = endpoint.dial(protocols::STREAM_PORT).await?;
    transport::write_all(&stream, &id.to_le_bytes())
        .await
        .map_err(Error::io(format!("cannot name stream {id} to the host")))?;
    Ok(stream)
}

/// The process's ends of its pipes. They are inheritable: drop them as soon as the helper runs, or no stream ever ends.
#[derive(Default)]
pub(crate) struct ProcessEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl ProcessEnds {
    /// The numbers of stdin, stdout and stderr for the helper.
    pub(crate) fn numbers(&self) -> [Option<RawFd>; 3] {
        [&self.stdin, &self.stdout, &self.stderr].map(|end| end.as_ref().map(AsRawFd::as_raw_fd))
    }
}

/// Pipes between a process without a terminal and its streams.
pub(crate) struct Pipes {
    stdin: Option<(Watched, Watched)>,
    outputs: Vec<(Watched, Watched)>,
}

impl Pipes {
    /// Makes one pipe per stream.
    pub(crate) fn new(streams: HostStreams) -> io::Result<(Self, ProcessEnds)> {
        let mut ends = ProcessEnds::default();
        let mut pipes = Self { stdin: None, outputs: Vec::new() };
        if let Some(stream) = streams.stdin {
            let (read, write) = pipe(End::Read)?;
            ends.stdin = Some(read);
            pipes.stdin = Some((stream, sys::watch(write)?));
        }
        for (stream, end) in [(streams.stdout, &mut ends.stdout), (streams.stderr, &mut ends.stderr)] {
            if let Some(stream) = stream {
                let (read, write) = pipe(End::Write)?;
                *end = Some(write);
                pipes.outputs.push((sys::watch(read)?, stream));
            }
        }
        Ok((pipes, ends))
    }

    /// Starts forwarding.
    pub(crate) fn forward(self) -> Forwarding {
        for (pipe, stream) in self.outputs {
            spawn_local(async move { forward_output(&pipe, Some(&stream)).await });
        }
        Forwarding {
            stdin: self
                .stdin
                .map(|(stream, pipe)| spawn_local(async move { forward_input(&stream, &pipe).await }).abort_handle()),
        }
    }
}

/// Starts forwarding between a terminal and its streams.
pub(crate) fn forward_terminal(streams: HostStreams, master: &Rc<Watched>) -> Forwarding {
    let output = Rc::clone(master);
    let stdout = streams.stdout;
    // Even without a stream the output is read, or the process would stop at a full terminal.
    spawn_local(async move { forward_output(&output, stdout.as_ref()).await });
    let input = Rc::clone(master);
    Forwarding {
        stdin: streams
            .stdin
            .map(|stream| spawn_local(async move { forward_input(&stream, &input).await }).abort_handle()),
    }
}

/// Forwarding under way. Outputs end by themselves when their last writer closed them; dropping this ends the input.
#[derive(Default)]
pub(crate) struct Forwarding {
    stdin: Option<AbortHandle>,
}

impl Forwarding {
    /// Whether the process has a stdin stream.
    pub(crate) fn has_stdin(&self) -> bool {
        self.stdin.is_some()
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        if let Some(stdin) = &self.stdin {
            stdin.abort();
        }
    }
}

/// Everything the process writes goes to the host, then end of file. A host that hung up does not stop the process:
/// what it still writes is read and dropped.
async fn forward_output(from: &Watched, to: Option<&Watched>) {
    let mut host = to;
    let outcome = pump(from, async |bytes| {
        if let Some(stream) = host
            && let Err(error) = transport::write_all(stream, bytes).await
        {
            tracing::debug!(%error, "the host hung up on an output stream");
            host = None;
        }
        Ok(())
    })
    .await;
    if let Err(error) = outcome {
        tracing::warn!(%error, "an output stream of a process broke");
    }
    if let Some(stream) = to {
        // Closing the connection follows at once; a host that is gone needs no end of file.
        let _ = transport::half_close(stream);
    }
}

/// Everything the host sends goes to the process, then end of file: both ends are dropped with the caller's task.
async fn forward_input(from: &Watched, to: &Watched) {
    if let Err(error) = pump(from, async |bytes| transport::write_all(to, bytes).await).await {
        tracing::debug!(%error, "a process no longer reads its stdin");
    }
}

/// Hands over all that `from` yields until its end of file. The buffer lives only while there is something to move.
pub(crate) async fn pump(from: &Watched, mut deliver: impl AsyncFnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    loop {
        drop(from.readable().await?);
        let mut chunk = vec![0; CHUNK];
        while let Some(n) = transport::try_read(from, &mut chunk).await? {
            if n == 0 {
                return Ok(());
            }
            deliver(&chunk[..n]).await?;
        }
    }
}

/// Which end of a pipe a process gets.
enum End {
    Read,
    Write,
}

/// A pipe (read, write): the process's end blocks and is inherited by the next child, ours does neither.
fn pipe(process: End) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (theirs, ours) = match process {
        End::Read => (&read, &write),
        End::Write => (&write, &read),
    };
    inherit(theirs)?;
    fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

/// Lets the next child keep a descriptor under the same number. Nothing else is spawned meanwhile: this process has
/// one thread, and spawning does not await.
fn inherit(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stdio_fields_are_empty_or_name_a_stream() {
        let parsed = StdioRequest::parse("stream:1", "stream:18446744073709551615", "", false).ok();
        assert_eq!(
            parsed,
            Some(StdioRequest { stdin: Some(1), stdout: Some(u64::MAX), stderr: None, terminal: false })
        );
        for bad in ["stream:", "stream:-1", "stream:x", "/run/fifo", "stream:18446744073709551616"] {
            assert!(StdioRequest::parse(bad, "", "", false).is_err(), "{bad:?} must be refused");
        }
        assert!(StdioRequest::parse("", "", "stream:3", true).is_err(), "a terminal has no stderr");
    }
}
