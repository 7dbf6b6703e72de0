//! The process that a sandbox's PID namespace begins with: it keeps the namespace while no container is in it, and takes
//! over orphans. It is this binary executed once more, as "pause".

use std::convert::Infallible;
use std::io;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_dumpable, set_name};

use super::Started;
use crate::sys;

/// First argument that makes this binary that process.
pub(crate) const ARGUMENT: &str = "pause";

/// Makes a PID namespace and its first process. Processes that the caller starts afterwards are in it, too.
pub(super) fn start() -> io::Result<Started> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(Started { pid: child.id().cast_signed(), uid: 0, hooks: Vec::new() })
}

/// That process's whole life. The kernel drops all signals for it that come from its own namespace.
pub(crate) fn main() -> io::Result<Infallible> {
    // Containers see this process and shall not look into it.
    set_dumpable(false)?;
    set_name(c"pause")?;
    sys::leave_children_to_kernel()?;
    loop {
        nix::unistd::pause();
    }
}
