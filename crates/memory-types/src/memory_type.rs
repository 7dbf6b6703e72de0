//! The types, and what comes of two that meet.

use std::fmt;

/// How the processor caches and orders accesses to memory.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryType {
    /// UC: each access goes to the device, in order.
    Uncached,
    /// UC-: as UC, unless the MTRRs say write-combining. Only page tables can say it.
    UncachedMinus,
    /// WC: writes are gathered; for frame buffers.
    WriteCombining,
    /// WT: reads are cached, writes go through.
    WriteThrough,
    /// WP: reads are cached, writes are not.
    WriteProtected,
    /// WB: cached; for RAM.
    WriteBack,
}

impl MemoryType {
    /// The type of an encoding that an MTRR may hold; nothing for reserved ones.
    #[must_use]
    pub const fn from_mtrr(encoding: u8) -> Option<Self> {
        match encoding {
            0 => Some(Self::Uncached),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }

    /// The type of an encoding that an entry of the PAT may hold; nothing for reserved ones.
    #[must_use]
    pub const fn from_pat(encoding: u8) -> Option<Self> {
        match encoding {
            7 => Some(Self::UncachedMinus),
            other => Self::from_mtrr(other),
        }
    }

    /// Its encoding in registers.
    #[must_use]
    pub const fn encoding(self) -> u8 {
        match self {
            Self::Uncached => 0,
            Self::WriteCombining => 1,
            Self::WriteThrough => 4,
            Self::WriteProtected => 5,
            Self::WriteBack => 6,
            Self::UncachedMinus => 7,
        }
    }

    /// The type of a name that Linux uses in `/proc/mtrr` or in its list of PAT types; nothing for others.
    #[must_use]
    pub fn from_linux(name: &str) -> Option<Self> {
        Some(match name {
            "uncachable" | "uncached" => Self::Uncached,
            "uncached-minus" => Self::UncachedMinus,
            "write-combining" => Self::WriteCombining,
            "write-through" => Self::WriteThrough,
            "write-protect" | "write-protected" => Self::WriteProtected,
            "write-back" => Self::WriteBack,
            _ => return None,
        })
    }
}

impl fmt::Display for MemoryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Uncached => "uncached",
            Self::UncachedMinus => "uncached-minus",
            Self::WriteCombining => "write-combining",
            Self::WriteThrough => "write-through",
            Self::WriteProtected => "write-protected",
            Self::WriteBack => "write-back",
        })
    }
}

/// The type that an access has when the MTRRs give `mtrr` and the page table gives `pat`: SDM vol. 3A, table 12-7
/// ("Effective Page-Level Memory Types for Pentium III and More Recent Processor Families").
#[must_use]
pub const fn effective(mtrr: MemoryType, pat: MemoryType) -> MemoryType {
    use MemoryType::{Uncached, UncachedMinus, WriteBack, WriteCombining, WriteProtected, WriteThrough};
    match (mtrr, pat) {
        // What the page table decides alone.
        (_, Uncached) => Uncached,
        (_, WriteCombining) => WriteCombining,
        // Weaker than UC: some ranges may still combine writes.
        (WriteCombining | WriteProtected, UncachedMinus) => WriteCombining,
        (_, UncachedMinus) => Uncached,
        // Write-back is all permissive: the range decides.
        (UncachedMinus, WriteBack) => Uncached,
        (range, WriteBack) => range,
        (WriteBack | WriteThrough, WriteThrough) => WriteThrough,
        (_, WriteThrough) => Uncached,
        (WriteBack | WriteThrough | WriteProtected, WriteProtected) => WriteProtected,
        (_, WriteProtected) => Uncached,
    }
}

#[cfg(test)]
mod tests {
    use super::MemoryType::{Uncached, UncachedMinus, WriteBack, WriteCombining, WriteProtected, WriteThrough};
    use super::*;

    const ALL: [MemoryType; 6] = [Uncached, UncachedMinus, WriteCombining, WriteThrough, WriteProtected, WriteBack];

    #[test]
    fn the_effective_type_is_that_of_the_manuals_table() {
        // Rows: the MTRRs; columns: the page table's UC, UC-, WC, WT, WP, WB.
        let table = [
            (Uncached, [Uncached, Uncached, WriteCombining, Uncached, Uncached, Uncached]),
            (WriteCombining, [Uncached, WriteCombining, WriteCombining, Uncached, Uncached, WriteCombining]),
            (WriteThrough, [Uncached, Uncached, WriteCombining, WriteThrough, WriteProtected, WriteThrough]),
            (WriteProtected, [Uncached, WriteCombining, WriteCombining, Uncached, WriteProtected, WriteProtected]),
            (WriteBack, [Uncached, Uncached, WriteCombining, WriteThrough, WriteProtected, WriteBack]),
        ];
        for (mtrr, row) in table {
            assert_eq!(ALL.map(|pat| effective(mtrr, pat)), row, "{mtrr}");
        }
    }

    #[test]
    fn encodings_and_names_lead_back_to_their_types() {
        for kind in ALL {
            assert_eq!(MemoryType::from_pat(kind.encoding()), Some(kind));
            assert_eq!(MemoryType::from_linux(&kind.to_string()), Some(kind));
            assert_eq!(MemoryType::from_mtrr(kind.encoding()).is_some(), kind != UncachedMinus);
        }
        for reserved in [2, 3, 8, 255] {
            assert_eq!(MemoryType::from_pat(reserved), None);
        }
        assert_eq!(MemoryType::from_linux("uncachable"), Some(Uncached), "so /proc/mtrr spells it");
        assert_eq!(MemoryType::from_linux("?"), None);
    }
}
