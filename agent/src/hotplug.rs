//! CPUs and memory that the host adds while the guest runs: brought online, and waited for.
//!
//! The kernel finds a new CPU by itself and leaves it to user space to bring it online. Memory it brings online itself
//! (`CONFIG_MHP_DEFAULT_ONLINE_TYPE`); only its block that is last may still be on its way when the host has done its part.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocols::agent::{OnlineCpuMemRequest, OnlineCpuMemResponse};

use crate::error::{Error, Result};
use crate::uevents::Uevents;

/// Longest that a host may have the guest wait.
const MAX_DEADLINE: Duration = Duration::from_secs(3600);

/// CPUs and memory blocks as sysfs has them.
#[derive(Debug, Clone)]
struct System {
    directory: PathBuf,
}

/// Brings CPUs and memory online until there is what was asked for.
pub(crate) async fn online(request: &OnlineCpuMemRequest) -> Result<OnlineCpuMemResponse> {
    let deadline = Duration::from_millis(request.deadline_ms.into()).min(MAX_DEADLINE);
    let system = System { directory: PathBuf::from("/sys/devices/system") };
    // Before the first look: what comes after it is an event.
    let events = Uevents::listen().map_err(Error::io("cannot listen to the kernel's events"))?;
    let reached = async {
        let cpus = events.until(|| system.online_cpus(request.cpus)).await?;
        let memory = events.until(|| system.online_memory(request.memory)).await?;
        Ok(OnlineCpuMemResponse { cpus, memory, ..Default::default() })
    };
    match tokio::time::timeout(deadline, reached).await {
        Ok(outcome) => outcome.map_err(Error::io::<io::Error>("cannot bring CPUs and memory online")),
        Err(_) => Err(Error::Deadline {
            what: format!(
                "{} of {} CPUs and {} of {} MiB of memory are online",
                system.cpus().map_or(0, |cpus| cpus.len()),
                request.cpus,
                system.memory().unwrap_or(0) >> 20,
                request.memory >> 20
            ),
            seconds: deadline.as_secs(),
        }),
    }
}

impl System {
    /// Brings those that are offline online until `wanted` are; nothing while there are not as many.
    fn online_cpus(&self, wanted: u32) -> io::Result<Option<u32>> {
        let enough = |online: usize| u32::try_from(online).ok().filter(|online| *online >= wanted);
        let mut online = self.cpus()?;
        for cpu in self.list("cpu/present")? {
            if enough(online.len()).is_some() {
                break;
            }
            if online.contains(&cpu) {
                continue;
            }
            match fs::write(self.directory.join(format!("cpu/cpu{cpu}/online")), "1") {
                Ok(()) => online.push(cpu),
                // It is being made, or goes away: an event will tell.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EBUSY)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(enough(online.len()))
    }

    /// Bytes in blocks that are online; nothing while they are fewer than `wanted`.
    fn online_memory(&self, wanted: u64) -> io::Result<Option<u64>> {
        // A kernel without memory hot-plug has no blocks, and what it was started with in use.
        if wanted == 0 || !self.directory.join("memory/block_size_bytes").exists() {
            return Ok(Some(wanted));
        }
        Ok(Some(self.memory()?).filter(|online| *online >= wanted))
    }

    /// CPUs that are online.
    fn cpus(&self) -> io::Result<Vec<u32>> {
        self.list("cpu/online")
    }

    fn list(&self, file: &str) -> io::Result<Vec<u32>> {
        let text = fs::read_to_string(self.directory.join(file))?;
        parse_list(text.trim()).ok_or_else(|| io::Error::other(format!("{file} is {text:?}")))
    }

    /// Bytes in memory blocks that are online.
    fn memory(&self) -> io::Result<u64> {
        let directory = self.directory.join("memory");
        let size = fs::read_to_string(directory.join("block_size_bytes"))?;
        let size = u64::from_str_radix(size.trim(), 16).map_err(io::Error::other)?;
        let mut blocks = 0;
        for entry in fs::read_dir(&directory)? {
            blocks += u64::from(is_online_block(&entry?.path()));
        }
        Ok(blocks.saturating_mul(size))
    }
}

/// A block may go away while it is looked at.
fn is_online_block(path: &Path) -> bool {
    let is_block = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| {
        name.strip_prefix("memory")
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    });
    is_block && fs::read_to_string(path.join("state")).is_ok_and(|state| state.trim() == "online")
}

/// Numbers and ranges, such as `0-3,5` (Documentation/admin-guide/cputopology.rst).
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse().ok()?..=last.parse().ok().filter(|last: &u32| *last < 1 << 16)?);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with CPUs (some of them online) and memory blocks of 128 MiB.
    fn system(present: &str, online: &str, blocks: &[&str]) -> (tempfile::TempDir, System) {
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, text).expect("a file");
        };
        write("cpu/present", present);
        write("cpu/online", online);
        for cpu in parse_list(present.trim()).expect("a list") {
            write(&format!("cpu/cpu{cpu}/online"), "0\n");
        }
        write("memory/block_size_bytes", "8000000\n");
        write("memory/auto_online_blocks", "online\n");
        for (number, state) in blocks.iter().enumerate() {
            write(&format!("memory/memory{number}/state"), state);
        }
        let system = System { directory: root.path().to_owned() };
        (root, system)
    }

    #[test]
    fn lists_of_cpus_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_list("0"), Some(vec![0]));
        assert_eq!(parse_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_list(""), Some(vec![]));
        assert_eq!(parse_list("0-"), None);
        assert_eq!(parse_list("x"), None);
        assert_eq!(parse_list("0-4000000000"), None);
    }

    #[test]
    fn cpus_are_brought_online_only_as_far_as_asked_for() {
        let (root, system) = system("0-3\n", "0\n", &[]);
        let online = |cpu: u32| fs::read_to_string(root.path().join(format!("cpu/cpu{cpu}/online"))).expect("a file");
        assert_eq!(system.online_cpus(0).expect("an answer"), Some(1));
        assert_eq!(system.online_cpus(3).expect("an answer"), Some(3));
        assert_eq!([online(0), online(1), online(2), online(3)], ["0\n", "1", "1", "0\n"]);
        // More than there are: those that are there, and then the wait.
        assert_eq!(system.online_cpus(5).expect("an answer"), None);
        assert_eq!(online(3), "1");
    }

    #[test]
    fn a_cpu_whose_files_are_not_there_yet_is_waited_for() {
        let (root, system) = system("0-1\n", "0\n", &[]);
        fs::remove_dir_all(root.path().join("cpu/cpu1")).expect("a directory");
        assert_eq!(system.online_cpus(2).expect("an answer"), None);
    }

    #[test]
    fn memory_counts_when_its_blocks_are_online() {
        let (_root, system) = system("0\n", "0\n", &["online\n", "online\n", "offline\n"]);
        assert_eq!(system.online_memory(256 << 20).expect("an answer"), Some(256 << 20));
        assert_eq!(system.online_memory(300 << 20).expect("an answer"), None);
        assert_eq!(system.online_memory(0).expect("an answer"), Some(0));
    }
}
