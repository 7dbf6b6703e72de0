//! What a Task API call can fail with, and the status code that containerd gets for it.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use protocols::containerd::ttrpc;
use ttrpc::Code;

use crate::machine::{ChangeError, ExitReason, LaunchError};
use crate::sizing::SizeError;

/// The failure of a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The undo journal.
    #[error(transparent)]
    Journal(#[from] journal::JournalError),
    /// A name in the request.
    #[error(transparent)]
    Name(#[from] crate::paths::NameError),
    /// The container's specification.
    #[error(transparent)]
    Spec(#[from] crate::spec::SpecError),
    /// A mount for the container.
    #[error(transparent)]
    Mount(#[from] crate::host::mount::MountError),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    /// An interface of the pod's network cannot be the machine's.
    #[error("the interface {interface} of the pod's network cannot be joined to the virtual machine")]
    Interface {
        /// Its name in the pod's network namespace.
        interface: String,
        /// Why not.
        #[source]
        source: dragonball::TapError,
    },
    /// An interface came to a machine that was made without room for one.
    #[error(
        "the interface {0} came to the container's network, and its virtual machine has no room for a card: bind a file to \
         /etc/resolv.conf in the container, which says that it is to have a network, or raise `default_maxvcpus` above \
         `default_vcpus`"
    )]
    NoRoom(String),
    /// The limits of containers and the size of the machine do not go together.
    #[error(transparent)]
    Size(#[from] crate::sizing::SizeError),
    /// The machine was asked to grow and did not.
    #[error("the virtual machine cannot have {wanted} for the container's limits; it is as it was before")]
    Grow {
        /// What it was to have.
        wanted: String,
        /// Why not.
        #[source]
        source: Box<Error>,
    },
    /// The machine refused a change.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The guest did less than it was asked to within the deadline.
    #[error(
        "the guest reached {reached} of {wanted} within {deadline:?}: it hangs, or is slower than \
        `create_container_timeout` in [agent.kata] allows"
    )]
    Short {
        /// What there is.
        reached: String,
        /// What was wanted.
        wanted: String,
        /// The deadline that passed.
        deadline: Duration,
    },
    /// The virtual machine did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The guest ended before its agent answered.
    #[error("{what} before its agent answered{}", quote(tail))]
    GuestEnded {
        /// What the guest did.
        what: ExitReason,
        /// The end of its console output.
        tail: String,
    },
    /// The guest runs but its agent does not answer.
    #[error(
        "the guest's agent did not answer within {deadline:?}: the guest hangs, or is slower than \
         `reconnect_timeout_ms` in [agent.kata] allows{}",
        quote(tail)
    )]
    GuestHangs {
        /// The deadline that passed.
        deadline: Duration,
        /// The end of its console output.
        tail: String,
    },
    /// A command was to be executed in the guest itself.
    #[error(
        "no commands can be executed in this pod's guest itself: set debug_console_enabled = true in [agent.kata] of the \
         configuration and start the pod again"
    )]
    NoConsole,
    /// The virtual machine has ended.
    #[error("the sandbox's virtual machine has ended ({0}); delete the container and create it again")]
    GuestGone(String),
    /// The virtual machine runs, and its agent let a request's time pass.
    #[error(
        "the guest's agent did not answer within the request's time ({0}): the guest hangs, or has more to do than it \
         can; try again, or delete the container and give it more CPUs"
    )]
    Unanswered(String),
    /// The agent's own answer, with its code.
    #[error("{0}")]
    Agent(String, Code),
    /// No such container or exec.
    #[error("{0}: not found")]
    NotFound(String),
    /// A container or exec of this name exists.
    #[error("{0}: already exists; delete it first")]
    AlreadyExists(String),
    /// The process is in a state that does not allow the request.
    #[error("{0}")]
    State(String),
    /// The request asks for something that does not make sense.
    #[error("{0}")]
    Invalid(String),
    /// A part of the Task API that a container in a VM does not have.
    #[error("{0}")]
    Unsupported(String),
    /// The host refused something.
    #[error("could not {action} {}: {source}", path.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// A [`Error::Host`] for this path.
    pub fn host(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Host { action, path, source }
    }

    /// The gRPC status code of this error.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Name(_) | Self::Spec(_) | Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Launch(LaunchError::Config(_) | LaunchError::Image { .. }) => Code::FAILED_PRECONDITION,
            Self::Config(config::ConfigError::Annotation(_)) => Code::INVALID_ARGUMENT,
            Self::State(_) | Self::Config(_) | Self::NoRoom(_) | Self::NoConsole => Code::FAILED_PRECONDITION,
            Self::GuestHangs { .. } | Self::Unanswered(_) => Code::DEADLINE_EXCEEDED,
            Self::GuestEnded { .. } | Self::GuestGone(_) => Code::UNAVAILABLE,
            Self::Agent(_, code) => *code,
            Self::Size(SizeError::Defaults { .. }) => Code::FAILED_PRECONDITION,
            Self::Size(_) => Code::RESOURCE_EXHAUSTED,
            Self::Grow { source, .. } => source.code(),
            Self::Short { .. } => Code::DEADLINE_EXCEEDED,
            Self::Change(error) => change_code(error),
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Mount(error) => error.code(),
            Self::Network(network::NetworkError::OfHost { .. } | network::NetworkError::Namespace { .. }) => {
                Code::INVALID_ARGUMENT
            }
            Self::Network(_) | Self::Interface { .. } => Code::INTERNAL,
            Self::Journal(_) | Self::Launch(_) | Self::Host { .. } => Code::INTERNAL,
        }
    }
}

