//! The pod's cgroup on the host (cgroup v2): what the VM uses is accounted and limited where the orchestrator expects it.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use journal::{Effect, EffectId, Journal};
use protocols::containerd::cgroups_v2::metrics::Metrics;

use crate::error::Error;

/// Where cgroup v2 is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// The cgroup that this process is in.
#[derive(Debug)]
pub struct PodCgroup {
    /// The cgroup that the process came from, to go back to before the pod's own is removed.
    origin: PathBuf,
    path: PathBuf,
    effects: Vec<EffectId>,
}

impl PodCgroup {
    /// Makes the cgroup that the specification names, and moves this process with all its threads into it.
    ///
    /// Nothing happens, and `None` is returned, on a host with cgroup v1, or when the specification names none.
    ///
    /// # Errors
    ///
    /// [`Error`] when the path is not valid or the kernel refuses.
    pub fn join(path: &str, journal: &Journal) -> Result<Option<Self>, Error> {
        if path.is_empty() || !Path::new(MOUNT).join("cgroup.controllers").exists() {
            tracing::debug!(path, "no pod cgroup: the path is empty, or the host does not have cgroup v2");
            return Ok(None);
        }
        let target = Path::new(MOUNT).join(relative(path)?);
        let mut cgroup = Self { origin: origin()?, path: target.clone(), effects: Vec::new() };
        let entered = cgroup.make(&target, journal).and_then(|()| enter(&target));
        if let Err(error) = entered {
            for failure in journal.undo_all(&cgroup.effects) {
                tracing::warn!(%failure, "the cgroup stays");
            }
            return Err(error);
        }
        Ok(Some(cgroup))
    }

