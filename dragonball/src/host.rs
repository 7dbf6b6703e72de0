//! What this host can give to a virtual machine.

/// The host's limits for one machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of RAM that the host has.
    pub(crate) memory: u64,
    /// Width of a guest-physical address in bits.
    pub(crate) address_bits: u8,
    /// The most vCPUs that KVM gives to one machine.
    pub(crate) vcpus: u8,
}

impl Limits {
    /// Reads them. Where `/dev/kvm` cannot be asked, its limits are taken as the widest: starting the machine then says
    /// what is wrong with `/dev/kvm`.
    pub(crate) fn of_this_host() -> Self {
        let vcpus = kvm_ioctls::Kvm::new().map_or_else(|_| usize::from(u8::MAX), |kvm| kvm.get_max_vcpus());
        Self { memory: total_memory(), address_bits: address_bits(), vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX) }
    }

    /// The most bytes of guest memory, and what sets that limit. Half of the address space stays free for devices.
    pub(crate) fn guest_memory(&self) -> (u64, &'static str) {
        let addressable = 1_u64 << (self.address_bits - 1);
        let (limit, reason) = if addressable < self.memory {
            (addressable, "half of what the processor can address")
        } else {
            (self.memory, "the RAM of this host")
        };
        (limit - limit % crate::config::MEMORY_GRANULE, reason)
    }
}

/// The most guest memory of one machine on this host, in bytes: a multiple of the granule.
#[must_use]
pub fn memory_limit() -> u64 {
    let limits = Limits { memory: total_memory(), address_bits: address_bits(), vcpus: u8::MAX };
    limits.guest_memory().0
}

/// The host's RAM in bytes.
fn total_memory() -> u64 {
    // SAFETY: sysinfo is a plain structure of integers, for which all zeroes is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writes of its type.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return u64::MAX;
    }
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// The width of a physical address (CPUID 0x8000_0008, EAX bits 7:0), 36 where the processor does not say.
pub(crate) fn address_bits() -> u8 {
    const LEAF: u32 = 0x8000_0008;
    if std::arch::x86_64::__cpuid(0x8000_0000).eax < LEAF {
        return 36;
    }
    let bits = std::arch::x86_64::__cpuid(LEAF).eax & 0xff;
    u8::try_from(bits).unwrap_or(36).clamp(32, 52)
}
