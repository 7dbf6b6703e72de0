//! A process of the guest itself, beside its containers: for a person who looks for a fault.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::pty::{OpenptyResult, openpty};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use protobuf::Message;
use protocols::agent::GuestCommand;

use super::executor::find_program;
use super::{Error, Started, Stdio, process_end};
use crate::sys;

/// Starts the process that `file` describes: a [`GuestCommand`].
pub(super) fn start(file: &Path, stdio: Stdio) -> Result<Started, Error> {
    let description = GuestCommand::parse_from_bytes(&std::fs::read(file)?)?;
    let mut command = command(&description)?;
    let terminal = stdio.console.is_some();
    let [stdin, stdout, stderr] = match stdio.console {
        Some(console) => terminal_at(&console)?,
        None => {
            let [stdin, stdout, stderr] = stdio.pipes;
            [process_end(stdin, 0)?, process_end(stdout, 0)?, process_end(stderr, 0)?]
        }
    };
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    sys::lead_session(&mut command, terminal);
    let child = command.spawn().map_err(|error| format!("cannot execute {:?}: {error}", command.get_program()))?;
    Ok(Started { pid: child.id().cast_signed(), uid: 0, hooks: Vec::new() })
}

fn command(description: &GuestCommand) -> Result<Command, Error> {
    let (name, arguments) = description.arguments.split_first().ok_or("the command names no program")?;
    let environment = description.environment.iter().map(|variable| {
        variable.split_once('=').ok_or_else(|| format!("environment variable {variable:?}: expected NAME=VALUE"))
    });
    let environment = environment.collect::<Result<Vec<_>, _>>()?;
    let path = environment.iter().rev().find(|(name, _)| *name == "PATH").map_or("", |(_, path)| path);
    let program = find_program(name, path).map_err(|reason| format!("cannot execute {reason}"))?;
    let mut command = Command::new(program);
    command.arg0(name).args(arguments).env_clear().envs(environment).current_dir("/");
    Ok(command)
}

/// Makes a terminal, whose other end goes to `console`.
fn terminal_at(console: &Path) -> io::Result<[OwnedFd; 3]> {
    let OpenptyResult { master, slave } = openpty(None, None)?;
    let connection = UnixStream::connect(console)?;
    let number = [master.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&number)];
    sendmsg::<()>(connection.as_fd().as_raw_fd(), &[IoSlice::new(b"terminal")], &control, MsgFlags::empty(), None)?;
    Ok([slave.try_clone()?, slave.try_clone()?, slave])
}
