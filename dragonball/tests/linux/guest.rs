//! A Linux guest with a shell: a kernel, busybox in an initrd, and the console as the way to talk to it.

#![expect(clippy::unwrap_used, reason = "a helper of tests, which fail by panics")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use dragonball::{ConsoleOutput, ExitReason, MachineConfig, Vm, start};
use tempfile::TempDir;

/// How long the guest may take for an answer: the lab emulates its processors.
const PATIENCE: Duration = Duration::from_secs(120);
/// A line that no command prints.
const END: &str = "=end=";
/// The guest's shell, where `TATAMI_TEST_BUSYBOX` names no other.
const BUSYBOX: &str = "/usr/bin/busybox";
/// What the guest's first process does: it makes the usual places, and then what it is told.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=4G tmpfs /tmp
for module in /modules/*; do [ ! -e $module ] || insmod $module; done
exec </dev/hvc0 >/dev/hvc0 2>&1
stty -echo -onlcr
echo =end=
while read -r line; do eval \"$line\"; done
";

/// The guest kernel to test with; says so where there is none.
pub(crate) fn kernel() -> Option<PathBuf> {
    let kernel = std::env::var_os("TATAMI_TEST_KERNEL").map(PathBuf::from);
    if kernel.is_none() {
        eprintln!("SKIPPED: TATAMI_TEST_KERNEL names no guest kernel");
        return None;
    }
    // Else the harness would write to a guest's streams what it has to say of another test.
    let threads = std::env::var("RUST_TEST_THREADS").ok();
    assert_eq!(threads.as_deref(), Some("1"), "guests borrow the standard streams: set RUST_TEST_THREADS=1");
    kernel
}

/// The kernel modules of the directory `TATAMI_TEST_MODULES`, with the paths at which guests have them: they load them in
/// the order of their names.
pub(crate) fn modules() -> Vec<(String, Vec<u8>)> {
    let Some(directory) = std::env::var_os("TATAMI_TEST_MODULES") else { return Vec::new() };
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let path = |file: &Path| format!("modules/{}", file.file_name().unwrap().to_string_lossy());
    files.iter().map(|file| (path(file), std::fs::read(file).unwrap())).collect()
}

/// A guest that runs.
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    input: File,
    lines: Receiver<String>,
    directory: TempDir,
}

impl Guest {
    /// Starts the machine of `config` with a shell on its console, and waits for it.
    pub(crate) fn start(config: MachineConfig) -> Self {
        Self::start_with(config, &[])
    }

    /// The same, with more programs: paths in the guest and contents.
    pub(crate) fn start_with(config: MachineConfig, programs: &[(&str, &[u8])]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let initrd = directory.path().join("initrd");
        let busybox = std::env::var_os("TATAMI_TEST_BUSYBOX").unwrap_or_else(|| BUSYBOX.into());
        let busybox = std::fs::read(busybox).unwrap();
        let modules = modules();
        let mut files = vec![("bin/busybox", &busybox[..]), ("init", INIT.as_bytes())];
        files.extend(programs);
        files.extend(modules.iter().map(|(path, content)| (path.as_str(), &content[..])));
        std::fs::write(&initrd, archive(&files)).unwrap();
        let config = MachineConfig {
            initrd: Some(initrd),
            cmdline: format!("{} console=hvc0 loglevel=4 rdinit=/init", config.cmdline),
            console: ConsoleOutput::Stdio,
            ..config
        };
        let (guest_input, input) = std::io::pipe().unwrap();
        let (output, guest_output) = std::io::pipe().unwrap();
        let vm = with_standard_streams(guest_input.as_fd(), guest_output.as_fd(), || start(config).unwrap());
        drop((guest_input, guest_output));
        let (sender, lines) = channel();
        // Ends with the guest, whose side of the pipe is closed then.
        std::thread::spawn(move || {
            for line in BufReader::new(File::from(std::os::fd::OwnedFd::from(output))).lines() {
                if line.is_err() || sender.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        let guest = Self { vm, input: File::from(std::os::fd::OwnedFd::from(input)), lines, directory };
        guest.until_end();
        guest
    }

    /// How often what comes and goes does so: `TATAMI_TEST_ROUNDS`, or `usual` times.
    pub(crate) fn rounds(usual: usize) -> usize {
        std::env::var("TATAMI_TEST_ROUNDS").map_or(usual, |rounds| rounds.parse().unwrap())
    }

    /// Brings all vCPUs online that are there, which must be `count`.
    pub(crate) fn bring_online(&mut self, count: u8) {
        // One that is leaving may vanish between two looks at it.
        let online = self.run(
            "for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do \
             [ \"$(cat $cpu 2>/dev/null)\" != 0 ] || echo 1 > $cpu; done; nproc",
        );
        assert_eq!(online, format!("{count}\n"));
    }

    /// Whether the guest's kernel shows the memory types of its page tables; it then does so until its end.
    pub(crate) fn shows_page_table_types(&mut self) -> bool {
        let command = "mkdir -p /sys/kernel/debug; mount -t debugfs debugfs /sys/kernel/debug; \
                       grep -c . /sys/kernel/debug/x86/pat_memtype_list";
        self.run(command).trim().parse::<u32>().is_ok_and(|lines| lines > 0)
    }

    /// A directory that goes away with the guest.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Resizes the machine to `count` vCPUs; the guest need not bring them online.
    pub(crate) fn resize_vcpus(&self, count: u8) {
        let reached = self.vm.manager().resize_vcpus(count, PATIENCE).unwrap();
        let seconds = PATIENCE.as_secs();
        assert_eq!(reached.present, count, "the guest did not answer within {seconds} s: {reached:?}");
    }

    /// Runs `command` in the guest's shell and returns what it printed.
    pub(crate) fn run(&mut self, command: &str) -> String {
        self.input.write_all(format!("{command}; echo {END}\n").as_bytes()).unwrap();
        self.until_end()
    }

    /// What an idle guest that does not do what it should says of itself: its interrupts and the tasks that wait in its kernel.
    /// A guest of which a CPU hangs does not answer.
    pub(crate) fn what_it_waits_for(&mut self) -> String {
        let answers = self.run(
            "for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu true; done; dmesg -c >/dev/null; \
             echo w >/proc/sysrq-trigger; dmesg; cat /proc/interrupts",
        );
        format!("all its CPUs work, and it says:\n{answers}")
    }

    /// Powers the guest off and waits for its end.
    pub(crate) fn power_off(mut self) -> ExitReason {
        self.input.write_all(b"poweroff -f\n").unwrap();
        let mut poll = libc::pollfd { fd: self.vm.exit_event().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let limit = i32::try_from(PATIENCE.as_millis()).unwrap();
        // SAFETY: one valid structure.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, limit) }, 1, "the guest does not power off");
        self.vm.wait()
    }

    fn until_end(&self) -> String {
        let mut text = String::new();
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|error| {
                let (seconds, tail) = (PATIENCE.as_secs(), self.vm.console_tail());
                panic!("the guest did not answer within {seconds} s ({error}); its console: {tail}")
            });
            let line = line.trim_end_matches('\r');
            if line.ends_with(END) {
                return text;
            }
            text.push_str(line);
            text.push('\n');
        }
    }
}

/// Calls `action` while this process has other standard streams: the machine keeps descriptors of its own.
fn with_standard_streams<T>(
    input: std::os::fd::BorrowedFd<'_>,
    output: std::os::fd::BorrowedFd<'_>,
    action: impl FnOnce() -> T,
) -> T {
    let pairs = [(input.as_raw_fd(), libc::STDIN_FILENO), (output.as_raw_fd(), libc::STDOUT_FILENO)];
    let kept = pairs.map(|(new, standard)| {
        // SAFETY: all are open descriptors of this process; nobody else uses the standard ones meanwhile.
        unsafe {
            let kept = libc::dup(standard);
            assert!(kept >= 0 && libc::dup2(new, standard) >= 0, "a standard stream cannot be replaced");
            (kept, standard)
        }
    });
    let result = action();
    for (kept, standard) in kept {
        // SAFETY: as above; the copy was made a moment ago and is closed once.
        unsafe {
            libc::dup2(kept, standard);
            libc::close(kept);
        }
    }
    result
}

/// An archive of executable files in the "newc" format of initrds
/// (`Documentation/driver-api/early-userspace/buffer-format.rst`).
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |path: &str, mode: u32, content: &[u8]| {
        let number = |value: usize| format!("{value:08x}");
        let mode = usize::try_from(mode).unwrap();
        let fields = [0, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, path.len() + 1, 0];
        archive.extend(b"070701");
        fields.iter().for_each(|&field| archive.extend(number(field).bytes()));
        archive.extend(path.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    ["bin", "dev", "modules"].into_iter().for_each(|directory| entry(directory, 0o040_755, &[]));
    files.iter().for_each(|(path, content)| entry(path, 0o100_755, content));
    entry("TRAILER!!!", 0, &[]);
    archive
}
