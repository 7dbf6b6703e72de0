//! Host mappings that back guest memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::blocks::BLOCK;

/// The name of guest RAM in `/proc/<pid>/smaps` (`[anon:guest-ram]`), so that it can be told from the monitor's own.
const RAM_NAME: &std::ffi::CStr = c"guest-ram";

/// Maps `length` bytes of zeroed memory that costs nothing until it is touched. They begin at a multiple of [`BLOCK`], so
/// that the huge pages of host, guest and IOMMU lie upon each other. Returns that view, and the mapping that it is a part
/// of, which must live as long.
///
/// # Errors
/// When the host has no room.
pub(crate) fn ram(length: u64) -> io::Result<(MmapRegion, MmapRegion)> {
    aligned(length, libc::PROT_READ | libc::PROT_WRITE)
}

/// Maps `length` bytes of zeroed memory that costs nothing until it is touched, wherever there is room.
///
/// # Errors
/// When the host has no room.
#[cfg(test)]
pub(crate) fn anonymous(length: usize) -> io::Result<MmapRegion> {
    let region = MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    name_as_ram(&region);
    keep_out_of_dumps(region.as_ptr().cast(), length)?;
    Ok(region)
}

/// Reserves addresses for `length` bytes of memory, a multiple of [`BLOCK`], of which nothing can be accessed before it
/// is opened ([`open`]). They begin and are returned as [`ram`]'s.
///
/// # Errors
/// When the host has no room.
pub(crate) fn reserve(length: u64) -> io::Result<(MmapRegion, MmapRegion)> {
    aligned(length, libc::PROT_NONE)
}

fn aligned(length: u64, protection: libc::c_int) -> io::Result<(MmapRegion, MmapRegion)> {
    let with_room = length.checked_add(BLOCK).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let owner = MmapRegionBuilder::new(usize::try_from(with_room).map_err(io::Error::other)?)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(flags)
        .build()
        .map_err(io::Error::other)?;
    name_as_ram(&owner);
    keep_out_of_dumps(owner.as_ptr().cast(), owner.size())?;
    let skip = owner.as_ptr().align_offset(usize::try_from(BLOCK).map_err(io::Error::other)?);
    let length = usize::try_from(length).map_err(io::Error::other)?;
    // The rest stays as it is: a map of its own, so that the memory is seen as long as it is.
    // SAFETY: the range lies in the owner's pages, which nobody knows yet.
    if unsafe { libc::mprotect(owner.as_ptr().add(skip).cast(), length, protection) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the view lies in the owner's pages, which are at least a block longer; the caller keeps the owner as long,
    // and a region of a raw pointer does not unmap it.
    let view = unsafe { MmapRegionBuilder::new(length).with_raw_mmap_pointer(owner.as_ptr().add(skip)) };
    let view = view.with_mmap_prot(protection).with_mmap_flags(flags).build().map_err(io::Error::other)?;
    Ok((view, owner))
}

/// Lets the host back memory by huge pages, wherever a part of one is touched.
///
/// # Errors
/// When its kernel was built without them.
pub(crate) fn advise_huge_pages(region: &GuestRegionMmap<()>) -> io::Result<()> {
    let (address, length) = pages(region, 0, region.len())?;
    // SAFETY: the advice does not change what the region's own pages hold.
    if unsafe { libc::madvise(address, length, libc::MADV_HUGEPAGE) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes huge pages of the small ones that memory has already: an IOMMU has an entry for each page. A good turn as
/// [`fill`]: kernels before 6.1 do not know how, and none does it to what is mapped from a file.
fn collapse(start: usize, length: usize) {
    const SMALL: usize = 4 << 10;
    const HUGE: usize = 2 << 20;
    /// How much is looked at with one buffer.
    const AT_ONCE: usize = 64 << 20;
    let mut touched = vec![0; AT_ONCE / SMALL];
    for (start, length) in pieces(start, length, AT_ONCE) {
        // SAFETY: the kernel writes a byte for each page of the range, which is no longer than the buffer is for.
        if unsafe { libc::mincore(start as *mut libc::c_void, length, touched.as_mut_ptr()) } != 0 {
            return;
        }
        for ((start, length), touched) in pieces(start, length, HUGE).zip(touched.chunks(HUGE / SMALL)) {
            // Only where there is something to do: each advice makes all processors look up.
            if touched.iter().any(|page| page & 1 != 0) {
                // SAFETY: the advice does not change what any memory holds, wherever it points to.
                unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_COLLAPSE) };
            }
        }
    }
}

/// Cuts `length` bytes at `start` into pieces of at most `size`.
fn pieces(start: usize, length: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length).step_by(size).map(move |offset| (start + offset, size.min(length - offset)))
}

