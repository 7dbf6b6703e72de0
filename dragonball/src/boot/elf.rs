//! Reads what booting needs of an ELF kernel: its loadable pieces and its PVH entry point.
//!
//! Sources: the ELF-64 object file format, and Xen's `docs/misc/pvh.pandoc` for the note that names the entry point.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The most program headers looked at; kernels have about five.
const HEADERS_MAX: u16 = 64;
/// The longest note segment looked at, in bytes; kernels have some hundred.
const NOTES_MAX: u64 = 64 << 10;
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The note of the 32-bit PVH entry point (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`), owner `Xen`.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// A loadable piece of a kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Segment {
    /// Where its content begins in the file.
    pub(crate) file_offset: u64,
    /// How much content the file has, in bytes.
    pub(crate) file_size: u64,
    /// Where it goes in guest memory.
    pub(crate) address: u64,
    /// How much memory it takes, in bytes; what the file does not have is zero.
    pub(crate) memory_size: u64,
}

/// What booting needs of an ELF kernel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Elf {
    /// The loadable pieces.
    pub(crate) segments: Vec<Segment>,
    /// Where a PVH boot starts.
    pub(crate) pvh_entry: u32,
}

/// Why a file is no kernel that can be booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ElfError {
    #[error("it is not an ELF file: give an uncompressed vmlinux or a bzImage")]
    NotElf,
    #[error("it is an ELF file, but not a 64-bit little-endian x86-64 one")]
    WrongMachine,
    #[error("its {0} is damaged: build or copy it again")]
    Damaged(&'static str),
    #[error("it has no PVH entry point: build the kernel with CONFIG_PVH=y")]
    NoPvhEntry,
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// Reads the headers of `file`.
///
/// # Errors
/// When the file is no x86-64 ELF kernel with a PVH entry point.
pub(crate) fn parse(file: &File) -> Result<Elf, ElfError> {
    let mut header = [0; HEADER_SIZE];
    file.read_exact_at(&mut header, 0).map_err(|_| ElfError::NotElf)?;
    if header[..4] != *b"\x7fELF" {
        return Err(ElfError::NotElf);
    }
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(ElfError::WrongMachine);
    }
    let (table, entry_size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if entry_size != PROGRAM_HEADER_SIZE || count == 0 || count > HEADERS_MAX {
        return Err(ElfError::Damaged("program header table"));
    }
    let mut bytes = vec![0; usize::from(entry_size) * usize::from(count)];
    file.read_exact_at(&mut bytes, table).map_err(|_| ElfError::Damaged("program header table"))?;

    let length = file.metadata()?.len();
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for entry in bytes.chunks_exact(usize::from(entry_size)) {
        match u32_at(entry, 0) {
            PT_LOAD => segments.extend(segment(entry, length)?),
            PT_NOTE if pvh_entry.is_none() => pvh_entry = entry_point(&read_notes(file, entry)?),
            _ => {}
        }
    }
    Ok(Elf { segments, pvh_entry: pvh_entry.ok_or(ElfError::NoPvhEntry)? })
}

/// The piece that a program header speaks of; nothing when it takes no memory.
fn segment(entry: &[u8], file_length: u64) -> Result<Option<Segment>, ElfError> {
    let segment = Segment {
        file_offset: u64_at(entry, 8),
        address: u64_at(entry, 24),
        file_size: u64_at(entry, 32),
        memory_size: u64_at(entry, 40),
    };
    let file_end = segment.file_offset.checked_add(segment.file_size);
    let memory_end = segment.address.checked_add(segment.memory_size);
    let inside = file_end.is_some_and(|end| end <= file_length) && memory_end.is_some();
    if !inside || segment.file_size > segment.memory_size {
        return Err(ElfError::Damaged("program header"));
    }
    Ok((segment.memory_size > 0).then_some(segment))
}

fn read_notes(file: &File, entry: &[u8]) -> Result<Vec<u8>, ElfError> {
    let (offset, size) = (u64_at(entry, 8), u64_at(entry, 32));
    let damaged = || ElfError::Damaged("note segment");
    if size > NOTES_MAX {
        return Err(damaged());
    }
    let mut notes = vec![0; usize::try_from(size).map_err(|_| damaged())?];
    file.read_exact_at(&mut notes, offset).map_err(|_| damaged())?;
    Ok(notes)
}

/// Looks for the PVH entry point among notes: each is a header of three words, a name and a description, both padded
/// to four bytes.
fn entry_point(mut notes: &[u8]) -> Option<u32> {
    const NOTE_HEADER: usize = 12;
    while notes.len() >= NOTE_HEADER {
        let (name_size, size, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let name_end = NOTE_HEADER.checked_add(usize::try_from(name_size).ok()?)?;
        let start = name_end.checked_next_multiple_of(4)?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        let description = notes.get(start..end)?;
        if kind == NOTE_PHYS32_ENTRY && notes.get(NOTE_HEADER..name_end) == Some(b"Xen\0") {
            return match size {
                4 => Some(u32_at(description, 0)),
                8 => u32::try_from(u64_at(description, 0)).ok(),
                _ => None,
            };
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..).unwrap_or_default();
    }
    None
}

/// Reads little-endian integers; the callers' slices are long enough by construction, a short one reads as zero.
fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, offset))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// A kernel with one segment at `address` that holds `code`, entered at its first byte.
    pub(crate) fn kernel(address: u32, code: &[u8]) -> Vec<u8> {
        let mut notes = Vec::new();
        for word in [4_u32, 4, NOTE_PHYS32_ENTRY] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(b"Xen\0");
        notes.extend(address.to_le_bytes());

        let notes_at = HEADER_SIZE + 2 * usize::from(PROGRAM_HEADER_SIZE);
        let mut image = vec![0; HEADER_SIZE];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        image[32..40].copy_from_slice(&(HEADER_SIZE as u64).to_le_bytes());
        image[54..56].copy_from_slice(&PROGRAM_HEADER_SIZE.to_le_bytes());
        image[56..58].copy_from_slice(&2_u16.to_le_bytes());
        let code_at = 4096;
        for (kind, offset, size) in [(PT_LOAD, code_at, code.len()), (PT_NOTE, notes_at, notes.len())] {
            image.extend(kind.to_le_bytes());
            image.extend(0_u32.to_le_bytes());
            for word in [offset as u64, 0, u64::from(address), size as u64, size as u64, 4096] {
                image.extend(word.to_le_bytes());
            }
        }
        image.extend(notes);
        image.resize(code_at, 0);
        image.extend(code);
        image
    }

    fn parse_bytes(bytes: &[u8]) -> Result<Elf, ElfError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        parse(&file)
    }

    #[test]
    fn the_segment_and_the_entry_point_are_found() {
        let elf = parse_bytes(&kernel(0x10_0000, b"code")).unwrap();
        let segment = Segment { file_offset: 4096, file_size: 4, address: 0x10_0000, memory_size: 4 };
        assert_eq!(elf, Elf { segments: vec![segment], pvh_entry: 0x10_0000 });
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let good = kernel(0x10_0000, b"code");
        let with = |offset: usize, bytes: &[u8]| {
            let mut image = good.clone();
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
            parse_bytes(&image).unwrap_err().to_string()
        };
        assert!(parse_bytes(b"#!/bin/sh\n").unwrap_err().to_string().contains("not an ELF file"));
        assert!(with(4, &[1]).contains("64-bit"));
        assert!(with(56, &u16::MAX.to_le_bytes()).contains("program header table"));
        assert!(with(32, &u64::MAX.to_le_bytes()).contains("program header table"));
        assert!(with(HEADER_SIZE + 32, &u64::MAX.to_le_bytes()).contains("program header"));
        assert!(with(HEADER_SIZE + 56 + 32, &u64::MAX.to_le_bytes()).contains("note segment"));
        assert!(with(HEADER_SIZE + 56, &9_u32.to_le_bytes()).contains("CONFIG_PVH"));
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(offset in 0_usize..300, bytes in prop::collection::vec(any::<u8>(), 1..16)) {
            let mut image = kernel(0x10_0000, b"code");
            image[offset..offset + bytes.len()].copy_from_slice(&bytes);
            let _ = parse_bytes(&image);
        }

        #[test]
        fn any_notes_never_panic(notes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = entry_point(&notes);
        }
    }
}
