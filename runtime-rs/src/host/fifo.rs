//! containerd's stdio: FIFOs that are opened without ever waiting for the other side.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use crate::error::Error;

/// Where a container's output goes.
#[derive(Debug)]
pub enum Output {
    /// A FIFO that this process holds at both ends: a reader that restarts finds what was not read.
    Fifo(pipe::Sender),
    /// A file that is appended to.
    File(tokio::fs::File),
}

/// Where a container's input comes from.
#[derive(Debug)]
pub struct Input {
    /// The end that is read.
    pub reader: pipe::Receiver,
    /// Keeps the FIFO from ending until `CloseIO`, even when a client comes, goes and comes back.
    pub keep_open: pipe::Sender,
}

/// Opens the `stdout` or `stderr` of a request; an empty name is none.
///
/// # Errors
///
/// [`Error::Invalid`] for what is no FIFO and no `file://`, [`Error::Host`] when it cannot be opened.
pub async fn open_output(name: &str) -> Result<Option<Output>, Error> {
    if name.is_empty() {
        return Ok(None);
    }
    if let Some(path) = name.strip_prefix("file://") {
        let path = absolute(path)?;
        let file = tokio::fs::OpenOptions::new().append(true).create(true).mode(0o640).open(&path).await;
        return Ok(Some(Output::File(file.map_err(Error::host("open the output", path))?)));
    }
    let path = fifo_path(name)?;
    let sender = pipe::OpenOptions::new().read_write(true).open_sender(&path).map_err(explain(path))?;
    Ok(Some(Output::Fifo(sender)))
}

/// Checks the `stdin` of a request, which is opened later; an empty name is none.
///
/// # Errors
///
/// As [`open_output`].
pub fn check_input(name: &str) -> Result<Option<PathBuf>, Error> {
    if name.is_empty() {
        return Ok(None);
    }
    let path = fifo_path(name)?;
    let metadata = std::fs::metadata(&path).map_err(Error::host("find the FIFO", &path))?;
    if !metadata.file_type().is_fifo() {
        return Err(explain(path)(ErrorKind::InvalidInput.into()));
    }
    Ok(Some(path))
}

/// Opens a checked `stdin`.
///
/// # Errors
///
/// As [`open_output`].
pub fn open_input(path: &Path) -> Result<Input, Error> {
    // The reader first: a writer cannot be opened without one.
    let reader = pipe::OpenOptions::new().open_receiver(path).map_err(explain(path.to_owned()))?;
    let keep_open = pipe::OpenOptions::new().open_sender(path).map_err(explain(path.to_owned()))?;
    Ok(Input { reader, keep_open })
}

/// Closes an output that has ended, as soon as its FIFO has a reader: what is left in it is the reader's then. Without a
/// reader the last end to be closed takes it along, so a client that is late, or restarts, would get nothing.
///
/// `lonely` is told when there is no reader; `unwanted` ends the wait, and the FIFO is closed when this answers.
///
/// # Errors
///
/// When the FIFO cannot be opened again.
pub async fn leave_to_reader(fifo: pipe::Sender, lonely: &Notify, unwanted: &Notify) -> io::Result<()> {
    let writer = reopen(&fifo, OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK))?;
    // It is open at both ends: only without it can a reader be told.
    drop(fifo);
    if has_reader(&writer)? {
        return Ok(());
    }
    lonely.notify_one();
    let wait = Wait { writer, reader: Arc::default() };
    let (writer, reader) = (wait.writer.try_clone()?, Arc::clone(&wait.reader));
    let open = move || {
        // Opening a FIFO for writing waits for its reader (fifo(7)); nothing else tells of one.
        let opened = reopen(&writer, OpenOptions::new().write(true));
        drop(reader);
        opened
    };
    let mut thread = tokio::task::spawn_blocking(open);
    let opened = tokio::select! {
        opened = &mut thread => opened,
        () = unwanted.notified() => {
            drop(wait);
            thread.await
        }
    };
    opened.map_err(io::Error::other)?.map(drop)
}

/// A thread that waits for a reader. Dropping this gives it one, which stays as long as the thread.
struct Wait {
    writer: File,
    reader: Arc<OnceLock<File>>,
}

impl Drop for Wait {
    fn drop(&mut self) {
        match reopen(&self.writer, OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK)) {
            // It was empty: nobody else fills it.
            Ok(reader) => drop(self.reader.set(reader)),
            Err(error) => tracing::warn!(%error, "a thread waits for the reader of a FIFO for ever"),
        }
    }
}

/// Opens what a descriptor stands for once more, even if its name is gone.
fn reopen(fifo: &impl AsRawFd, options: &OpenOptions) -> io::Result<File> {
    options.open(format!("/proc/self/fd/{}", fifo.as_raw_fd()))
}

/// Whether a FIFO that this process only writes to has a reader (poll(2): the writing end of one without is in error).
fn has_reader(writer: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(!fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

fn fifo_path(name: &str) -> Result<PathBuf, Error> {
    let name = name.strip_prefix("fifo://").unwrap_or(name);
    if name.contains("://") {
        return Err(Error::Invalid(format!(
            "stdio {name:?}: this scheme is not supported; use a FIFO, or file:///path for output"
        )));
    }
    absolute(name)
}

fn absolute(name: &str) -> Result<PathBuf, Error> {
    if !Path::new(name).is_absolute() {
        return Err(Error::Invalid(format!("stdio {name:?} is not an absolute path")));
    }
    Ok(PathBuf::from(name))
}

fn explain(path: PathBuf) -> impl FnOnce(std::io::Error) -> Error {
    move |error| match error.kind() {
        // What tokio says of a file that is no FIFO.
        ErrorKind::InvalidInput => Error::Invalid(format!("stdio {}: not a FIFO", path.display())),
        _ => Error::host("open the FIFO", path)(error),
    }
}
