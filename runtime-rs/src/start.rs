//! `start`: makes the pod process of a sandbox, or names the one that a container belongs to.
//!
//! This process touches nothing of the host itself. It executes itself once as the pod process and talks to it over a
//! socket pair: the pod process says that it listens, `start` prints the address and says that it did. If `start` is
//! killed before that, the pod process sees the socket close, and undoes what it did.
//!
//! containerd runs `delete` for a pod process that it has connected to. Until it has, a copy of this process that
//! containerd does not wait for keeps watch: should the pod process be killed in between, nobody else would know.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use journal::ProcessId;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};
use serde::Deserialize;

use crate::args::Args;
use crate::paths::{NameError, Paths};
use crate::{BINARY, delete};

/// What the pod process answers when it listens; anything else is the text of its failure.
pub const READY: &[u8] = b"ready\n";
/// What `start` answers when the address is printed.
pub const PRINTED: &[u8] = b"printed\n";
/// What the pod process says when containerd has connected.
pub const CONNECTED: &[u8] = b"connected\n";
/// Environment variable with the stamps of `start` for the timeline: `name=nanoseconds,…`.
pub const STAMPS_VARIABLE: &str = "KATA_START_STAMPS";

/// The plugin of containerd that makes sandboxes by their shims, and has a directory of its name.
const SANDBOXES: &str = "io.containerd.sandbox.controller.v1.shim";
/// The pod process has only its sockets to make until it answers.
const READY_DEADLINE: Duration = Duration::from_secs(10);
/// A pod process gives containerd less than this to connect, and then ends by itself.
const GUARD_DEADLINE: Duration = Duration::from_secs(20);
/// The longest failure that the pod process tells (bytes).
const MAX_FAILURE: u64 = 16 << 10;

/// Why no address was printed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The namespace or the id.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The bundle has no readable specification.
    #[error("bundle {}: config.json: {source}; give the directory of an OCI bundle as working directory or by -bundle", path.display())]
    Bundle {
        /// The bundle.
        path: PathBuf,
        /// What is wrong.
        source: std::io::Error,
    },
    /// The container's sandbox does not run.
    #[error("sandbox {sandbox} of container {container} does not run; create the sandbox again")]
    NoSandbox {
        /// The container.
        container: String,
        /// What its annotation names.
        sandbox: String,
    },
    /// The pod process said why it could not start, or ended without a word.
    #[error("{0}")]
    Pod(String),
    /// The system refused something.
    #[error("could not {0}: {1}")]
    System(&'static str, #[source] std::io::Error),
}

/// Prints the address of the sandbox's Task API.
///
/// # Errors
///
/// [`StartError`]; nothing of the sandbox is left then.
pub fn run(args: &Args, root: &Path) -> Result<(), StartError> {
    let began = timeline::now_ns();
    let bundle = bundle(args)?;
    let sandbox = sandbox_of(&bundle, &args.id)?;
    let paths = Paths::new(root, &args.namespace, &sandbox)?;
    if sandbox != args.id {
        if !paths.task_socket().exists() {
            return Err(StartError::NoSandbox { container: args.id.clone(), sandbox });
        }
        return print_address(&bundle, &paths);
    }

    let (mut channel, theirs) = UnixStream::pair().map_err(|error| StartError::System("make a socket pair", error))?;
    let stamps = format!("start={began},config.json read={}", timeline::now_ns());
    let mut child = spawn(args, &bundle, theirs, &stamps)?;
    let result = await_ready(&mut channel).and_then(|()| print_address(&bundle, &paths));
    match result {
        Ok(()) => {
            // The pod process may have ended meanwhile; containerd finds out by itself.
            let _ = channel.write_all(PRINTED);
            guard(channel, &paths);
            Ok(())
        }
        Err(error) => {
            drop(channel);
            abandon(&mut child, &paths);
            Err(error)
        }
    }
}

fn bundle(args: &Args) -> Result<PathBuf, StartError> {
    let given = if args.bundle.as_os_str().is_empty() { Path::new(".") } else { &args.bundle };
    std::fs::canonicalize(given).map_err(|source| StartError::Bundle { path: given.to_owned(), source })
}

/// The sandbox that the annotations name: those of containerd's CRI, then those of CRI-O.
fn sandbox_of(bundle: &Path, id: &str) -> Result<String, StartError> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let read = || -> std::io::Result<Annotated> {
        let mut text = Vec::new();
        File::open(bundle.join("config.json"))?.take(protocols::MAX_SPEC as u64).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    };
    let spec = match read() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && is_of_sandbox(bundle) => return Ok(id.to_owned()),
        read => read.map_err(|source| StartError::Bundle { path: bundle.to_owned(), source })?,
    };
    let annotations = spec.annotations.unwrap_or_default();
    Ok(crate::spec::Role::of(&annotations, id).sandbox().to_owned())
}

