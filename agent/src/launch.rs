//! Starts helpers, and joins what they started to its streams.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::helper::{self, Reply, Request, Started};
use crate::process::Process;
use crate::reaper::Exit;
use crate::stdio::{self, HostStreams, Pipes, ProcessEnds, StdioRequest};
use crate::sys;
use crate::transport;

/// A helper's answer is a line; its texts are bounded where they are made.
const REPLY_LIMIT: usize = 64 << 10;

/// Longest that a helper may take; hooks of the container run inside.
const HELPER_DEADLINE: Duration = Duration::from_secs(120);

/// A process that was started, and the promise of its exit.
pub(crate) struct Launched {
    pub(crate) started: Started,
    pub(crate) exit: oneshot::Receiver<Exit>,
}

impl Guest {
    /// Has a helper start a process and forwards its stdio.
    pub(crate) async fn launch(
        &self,
        process: &Process,
        operation: &'static str,
        request: impl FnOnce(helper::Stdio) -> Request,
    ) -> Result<Launched> {
        let fields = &process.fields;
        let wanted = StdioRequest::parse(&fields.stdin, &fields.stdout, &fields.stderr, fields.terminal)?;
        let streams = HostStreams::open(&self.endpoint, &wanted).await?;
        let birth = self.reaper.birth();
        let started = if wanted.terminal {
            self.launch_with_terminal(process, operation, streams, request).await?
        } else {
            self.launch_with_pipes(process, operation, streams, request).await?
        };
        let exit = self.reaper.claim(started.pid);
        drop(birth);
        process.set_pid(started.pid);
        Ok(Launched { started, exit })
    }

    async fn launch_with_pipes(
        &self,
        process: &Process,
        operation: &'static str,
        streams: HostStreams,
        request: impl FnOnce(helper::Stdio) -> Request,
    ) -> Result<Started> {
        let (pipes, ends) = Pipes::new(streams).map_err(Error::io("cannot make pipes"))?;
        let request = request(helper::Stdio { pipes: ends.numbers(), console: None });
        let started = started(operation, self.run_helper(operation, &request, ends).await?)?;
        process.attach(pipes.forward(), None)?;
        Ok(started)
    }

    async fn launch_with_terminal(
        &self,
        process: &Process,
        operation: &'static str,
        streams: HostStreams,
        request: impl FnOnce(helper::Stdio) -> Request,
    ) -> Result<Started> {
        let console = Console::listen(&self.unique_name()).map_err(Error::io("cannot make a console socket"))?;
        let request = request(helper::Stdio { pipes: [None; 3], console: Some(console.path.clone()) });
        let started = started(operation, self.run_helper(operation, &request, ProcessEnds::default()).await?)?;
        let master = console.receive().map_err(Error::io("the helper sent no terminal"))?;
        if let Err(error) = sys::chown_terminal(&master, started.uid) {
            tracing::warn!(%error, uid = started.uid, "cannot give the terminal to the process's user");
        }
        let master = Rc::new(sys::watch(master).map_err(Error::io("cannot watch the terminal"))?);
        process.attach(stdio::forward_terminal(streams, &master), Some(master))?;
        Ok(started)
    }

    /// Runs one helper to its answer. `ends` are dropped as soon as the helper has them.
    pub(crate) async fn run_helper(
        &self,
        operation: &'static str,
        request: &Request,
        ends: ProcessEnds,
    ) -> Result<Reply> {
        let (pid, answer) = spawn_helper(request).map_err(Error::io("cannot start the helper"))?;
        drop(ends);
        let mut ended = self.reaper.claim(pid);
        let Ok(line) = tokio::time::timeout(HELPER_DEADLINE, read_line(&answer)).await else {
            // Only what is not reaped yet still owns its pid.
            if ended.try_recv().is_err() {
                let _ = sys::kill(pid, libc::SIGKILL);
            }
            let what = format!("the helper that should {operation}");
            return Err(Error::Deadline { what, seconds: HELPER_DEADLINE.as_secs() });
        };
        let line = line.map_err(Error::io("cannot read the helper's answer"))?;
        let status = ended.await.map_or(0, |exit| exit.status);
        match serde_json::from_slice(&line) {
            Ok(Reply::Failed(message)) => Err(Error::Runtime { operation, message }),
            Ok(reply) => Ok(reply),
            Err(_) => Err(Error::Runtime {
                operation,
                message: format!("the helper ended with status {status} and no answer"),
            }),
        }
    }
}

/// What a helper says that it started.
pub(crate) fn started(operation: &'static str, reply: Reply) -> Result<Started> {
    match reply {
        Reply::Started(started) => Ok(started),
        _ => Err(Error::Runtime { operation, message: "the helper did not say what it started".into() }),
    }
}

fn spawn_helper(request: &Request) -> io::Result<(RawFd, AsyncFd<OwnedFd>)> {
    let (request_read, mut request_write) = io::pipe()?;
    let (reply_read, reply_write) = io::pipe()?;
    // Far below the size of a pipe: written before there is a reader.
    request_write.write_all(&serde_json::to_vec(request)?)?;
    drop(request_write);
    let child = Command::new("/proc/self/exe")
        .arg(helper::ARGUMENT)
        .env_clear()
        .stdin(request_read)
        .stdout(reply_write)
        .stderr(Stdio::inherit())
        .spawn()?;
    let reply = OwnedFd::from(reply_read);
    fcntl(&reply, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((child.id().cast_signed(), sys::watch(reply)?))
}

/// Reads to the end of the line: a process that the helper forked may hold the pipe open a little longer.
async fn read_line(from: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 1024];
    while line.len() < REPLY_LIMIT {
        match transport::try_read(from, &mut chunk).await? {
            None => {}
            Some(0) => break,
            Some(n) => line.extend_from_slice(&chunk[..n]),
        }
        if let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            line.truncate(end);
            break;
        }
    }
    Ok(line)
}

/// The socket through which a new process hands us its terminal.
struct Console {
    path: PathBuf,
    listener: UnixListener,
}

impl Console {
    fn listen(name: &str) -> io::Result<Self> {
        let directory = Path::new(crate::RUNTIME_DIR).join("consoles");
        std::fs::create_dir_all(&directory)?;
        let path = directory.join(name);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { path, listener })
    }

    /// The terminal that the helper has sent before it answered.
    fn receive(&self) -> io::Result<OwnedFd> {
        let (connection, _) = self.listener.accept()?;
        connection.set_nonblocking(true)?;
        let mut name = [0; 64];
        let mut buffers = [io::IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(connection.as_fd().as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
        let master = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        let master = master.map(sys::received_fd).ok_or(io::ErrorKind::UnexpectedEof)?;
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK | OFlag::O_RDWR))?;
        Ok(master)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
