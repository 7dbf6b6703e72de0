//! The pages that a guest puts into its balloon, joined to runs: one call to the host for neighbours.

use super::PAGE;
use crate::memory::layout::Range;
use crate::virtio::buffers::Buffers;

/// Bytes of a page number.
const NUMBER: usize = 4;
/// The most page numbers of a request: Linux sends 256 (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`), 16384 are 64 MiB.
pub(super) const PAGES_MAX: usize = 16384;

/// The runs of pages in a request, in order and without overlaps; `None` when there are too many pages, or half a number.
pub(super) fn runs(buffers: &Buffers<'_>) -> Option<Vec<Range>> {
    let count = buffers.len() / NUMBER;
    if !buffers.len().is_multiple_of(NUMBER) || count > PAGES_MAX {
        return None;
    }
    let mut raw = vec![0; buffers.len()];
    buffers.read_at(0, &mut raw);
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
    let mut pages: Vec<u32> = raw.chunks_exact(NUMBER).map(number).collect();
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<Range> = Vec::new();
    for start in pages.into_iter().map(|page| u64::from(page) * PAGE) {
        match runs.last_mut() {
            Some(last) if last.end() == start => last.length += PAGE,
            _ => runs.push(Range { start, length: PAGE }),
        }
    }
    Some(runs)
}
