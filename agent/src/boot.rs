//! What PID 1 does before it can serve: mounts, cgroup controllers, loopback; and what it does last: power off.

use std::convert::Infallible;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::cgroup::CGROUP_ROOT;
use crate::error::{Error, Result};
use crate::network;

/// One file system of the guest itself.
struct GuestMount {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
    /// Whether the guest can do without: a small kernel may lack it.
    optional: bool,
}

/// POSIX shared memory of all containers (shm_overview(7)).
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";

pub(crate) const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const RESTRICTED: MsFlags = NO_DEVICES.union(MsFlags::MS_NOEXEC);

/// In the order in which they are mounted. Their targets are in the guest image or in a file system mounted before.
const MOUNTS: &[GuestMount] = &[
    GuestMount { fstype: "proc", target: "/proc", flags: RESTRICTED, data: "", optional: false },
    GuestMount { fstype: "sysfs", target: "/sys", flags: RESTRICTED, data: "", optional: false },
    GuestMount { fstype: "devtmpfs", target: "/dev", flags: MsFlags::MS_NOSUID, data: "mode=0755", optional: false },
    GuestMount {
        fstype: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,ptmxmode=0666,gid=5",
        optional: false,
    },
    GuestMount { fstype: "tmpfs", target: SHARED_MEMORY, flags: NO_DEVICES, data: "mode=1777", optional: false },
    GuestMount { fstype: "mqueue", target: "/dev/mqueue", flags: RESTRICTED, data: "", optional: true },
    GuestMount { fstype: "tmpfs", target: "/run", flags: NO_DEVICES, data: "mode=0755", optional: false },
    GuestMount { fstype: "tmpfs", target: "/tmp", flags: NO_DEVICES, data: "mode=1777", optional: false },
    GuestMount { fstype: "cgroup2", target: CGROUP_ROOT, flags: RESTRICTED, data: "", optional: false },
];

/// Mounts what a guest needs.
pub(crate) fn mount_all() -> Result<()> {
    for entry in MOUNTS {
        if let Err(source) = mount_one(entry)
            && !entry.optional
        {
            return Err(Error::Mount {
                fstype: entry.fstype.into(),
                source_name: entry.fstype.into(),
                target: entry.target.into(),
                source,
            });
        }
    }
    fs::create_dir_all(crate::RUNTIME_DIR).map_err(Error::io(format!("cannot make {}", crate::RUNTIME_DIR)))
}

fn mount_one(entry: &GuestMount) -> io::Result<()> {
    if !Path::new(entry.target).exists() {
        fs::create_dir(entry.target)?;
    }
    match mount(Some(entry.fstype), entry.target, Some(entry.fstype), entry.flags, Some(entry.data)) {
        // The kernel may have mounted /dev already.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets containers have every controller that the kernel has. One that cannot be enabled makes a limit that needs it
/// fail later, with its own reason.
pub(crate) fn enable_controllers() -> Result<()> {
    let root = Path::new(CGROUP_ROOT);
    let controllers =
        fs::read_to_string(root.join("cgroup.controllers")).map_err(Error::io("cannot read the cgroup controllers"))?;
    for controller in controllers.split_whitespace() {
        if let Err(error) = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::warn!(controller, %error, "cannot enable a cgroup controller");
        }
    }
    Ok(())
}

/// Brings the loopback interface up; a guest without it still runs containers.
pub(crate) fn loopback_up() {
    if let Err(error) = network::loopback_up() {
        tracing::warn!(%error, "no loopback interface");
    }
}

/// Takes the host's generator of random numbers from the kernel, which has been seeded by it and is again by the first
/// request: it would read from it for ever, once a minute in the end, and wake a host whose guest has nothing to do.
pub(crate) fn rest_random_source() {
    match fs::write("/sys/class/misc/hw_random/rng_current", "none") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "the kernel goes on reading random numbers from the host");
        }
        _ => {}
    }
}

/// A parameter of the kernel command line, `agent.<name>=<value>`.
pub(crate) fn kernel_parameter(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    find_parameter(&line, name).map(str::to_owned)
}

fn find_parameter<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let value = |word: &'a str| word.strip_prefix("agent.")?.strip_prefix(name)?.strip_prefix('=');
    line.split_whitespace().find_map(value)
}

/// Says why the guest cannot go on, where the host can read it: kernel log, or the console if there is no log.
pub(crate) fn report_fatal(why: &str) {
    let line = format!("kata-agent: {why}; powering off\n");
    // <0> is KERN_EMERG: printed whatever the console's log level is.
    let logged = fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(format!("<0>{line}").as_bytes()));
    if logged.is_err() {
        // The kernel gave PID 1 the console, if there is one.
        let _ = io::stderr().write_all(line.as_bytes());
    }
}

/// Ends the guest. In a PID namespace (a test) the kernel ends that instead.
pub(crate) fn power_off() -> Result<Infallible> {
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF).map_err(Error::io("cannot power off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_by_whole_name() {
        let line = "console=hvc0 agent.dialx=no agent.dial=unix:/run/a xagent.log=no agent.log=debug\n";
        assert_eq!(find_parameter(line, "dial"), Some("unix:/run/a"));
        assert_eq!(find_parameter(line, "log"), Some("debug"));
        assert_eq!(find_parameter(line, "console"), None);
    }
}
