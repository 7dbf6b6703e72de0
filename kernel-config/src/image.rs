//! Packs `vmlinux` down to what a VMM has to load.
//!
//! The linker aligns text, entry code and read-only data to 2 MiB pages and fills the gaps (INT3 or zero bytes), and it
//! leaves page tables and buffers in initialised data that are all zero. A VMM that copies segments would copy and so
//! allocate all of that in each VM. The packed file has the same bytes at the same addresses, but its segments leave
//! out pages that hold nothing; guest memory is zero there, as it is anywhere that nobody wrote to. (System V ABI,
//! "Object Files" and "Program Loading"; the PVH entry point stays where its note says.)

use std::ops::Range;

/// Size of a page, and the alignment of segments in the file, so that a VMM can map them.
const PAGE: usize = 4096;
/// Runs of empty pages shorter than this do not pay for a segment of their own.
const SHORTEST_GAP: usize = 16 * PAGE;
/// Sizes of the ELF64 file header and of one program header.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// `p_type` values.
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// What the linker fills gaps with: nothing, and INT3 between functions.
const FILLS: [u8; 2] = [0, 0xcc];

/// Why a file could not be packed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It is no little-endian ELF64 file.
    #[error("not a 64-bit little-endian ELF file")]
    Magic,
    /// A header points outside the file.
    #[error("a header points outside the file, at byte {0}")]
    Range(usize),
    /// It has more segments than a header can count.
    #[error("more than 65535 segments")]
    Segments,
}

/// One program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: usize,
    virtual_address: u64,
    physical_address: u64,
    file_size: usize,
    memory_size: u64,
    alignment: u64,
}

fn bytes<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], Error> {
    let end = at.checked_add(N).ok_or(Error::Range(at))?;
    file.get(at..end).and_then(|bytes| bytes.try_into().ok()).ok_or(Error::Range(at))
}

fn word(file: &[u8], at: usize) -> Result<u64, Error> {
    bytes(file, at).map(u64::from_le_bytes)
}

fn size(file: &[u8], at: usize) -> Result<usize, Error> {
    usize::try_from(word(file, at)?).map_err(|_| Error::Range(at))
}

impl Segment {
    fn parse(file: &[u8], at: usize) -> Result<Self, Error> {
        let segment = Self {
            kind: u32::from_le_bytes(bytes(file, at)?),
            flags: u32::from_le_bytes(bytes(file, at + 4)?),
            offset: size(file, at + 8)?,
            virtual_address: word(file, at + 16)?,
            physical_address: word(file, at + 24)?,
            file_size: size(file, at + 32)?,
            memory_size: word(file, at + 40)?,
            alignment: word(file, at + 48)?,
        };
        let end = segment.offset.checked_add(segment.file_size).ok_or(Error::Range(at))?;
        if end > file.len() { Err(Error::Range(at)) } else { Ok(segment) }
    }

    /// The part of this segment at these offsets from its start; the last part keeps the memory beyond the file.
    fn part(self, range: &Range<usize>) -> Self {
        let (skip, last) = (range.start as u64, range.end == self.file_size);
        Self {
            offset: self.offset + range.start,
            virtual_address: self.virtual_address.wrapping_add(skip),
            physical_address: self.physical_address.wrapping_add(skip),
            file_size: range.len(),
            memory_size: if last { self.memory_size - skip } else { range.len() as u64 },
            alignment: PAGE as u64,
            ..self
        }
    }