/// Whether containerd made the bundle for a sandbox that the Sandbox API will describe, which has no specification: those
/// lie at `STATE/SANDBOXES/<namespace>/<id>`.
fn is_of_sandbox(bundle: &Path) -> bool {
    bundle.ancestors().nth(2).and_then(Path::file_name).is_some_and(|name| name == SANDBOXES)
}

fn print_address(bundle: &Path, paths: &Paths) -> Result<(), StartError> {
    let address = format!("unix://{}", paths.task_socket().display());
    // containerd before 1.7 finds the pod process again through this file of the bundle.
    let (temporary, file) = (bundle.join(".address"), bundle.join("address"));
    std::fs::write(&temporary, &address)
        .and_then(|()| std::fs::rename(&temporary, &file))
        .map_err(|error| StartError::System("write the bundle's address file", error))?;
    let mut out = std::io::stdout();
    out.write_all(address.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| StartError::System("print the address", error))
}

fn spawn(args: &Args, bundle: &Path, channel: UnixStream, stamps: &str) -> Result<Child, StartError> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(BINARY)
        .args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address])
        .arg("-bundle")
        .arg(bundle);
    if args.debug {
        command.arg("-debug");
    }
    command
        .arg("pod")
        .env(STAMPS_VARIABLE, stamps)
        .stdin(Stdio::from(OwnedFd::from(channel)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map_err(|error| StartError::System("execute the pod process", error))
}

fn await_ready(channel: &mut UnixStream) -> Result<(), StartError> {
    let failed = |error| StartError::System("hear from the pod process", error);
    channel.set_read_timeout(Some(READY_DEADLINE)).map_err(failed)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 512];
    while answer != READY {
        match channel.read(&mut buffer).map_err(failed)? {
            0 if answer.is_empty() => {
                return Err(StartError::Pod("the pod process ended before it listened".to_owned()));
            }
            0 => return Err(StartError::Pod(String::from_utf8_lossy(&answer).into_owned())),
            count if answer.len() as u64 > MAX_FAILURE => {
                return Err(StartError::Pod(format!(
                    "the pod process failed with an endless text ({count} bytes more)"
                )));
            }
            count => answer.extend_from_slice(&buffer[..count]),
        }
    }
    Ok(())
}

/// Leaves a copy of this process behind that undoes what the pod process did if it dies before containerd connects.
///
/// Without it a start is as good; only a pod process that is killed in that instant would leave something.
fn guard(mut channel: UnixStream, paths: &Paths) {
    // SAFETY: this process has one thread, so the child may do whatever the parent may.
    let Ok(ForkResult::Child) = (unsafe { fork() }) else { return };
    // containerd waits until nobody holds the outputs of `start`.
    let let_go = File::options().read(true).write(true).open("/dev/null").and_then(|null| {
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        Ok(setsid().map(drop)?)
    });
    let mut said = [0; CONNECTED.len()];
    let connected = let_go
        .and_then(|()| channel.set_read_timeout(Some(GUARD_DEADLINE)))
        .and_then(|()| channel.read_exact(&mut said))
        .is_ok();
    if !connected {
        // Nobody listens to this process: what it cannot undo, a later `delete` tries again.
        let _ = delete::undo(paths);
    }
    std::process::exit(0)
}

/// Ends a pod process that did not come up, and undoes what it did.
fn abandon(child: &mut Child, paths: &Paths) {
    // It may have ended by itself; both calls are then harmless.
    let _ = child.kill();
    let _ = child.wait();
    // A journal of a process that lives is another's: this one was refused because of it.
    if journal::owners(&paths.journal()).is_ok_and(|owners| owners.iter().any(ProcessId::is_alive)) {
        return;
    }
    if let Err(error) = delete::undo(paths) {
        eprintln!("{BINARY}: {}", crate::error::chain(&error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_without_a_specification_is_a_sandbox_s_only_where_containerd_keeps_those() {
        let state = tempfile::tempdir().unwrap();
        let of = |parent: &str| {
            let bundle = state.path().join(parent).join("k8s.io/pod");
            std::fs::create_dir_all(&bundle).unwrap();
            sandbox_of(&bundle, "pod")
        };
        assert_eq!(of(SANDBOXES).unwrap(), "pod");
        let error = of("io.containerd.runtime.v2.task").unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
