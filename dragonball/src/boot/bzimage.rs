//! The Linux/x86 64-bit boot protocol, for `bzImage` kernels of distributions.
//!
//! Source: `Documentation/arch/x86/boot.rst` and `zero-page.rst` of the Linux kernel.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::ByteValued;

use super::Payload;
use crate::memory::GuestRam;
use crate::memory::layout::{self, BOOT_GDT, BOOT_PAGE_TABLES, CMDLINE, HIGH_RAM, START_INFO};

/// Where the setup header begins in the file.
const HEADER_OFFSET: u64 = 0x1f1;
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// Protocol 2.12 brought `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry point 0x200 bytes behind the load address.
const KERNEL_64: u16 = 1;
const ENTRY_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;
/// A file that declares no setup sectors has four.
const SETUP_SECTORS_DEFAULT: u8 = 4;
/// `type_of_loader`: none of the registered ones.
const LOADER_OTHER: u8 = 0xff;

/// Why a file is no `bzImage` that can be booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BzImageError {
    #[error("it is neither an ELF file nor a bzImage: give an uncompressed vmlinux or a bzImage")]
    NotBzImage,
    #[error("it is a bzImage without a 64-bit entry point: give a 64-bit kernel, version 3.8 or newer")]
    TooOld,
    #[error(
        "it needs {needed} bytes of memory from 1 MiB on, the machine has {available}: give the machine more memory"
    )]
    Memory { needed: u64, available: u64 },
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// What booting needs of a `bzImage`.
#[derive(Debug)]
pub(crate) struct BzImage {
    header: setup_header,
    code_offset: u64,
    code_size: u64,
}

/// Reads the setup header of `file`.
///
/// # Errors
/// When the file is no `bzImage` with a 64-bit entry point.
pub(crate) fn parse(file: &File) -> Result<BzImage, BzImageError> {
    let mut header = setup_header::default();
    file.read_exact_at(header.as_mut_slice(), HEADER_OFFSET).map_err(|_| BzImageError::NotBzImage)?;
    if header.boot_flag != BOOT_FLAG || header.header != HEADER_MAGIC {
        return Err(BzImageError::NotBzImage);
    }
    if header.version < VERSION_MIN || header.xloadflags & KERNEL_64 == 0 {
        return Err(BzImageError::TooOld);
    }
    let sectors = if header.setup_sects == 0 { SETUP_SECTORS_DEFAULT } else { header.setup_sects };
    let code_offset = (u64::from(sectors) + 1) * SECTOR;
    let code_size = file.metadata()?.len().checked_sub(code_offset).filter(|size| *size > 0);
    Ok(BzImage { header, code_offset, code_size: code_size.ok_or(BzImageError::NotBzImage)? })
}

impl BzImage {
    /// Loads the kernel and gives its entry point and the end of the memory that it needs.
    ///
    /// # Errors
    /// When guest memory does not reach there.
    pub(crate) fn load(&self, file: &File, ram: &GuestRam, low_ram: u64) -> Result<(u64, u64), BzImageError> {
        // It unpacks itself to `pref_address`, and must not be in its own way there.
        let load = HIGH_RAM;
        let end = u64::from(self.header.init_size)
            .max(self.code_size)
            .saturating_add(self.header.pref_address.max(load))
            .saturating_add(SLACK);
        if end > low_ram {
            return Err(BzImageError::Memory { needed: end - load, available: low_ram.saturating_sub(load) });
        }
        ram.load(file, self.code_offset, self.code_size, load)?;
        Ok((load + ENTRY_OFFSET, end))
    }

