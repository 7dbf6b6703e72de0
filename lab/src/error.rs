//! Why the lab could not do what was asked.

use std::path::PathBuf;
use std::time::Duration;

use lab_guest::wire::WireError;

/// Why the lab could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// Debian packages could not be had.
    #[error(transparent)]
    Debian(#[from] debian::Error),
    /// The machine's own kernel could not be built.
    #[error(transparent)]
    KernelBuild(#[from] kernel_config::build::Error),
    /// A file operation or a program failed.
    #[error(transparent)]
    Tool(#[from] tool::Error),
    /// A file does not hold what it should.
    #[error("{path} {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A machine's name cannot be used.
    #[error("{0:?} is no name for a machine: use 1 to 32 letters, digits, '-', '_' or '.', beginning with a letter")]
    Name(String),
    /// There is no such snapshot.
    #[error("There is no snapshot {name:?}; there are: {known}")]
    NoSnapshot {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// There is no such device.
    #[error(
        "There is no device {0:?}; there are: edu, nvme, ati+edu, gpu[:SIZE], ivshmem[:SIZE], testdev[:SIZE]; \
         a SIZE is a power of two in M or G, up to 1024G"
    )]
    Device(String),
    /// There are more devices than ports.
    #[error("A machine has at most {most} devices, not {found}; start another one for the rest")]
    Devices {
        /// How many there can be.
        most: usize,
        /// How many were asked for.
        found: usize,
    },
    /// There is no such kernel.
    #[error("There is no kernel {0:?}; there are: debian, iommufd")]
    Kernel(String),
    /// The machine runs already.
    #[error("Machine {0:?} runs already; use it, or end it by `lab down {0}`")]
    Runs(String),
    /// The machine does not run.
    #[error("Machine {0:?} does not run; start it by `lab up {0}`, or see `lab list`")]
    NotRunning(String),
    /// The machine is paused.
    #[error("Machine {0:?} is stopped; let it go on by `lab start {0}`")]
    Paused(String),
    /// QEMU ended, or spoke otherwise than it should.
    #[error("The machine's QEMU {problem}{log}")]
    Qemu {
        /// What happened.
        problem: String,
        /// The end of its log, on lines of their own.
        log: String,
    },
    /// QEMU refused a request.
    #[error("QEMU refuses {request}: {answer}")]
    Qmp {
        /// What was asked.
        request: String,
        /// Its answer.
        answer: String,
    },
    /// The connection to the machine broke.
    #[error("The connection to the machine broke; see `lab log`")]
    Connection(#[source] std::io::Error),
    /// Something else than frames came from the machine.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Nothing came in time.
    #[error("{what} took longer than {} s", limit.as_secs_f64())]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The machine refused a request.
    #[error("{message}")]
    Refused {
        /// Its reason.
        message: String,
        /// The error number, if the reason is the operating system's.
        errno: Option<i32>,
    },
    /// A helper command in the machine failed.
    #[error("`{command}` in the machine ended with {code}: {stderr}")]
    Command {
        /// The command.
        command: String,
        /// Its exit status.
        code: i32,
        /// What it wrote to standard error.
        stderr: String,
    },
}
