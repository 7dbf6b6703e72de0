//! MTRR: the memory types that the guest's kernel starts from.
//!
//! Everything is write-back by default and no range says otherwise, so that the kernel may choose any type by its page
//! tables: write-back for persistent memory, write-combining for frame buffers. Fixed ranges stay off: enabling them
//! with their registers at zero would make the first MiB uncached. Source: Intel SDM vol. 3, §12.11.

use kvm_bindings::kvm_msr_entry;

/// `IA32_MTRR_DEF_TYPE`.
const DEFAULT_TYPE: u32 = 0x2ff;
/// `IA32_MTRRCAP`: how many variable ranges there are.
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// What every vCPU's registers are set to, hot-added and restored ones included.
pub(crate) fn registers() -> [kvm_msr_entry; 1] {
    [kvm_msr_entry { index: DEFAULT_TYPE, data: MTRR_ENABLE | WRITE_BACK, ..Default::default() }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_write_back_without_fixed_ranges() {
        let [default] = registers();
        assert_eq!((default.index, default.data), (0x2ff, 0x806));
    }
}