/// How much one thread fills at a time: whoever changes the process's mappings waits for it.
const PIECE: usize = 4 << 20;
/// More threads than this find no more memory bandwidth.
const FILLERS_MAX: usize = 8;

/// Fills `length` bytes of memory at `host`, which may have content, before somebody pins them: in huge pages where the
/// host has any, and by several threads, as most of it is the zeroing. No more than a good turn: what is not filled here
/// (kernels before 5.14 do not know how) is filled by who pins it, page by page, who also says what is wrong. Ends early
/// when it is not `wanted` any more.
pub(crate) fn fill(host: u64, length: u64, wanted: &(dyn Fn() -> bool + Sync)) {
    let (Ok(start), Ok(length)) = (usize::try_from(host), usize::try_from(length)) else { return };
    // Once for all: this advice changes the mapping, so that given for each piece it would wait for all who fill another.
    // SAFETY: as below.
    unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
    collapse(start, length);
    let count = length.div_ceil(PIECE);
    let rest = Mutex::new(pieces(start, length, PIECE));
    let fill = || {
        let next = || rest.lock().unwrap_or_else(PoisonError::into_inner).next().filter(|_| wanted());
        while let Some((start, length)) = next() {
            // SAFETY: the advice does not change what any memory holds, wherever it points to.
            unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_POPULATE_WRITE) };
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(FILLERS_MAX).min(count);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // One that cannot be had is one less.
            let _ = std::thread::Builder::new().name("fill".to_owned()).spawn_scoped(scope, fill);
        }
        fill();
    });
}

fn name_as_ram(region: &MmapRegion) {
    // SAFETY: the range is a mapping of this process, the name is NUL-terminated and copied by the kernel. Kernels
    // without names for anonymous memory refuse, which changes nothing but the name.
    unsafe {
        libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, region.as_ptr(), region.size(), RAM_NAME.as_ptr());
    }
}