fn change_code(error: &ChangeError) -> Code {
    match error {
        ChangeError::NotPluggable | ChangeError::Config(_) | ChangeError::Device { .. } => Code::FAILED_PRECONDITION,
        ChangeError::Vcpus { .. } | ChangeError::Memory { .. } | ChangeError::NoSlot => Code::RESOURCE_EXHAUSTED,
        ChangeError::Unseen(_) | ChangeError::NoDriver(_) | ChangeError::InUse(_) => Code::DEADLINE_EXCEEDED,
        ChangeError::Ended => Code::UNAVAILABLE,
        _ => Code::INTERNAL,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::error::get_rpc_status(error.code(), chain(&error))
    }
}

/// An error with all its causes, as one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // A transparent error repeats its cause.
        if !text.contains(&next) {
            let _ = write!(text, ": {next}");
        }
        cause = error.source();
    }
    text
}

/// The console's tail, or nothing.
fn quote(tail: &str) -> String {
    /// containerd passes the text on in one message (bytes).
    const MAX_TAIL: usize = 2048;
    let tail = tail.trim_end();
    if tail.is_empty() {
        return String::new();
    }
    let start = (tail.len().saturating_sub(MAX_TAIL)..tail.len()).find(|at| tail.is_char_boundary(*at)).unwrap_or(0);
    format!("; the end of its console:\n{}", &tail[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_ended_early_is_reported_as_what_it_was_with_its_console() {
        let error = Error::GuestEnded { what: ExitReason::Panic, tail: "VFS: Unable to mount root\n".to_owned() };
        let text = error.to_string();
        assert!(
            text.contains("panicked before its agent answered") && text.ends_with("Unable to mount root"),
            "{text}"
        );
        assert_eq!(error.code(), Code::UNAVAILABLE);
    }

    #[test]
    fn a_long_console_is_quoted_from_its_end_at_a_character() {
        let text = quote(&format!("{}end", "ä".repeat(4000)));
        assert!(text.len() < 2200 && text.ends_with("ääend"));
    }

    #[test]
    fn causes_are_part_of_the_text_once() {
        let cause = std::io::Error::other("no space");
        let error = Error::Host { action: "write", path: "/x".into(), source: cause };
        assert_eq!(chain(&error), "could not write /x: no space");
    }
}
