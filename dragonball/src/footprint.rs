//! Memory of the process itself, as opposed to its guest's.

use std::ffi::{c_int, c_void};

/// Gives back the code and the constants that only the start needed.
///
/// The kernel maps program files 64 KiB around each page that is touched, so that nearly all of a program counts as
/// its memory once it has started, though a machine that runs uses little of it. The pages stay in the page cache; the
/// first use of one afterwards is a minor fault. A debugger's breakpoints are forgotten.
pub fn give_back_code() {
    let mut segments = Vec::<Segment>::new();
    // SAFETY: `collect` has the type that is asked for, and `segments` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut segments).cast()) };
    for segment in segments {
        // SAFETY: the range is a segment of a program file that is mapped privately and is never written, so that what
        // is faulted in again is what was there. It fails only for pages that are locked, which then simply stay.
        unsafe { libc::madvise(segment.address as *mut c_void, segment.length, libc::MADV_DONTNEED) };
    }
}

/// A part of a program file in memory.
#[derive(Debug)]
struct Segment {
    address: usize,
    length: usize,
}

/// Adds the segments of one program file that are never written, not even by the dynamic linker. (What is read-only
/// after relocation lies in a writable segment.)
///
/// # Safety
///
/// `segments` is a `Vec<Segment>`, `info` comes from `dl_iterate_phdr`.
unsafe extern "C" fn collect(info: *mut libc::dl_phdr_info, _size: usize, segments: *mut c_void) -> c_int {
    // SAFETY: see above.
    let (info, segments) = unsafe { (&*info, &mut *segments.cast::<Vec<Segment>>()) };
    // SAFETY: the dynamic linker says so.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let unwritten = headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
    segments.extend(unwritten.filter_map(|header| {
        let start = usize::try_from(info.dlpi_addr.wrapping_add(header.p_vaddr)).ok()?;
        let offset = start % PAGE;
        Some(Segment { address: start - offset, length: usize::try_from(header.p_memsz).ok()? + offset })
    }));
    0
}

/// What `madvise` counts in, in bytes.
const PAGE: usize = 4096;