/// Lets `length` bytes of `region` from `offset` on be accessed; they read as zero and cost nothing until touched.
///
/// # Errors
/// When the range is not of whole pages in the region, or the host refuses: it has a limit of separate mappings
/// (`vm.max_map_count`).
pub(crate) fn open(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<()> {
    protect(region, offset, length, libc::PROT_READ | libc::PROT_WRITE)
}

/// Lets nobody access `length` bytes of `region` from `offset` on: not this process, not the guest, not the kernel on
/// behalf of either. They keep what they hold.
///
/// # Errors
/// As [`open`].
pub(crate) fn seal(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<()> {
    protect(region, offset, length, libc::PROT_NONE)
}

/// Gives the memory of `length` bytes of `region` from `offset` on back to the host. Anonymous memory reads as zero
/// afterwards, what was mapped over it by [`overlay`] as the file does: the guest has seen that already.
///
/// # Errors
/// When the range is not of whole pages in the region, or the host refuses.
pub(crate) fn discard(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<()> {
    let (address, length) = pages(region, offset, length)?;
    // SAFETY: the range was checked to lie in the region, which is only accessed through volatile accesses; to lose its
    // content is what the guest asked for.
    if unsafe { libc::madvise(address, length, libc::MADV_DONTNEED) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn protect(region: &GuestRegionMmap<()>, offset: u64, length: u64, protection: libc::c_int) -> io::Result<()> {
    let (address, length) = pages(region, offset, length)?;
    // SAFETY: the range was checked to lie in the region. Devices look at the plugged blocks before each access, and the
    // thread that changes those is the one that they run on.
    if unsafe { libc::mprotect(address, length, protection) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Host address and length of a range of whole pages in `region`.
fn pages(region: &GuestRegionMmap<()>, offset: u64, length: u64) -> io::Result<(*mut libc::c_void, usize)> {
    let fits = offset.checked_add(length).is_some_and(|end| end <= region.len());
    if !fits || length == 0 || !offset.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let skip = usize::try_from(offset).map_err(io::Error::other)?;
    let length = usize::try_from(length).map_err(io::Error::other)?;
    Ok((region.as_ptr().wrapping_add(skip).cast(), length))
}

/// A guest's secrets do not get into the monitor's core dump; and the kernel never joins guest memory with a map of the
/// monitor's own, so that each can be counted.
fn keep_out_of_dumps(address: *mut libc::c_void, length: usize) -> io::Result<()> {
    // SAFETY: the advice changes what a core dump holds, never the memory, whatever the range.
    if unsafe { libc::madvise(address, length, libc::MADV_DONTDUMP) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Replaces `length` bytes of `region` from `offset` on by a private mapping of `file` from `file_offset` on: what is
/// written there stays out of the file, what is not shares the host's page cache.
///
/// All three numbers are multiples of the page size but for the length, which is rounded up; the file's last page reads
/// as zero behind its end.
///
/// # Errors
/// When the range is outside of the region or not page-aligned, or the host refuses.
pub(crate) fn overlay(region: &MmapRegion, offset: u64, file: &File, file_offset: u64, length: u64) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let length = length.checked_next_multiple_of(PAGE).ok_or_else(invalid)?;
    let end = offset.checked_add(length).ok_or_else(invalid)?;
    let size = u64::try_from(region.size()).map_err(|_| invalid())?;
    if !offset.is_multiple_of(PAGE) || !file_offset.is_multiple_of(PAGE) || length == 0 || end > size {
        return Err(invalid());
    }
    let offset = usize::try_from(offset).map_err(|_| invalid())?;
    let length = usize::try_from(length).map_err(|_| invalid())?;
    let file_offset = libc::off_t::try_from(file_offset).map_err(|_| invalid())?;
    // SAFETY: the range was checked to lie in `region`, which this process owns and which is only accessed through
    // volatile accesses of vm-memory; it stays mapped, readable and writable.
    let address = unsafe {
        libc::mmap(
            region.as_ptr().add(offset).cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            file_offset,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    keep_out_of_dumps(address, length)
}

/// The page size of x86-64.
pub(crate) const PAGE: u64 = 4096;

/// Whether the page at host `address` is in memory (bit 63 of its entry in `/proc/self/pagemap`, proc(5)).
#[cfg(test)]
pub(crate) fn is_resident(address: u64) -> bool {
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, address / PAGE * 8).unwrap();
    u64::from_le_bytes(entry) >> 63 == 1
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes as _, VolatileMemory as _};

    use super::*;

    fn byte_at(region: &MmapRegion, offset: usize) -> u8 {
        assert!(offset < region.size());
        // SAFETY: inside of the region, which is readable.
        unsafe { region.as_ptr().add(offset).read_volatile() }
    }

    #[test]
    fn filled_memory_is_there_and_keeps_its_content() {
        const LENGTH: u64 = 3 * (PIECE as u64) / 2;
        let (view, _owner) = ram(LENGTH).unwrap();
        let host = view.as_ptr() as u64;
        assert!(host.is_multiple_of(BLOCK));
        view.get_slice(12_288, 1).unwrap().write_obj(7_u8, 0).unwrap();
        assert!(!is_resident(host + LENGTH - PAGE));
        fill(host, LENGTH, &|| false);
        assert!(!is_resident(host + LENGTH - PAGE));
        fill(host, LENGTH, &|| true);
        assert!((0..LENGTH / PAGE).all(|page| is_resident(host + page * PAGE)));
        assert_eq!(view.get_slice(12_288, 1).unwrap().read_obj::<u8>(0).unwrap(), 7);
    }

    #[test]
    fn an_overlay_shows_the_file_and_zeroes_behind_its_end() {
        let region = anonymous(16 * 4096).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        overlay(&region, 4096, &file, 0, 5000).unwrap();
        assert_eq!([byte_at(&region, 4095), byte_at(&region, 4096), byte_at(&region, 4096 + 4999)], [0, 7, 7]);
        assert_eq!([byte_at(&region, 4096 + 5000), byte_at(&region, 3 * 4096)], [0, 0]);
    }

    #[test]
    fn guest_memory_stays_out_of_core_dumps() {
        let region = anonymous(4 * 4096).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        overlay(&region, 4096, &file, 0, 4096).unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        for offset in [0, 4096, 8192] {
            let start = format!("{:x}-", region.as_ptr() as usize + offset);
            let map = maps.split_once(&format!("\n{start}")).unwrap().1;
            let flags = map.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{offset}: {flags}");
        }
    }

    #[test]
    fn an_overlay_outside_of_the_region_or_off_a_page_is_refused() {
        let region = anonymous(4 * 4096).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (offset, file_offset, length) in
            [(0, 0, 5 * 4096), (4 * 4096, 0, 1), (1, 0, 4096), (0, 1, 4096), (0, 0, 0), (u64::MAX - 4095, 0, 8192)]
        {
            assert!(overlay(&region, offset, &file, file_offset, length).is_err(), "{offset} {file_offset} {length}");
        }
    }
}
