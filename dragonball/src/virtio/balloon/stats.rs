//! What a guest says of its memory (virtio 1.2, §5.5.6.4, and `linux/virtio_balloon.h` for the later ones).

use crate::virtio::buffers::Buffers;

/// Bytes of `struct virtio_balloon_stat`: a tag and a value, without padding between them.
const STAT: usize = 10;
/// The most entries that are looked at.
const ENTRIES: usize = 64;

/// A guest's statistics; nothing where the guest does not say. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Serialize)]
pub struct BalloonStats {
    /// Memory that was swapped in.
    pub swap_in: Option<u64>,
    /// Memory that was swapped out.
    pub swap_out: Option<u64>,
    /// How many page faults needed the disk.
    pub major_faults: Option<u64>,
    /// How many page faults did not.
    pub minor_faults: Option<u64>,
    /// Memory that nobody uses.
    pub free_memory: Option<u64>,
    /// All memory.
    pub total_memory: Option<u64>,
    /// What programs could get without swapping (`MemAvailable`).
    pub available_memory: Option<u64>,
    /// What could be freed of the page cache.
    pub disk_caches: Option<u64>,
    /// How many huge pages were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// How many could not be.
    pub hugetlb_failures: Option<u64>,
    /// How many processes were killed for want of memory.
    pub oom_kills: Option<u64>,
    /// How often an allocation had to wait.
    pub allocation_stalls: Option<u64>,
    /// Memory that was looked through in the background for something to free.
    pub background_scans: Option<u64>,
    /// Memory that an allocation had to look through.
    pub direct_scans: Option<u64>,
    /// Memory that was freed in the background.
    pub background_reclaims: Option<u64>,
    /// Memory that an allocation had to free.
    pub direct_reclaims: Option<u64>,
}

impl BalloonStats {
    /// Reads the statistics in a buffer of the statistics queue. Tags that are not known are left out.
    pub(super) fn read(buffers: &Buffers<'_>) -> Self {
        let mut stats = Self::default();
        for entry in (0..buffers.len() / STAT).take(ENTRIES) {
            let tag = buffers.read_array(entry * STAT).map(u16::from_le_bytes);
            let value = buffers.read_array(entry * STAT + 2).map(u64::from_le_bytes);
            if let Some(field) = tag.and_then(|tag| stats.field(tag)) {
                *field = value;
            }
        }
        stats
    }

    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kills,
            11 => &mut self.allocation_stalls,
            12 => &mut self.background_scans,
            13 => &mut self.direct_scans,
            14 => &mut self.background_reclaims,
            15 => &mut self.direct_reclaims,
            _ => return None,
        })
    }
}
