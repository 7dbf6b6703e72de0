//! Guests of a few bytes: hand-written 32-bit code in an ELF kernel with a PVH entry point.

#![expect(clippy::unwrap_used, reason = "a helper of tests, which fail by panics")]

use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use dragonball::{ConsoleOutput, ExitReason, MachineConfig, Vm, start};
use tempfile::TempDir;

/// Where the code is loaded and entered.
pub(crate) const CODE: u32 = 0x20_0000;

/// Machine code, appended instruction by instruction.
#[derive(Clone, Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// What was appended so far.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.clone()
    }

    /// `mov al, value; mov dx, port; out dx, al`
    pub(crate) fn out_byte(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0xb0, value, 0x66, 0xba, low, high, 0xee])
    }

    /// `mov dword [address], value`
    pub(crate) fn store(self, address: u32, value: u32) -> Self {
        self.raw(&[0xc7, 0x05]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes())
    }

    /// `mov byte [address], value`
    pub(crate) fn store_byte(self, address: u32, value: u8) -> Self {
        self.raw(&[0xc6, 0x05]).raw(&address.to_le_bytes()).raw(&[value])
    }

    /// `mov word [address], value`
    pub(crate) fn store_word(self, address: u32, value: u16) -> Self {
        self.raw(&[0x66, 0xc7, 0x05]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes())
    }

    /// `mov eax, [address]`
    pub(crate) fn load(self, address: u32) -> Self {
        self.raw(&[0xa1]).raw(&address.to_le_bytes())
    }

    /// Writes the four bytes of EAX to the debug UART, lowest first.
    pub(crate) fn print_eax(self) -> Self {
        let mut code = self.raw(&[0x66, 0xba, 0xf8, 0x03]);
        for _ in 0..4 {
            // out dx, al; shr eax, 8
            code = code.raw(&[0xee, 0xc1, 0xe8, 0x08]);
        }
        code
    }

    /// Writes `text` to the debug UART.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out_byte(0x3f8, byte))
    }

    /// Powers off by ACPI, then spins.
    pub(crate) fn power_off(self) -> Self {
        self.out_byte(0x600, 1 << 5 | 5 << 2).forever()
    }

    /// `jmp $`
    pub(crate) fn forever(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Waits until the dword at `address` is `value`: `cmp dword [address], value; jne` back.
    pub(crate) fn wait_for(self, address: u32, value: u32) -> Self {
        self.raw(&[0x81, 0x3d]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes()).raw(&[0x75, 0xf4])
    }
}

/// An ELF kernel of `code`.
fn kernel(code: &[u8]) -> Vec<u8> {
    const NOTE: [u32; 3] = [4, 4, 18];
    let mut image = Vec::from(*b"\x7fELF\x02\x01\x01");
    image.resize(16, 0);
    for half in [2_u16, 62] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1_u32.to_le_bytes());
    for word in [u64::from(CODE), 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for (kind, offset, size) in [(1_u32, 4096, code.len() as u64), (4, 176, 20)] {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        for word in [offset, u64::from(CODE), u64::from(CODE), size, size, 4096] {
            image.extend(word.to_le_bytes());
        }
    }
    NOTE.iter().for_each(|word| image.extend(word.to_le_bytes()));
    image.extend(b"Xen\0");
    image.extend(CODE.to_le_bytes());
    image.resize(4096, 0);
    image.extend(code);
    image
}

/// What came of a guest.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) reason: ExitReason,
    pub(crate) output: Vec<u8>,
}

impl Outcome {
    /// The output as little-endian words.
    pub(crate) fn words(&self) -> Vec<u32> {
        self.output.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

/// Whether there is a KVM to test on. Only its absence skips a test, and says so.
pub(crate) fn kvm() -> bool {
    let present = Path::new("/dev/kvm").exists();
    if !present {
        eprintln!("SKIPPED: this host has no /dev/kvm");
    }
    present
}

/// A machine of 32 MiB that will run `code`, its UART into a file of `directory`. Slot 1 holds the entropy device, slot 2
/// the console.
pub(crate) fn machine(directory: &TempDir, code: &Code) -> MachineConfig {
    let path = directory.path().join("kernel");
    std::fs::File::create(&path).unwrap().write_all(&kernel(&code.0)).unwrap();
    MachineConfig {
        memory: 32 << 20,
        debug_uart: ConsoleOutput::File(directory.path().join("output")),
        console: ConsoleOutput::File(directory.path().join("console")),
        ..MachineConfig::new(path)
    }
}

/// Waits until `vm` ends, at most half a minute: a guest that hangs fails its test instead of holding it.
pub(crate) fn wait_for_end(vm: &Vm) -> ExitReason {
    assert!(comes(vm.exit_event()), "the guest does not end; its output: {:?}", vm.console_tail());
    vm.exit_reason().unwrap()
}

/// Waits until the guest has written the boot timer's byte, at most half a minute.
pub(crate) fn wait_for_boot(vm: &Vm) {
    assert!(comes(vm.boot_event()), "the guest does not say that it has booted; its output: {:?}", vm.console_tail());
}

fn comes(event: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let limit = i32::try_from(Duration::from_secs(30).as_millis()).unwrap();
    // SAFETY: one valid structure.
    unsafe { libc::poll(&raw mut poll, 1, limit) == 1 }
}

/// Runs a machine to its end.
pub(crate) fn run_machine(directory: &TempDir, config: MachineConfig) -> Outcome {
    let vm = start(config).unwrap();
    let reason = wait_for_end(&vm);
    drop(vm);
    Outcome { reason, output: std::fs::read(directory.path().join("output")).unwrap() }
}

/// Runs `code` in a machine without devices but the UART.
pub(crate) fn run(code: &Code) -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let config = machine(&directory, code);
    run_machine(&directory, config)
}
