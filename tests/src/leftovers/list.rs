//! Lists the things of a scope from `/proc` and `/sys`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Scope, Thing};

/// `PF_KTHREAD` of linux/sched.h: the process is a thread of the kernel.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// Cgroups that a service manager makes and removes on its own.
const MANAGED_CGROUPS: [&str; 3] = ["system.slice", "user.slice", "init.scope"];

pub(super) fn all(scope: &Scope) -> Result<BTreeSet<Thing>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("Cannot read /proc/self/mountinfo")?;
    let mut things = BTreeSet::new();
    things.extend(processes(scope)?);
    things.extend(mounts.lines().filter_map(mount));
    let sockets = fs::read_to_string("/proc/net/unix").context("Cannot read /proc/net/unix")?;
    things.extend(sockets.lines().skip(1).filter_map(|line| socket(line, scope)));
    for root in mounts.lines().filter_map(mount).filter_map(|thing| cgroup_root(&thing)) {
        cgroups(&root, &root, &scope.marker, &mut things);
    }
    for (directory, levels) in &scope.directories {
        if let Ok(data) = fs::symlink_metadata(directory) {
            files(directory, *levels, data.dev(), &mut things);
        }
    }
    things.extend(network_devices()?);
    Ok(things)
}

/// What `/proc/<pid>` tells of a process.
struct Process {
    parent: i32,
    start: u64,
    name: String,
    command: String,
    cgroups: String,
}

fn process(pid: i32) -> Option<Process> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let (name, fields) = parse_stat(&stat)?;
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    // Numbers of proc_pid_stat(5), less the three that come before: ppid 4, flags 9, starttime 22.
    if number(6)? & KERNEL_THREAD != 0 {
        return None;
    }
    let command = fs::read(directory.join("cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
    Some(Process {
        parent: i32::try_from(number(1)?).ok()?,
        start: number(19)?,
        command: if command.is_empty() { format!("[{name}]") } else { command },
        name: name.to_owned(),
        cgroups: fs::read_to_string(directory.join("cgroup")).unwrap_or_default(),
    })
}

/// The name, which may hold any character, and the fields after it.
fn parse_stat(stat: &str) -> Option<(&str, Vec<&str>)> {
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    let fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
    Some((name, fields))
}

/// The scope's processes: by program, by the marker, and all that they (and this process) started.
fn processes(scope: &Scope) -> Result<Vec<Thing>> {
    let found: BTreeMap<i32, Process> = fs::read_dir("/proc")
        .context("Cannot read /proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, process(pid)?)))
        .collect();
    let ours = i32::try_from(std::process::id())?;
    let named = |pid: i32, process: &Process| {
        let program = process.command.split(' ').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
        pid != ours
            && (scope.programs.iter().any(|name| program.starts_with(name) || process.name.starts_with(name))
                || process.command.contains(&scope.marker)
                || process.cgroups.contains(&scope.marker))
    };
    let mut relevant: BTreeSet<i32> = found.iter().filter(|(pid, it)| named(**pid, it)).map(|(pid, _)| *pid).collect();
    relevant.insert(ours);
    // Descendants: until a round adds none.
    loop {
        let children: Vec<i32> = found
            .iter()
            .filter(|(pid, process)| relevant.contains(&process.parent) && !relevant.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if children.is_empty() {
            break;
        }
        relevant.extend(children);
    }
    relevant.remove(&ours);
    let is_daemon = |process: &Process| scope.daemon.as_ref().is_some_and(|daemon| process.command.contains(daemon));
    relevant.retain(|pid| !found.get(pid).is_some_and(is_daemon));
    let thing = |pid: i32| {
        let process = found.get(&pid)?;
        Some(Thing::Process { pid, start: process.start, command: process.command.clone() })
    };
    Ok(relevant.into_iter().filter_map(thing).collect())
}

/// One line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn mount(line: &str) -> Option<Thing> {
    let (fields, rest) = line.split_once(" - ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    Some(Thing::Mount {
        id: fields.first()?.parse().ok()?,
        point: PathBuf::from(unescape(fields.get(4)?)),
        kind: rest.split(' ').next()?.to_owned(),
    })
}

/// Octal escapes of mountinfo: space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

/// A named socket of the scope, from a line of `/proc/net/unix`.
fn socket(line: &str, scope: &Scope) -> Option<Thing> {
    let name = line.split_ascii_whitespace().nth(7)?;
    let of_runtime = ["/run/kata", "/run/vc", "/run/containerd"].iter().any(|prefix| name.starts_with(prefix));
    let in_directory = scope.directories.iter().any(|(directory, _)| Path::new(name).starts_with(directory));
    let abstract_name = name.starts_with('@') && ["kata", "containerd"].iter().any(|word| name.contains(word));
    (of_runtime || in_directory || abstract_name || name.contains(&scope.marker))
        .then(|| Thing::Socket { name: name.to_owned() })
}

fn cgroup_root(thing: &Thing) -> Option<PathBuf> {
    match thing {
        Thing::Mount { point, kind, .. } if matches!(kind.as_str(), "cgroup" | "cgroup2") => Some(point.clone()),
        _ => None,
    }
}

fn cgroups(root: &Path, directory: &Path, marker: &str, things: &mut BTreeSet<Thing>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        let below = path.strip_prefix(root).unwrap_or(&path);
        let managed = MANAGED_CGROUPS.iter().any(|name| below.starts_with(name));
        if !managed || below.to_string_lossy().contains(marker) {
            things.insert(Thing::Cgroup { path: path.clone() });
        }
        cgroups(root, &path, marker, things);
    }
}

