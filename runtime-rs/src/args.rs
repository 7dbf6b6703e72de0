//! The command line that containerd gives: Go's flags, then one action.

use std::ffi::OsString;
use std::path::PathBuf;

/// What `-h` prints.
pub const HELP: &str = "\
containerd-shim-kata-v2 runs containers in virtual machines. containerd executes it; use it by its runtime type:

    ctr run --rm --runtime io.containerd.kata.v2 IMAGE ID [COMMAND...]

Flags and actions are containerd's (runtime v2):
    -namespace NS  -id ID  -address SOCKET  -publish-binary PATH  -bundle DIR  -debug   start | delete
    -info          what this runtime can do, as protobuf
    -v             its version
The configuration file is documented in /usr/share/defaults/kata-containers/configuration.toml.";

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make a pod process, or name the one of the container's sandbox.
    Start,
    /// Undo what is left of a sandbox.
    Delete,
    /// Be the pod process; `start` gives this one.
    Pod,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
    /// Print the usage.
    Help,
}

/// One parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container that this is about.
    pub id: String,
    /// The bundle; containerd's working directory for `start`.
    pub bundle: PathBuf,
    /// containerd's gRPC socket.
    pub address: String,
    /// Log at debug.
    pub debug: bool,
}

/// A command line that containerd would not give.
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    /// A flag without the value that it needs.
    #[error("flag -{0} needs a value; see -h")]
    NoValue(String),
    /// A flag that does not exist.
    #[error("unknown flag -{0}; see -h")]
    UnknownFlag(String),
    /// No action, or one that does not exist.
    #[error("unknown action {0:?}; give start or delete, or see -h")]
    UnknownAction(String),
    /// The action needs this flag.
    #[error("{action} needs -{flag}; see -h")]
    Missing {
        /// The action.
        action: &'static str,
        /// The flag.
        flag: &'static str,
    },
    /// An argument that is not UTF-8.
    #[error("argument {0:?} is not UTF-8")]
    NotUtf8(OsString),
}

impl Args {
    /// Parses what follows the program's name.
    ///
    /// # Errors
    ///
    /// [`ArgsError`].
    pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut args = Self {
            action: Action::Help,
            namespace: String::new(),
            id: String::new(),
            bundle: PathBuf::new(),
            address: String::new(),
            debug: false,
        };
        let mut action = None;
        let mut arguments = arguments.map(|argument| argument.into_string().map_err(ArgsError::NotUtf8));
        while let Some(argument) = arguments.next().transpose()? {
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                action = Some(parse_action(&argument)?);
                continue;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || match inline.clone().map(Ok).or_else(|| arguments.next()) {
                Some(value) => value,
                None => Err(ArgsError::NoValue(name.to_owned())),
            };
            match name {
                "namespace" => args.namespace = value()?,
                "id" => args.id = value()?,
                "bundle" => args.bundle = PathBuf::from(value()?),
                "address" => args.address = value()?,
                // Events go over the ttrpc socket of TTRPC_ADDRESS; the socket's place is the runtime's own business.
                "publish-binary" | "socket" => drop(value()?),
                "debug" => args.debug = inline.as_deref().is_none_or(|value| value != "false"),
                "info" => action = Some(Action::Info),
                "v" | "version" => action = Some(Action::Version),
                "h" | "help" => action = Some(Action::Help),
                unknown => return Err(ArgsError::UnknownFlag(unknown.to_owned())),
            }
        }
        args.action = action.ok_or_else(|| ArgsError::UnknownAction(String::new()))?;
        args.check()
    }

    fn check(self) -> Result<Self, ArgsError> {
        let action = match self.action {
            Action::Start => "start",
            Action::Delete => "delete",
            Action::Pod => "pod",
            Action::Info | Action::Version | Action::Help => return Ok(self),
        };
        match (self.namespace.is_empty(), self.id.is_empty()) {
            (true, _) => Err(ArgsError::Missing { action, flag: "namespace" }),
            (_, true) => Err(ArgsError::Missing { action, flag: "id" }),
            _ => Ok(self),
        }
    }
}

fn parse_action(word: &str) -> Result<Action, ArgsError> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "pod" => Ok(Action::Pod),
        other => Err(ArgsError::UnknownAction(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let args =
            parse("-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id a -debug start");
        let args = args.unwrap();
        assert_eq!((args.action, &*args.namespace, &*args.id), (Action::Start, "k8s.io", "a"));
        assert!(args.debug && args.address == "/run/c.sock");
        let args = parse("-namespace=n --id=a -bundle /b -debug=false delete").unwrap();
        assert_eq!((args.action, args.bundle, args.debug), (Action::Delete, PathBuf::from("/b"), false));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn a_wrong_command_line_says_what_is_wrong() {
        for (line, part) in [
            ("-id a start", "-namespace"),
            ("-namespace n start", "-id"),
            ("-namespace n -id a", "action"),
            ("-namespace n -id a restart", "restart"),
            ("-namespace n -colour red start", "-colour"),
            ("start -id", "-id needs a value"),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(message.contains(part), "{line}: {message}");
        }
    }
}
