//! What can go wrong for a request, and the gRPC code that says so to containerd.

use std::io;
use std::path::PathBuf;

use ttrpc::Code;

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was refused or failed.
///
/// The texts of the first group are those that containerd's client and its users know from runc's shim.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container {0:?} does not exist: not found")]
    NoContainer(String),
    #[error("process {exec_id:?} of container {container:?} does not exist: not found")]
    NoProcess { container: String, exec_id: String },
    #[error("process already finished: not found")]
    ProcessFinished,
    #[error("{0:?}: already exists")]
    Exists(String),
    #[error("{what}: failed precondition")]
    Precondition { what: String },
    #[error("{what}")]
    Invalid { what: String },
    #[error("{what}: not implemented")]
    Unimplemented { what: &'static str },
    /// What the OCI runtime said, worded as runc words it: clients look for parts of it.
    #[error("OCI runtime {operation} failed: {message}")]
    Runtime { operation: &'static str, message: String },
    #[error("nothing in the guest answers at port {port} of its loopback address: {source}")]
    NoServer { port: u16, source: io::Error },
    #[error("{what}: no answer within {seconds} s")]
    Deadline { what: String, seconds: u64 },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("cannot mount {fstype} {source_name:?} on {target:?}: {source}")]
    Mount { fstype: String, source_name: String, target: PathBuf, source: io::Error },
    #[error("{0}")]
    Network(#[from] crate::network::NetworkError),
    #[error("clean-up of {container:?} left something behind: {}", failures.join("; "))]
    CleanUp { container: String, failures: Vec<String> },
}

impl Error {
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(crate) fn precondition(what: impl Into<String>) -> Self {
        Self::Precondition { what: what.into() }
    }

    /// For `map_err`: an I/O error of any kind, with what was being done.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::ProcessFinished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Precondition { .. } => Code::FAILED_PRECONDITION,
            Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::Unimplemented { .. } => Code::UNIMPLEMENTED,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::NoServer { .. } => Code::UNAVAILABLE,
            Self::Network(error) => error.code(),
            Self::Runtime { .. } | Self::Io { .. } | Self::Mount { .. } | Self::CleanUp { .. } => Code::UNKNOWN,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
