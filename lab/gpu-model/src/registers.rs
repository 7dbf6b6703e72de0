//! The registers in BAR0: their offsets, and what is in them. The crate's documentation has the map.

/// Identity of the device, [`ID_VALUE`].
pub const ID: u64 = 0x0000;
/// Version of this register map, [`MAP_VERSION`].
pub const VERSION: u64 = 0x0004;
/// Bytes of video memory, 64 bits.
pub const VIDEO_MEMORY_SIZE: u64 = 0x0008;
/// Where a command reads, 64 bits.
pub const SOURCE: u64 = 0x1000;
/// Where a command writes, 64 bits.
pub const DESTINATION: u64 = 0x1008;
/// How many bytes, 64 bits.
pub const LENGTH: u64 = 0x1010;
/// The factor of [`Operation::Compute`].
pub const MULTIPLIER: u64 = 0x1018;
/// The summand of [`Operation::Compute`].
pub const ADDEND: u64 = 0x101c;
/// Starts a command: operation in bits 0–7, MSI-X vector in bits 8–15.
pub const COMMAND: u64 = 0x1020;
/// [`BUSY`], [`DONE`], and the error of the last command in bits 8–15.
pub const STATUS: u64 = 0x1024;
/// Commands that have ended since the last reset, well or not.
pub const COMPLETED: u64 = 0x1028;
/// [`checksum`] of what the last command moved or computed, 64 bits.
pub const CHECKSUM: u64 = 0x1030;
/// The bus address that the last command could not reach, 64 bits.
pub const FAULT_ADDRESS: u64 = 0x1038;
/// Bit 0: a command has ended; cleared by writing one.
pub const INTERRUPT_STATUS: u64 = 0x1040;
/// Bit 0: lets [`INTERRUPT_STATUS`] raise INTx while MSI-X is off.
pub const INTERRUPT_ENABLE: u64 = 0x1044;
/// Keeps what is written.
pub const SCRATCH: u64 = 0x1048;
/// Resets since the model was started; survives them.
pub const RESETS: u64 = 0x104c;

/// What [`ID`] reads.
pub const ID_VALUE: u32 = 0x1700_00a1;
/// What [`VERSION`] reads.
pub const MAP_VERSION: u32 = 1;
/// In [`STATUS`]: a command runs; others are ignored until it ends.
pub const BUSY: u32 = 1;
/// In [`STATUS`]: a command has ended and none runs.
pub const DONE: u32 = 1 << 1;

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Copies from guest memory (`SOURCE`, a bus address) to video memory (`DESTINATION`, an offset).
    CopyIn = 1,
    /// Copies from video memory (`SOURCE`, an offset) to guest memory (`DESTINATION`, a bus address).
    CopyOut = 2,
    /// Makes `MULTIPLIER * x + ADDEND`, modulo 2³², of each little-endian 32-bit word of video memory, from `SOURCE`
    /// to `DESTINATION`. Both and `LENGTH` are multiples of 4; the two ranges are the same or do not overlap.
    Compute = 3,
    /// Reads `LENGTH` bytes of video memory at `SOURCE` for their checksum.
    Checksum = 4,
}

impl Operation {
    /// The operation in a command, if there is such.
    #[must_use]
    pub fn of_command(command: u32) -> Option<Self> {
        [Self::CopyIn, Self::CopyOut, Self::Compute, Self::Checksum]
            .into_iter()
            .find(|operation| *operation as u32 == command & 0xff)
    }
}

/// Why a command failed, as bits 8–15 of [`STATUS`] say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// A bus address is not mapped, or not for this direction; see [`FAULT_ADDRESS`].
    BusAddress = 1,
    /// There is no such operation or vector.
    Command = 2,
    /// A range leaves the video memory, is not aligned, or overlaps another that it must not.
    Range = 3,
    /// Bus mastering is off in the PCI command register.
    BusMaster = 4,
}

/// What stands in the registers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registers {
    pub(crate) source: u64,
    pub(crate) destination: u64,
    pub(crate) length: u64,
    pub(crate) multiplier: u32,
    pub(crate) addend: u32,
    pub(crate) status: u32,
    pub(crate) completed: u32,
    pub(crate) checksum: u64,
    pub(crate) fault_address: u64,
    pub(crate) interrupt_status: bool,
    pub(crate) interrupt_enable: bool,
    scratch: u32,
    resets: u32,
}

/// What a write asks the device for beyond a changed register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The command register was written with this.
    Start(u32),
    /// The interrupt line may have changed.
    Interrupt,
}

impl Registers {
    /// The 32-bit word at `offset`, a multiple of 4; zero where there is no register.
    pub(crate) fn word(&self, offset: u64, video_memory: u64) -> u32 {
        match offset {
            ID => ID_VALUE,
            VERSION => MAP_VERSION,
            MULTIPLIER => self.multiplier,
            ADDEND => self.addend,
            STATUS => self.status,
            COMPLETED => self.completed,
            INTERRUPT_STATUS => self.interrupt_status.into(),
            INTERRUPT_ENABLE => self.interrupt_enable.into(),
            SCRATCH => self.scratch,
            RESETS => self.resets,
            _ => half(self.wide(offset & !7, video_memory), offset),
        }
    }

