//! The PVH start information: what a kernel that is entered by PVH finds in memory.
//!
//! Source: Xen's `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`.

use std::io;

use super::Payload;
use crate::memory::GuestRam;
use crate::memory::layout::{self, CMDLINE, MEMORY_MAP, START_INFO};

const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
/// The start information has 56 bytes; the module list follows at the next multiple of 64.
const MODULES: u64 = START_INFO + 64;

/// Writes the start information, the module list and the memory map.
///
/// # Errors
/// When guest memory does not reach there.
pub(crate) fn write_start_info(ram: &GuestRam, memory: u64, payload: &Payload) -> io::Result<()> {
    let map = layout::memory_map(memory);
    let mut info = Vec::with_capacity(56);
    let modules = u32::from(payload.initrd.is_some());
    for word in [MAGIC, VERSION, 0, modules] {
        info.extend(word.to_le_bytes());
    }
    for address in [if modules > 0 { MODULES } else { 0 }, CMDLINE, payload.rsdp, MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend(u32::try_from(map.len()).map_err(io::Error::other)?.to_le_bytes());
    info.extend(0_u32.to_le_bytes());
    ram.write(&info, START_INFO)?;

    if let Some(initrd) = payload.initrd {
        let module: Vec<u8> = [initrd.start, initrd.length, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write(&module, MODULES)?;
    }
    let mut entries = Vec::new();
    for (range, kind) in map {
        entries.extend(range.start.to_le_bytes());
        entries.extend(range.length.to_le_bytes());
        entries.extend((kind as u32).to_le_bytes());
        entries.extend(0_u32.to_le_bytes());
    }
    ram.write(&entries, MEMORY_MAP)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::layout::Range;

    #[test]
    fn the_start_information_points_to_everything() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let initrd = Some(Range { start: 0x200_0000, length: 1234 });
        write_start_info(&ram, 64 << 20, &Payload { initrd, rsdp: 0xE_0000 }).unwrap();
        let word = |address: u64| ram.memory().read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(word(START_INFO), u64::from(VERSION) << 32 | u64::from(MAGIC));
        assert_eq!(word(START_INFO + 8) >> 32, 1, "one module");
        assert_eq!([word(word(START_INFO + 16)), word(word(START_INFO + 16) + 8)], [0x200_0000, 1234]);
        assert_eq!(
            [word(START_INFO + 24), word(START_INFO + 32), word(START_INFO + 40)],
            [CMDLINE, 0xE_0000, MEMORY_MAP]
        );
        assert_eq!(word(START_INFO + 48), 4, "ranges: low RAM, tables, high RAM, ECAM");
        assert_eq!([word(MEMORY_MAP), word(MEMORY_MAP + 8), word(MEMORY_MAP + 16)], [0, layout::LOW_RAM_END, 1]);
    }
}
