//! The guest's memory as devices see it: each guest-physical address is the same address for the device, and the IOMMU
//! leads it to where the memory is.
//!
//! RAM is mapped in pieces as large as they come, before the guest learns of a device. Memory that the guest gets later
//! is mapped piece by piece, because the IOMMU gives back only what was mapped as one.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::VfioError;
use super::host::Iommu;
use crate::memory::layout::Range;
use crate::memory::listener::{Attachment, DmaListener, DmaListeners};

/// What devices can access.
pub(crate) struct Dma {
    iommu: Arc<dyn Iommu>,
    /// The addresses that the IOMMU translates.
    translated: Vec<Range>,
    /// What is mapped: lengths by first address.
    maps: Mutex<BTreeMap<u64, u64>>,
}

impl Dma {
    /// An address space in which nothing is mapped.
    ///
    /// # Errors
    /// When the IOMMU does not say what it translates.
    pub(crate) fn new(iommu: Arc<dyn Iommu>) -> io::Result<Self> {
        let translated = iommu.translated()?;
        Ok(Self { iommu, translated, maps: Mutex::default() })
    }

    fn maps(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets devices access the mapping at `host` as `range`.
    ///
    /// # Errors
    /// When the IOMMU does not translate these addresses, or the host has a limit that this would exceed.
    ///
    /// # Safety
    /// `host` must be a mapping of the range's length that stays in place until [`Self::unmap`], and nobody in this
    /// process may rely on its content staying as it is.
    pub(crate) unsafe fn map(&self, range: Range, host: u64) -> Result<(), VfioError> {
        let inside = |window: &Range| window.start <= range.start && range.end() <= window.end();
        if !self.translated.iter().any(inside) {
            let translated = self.translated.iter().map(|one| format!("{:#x}-{:#x}", one.start, one.end() - 1));
            let translated = translated.collect::<Vec<_>>().join(", ");
            return Err(VfioError::NotTranslated { start: range.start, last: range.end() - 1, translated });
        }
        let mut maps = self.maps();
        // SAFETY: as the caller promises.
        let result = unsafe { self.iommu.map(range, host) };
        result.map_err(|source| VfioError::Map { start: range.start, length: range.length, source })?;
        maps.insert(range.start, range.length);
        Ok(())
    }

    /// Ends that, for all maps that lie in `range`. Devices meet a fault there afterwards.
    ///
    /// # Errors
    /// The first failure, after all maps were tried.
    pub(crate) fn unmap(&self, range: Range) -> io::Result<()> {
        let mut maps = self.maps();
        let inside: Vec<_> = maps.range(range.start..range.end()).map(|(start, length)| (*start, *length)).collect();
        let mut result = Ok(());
        for (start, length) in inside {
            let outcome = self.iommu.unmap(Range { start, length });
            maps.remove(&start);
            result = result.and(outcome);
        }
        result
    }

    /// Gives devices all memory that the guest has, and from then on what it gets, until the result is dropped.
    ///
    /// # Errors
    /// As [`Self::map`]; nothing is mapped then.
    pub(crate) fn follow(self: &Arc<Self>, listeners: &DmaListeners) -> Result<Attachment, VfioError> {
        let refused = |source| VfioError::Host { device: "guest memory".to_owned(), action: "map it", source };
        let attached = listeners.attach(Arc::clone(self) as _);
        attached.map_err(|error| error.downcast().unwrap_or_else(refused))
    }

    /// How much devices can access, in bytes.
    #[cfg(test)]
    pub(crate) fn mapped(&self) -> u64 {
        self.maps().values().sum()
    }
}

impl DmaListener for Dma {
    fn plugged(&self, range: Range, host: u64) -> io::Result<()> {
        // SAFETY: the memory stays mapped until `unplugged` or the end of the attachment, and is the guest's: this process
        // takes nothing in it for granted.
        unsafe { self.map(range, host) }.map_err(io::Error::other)
    }

