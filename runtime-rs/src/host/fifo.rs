//! containerd's stdio: FIFOs that are opened without ever waiting for the other side.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::AddWatchFlags;
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use crate::error::Error;
use crate::host::notices::{self, Notices};

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

/// Who wants to know how the reading of an ended output goes.
pub trait Reading {
    /// There is no reader; one may come.
    fn nobody_reads(&self);
    /// The reader took some.
    fn progressed(&self);
    /// Told when nobody waits for the reader any more: the FIFO is closed then, with what is in it.
    fn unwanted(&self) -> &Notify;
}

/// Closes an output that has ended, once its reader has read it. Without a reader the last end to be closed takes along
/// what is in the FIFO, so a client that is late, or restarts, would get nothing.
///
/// # Errors
///
/// When the FIFO cannot be opened again, or its reader cannot be watched.
pub async fn leave_to_reader(fifo: pipe::Sender, reading: &impl Reading) -> io::Result<()> {
    let writer = reopen(&fifo, OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK))?;
    // It is open at both ends: only without it can a reader be told.
    drop(fifo);
    if !has_reader(&writer)? {
        reading.nobody_reads();
        return wait_for_reader(writer, reading.unwanted()).await;
    }
    tokio::select! {
        read = wait_until_read(&writer, reading) => read,
        () = reading.unwanted().notified() => Ok(()),
    }
}

/// Waits until the reader of a FIFO has taken everything, or is gone.
async fn wait_until_read(writer: &File, reading: &impl Reading) -> io::Result<()> {
    if queued(writer)? == 0 {
        return Ok(());
    }
    // No end of a pipe can wait for "empty"; but each read of a named one is an event of the file (inotify(7)).
    let reads = AddWatchFlags::IN_ACCESS | AddWatchFlags::IN_CLOSE_NOWRITE;
    let reads = Notices::of(notices::watch(&proc_path(writer), reads)?)?;
    while queued(writer)? > 0 && has_reader(writer)? {
        reads.changed().await?;
        reading.progressed();
    }
    Ok(())
}

/// How many bytes are in a FIFO.
fn queued(fifo: &File) -> io::Result<libc::c_int> {
    let mut count = 0;
    // SAFETY: FIONREAD of a pipe writes one int, and `count` is one.
    match unsafe { libc::ioctl(fifo.as_raw_fd(), libc::FIONREAD, &raw mut count) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(count),
    }
}

async fn wait_for_reader(writer: File, unwanted: &Notify) -> io::Result<()> {
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
    options.open(proc_path(fifo))
}

fn proc_path(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
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
