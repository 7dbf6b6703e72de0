//! How observations are put together.

use std::fmt::Display;
use std::io;
use std::path::Path;
use std::sync::Barrier;
use std::thread;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// What was observed, or the error of a step that every file system ought to do.
pub(crate) type Observed = io::Result<String>;

/// Steps and what came of them.
#[derive(Default)]
pub(crate) struct Steps(Vec<String>);

impl Steps {
    /// Notes what a step gave.
    pub(crate) fn see(&mut self, step: &str, value: impl Display) {
        self.0.push(format!("{step} {value}"));
    }

    /// Notes whether a step succeeded, or the name of its error.
    pub(crate) fn result<T, E: Into<io::Error>>(&mut self, step: &str, result: Result<T, E>) {
        self.see(step, outcome(result.map_err(Into::into)));
    }

    /// The observation.
    pub(crate) fn done(self) -> Observed {
        Ok(self.0.join(", "))
    }
}

/// `ok`, or the error by its name in errno(3).
pub(crate) fn outcome<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("{:?}", Errno::from_raw(number)),
            None => error.to_string(),
        },
    }
}

/// Runs `work` in a process of its own and answers its exit code: locks and users are a process's.
///
/// # Errors
/// When the process cannot be made, or is killed.
pub(crate) fn in_another_process(work: impl FnOnce() -> u8) -> io::Result<u8> {
    // SAFETY: this program has no other thread when it comes here, so that the child may do whatever the parent may.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let code = work();
            // SAFETY: it ends the process without what the parent is to do at its own end.
            unsafe { libc::_exit(i32::from(code)) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, code) => Ok(u8::try_from(code).unwrap_or(u8::MAX)),
            other => Err(io::Error::other(format!("{other:?}"))),
        },
    }
}

/// The error's number as an exit code; 0 is success.
pub(crate) fn code<T>(result: &io::Result<T>) -> u8 {
    let number = result.as_ref().err().map_or(0, |error| error.raw_os_error().unwrap_or(255));
    u8::try_from(number).unwrap_or(255)
}

/// The outcome that [`code`] stands for.
pub(crate) fn of_code(code: u8) -> String {
    if code == 0 { "ok".to_owned() } else { format!("{:?}", Errno::from_raw(i32::from(code))) }
}

/// Runs `work` in `count` threads that begin together, and answers what each gave.
pub(crate) fn together<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(count);
    thread::scope(|scope| {
        let start = |number| {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                barrier.wait();
                work(number)
            })
        };
        let threads: Vec<_> = (0..count).map(start).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

/// A path as system calls take it.
///
/// # Errors
/// When it has a zero byte.
pub(crate) fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}

/// What a system call answered.
///
/// # Errors
/// What errno says if it answered -1.
pub(crate) fn answer<T: PartialOrd + Default>(value: T) -> io::Result<T> {
    if value < T::default() { Err(io::Error::last_os_error()) } else { Ok(value) }
}