    /// What the pod uses on the host, its machine and this process included.
    ///
    /// # Errors
    ///
    /// [`Error::Host`] when the cgroup cannot be read.
    pub fn metrics(&self) -> Result<Metrics, Error> {
        let read = |file: &str| {
            let path = self.path.join(file);
            std::fs::read_to_string(&path).map_err(Error::host("read", &path))
        };
        let mut metrics = Metrics::default();
        let cpu = metrics.cpu.mut_or_insert_default();
        for (name, value) in read("cpu.stat")?.lines().filter_map(|line| line.split_once(' ')) {
            let value = value.parse().unwrap_or_default();
            match name {
                "usage_usec" => cpu.usage_usec = value,
                "user_usec" => cpu.user_usec = value,
                "system_usec" => cpu.system_usec = value,
                _ => {}
            }
        }
        // Controllers that the parent does not have are no failure.
        let number = |file: &str| read(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default();
        metrics.pids.mut_or_insert_default().current = number("pids.current");
        metrics.memory.mut_or_insert_default().usage = number("memory.current");
        for (name, value) in read("memory.stat").unwrap_or_default().lines().filter_map(|line| line.split_once(' ')) {
            let memory = metrics.memory.mut_or_insert_default();
            let value = value.parse().unwrap_or_default();
            match name {
                "anon" => memory.anon = value,
                "file" => memory.file = value,
                "inactive_file" => memory.inactive_file = value,
                "pgfault" => memory.pgfault = value,
                "pgmajfault" => memory.pgmajfault = value,
                _ => {}
            }
        }
        Ok(metrics)
    }

    /// Moves this process back, so that the pod's cgroup can be removed.
    ///
    /// # Errors
    ///
    /// [`Error::Host`] when neither the old cgroup nor the root takes the process.
    pub fn leave(&self) -> Result<(), Error> {
        enter(&self.origin).or_else(|_| enter(Path::new(MOUNT)))
    }

    /// Makes what is missing of the path. Parents that this runtime made, now or for another pod, are removed with the
    /// last pod in them; those of others stay.
    fn make(&mut self, target: &Path, journal: &Journal) -> Result<(), Error> {
        for attempt in 1.. {
            match self.try_make(target, journal) {
                // The last pod of the common parent ended meanwhile, and took the parent with it.
                Err(Error::Host { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound && attempt < MAKE_ATTEMPTS => {}
                result => return result,
            }
        }
        Ok(())
    }

    fn try_make(&mut self, target: &Path, journal: &Journal) -> Result<(), Error> {
        let mut levels: Vec<&Path> = target.ancestors().take_while(|path| *path != Path::new(MOUNT)).collect();
        levels.reverse();
        for path in levels {
            // What is accounted in a cgroup is decided above it.
            path.parent().into_iter().for_each(delegate);
            if path.exists() && path != target && !is_marked(path) {
                continue;
            }
            self.effects.push(journal.record(Effect::Cgroup { path: path.to_owned() })?);
            match std::fs::create_dir(path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                result => {
                    result.map_err(Error::host("make the cgroup", path))?;
                    mark(path);
                }
            }
        }
        Ok(())
    }
}

/// Has all controllers of `parent` account and limit what is below it, as runc does. One that is refused, as where processes
/// are in `parent` itself, is missing below, which is no failure of the pod's.
fn delegate(parent: &Path) {
    let words = |file: &str| std::fs::read_to_string(parent.join(file)).unwrap_or_default();
    let (there, passed_on) = (words("cgroup.controllers"), words("cgroup.subtree_control"));
    for controller in there.split_whitespace().filter(|name| passed_on.split_whitespace().all(|one| one != *name)) {
        if let Err(error) = std::fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::debug!(%error, controller, parent = %parent.display(), "a controller stays above the pod");
        }
    }
}

/// Extended attribute of the cgroups that this runtime made.
const MARK: &CStr = c"user.kata";
/// Pods that end at just the wrong moment, one after the other, before it is an error.
const MAKE_ATTEMPTS: u32 = 8;

/// Marks a cgroup as one of ours. Without the mark, which old kernels refuse, an empty parent may stay.
fn mark(path: &Path) {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return };
    // SAFETY: both names are NUL-terminated and outlive the call; the value is one byte, as its length says.
    unsafe { libc::setxattr(path.as_ptr(), MARK.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
}

/// Whether this runtime made the cgroup.
#[must_use]
pub fn is_marked(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: both names are NUL-terminated and outlive the call; with size 0 nothing is written.
    unsafe { libc::getxattr(path.as_ptr(), MARK.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

fn enter(cgroup: &Path) -> Result<(), Error> {
    let procs = cgroup.join("cgroup.procs");
    // 0 stands for the writer (Documentation/admin-guide/cgroup-v2.rst).
    std::fs::write(&procs, "0").map_err(Error::host("move the pod process into", &procs))
}

/// The v2 cgroup of this process, below the mount.
fn origin() -> Result<PathBuf, Error> {
    let text = std::fs::read_to_string("/proc/self/cgroup").map_err(Error::host("read", "/proc/self/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    Ok(Path::new(MOUNT).join(path.trim_start_matches('/')))
}

/// The path below the mount: as given for the cgroupfs driver, expanded for systemd's `slice:prefix:name`.
fn relative(path: &str) -> Result<PathBuf, Error> {
    let bad =
        |why: &str| Error::Invalid(format!("linux.cgroupsPath {path:?} {why}; give /parent/name or slice:prefix:name"));
    let relative = match *path.split(':').collect::<Vec<_>>().as_slice() {
        [plain] => PathBuf::from(plain.trim_start_matches('/')),
        [slice, prefix, name] => {
            let mut path = expand_slice(slice).ok_or_else(|| bad("names no systemd slice"))?;
            path.push(if name.ends_with(".slice") { name.to_owned() } else { format!("{prefix}-{name}.scope") });
            path
        }
        _ => return Err(bad("has the wrong number of colons")),
    };
    let plain = relative.components().all(|component| matches!(component, Component::Normal(_)));
    if !plain || relative.as_os_str().is_empty() {
        return Err(bad("leaves the cgroup mount"));
    }
    Ok(relative)
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    if stem == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations_of_a_cgroup_path_give_the_directory_that_runc_uses() {
        for (path, expected) in [
            ("/default/redis", "default/redis"),
            ("kubepods/burstable/pod1/c", "kubepods/burstable/pod1/c"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
            (":docker:abc", "system.slice/docker-abc.scope"),
            ("-.slice:x:y", "x-y.scope"),
        ] {
            assert_eq!(relative(path).unwrap(), Path::new(expected));
        }
    }

    #[test]
    fn a_cgroup_path_that_leaves_the_mount_is_refused() {
        for path in ["/../../etc", "/a/../..", "a:b", "nonsense:a:b", "a--b.slice:x:y", "/", "a.slice:x:../../../y/z"] {
            assert!(relative(path).is_err(), "{path}");
        }
    }
}
