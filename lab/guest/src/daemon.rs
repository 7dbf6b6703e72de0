//! Starts a service and returns when it says that it is ready (sd_notify(3)).

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Starts `program` with its output in the file `log`.
///
/// Answers when the service has sent `READY=1`; an error when it ended before.
pub(crate) fn start(log: &Path, program: &[&str]) -> io::Result<()> {
    let socket_path = log.with_extension("notify");
    let socket = UnixDatagram::bind(&socket_path)?;
    let output = File::create(log)?;
    let [name, arguments @ ..] = program else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let mut child = Command::new(name)
        .args(arguments)
        .env("NOTIFY_SOCKET", &socket_path)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()?;
    let own = UnixDatagram::unbound()?;
    own.connect(&socket_path)?;
    std::thread::spawn(move || {
        let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        // No receiver: the service was ready long ago, and this process has ended or is about to.
        let _ = own.send(format!("ENDED={status}").as_bytes());
    });
    let mut buffer = [0; 4096];
    let result = loop {
        let count = socket.recv(&mut buffer)?;
        let message = String::from_utf8_lossy(&buffer[..count]);
        if message.lines().any(|line| line == "READY=1") {
            break Ok(());
        }
        if let Some(status) = message.strip_prefix("ENDED=") {
            break Err(io::Error::other(format!("{name} ended before it was ready ({status}); see {}", log.display())));
        }
    };
    std::fs::remove_file(&socket_path)?;
    result
}
