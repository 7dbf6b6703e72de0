//! The command server: one thread per port, one session at a time on each.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use lab_guest::wire::{Command, Frame, Kind, Refusal, array};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::port::{Port, Received};
use crate::reactor::Reactor;
use crate::session;

/// Where the kernel lists the ports and their names.
const PORTS: &str = "/sys/class/virtio-ports";
/// What the names of command ports begin with.
const PREFIX: &str = "lab.";

/// Serves every command port, for ever.
pub(crate) fn serve_all() -> io::Result<()> {
    let ports = command_ports()?;
    if ports.is_empty() {
        return Err(io::Error::other(format!("No port named {PREFIX}* under {PORTS}; is virtio_console loaded?")));
    }
    let (report, failures) = channel();
    for port in ports {
        let report = report.clone();
        std::thread::spawn(move || {
            let Err(error) = serve(&port);
            // Always received: below one waits for the first of them.
            let _ = report.send(io::Error::other(format!("{}: {error}", port.display())));
        });
    }
    drop(report);
    // One port's failure ends the server, and init starts it anew with all ports fresh.
    Err(failures.recv().unwrap_or_else(|_| io::Error::other("All ports' servers panicked")))
}

fn command_ports() -> io::Result<Vec<PathBuf>> {
    let mut ports = Vec::new();
    for entry in fs::read_dir(PORTS)? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.starts_with(PREFIX) {
            ports.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    Ok(ports)
}

fn serve(path: &Path) -> io::Result<Infallible> {
    let mut port = Port::open(path)?;
    let reactor = Reactor::new()?;
    reactor.watch(&port)?;
    let mut session = 0;
    loop {
        match port.receive()? {
            Received::Frame(frame) => {
                let mut frame = Some(frame);
                while let Some(current) = frame.take() {
                    frame = handle(&mut port, &mut session, &current)?;
                }
            }
            Received::Nothing | Received::Closed => {
                port.flush()?;
                reactor.wait()?;
            }
        }
    }
}

/// Does what a frame asks for; answers the frame that broke a command off, if one did.
fn handle(port: &mut Port, session: &mut u64, frame: &Frame) -> io::Result<Option<Frame>> {
    match frame.kind {
        Kind::Hello => {
            port.forget();
            *session = frame.session;
            port.queue(Kind::Ready, *session, &[]);
        }
        Kind::SetClock if frame.session == *session => match set_clock(&frame.payload) {
            Ok(()) => port.queue(Kind::Ready, *session, &[]),
            Err(error) => refuse(port, *session, "Cannot set the clock", &error),
        },
        Kind::Run if frame.session == *session => return run(port, *session, &frame.payload),
        // Left over from a command that has ended, or from an earlier driver.
        _ => {}
    }
    Ok(None)
}

fn run(port: &mut Port, session: u64, payload: &[u8]) -> io::Result<Option<Frame>> {
    let command: Command = match serde_json::from_slice(payload) {
        Ok(command) => command,
        Err(error) => {
            refuse(port, session, "Cannot read the command", &error.into());
            return Ok(None);
        }
    };
    match session::Running::start(session, &command) {
        Ok(running) => running.attend(port),
        Err(error) => {
            let program = command.arguments.first().map_or("", String::as_str);
            refuse(port, session, &format!("Cannot run {program:?} in the machine"), &error);
            Ok(None)
        }
    }
}

fn refuse(port: &mut Port, session: u64, what: &str, error: &io::Error) {
    let refusal = Refusal { message: format!("{what}: {error}"), errno: error.raw_os_error() };
    port.queue(Kind::Refused, session, &serde_json::to_vec(&refusal).unwrap_or_default());
}

fn set_clock(payload: &[u8]) -> io::Result<()> {
    let nanoseconds = u64::from_le_bytes(array(Kind::SetClock, payload).map_err(io::Error::other)?);
    let time = TimeSpec::from_duration(Duration::from_nanos(nanoseconds));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}
