//! The smallest guest there is: an initrd with one static `/init` of a few hundred bytes.
//!
//! It executes CPUID with leaf [`MARK_LEAF`], which a hypervisor must intercept (so the host sees the moment in KVM's
//! `kvm_cpuid` tracepoint, whatever VMM runs the guest), writes [`TIMER_BYTE`] to the
//! VMM's boot timer, and then waits for ever without using a CPU.

use crate::cpio::Archive;

/// CPUID leaf that marks the first instructions of `/init`.
pub const MARK_LEAF: u32 = 0x5658;
/// Guest-physical address of the boot timer pseudo device (Firecracker's convention).
const TIMER_ADDRESS: u32 = 0xc000_0000;
/// What is written to the boot timer.
const TIMER_BYTE: u8 = 123;
/// Where the program is loaded.
const LOAD_ADDRESS: u64 = 0x40_0000;
/// Sizes of an ELF64 header and of one program header.
const HEADERS: u64 = 64 + 56;
/// Device number of `/dev/mem`.
const DEV_MEM: (u32, u32) = (1, 1);

core::arch::global_asm!(
    ".pushsection .rodata.guest_init, \"a\"",
    ".global tatami_guest_init_start",
    ".global tatami_guest_init_end",
    "tatami_guest_init_start:",
    "mov eax, {leaf}",
    "xor ecx, ecx",
    "cpuid",
    // open("/dev/mem", O_RDWR | O_SYNC)
    "mov eax, 2",
    "lea rdi, [rip + 4f]",
    "mov esi, 0x101002",
    "xor edx, edx",
    "syscall",
    "test eax, eax",
    "js 3f",
    // mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, TIMER_ADDRESS)
    "mov r8d, eax",
    "mov eax, 9",
    "xor edi, edi",
    "mov esi, 4096",
    "mov edx, 3",
    "mov r10d, 1",
    "mov r9d, {timer}",
    "syscall",
    "cmp rax, -4096",
    "ja 3f",
    "mov byte ptr [rax], {byte}",
    // pause()
    "3: mov eax, 34",
    "syscall",
    "jmp 3b",
    "4: .asciz \"/dev/mem\"",
    "tatami_guest_init_end:",
    ".popsection",
    leaf = const MARK_LEAF,
    timer = const TIMER_ADDRESS,
    byte = const TIMER_BYTE,
);

#[expect(unsafe_code, reason = "the assembler's output is reachable by its labels only")]
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static tatami_guest_init_start: u8;
        static tatami_guest_init_end: u8;
    }
    let (start, end) = (&raw const tatami_guest_init_start, &raw const tatami_guest_init_end);
    // SAFETY: both labels are in the one section that the assembly above puts into this program, the second after the
    // first, and the bytes between them are never written.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The static ELF program: one loadable segment that holds its own headers.
#[must_use]
pub fn init() -> Vec<u8> {
    let code = code();
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::with_capacity(1024);
    // e_ident: magic, 64 bits, little endian, version 1, System V.
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // e_type EXEC, e_machine x86-64, e_version.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for address in [LOAD_ADDRESS + HEADERS, 64, 0] {
        elf.extend(address.to_le_bytes());
    }
    // e_flags, e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// The initrd with that program and the one device node that it opens.
#[must_use]
pub fn initrd() -> Vec<u8> {
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character_device("dev/mem", DEV_MEM);
    archive.program("init", &init());
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    // Not run here: on a host it would write to a real device's memory.
    #[test]
    fn the_program_is_smaller_than_a_kibibyte_and_its_entry_is_the_marking_cpuid() {
        let elf = init();
        assert!(elf.len() < 1024, "{} bytes", elf.len());
        let (entry, loaded_at, file_size) = (word(&elf, 24), word(&elf, 64 + 16), word(&elf, 64 + 32));
        assert_eq!(file_size, elf.len() as u64);
        let at = usize::try_from(entry - loaded_at).unwrap();
        // mov eax, 0x5658; xor ecx, ecx; cpuid
        assert_eq!(elf[at..at + 9], [0xb8, 0x58, 0x56, 0, 0, 0x31, 0xc9, 0x0f, 0xa2]);
    }
}