/// Everything below `directory` on its own file system; what is mounted there is told as a mount.
fn files(directory: &Path, levels: usize, device: u64, things: &mut BTreeSet<Thing>) {
    if levels == 0 {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(data) = entry.metadata() else { continue };
        things.insert(Thing::File { path: entry.path() });
        if data.is_dir() && data.dev() == device {
            files(&entry.path(), levels - 1, device, things);
        }
    }
}

fn network_devices() -> Result<Vec<Thing>> {
    let devices = fs::read_dir("/sys/class/net").context("Cannot read /sys/class/net")?;
    let device = |entry: fs::DirEntry| {
        let index = fs::read_to_string(entry.path().join("ifindex")).ok()?.trim().parse().ok()?;
        Some(Thing::NetworkDevice { index, name: entry.file_name().to_string_lossy().into_owned() })
    };
    Ok(devices.flatten().filter_map(device).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_brackets_and_spaces() {
        let (name, fields) = parse_stat("7 (a) (b c) S 1 7 7 0 -1 4194560 0").unwrap();
        assert_eq!(name, "a) (b c");
        assert_eq!(fields[..2], ["S", "1"]);
        assert!(parse_stat("7 no name").is_none());
    }

    #[test]
    fn a_mount_is_read_with_its_escaped_path() {
        let line = r"36 35 98:0 /mnt1 /mnt/a\040b rw,noatime master:1 - ext3 /dev/root rw";
        let wanted = Thing::Mount { id: 36, point: "/mnt/a b".into(), kind: "ext3".into() };
        assert_eq!(mount(line), Some(wanted));
        assert_eq!(mount("nonsense"), None);
    }

    #[test]
    fn sockets_of_others_and_nameless_ones_are_not_ours() {
        let scope = Scope { marker: "suite-1".into(), directories: vec![("/srv/x".into(), 1)], ..Scope::default() };
        let line = |name: &str| format!("0000000000000000: 00000002 00000000 00010000 0001 01 12345 {name}");
        for name in ["/run/kata/a/shim.sock", "/srv/x/s", "@/containerd-shim/abc.sock", "/tmp/suite-1/x"] {
            assert_eq!(socket(&line(name), &scope), Some(Thing::Socket { name: name.to_owned() }));
        }
        for name in ["/run/systemd/notify", "@/tmp/.X11-unix/X0", ""] {
            assert_eq!(socket(&line(name), &scope), None, "{name}");
        }
    }
}
