//! The command's standard streams: FIFOs that the pod process reads and writes, and threads that join them to our own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::sync::oneshot;

use crate::ctl::CtlError;
use crate::paths::Paths;

/// What is moved at once, in bytes.
const CHUNK: usize = 32 << 10;

/// The FIFOs of one command, removed when this is dropped. They are where the pod has its sockets: if this process is
/// killed, they go with the pod.
pub(super) struct Fifos {
    directory: PathBuf,
    pub(super) stdin: PathBuf,
    pub(super) stdout: PathBuf,
    /// None with a terminal, which has one output.
    pub(super) stderr: Option<PathBuf>,
}

impl Fifos {
    pub(super) fn make(paths: &Paths, terminal: bool) -> Result<Self, CtlError> {
        let directory = paths.console_fifos(std::process::id());
        fs::create_dir(&directory).map_err(CtlError::file("make the directory", &directory))?;
        let fifos = Self {
            stdin: directory.join("stdin"),
            stdout: directory.join("stdout"),
            stderr: (!terminal).then(|| directory.join("stderr")),
            directory,
        };
        for path in fifos.all() {
            mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)
                .map_err(|error| CtlError::file("make the FIFO", path)(error.into()))?;
        }
        Ok(fifos)
    }

    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.stdin, &self.stdout].into_iter().chain(&self.stderr)
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        // An error says that the pod has ended, and has removed them.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Hands our input to the command. The answer says that there is no more; none comes when the command takes no more.
pub(super) fn send_input(fifo: &Path) -> Result<oneshot::Receiver<()>, CtlError> {
    // It has a reader: opening does not wait.
    let mut fifo = OpenOptions::new().write(true).open(fifo).map_err(CtlError::file("open the FIFO", fifo))?;
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || {
        if copy(&mut io::stdin(), &mut fifo).is_ok() {
            let _ = ended.send(());
        }
    });
    Ok(end)
}

/// Hands the command's output to `to`. The answer comes at its end, and is an error when `to` takes no more.
pub(super) fn take_output(
    fifo: &Path,
    mut to: impl Write + Send + 'static,
) -> Result<oneshot::Receiver<io::Result<()>>, CtlError> {
    // It has a writer: opening does not wait.
    let mut fifo = File::open(fifo).map_err(CtlError::file("open the FIFO", fifo))?;
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = ended.send(copy(&mut fifo, &mut to));
    });
    Ok(end)
}

/// Copies until the end, and lets nothing wait in between: somebody looks at it.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&chunk[..count]).and_then(|()| to.flush())?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