    fn write(self, out: &mut Vec<u8>) {
        out.extend(self.kind.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        for field in [
            self.offset as u64,
            self.virtual_address,
            self.physical_address,
            self.file_size as u64,
            self.memory_size,
            self.alignment,
        ] {
            out.extend(field.to_le_bytes());
        }
    }
}

/// The file with the same segments, split where they hold nothing, and without sections.
///
/// # Errors
/// [`Error`] when it is no ELF64 file or is cut off.
pub fn pack(file: &[u8]) -> Result<Vec<u8>, Error> {
    if bytes::<6>(file, 0)? != [0x7f, b'E', b'L', b'F', 2, 1] {
        return Err(Error::Magic);
    }
    let table = size(file, 32)?;
    let count = usize::from(u16::from_le_bytes(bytes(file, 56)?));
    let segments = (0..count)
        .map(|number| Segment::parse(file, table + number * PROGRAM_HEADER))
        .collect::<Result<Vec<_>, _>>()?;
    let loads = segments.iter().filter(|segment| segment.kind == PT_LOAD);
    let parts: Vec<Segment> =
        loads.flat_map(|load| filled(file, load).into_iter().map(|range| load.part(&range))).collect();
    let notes = segments.iter().filter(|segment| segment.kind == PT_NOTE).copied();
    write(file, &parts.into_iter().chain(notes).collect::<Vec<_>>())
}

/// The parts of a segment that hold something, as offsets from its start.
fn filled(file: &[u8], segment: &Segment) -> Vec<Range<usize>> {
    let content = &file[segment.offset..segment.offset + segment.file_size];
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    while start < content.len() {
        let end = content.len().min(start + PAGE);
        let page = &content[start..end];
        // A page cut off by the segment's end stays, so that the last part always reaches that end.
        let empty =
            page.len() == PAGE && end < content.len() && FILLS.iter().any(|fill| page.iter().all(|byte| byte == fill));
        if !empty {
            match parts.last_mut() {
                Some(last) if start - last.end < SHORTEST_GAP => last.end = end,
                _ => parts.push(start..end),
            }
        }
        start = end;
    }
    parts
}

fn write(file: &[u8], segments: &[Segment]) -> Result<Vec<u8>, Error> {
    let count = u16::try_from(segments.len()).map_err(|_| Error::Segments)?;
    let mut headers = bytes::<HEADER>(file, 0)?.to_vec();
    headers[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
    // No section headers: their offset, number and name table.
    headers[40..48].fill(0);
    headers[56..58].copy_from_slice(&count.to_le_bytes());
    headers[60..64].fill(0);
    let mut contents = Vec::new();
    let start = (HEADER + segments.len() * PROGRAM_HEADER).next_multiple_of(PAGE);
    for segment in segments {
        contents.resize(contents.len().next_multiple_of(PAGE), 0);
        // A segment that starts within a page keeps its place in the page.
        let within = usize::try_from(segment.physical_address % PAGE as u64).unwrap_or_default();
        contents.resize(contents.len() + within, 0);
        let offset = start + contents.len();
        contents.extend(&file[segment.offset..segment.offset + segment.file_size]);
        Segment { offset, ..*segment }.write(&mut headers);
    }
    headers.resize(start, 0);
    headers.append(&mut contents);
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: u64 = 0x100_0000;

    /// A file with one loadable segment of these bytes and a note that points into it.
    fn elf(content: &[u8], beyond: u64) -> Vec<u8> {
        let mut file = vec![0; HEADER];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        file[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        file[40..48].copy_from_slice(&77_u64.to_le_bytes());
        file[56..58].copy_from_slice(&2_u16.to_le_bytes());
        file[60..62].copy_from_slice(&9_u16.to_le_bytes());
        let load = Segment {
            kind: PT_LOAD,
            flags: 5,
            offset: 2 * PAGE,
            virtual_address: ADDRESS | 0xffff_ffff_8000_0000,
            physical_address: ADDRESS,
            file_size: content.len(),
            memory_size: content.len() as u64 + beyond,
            alignment: 0x20_0000,
        };
        load.write(&mut file);
        Segment { kind: PT_NOTE, file_size: 16, memory_size: 16, ..load }.write(&mut file);
        file.resize(2 * PAGE, 0);
        file.extend(content);
        file
    }

    fn segments(file: &[u8]) -> Vec<Segment> {
        let count = usize::from(u16::from_le_bytes(bytes(file, 56).unwrap()));
        (0..count).map(|number| Segment::parse(file, HEADER + number * PROGRAM_HEADER).unwrap()).collect()
    }

    /// Memory as a loader makes it of a file.
    fn load(file: &[u8], size: usize) -> Vec<u8> {
        let mut memory = vec![0; size];
        for segment in segments(file).iter().filter(|segment| segment.kind == PT_LOAD) {
            let at = usize::try_from(segment.physical_address - ADDRESS).unwrap();
            memory[at..at + segment.file_size]
                .copy_from_slice(&file[segment.offset..segment.offset + segment.file_size]);
        }
        memory
    }

    fn content() -> Vec<u8> {
        let pages = |fill: u8, count: usize| vec![fill; count * PAGE];
        [pages(1, 3), pages(0, 40), pages(2, 1), pages(0, 4), pages(3, 1), pages(0xcc, 100), pages(4, 2)].concat()
    }

    #[test]
    fn a_loader_makes_the_same_memory_of_the_packed_file_but_for_the_filling() {
        let packed = pack(&elf(&content(), 8192)).unwrap();
        let expected: Vec<u8> = content().iter().map(|byte| if *byte == 0xcc { 0 } else { *byte }).collect();
        assert_eq!(load(&packed, expected.len()), expected);
        assert!(packed.len() < content().len() / 5);
    }

    #[test]
    fn segments_split_at_long_gaps_only_and_the_last_one_keeps_the_memory_beyond_the_file() {
        let packed = pack(&elf(&content(), 8192)).unwrap();
        let parts: Vec<(u64, usize, u64)> = segments(&packed)
            .iter()
            .filter(|segment| segment.kind == PT_LOAD)
            .map(|part| {
                ((part.physical_address - ADDRESS) / PAGE as u64, part.file_size / PAGE, part.memory_size / PAGE as u64)
            })
            .collect();
        assert_eq!(parts, [(0, 3, 3), (43, 6, 6), (149, 2, 4)]);
        assert!(segments(&packed).iter().all(|part| part.offset % PAGE == 0), "a VMM can map the segments");
    }

    #[test]
    fn the_note_is_kept_and_the_sections_are_gone() {
        let packed = pack(&elf(&content(), 0)).unwrap();
        let note = segments(&packed).into_iter().find(|segment| segment.kind == PT_NOTE).unwrap();
        assert_eq!(packed[note.offset..note.offset + note.file_size], [1; 16]);
        assert_eq!((word(&packed, 40), packed[60..64].to_vec()), (Ok(0), vec![0; 4]));
    }

    #[test]
    fn a_segment_of_nothing_but_filling_keeps_its_last_page() {
        let packed = pack(&elf(&vec![0; 64 * PAGE], 0)).unwrap();
        assert_eq!(segments(&packed).iter().filter(|segment| segment.kind == PT_LOAD).count(), 1);
    }

    #[test]
    fn what_is_no_whole_elf_file_is_refused() {
        assert_eq!(pack(b"MZ"), Err(Error::Range(0)));
        assert_eq!(pack(&[0; 128]), Err(Error::Magic));
        let file = elf(&content(), 0);
        assert_eq!(pack(&file[..file.len() - 1]), Err(Error::Range(HEADER)));
        assert_eq!(pack(&file[..HEADER + 10]), Err(Error::Range(HEADER + 8)));
    }
}
