//! Programs that take the agent's place in a guest image and never answer: what a guest can do to its host.
//!
//! Each is a static ELF executable of a few instructions, written here byte by byte, so that
//! the suites need no compiler on the machine under test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rootfs_builder::guest_image;

/// What the guest's first process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestProgram {
    /// Powers the machine off.
    PowerOff,
    /// Restarts the machine; with `reboot=t` on the kernel's command line by a triple fault.
    Restart,
    /// Exits: the kernel panics, for its init died.
    Exit,
    /// Waits for ever.
    Hang,
}

/// Where the program is loaded; a multiple of the page size, above what the kernel forbids to map.
const ADDRESS: u64 = 0x40_0000;
const HEADERS: u64 = 64 + 56;

/// `reboot(2)`'s magic numbers and commands (linux/reboot.h).
const MAGIC1: u32 = 0xfee1_dead;
const MAGIC2: u32 = 672_274_793;
const POWER_OFF: u32 = 0x4321_fedc;
const RESTART: u32 = 0x0123_4567;

/// System calls of x86-64 (asm/unistd_64.h).
const SYS_PAUSE: u32 = 34;
const SYS_EXIT_GROUP: u32 = 231;
const SYS_REBOOT: u32 = 169;

impl GuestProgram {
    /// Builds a guest image with this program as its agent, in `directory`.
    ///
    /// # Errors
    /// When the image cannot be built.
    pub fn image(self, directory: &Path) -> Result<PathBuf> {
        let program = directory.join(format!("{self:?}.elf"));
        fs::write(&program, self.executable()).with_context(|| format!("Cannot write {}", program.display()))?;
        let image =
            guest_image::build(&program, guest_image::BUSYBOX.as_ref(), &directory.join(format!("{self:?}.img")))?;
        Ok(image.path)
    }

    /// The ELF file: a header, one loadable segment, the instructions.
    #[must_use]
    pub fn executable(self) -> Vec<u8> {
        let code = self.instructions();
        let size = HEADERS + code.len() as u64;
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        for half in [2u16, 62] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        for word in [ADDRESS + HEADERS, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        // PT_LOAD, readable and executable.
        for word in [1u32, 5] {
            file.extend(word.to_le_bytes());
        }
        for word in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        file.extend(code);
        file
    }

    fn instructions(self) -> Vec<u8> {
        let mut code = match self {
            Self::PowerOff => system_call(SYS_REBOOT, [MAGIC1, MAGIC2, POWER_OFF]),
            Self::Restart => system_call(SYS_REBOOT, [MAGIC1, MAGIC2, RESTART]),
            Self::Exit => system_call(SYS_EXIT_GROUP, [1, 0, 0]),
            Self::Hang => Vec::new(),
        };
        // For ever: wait for a signal.
        let wait = system_call(SYS_PAUSE, [0, 0, 0]);
        let back = i8::try_from(wait.len() + 2).map_or(0, |len| -len);
        code.extend(wait);
        code.extend([0xeb, back.to_le_bytes()[0]]);
        code
    }
}

/// `mov edi, …; mov esi, …; mov edx, …; mov eax, number; syscall`.
fn system_call(number: u32, arguments: [u32; 3]) -> Vec<u8> {
    let registers = [(0xbf, arguments[0]), (0xbe, arguments[1]), (0xba, arguments[2]), (0xb8, number)];
    let mut code: Vec<u8> =
        registers.iter().flat_map(|(opcode, value)| [vec![*opcode], value.to_le_bytes().to_vec()].concat()).collect();
    code.extend([0x0f, 0x05]);
    code
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn each_program_is_accepted_as_a_guests_agent() {
        let directory = tempfile::tempdir().unwrap();
        for program in [GuestProgram::PowerOff, GuestProgram::Restart, GuestProgram::Exit, GuestProgram::Hang] {
            assert!(program.image(directory.path()).unwrap().is_file());
        }
    }

    #[test]
    fn the_kernel_runs_such_an_executable() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exit");
        fs::write(&path, GuestProgram::Exit.executable()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(Command::new(&path).status().unwrap().code(), Some(1));
    }

    #[test]
    fn a_program_that_hangs_waits_without_using_the_processor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hang");
        fs::write(&path, GuestProgram::Hang.executable()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).spawn().unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