    /// Writes the boot parameters (the "zero page"), the page tables and the descriptor table.
    ///
    /// # Errors
    /// When guest memory does not reach there.
    pub(crate) fn write_boot_params(&self, ram: &GuestRam, memory: u64, payload: &Payload) -> io::Result<()> {
        let mut params = boot_params { hdr: self.header, acpi_rsdp_addr: payload.rsdp, ..Default::default() };
        params.hdr.type_of_loader = LOADER_OTHER;
        params.hdr.cmd_line_ptr = u32::try_from(CMDLINE).map_err(io::Error::other)?;
        if let Some(initrd) = payload.initrd {
            params.hdr.ramdisk_image = u32::try_from(initrd.start).map_err(io::Error::other)?;
            params.hdr.ramdisk_size = u32::try_from(initrd.length).map_err(io::Error::other)?;
        }
        let map = layout::memory_map(memory);
        params.e820_entries = u8::try_from(map.len()).map_err(io::Error::other)?;
        for (slot, (range, kind)) in params.e820_table.iter_mut().zip(map) {
            slot.addr = range.start;
            slot.size = range.length;
            slot.r#type = kind as u32;
        }
        ram.write(params.as_slice(), START_INFO)?;
        write_page_tables(ram)?;
        write_gdt(ram)
    }
}

/// Room that the unpacking kernel may use behind what it declares.
const SLACK: u64 = 1 << 20;

/// The descriptors that the protocol asks for: 64-bit code at 0x10, flat data at 0x18 (boot.rst, "64-bit boot protocol").
pub(crate) const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

fn write_gdt(ram: &GuestRam) -> io::Result<()> {
    let bytes: Vec<u8> = GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    ram.write(&bytes, BOOT_GDT)
}

/// Maps the first GiB one to one by 2 MiB pages: a page of the fourth level, one of the third, one of the second.
fn write_page_tables(ram: &GuestRam) -> io::Result<()> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    let (third, second) = (BOOT_PAGE_TABLES + 0x1000, BOOT_PAGE_TABLES + 0x2000);
    ram.write(&(third | PRESENT_WRITABLE).to_le_bytes(), BOOT_PAGE_TABLES)?;
    ram.write(&(second | PRESENT_WRITABLE).to_le_bytes(), third)?;
    let pages: Vec<u8> = (0..512_u64).flat_map(|page| ((page << 21) | PRESENT_WRITABLE | HUGE).to_le_bytes()).collect();
    ram.write(&pages, second)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(change: impl FnOnce(&mut setup_header)) -> File {
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: 0x020f,
            xloadflags: KERNEL_64,
            init_size: 4 << 20,
            pref_address: 16 << 20,
            ..Default::default()
        };
        change(&mut header);
        let mut bytes = vec![0; 1024 + 100];
        bytes[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
        bytes[1024..].fill(0x90);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn a_kernel_goes_to_one_mib_and_is_entered_at_its_64_bit_entry() {
        let file = image(|_| {});
        let ram = GuestRam::new(64 << 20).unwrap();
        let (entry, end) = parse(&file).unwrap().load(&file, &ram, 64 << 20).unwrap();
        assert_eq!((entry, end), (HIGH_RAM + 0x200, (16 << 20) + (4 << 20) + SLACK));
    }

    #[test]
    fn what_cannot_be_booted_is_refused_with_the_reason() {
        assert!(matches!(parse(&image(|h| h.header = 0)), Err(BzImageError::NotBzImage)));
        assert!(matches!(parse(&image(|h| h.setup_sects = 200)), Err(BzImageError::NotBzImage)));
        assert!(matches!(parse(&image(|h| h.version = 0x0200)), Err(BzImageError::TooOld)));
        assert!(matches!(parse(&image(|h| h.xloadflags = 0)), Err(BzImageError::TooOld)));
        for change in [|h: &mut setup_header| h.init_size = u32::MAX, |h: &mut setup_header| h.pref_address = u64::MAX]
        {
            let file = image(change);
            let ram = GuestRam::new(64 << 20).unwrap();
            let error = parse(&file).unwrap().load(&file, &ram, 64 << 20).unwrap_err();
            assert!(matches!(error, BzImageError::Memory { .. }), "{error}");
        }
    }
}
