//! The log: the `log` FIFO that containerd reads and passes on.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

/// Sends what this process logs to the bundle's `log` FIFO, if containerd made one.
///
/// `debug` raises the level from info. A reader that is gone or slow loses lines; it never delays the pod.
pub fn init(bundle: &Path, debug: bool) {
    let Some(fifo) = open(&bundle.join("log")) else { return };
    let level = if debug { Level::DEBUG } else { Level::INFO };
    // Only an embedding test can have set a subscriber before.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(debug)
        .with_writer(FifoLog(Arc::new(fifo)))
        .try_init();
}

fn open(path: &Path) -> Option<File> {
    // Both ways: without a reader a write-only open fails now, and a reader that ends kills later writes.
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo()).then_some(file)
}

#[derive(Debug, Clone)]
struct FifoLog(Arc<File>);

impl Write for FifoLog {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        // Lines of up to PIPE_BUF are written whole or not at all (pipe(7)); a full pipe drops the line.
        match (&*self.0).write(line) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(line.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for FifoLog {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