    fn wide(&self, offset: u64, video_memory: u64) -> u64 {
        match offset {
            VIDEO_MEMORY_SIZE => video_memory,
            SOURCE => self.source,
            DESTINATION => self.destination,
            LENGTH => self.length,
            CHECKSUM => self.checksum,
            FAULT_ADDRESS => self.fault_address,
            _ => 0,
        }
    }

    /// Writes the 32-bit word at `offset`, a multiple of 4. What cannot be written keeps its value.
    pub(crate) fn write(&mut self, offset: u64, value: u32) -> Effect {
        match offset {
            COMMAND => return Effect::Start(value),
            MULTIPLIER => self.multiplier = value,
            ADDEND => self.addend = value,
            SCRATCH => self.scratch = value,
            INTERRUPT_STATUS => {
                self.interrupt_status &= value & 1 == 0;
                return Effect::Interrupt;
            }
            INTERRUPT_ENABLE => {
                self.interrupt_enable = value & 1 != 0;
                return Effect::Interrupt;
            }
            _ => self.write_half(offset, value),
        }
        Effect::None
    }

    fn write_half(&mut self, offset: u64, value: u32) {
        let register = match offset & !7 {
            SOURCE => &mut self.source,
            DESTINATION => &mut self.destination,
            LENGTH => &mut self.length,
            _ => return,
        };
        let shift = if offset & 4 == 0 { 0 } else { 32 };
        *register = *register & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }

    /// As after a reset; only their number is kept, and one more.
    pub(crate) fn reset(&mut self) {
        *self = Self { resets: self.resets.wrapping_add(1), ..Self::default() };
    }
}

/// The 32-bit half of a 64-bit register that lies at `offset`.
fn half(value: u64, offset: u64) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    u32::from_le_bytes(if offset & 4 == 0 { [a, b, c, d] } else { [e, f, g, h] })
}

/// The checksum that a command leaves, over bytes as 32-bit little-endian words, the last one filled up with zeros:
/// FNV-1a on words instead of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(u64);

impl Checksum {
    const PRIME: u64 = 0x0100_0000_01b3;

    /// Of no bytes.
    #[must_use]
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Goes on over `bytes`. Only the last part of what is summed may have a length that is no multiple of 4.
    pub fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<4>();
        let sum = words.iter().fold(self.0, |sum, word| Self::step(sum, *word));
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        self.0 = if rest.is_empty() { sum } else { Self::step(sum, last) };
    }

    fn step(sum: u64, word: [u8; 4]) -> u64 {
        (sum ^ u64::from(u32::from_le_bytes(word))).wrapping_mul(Self::PRIME)
    }

    /// What [`CHECKSUM`] reads.
    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }
}

impl Default for Checksum {
    fn default() -> Self {
        Self::new()
    }
}

/// The checksum of bytes that are all there.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = Checksum::new();
    sum.add(bytes);
    sum.value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_registers_are_written_and_read_by_halves() {
        let mut registers = Registers::default();
        registers.write(SOURCE + 4, 0x1122_3344);
        registers.write(SOURCE, 0x5566_7788);
        assert_eq!(registers.source, 0x1122_3344_5566_7788);
        assert_eq!((registers.word(SOURCE, 0), registers.word(SOURCE + 4, 0)), (0x5566_7788, 0x1122_3344));
        assert_eq!(registers.word(VIDEO_MEMORY_SIZE + 4, 8 << 30), 2);
    }

    #[test]
    fn what_is_read_only_keeps_its_value() {
        let mut registers = Registers::default();
        for offset in [ID, VERSION, VIDEO_MEMORY_SIZE, STATUS, COMPLETED, CHECKSUM, FAULT_ADDRESS, RESETS, 0x2000] {
            let before = registers.word(offset, 1 << 20);
            assert_eq!(registers.write(offset, !before), Effect::None, "{offset:#x}");
            assert_eq!(registers.word(offset, 1 << 20), before, "{offset:#x}");
        }
    }

    #[test]
    fn a_reset_clears_all_but_the_number_of_resets() {
        let mut registers = Registers::default();
        for offset in [SOURCE, DESTINATION, LENGTH, MULTIPLIER, ADDEND, SCRATCH, INTERRUPT_ENABLE] {
            registers.write(offset, 1);
        }
        registers.reset();
        for offset in (SOURCE..RESETS).step_by(4) {
            assert_eq!(registers.word(offset, 0), 0, "{offset:#x}");
        }
        assert_eq!(registers.word(RESETS, 0), 1);
    }

    #[test]
    fn a_checksum_is_the_same_in_parts_and_differs_by_order_and_length() {
        let mut parts = Checksum::new();
        parts.add(b"abcdefgh");
        parts.add(b"ijk");
        assert_eq!(parts.value(), checksum(b"abcdefghijk"));
        assert_eq!(checksum(b""), 0xcbf2_9ce4_8422_2325);
        assert_ne!(checksum(b"abcdefgh"), checksum(b"efghabcd"));
        assert_ne!(checksum(b"abcd"), checksum(b"abcd\0"));
    }
}
