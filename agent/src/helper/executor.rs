//! The last steps of a container's process: finding its program as runc does, and executing it.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libcontainer::capabilities;
use libcontainer::seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Process, Spec};

/// Exit status of a process whose program cannot be executed after all; runc's is the same.
const EXEC_FAILED: i32 = 255;

/// Marks an error text of [`ContainerExecutor::validate`] on its way through libcontainer's own.
const VERDICT: &str = "exec: ";

/// Runs the program of a container's process.
///
/// libcontainer leaves the container's seccomp filter out of further processes. For those this executor installs it,
/// which takes CAP_SYS_ADMIN unless the process may gain no privileges; so libcontainer is told nothing of their
/// capabilities, and they are dropped here, after the filter: the order that libcontainer itself keeps for the first
/// process.
#[derive(Clone)]
pub(super) struct ContainerExecutor {
    restrictions: Option<Restrictions>,
}

#[derive(Clone)]
struct Restrictions {
    seccomp: Option<LinuxSeccomp>,
    capabilities: LinuxCapabilities,
}

impl ContainerExecutor {
    /// For a container's first process.
    pub(super) fn for_init() -> Self {
        Self { restrictions: None }
    }

    /// For a further process: takes its capabilities over, and the container's filter.
    pub(super) fn for_exec(container: &Spec, process: &mut Process) -> Self {
        let seccomp = container.linux().as_ref().and_then(|linux| linux.seccomp().clone());
        // No capabilities in the request means none; oci-spec's default would be three.
        let capabilities = process.capabilities().clone().unwrap_or_else(no_capabilities);
        process.set_capabilities(None);
        Self { restrictions: Some(Restrictions { seccomp, capabilities }) }
    }
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
    none
}

impl Executor for ContainerExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let fail = |why: String| ExecutorValidationError::ArgValidationError(format!("{VERDICT}{why}"));
        let process = spec.process().as_ref().ok_or_else(|| fail("the spec has no process".into()))?;
        let program = process.args().as_ref().and_then(|args| args.first()).filter(|program| !program.is_empty());
        let program = program.ok_or_else(|| fail("the spec has no args: name a program to run".into()))?;
        find_program(program, search_path(process)).map(drop).map_err(fail)?;
        // Of all that libcontainer asks of an executor, this comes after the terminal and before the Create answer:
        // a later Resize wins.
        set_console_size(process).map_err(|error| fail(format!("cannot set the size of the terminal: {error}")))
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let error = match self.prepare(spec) {
            Ok((program, args)) => {
                crate::sys::reset_signals();
                let Err(errno) = nix::unistd::execv(&program, &args);
                format!("exec {}: {}", program.to_string_lossy(), errno.desc())
            }
            Err(why) => why,
        };
        // Nobody listens for an answer any more: the container's own stderr is where its user will look.
        eprintln!("{error}");
        std::process::exit(EXEC_FAILED);
    }
}

impl ContainerExecutor {
    fn prepare(&self, spec: &Spec) -> Result<(CString, Vec<CString>), String> {
        let process = spec.process().as_ref().ok_or("the spec has no process")?;
        let args = process.args().as_deref().unwrap_or_default();
        let program = find_program(args.first().map_or("", String::as_str), search_path(process))?;
        let program = CString::new(program.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        let args = args.iter().map(|arg| CString::new(arg.as_bytes())).collect::<Result<Vec<_>, _>>();
        let args = args.map_err(|e| format!("an argument has a zero byte: {e}"))?;
        if let Some(restrictions) = &self.restrictions {
            restrictions.apply()?;
        }
        Ok((program, args))
    }
}

impl Restrictions {
    fn apply(&self) -> Result<(), String> {
        if let Some(profile) = &self.seccomp {
            match seccomp::initialize_seccomp(profile) {
                Ok(None) => {}
                Ok(Some(_)) => {
                    return Err("seccomp: a profile that notifies a listener cannot be used with exec".into());
                }
                Err(error) => return Err(format!("seccomp: {error}")),
            }
        }
        let syscall = create_syscall();
        capabilities::reset_effective(syscall.as_ref()).map_err(|e| format!("capabilities: {e}"))?;
        capabilities::drop_privileges(&self.capabilities, syscall.as_ref()).map_err(|e| format!("capabilities: {e}"))
    }
}

fn set_console_size(process: &Process) -> std::io::Result<()> {
    let Some(size) = process.console_size().filter(|_| process.terminal() == Some(true)) else { return Ok(()) };
    let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
    crate::sys::set_window_size(std::io::stdin(), cells(size.width()), cells(size.height()))
}

fn search_path(process: &Process) -> &str {
    let env = process.env().as_deref().unwrap_or_default();
    env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default()
}

/// Finds a program as execvp(3) would, with Go's texts for what goes wrong (`exec.LookPath`): clients look for them.
pub(super) fn find_program(name: &str, path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match check_executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(errno @ Errno::ENOENT) => Err(format!("{name:?}: stat {name}: {}", lower(errno))),
            Err(errno) => Err(format!("{name:?}: {}", lower(errno))),
        };
    }
    let mut denied = false;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        match check_executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        Err(format!("{name:?}: permission denied"))
    } else {
        Err(format!("{name:?}: executable file not found in $PATH"))
    }
}

fn check_executable(path: &Path) -> Result<(), Errno> {
    let metadata = std::fs::metadata(path).map_err(|e| e.raw_os_error().map_or(Errno::ENOENT, Errno::from_raw))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    Ok(())
}

fn lower(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

/// Whether a text already says what is wrong with the program.
pub(super) fn is_verdict(text: &str) -> bool {
    text.starts_with("unable to start container process: ")
}

/// Words libcontainer's report of a failed validation as runc does.
pub(super) fn reword(text: &str) -> String {
    match text.find(VERDICT) {
        Some(start) => format!("unable to start container process: {}", &text[start..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_program_is_said_as_runc_says_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "").expect("a file");
        let path = directory.path().to_str().expect("UTF-8");
        let cases = [
            ("nothing", path, "\"nothing\": executable file not found in $PATH"),
            ("nothing", "", "\"nothing\": executable file not found in $PATH"),
            ("plain", path, "\"plain\": permission denied"),
            ("/no/such", path, "\"/no/such\": stat /no/such: no such file or directory"),
            ("/", path, "\"/\": is a directory"),
        ];
        for (name, path, expected) in cases {
            assert_eq!(find_program(name, path), Err(expected.to_owned()), "{name}");
        }
        assert_eq!(find_program("sh", "/nowhere:/bin"), Ok("/bin/sh".into()));
    }

    #[test]
    fn the_verdict_survives_libcontainers_wrapping() {
        let wrapped = "failed to create container: exec process failed with error error in executing process : \
                       exec: \"x\": executable file not found in $PATH";
        let worded = reword(wrapped);
        assert_eq!(worded, "unable to start container process: exec: \"x\": executable file not found in $PATH");
        assert!(is_verdict(&worded));
    }
}