    fn unplugged(&self, range: Range) {
        if let Err(error) = self.unmap(range) {
            tracing::error!(%error, ?range, "devices still reach memory that the guest let go");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An IOMMU that notes its maps and has room for a few.
    #[derive(Default)]
    pub(in crate::vfio) struct Noted {
        pub(in crate::vfio) maps: Mutex<BTreeMap<u64, u64>>,
        pub(in crate::vfio) limit: Option<usize>,
    }

    impl Iommu for Noted {
        unsafe fn map(&self, range: Range, _host: u64) -> io::Result<()> {
            let mut maps = self.maps.lock().unwrap();
            if self.limit == Some(maps.len()) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            assert!(maps.insert(range.start, range.length).is_none(), "mapped twice");
            Ok(())
        }

        fn unmap(&self, range: Range) -> io::Result<()> {
            let removed = self.maps.lock().unwrap().remove(&range.start);
            if removed == Some(range.length) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        }

        fn translated(&self) -> io::Result<Vec<Range>> {
            Ok(vec![Range { start: 0, length: 0xfee0_0000 }, Range { start: 0xfef0_0000, length: 1 << 38 }])
        }
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_is_mapped_and_unmapped_in_the_same_pieces() {
        let iommu = Arc::new(Noted::default());
        let dma = Dma::new(Arc::clone(&iommu) as _).unwrap();
        for (start, length) in [(0, 3 * GIB), (4 * GIB, GIB), (8 * GIB, 2 << 20), (8 * GIB + (2 << 20), 2 << 20)] {
            // SAFETY: the IOMMU only notes numbers.
            unsafe { dma.map(Range { start, length }, 0x1000) }.unwrap();
        }
        dma.unmap(Range { start: 8 * GIB, length: 4 << 20 }).unwrap();
        assert_eq!(iommu.maps.lock().unwrap().iter().collect::<Vec<_>>(), [(&0, &(3 * GIB)), (&(4 * GIB), &GIB)]);
        assert_eq!(dma.mapped(), 4 * GIB);
    }

    #[test]
    fn addresses_that_the_iommu_does_not_translate_are_refused_by_name() {
        let dma = Dma::new(Arc::new(Noted::default())).unwrap();
        for range in [Range { start: 0xfed0_0000, length: 1 << 24 }, Range { start: 1 << 39, length: 4096 }] {
            // SAFETY: the IOMMU only notes numbers.
            let error = unsafe { dma.map(range, 0x1000) }.unwrap_err().to_string();
            assert!(error.contains(&format!("{:#x}", range.start)) && error.contains("0xfef00000-"), "{error}");
        }
    }

    #[test]
    fn devices_get_what_the_guest_has_and_what_it_gets() {
        let memory = crate::memory::GuestRam::new(64 << 20).unwrap();
        let iommu = Arc::new(Noted::default());
        let dma = Arc::new(Dma::new(Arc::clone(&iommu) as _).unwrap());
        let attachment = dma.follow(&DmaListeners::new(Arc::clone(memory.memory()))).unwrap();
        assert_eq!(dma.mapped(), 64 << 20);
        let more = Range { start: 8 * GIB, length: 2 << 20 };
        dma.plugged(more, 0x1000).unwrap();
        assert_eq!(dma.mapped(), 66 << 20);
        dma.unplugged(more);
        assert_eq!(dma.mapped(), 64 << 20);
        drop(attachment);

        let full = Arc::new(Dma::new(Arc::new(Noted { limit: Some(0), ..Default::default() })).unwrap());
        let refused = full.follow(&DmaListeners::new(Arc::clone(memory.memory())));
        assert!(matches!(refused.err(), Some(VfioError::Map { .. })));
    }

    #[test]
    fn a_map_that_the_host_refuses_is_not_noted() {
        let dma = Dma::new(Arc::new(Noted { limit: Some(0), ..Default::default() })).unwrap();
        // SAFETY: the IOMMU only notes numbers.
        let error = unsafe { dma.map(Range { start: 0, length: 4096 }, 0x1000) }.unwrap_err();
        assert!(matches!(error, VfioError::Map { length: 4096, .. }));
        assert_eq!(dma.mapped(), 0);
    }
}
