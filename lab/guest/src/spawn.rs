//! Starts a command in a session of its own, with pipes or a terminal.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command as Process, Stdio};

use lab_guest::wire::{Command, Size};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};

/// A started command and the ends of its streams.
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    /// None for a terminal, where both outputs are one.
    pub(crate) stderr: Option<OwnedFd>,
    /// The terminal, to resize it.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts `command`.
pub(crate) fn spawn(command: &Command) -> io::Result<Spawned> {
    let Some((program, arguments)) = command.arguments.split_first() else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let mut process = Process::new(program);
    process.args(arguments).env_clear().env("HOME", "/root").env("USER", "root").env("LC_ALL", "C.UTF-8");
    process.env("PATH", search_path()?).envs(&command.environment);
    process.current_dir(command.directory.as_deref().unwrap_or("/root"));
    match command.terminal {
        Some(size) => spawn_on_terminal(process, size),
        None => spawn_on_pipes(process),
    }
}

/// The machine's search path, which its snapshot chose on the kernel's command line.
fn search_path() -> io::Result<String> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let path = line.split_whitespace().find_map(|word| word.strip_prefix("lab.path="));
    Ok(path.unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").to_owned())
}

fn spawn_on_pipes(mut process: Process) -> io::Result<Spawned> {
    let (stdin, our_stdin) = io::pipe()?;
    let (our_stdout, stdout) = io::pipe()?;
    let (our_stderr, stderr) = io::pipe()?;
    process.stdin(stdin).stdout(stdout).stderr(stderr);
    // SAFETY: setsid is async-signal-safe, and the closure touches nothing else.
    unsafe { process.pre_exec(|| setsid().map(drop).map_err(io::Error::from)) };
    Ok(Spawned {
        child: process.spawn()?,
        stdin: our_stdin.into(),
        stdout: our_stdout.into(),
        stderr: Some(our_stderr.into()),
        terminal: None,
    })
}

fn spawn_on_terminal(mut process: Process, size: Size) -> io::Result<Spawned> {
    let pty = openpty(&window(size), None)?;
    for fd in [&pty.master, &pty.slave] {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    let clone = || pty.slave.try_clone().map(Stdio::from);
    process.stdin(clone()?).stdout(clone()?).stderr(clone()?);
    // SAFETY: setsid and ioctl are async-signal-safe; descriptor 0 is the terminal by then, and TIOCSCTTY takes an
    // integer, no pointer.
    unsafe {
        process.pre_exec(|| {
            setsid()?;
            nix::errno::Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0)).map(drop).map_err(io::Error::from)
        });
    }
    let child = process.spawn()?;
    Ok(Spawned {
        child,
        stdin: pty.master.try_clone()?,
        stdout: pty.master.try_clone()?,
        stderr: None,
        terminal: Some(pty.master),
    })
}

fn window(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Gives a terminal another size; its foreground processes get SIGWINCH.
pub(crate) fn resize(terminal: &OwnedFd, size: Size) -> io::Result<()> {
    let window = window(size);
    // SAFETY: the descriptor is open, and TIOCSWINSZ reads one `winsize`, which lives until the call is over.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const window) };
    nix::errno::Errno::result(result).map(drop).map_err(io::Error::from)
}

/// Kills every process of the session that `leader` leads. What has left the session (a daemon) stays.
pub(crate) fn kill_session(leader: Pid) {
    // A process may fork while the list is read; its child is in the next list.
    let mut killed = HashSet::new();
    loop {
        let members: Vec<Pid> = session_members(leader).into_iter().filter(|pid| killed.insert(*pid)).collect();
        if members.is_empty() {
            return;
        }
        for member in members {
            // An error says that it has ended by itself.
            let _ = kill(member, Signal::SIGKILL);
        }
    }
}

fn session_members(leader: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .filter(|pid| alive_in_session(*pid, leader))
        .collect()
}

/// Whether `pid` is in `leader`'s session and not a zombie: state and session are fields 3 and 6 of `stat`, after
/// the name in parentheses.
fn alive_in_session(pid: Pid, leader: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let Some((_, fields)) = stat.rsplit_once(") ") else { return false };
    let mut fields = fields.split(' ');
    !matches!(fields.next(), Some("Z" | "X")) && fields.nth(2) == Some(leader.to_string().as_str())
}
