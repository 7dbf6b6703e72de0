//! A model of a datacenter GPU: its shape on the PCI bus, its memory, and an engine that copies and computes. It is
//! served by vfio-user, so that QEMU (10.1 and newer, `vfio-user-pci`) shows it to a machine like any PCI device.
//!
//! It draws nothing and runs no program; it is there to drive everything that passing such a device on needs: large
//! 64-bit prefetchable BARs, DMA through an IOMMU, MSI-X, and resets.
//!
//! | region | what |
//! |---|---|
//! | configuration | class 0302; PM, PCI Express endpoint with function-level reset, MSI-X |
//! | BAR0, 16 MiB | registers, by aligned words of 4 or 8 bytes; MSI-X table at 0xb90000, pending bits at 0xba0000 |
//! | BAR1, 8 GiB or as chosen, 64-bit prefetchable | video memory, which a client can map |
//! | BAR3, 32 MiB, 64-bit prefetchable | memory without a meaning, which a client can map |
//!
//! # Registers
//!
//! Little-endian; those of 64 bits can be accessed by halves. What is not listed reads zero and ignores writes.
//!
//! | offset | bits | access | name | what |
//! |---|---|---|---|---|
//! | 0x0000 | 32 | r | `ID` | 0x170000a1 |
//! | 0x0004 | 32 | r | `VERSION` | 1, the version of this table |
//! | 0x0008 | 64 | r | `VIDEO_MEMORY_SIZE` | bytes |
//! | 0x1000 | 64 | rw | `SOURCE` | where a command reads: bus address or offset in video memory |
//! | 0x1008 | 64 | rw | `DESTINATION` | where it writes: bus address or offset in video memory |
//! | 0x1010 | 64 | rw | `LENGTH` | bytes |
//! | 0x1018 | 32 | rw | `MULTIPLIER` | for operation 3 |
//! | 0x101c | 32 | rw | `ADDEND` | for operation 3 |
//! | 0x1020 | 32 | w | `COMMAND` | starts: operation in bits 0–7, MSI-X vector in bits 8–15 |
//! | 0x1024 | 32 | r | `STATUS` | bit 0 busy, bit 1 done, bits 8–15 error of the last command |
//! | 0x1028 | 32 | r | `COMPLETED` | commands that ended since the last reset, well or not |
//! | 0x1030 | 64 | r | `CHECKSUM` | of what the last command moved or computed |
//! | 0x1038 | 64 | r | `FAULT_ADDRESS` | the bus address that it could not reach |
//! | 0x1040 | 32 | rw | `INTERRUPT_STATUS` | bit 0: a command has ended; write 1 to clear |
//! | 0x1044 | 32 | rw | `INTERRUPT_ENABLE` | bit 0: raise INTx while `INTERRUPT_STATUS` is set and MSI-X is off |
//! | 0x1048 | 32 | rw | `SCRATCH` | keeps what is written |
//! | 0x104c | 32 | r | `RESETS` | resets since the model was started |
//!
//! | operation | what |
//! |---|---|
//! | 1 | copy from guest memory to video memory |
//! | 2 | copy from video memory to guest memory |
//! | 3 | `MULTIPLIER × x + ADDEND` modulo 2³² for each 32-bit word x of video memory; `SOURCE`, `DESTINATION` and `LENGTH` are multiples of 4, the ranges are the same or apart |
//! | 4 | the checksum of video memory at `SOURCE`, nothing else |
//!
//! | error | what |
//! |---|---|
//! | 1 | a bus address is not mapped, or not for this direction; what came before it has been copied |
//! | 2 | there is no such operation or vector |
//! | 3 | a range leaves the video memory, is not aligned or overlaps; nothing was changed |
//! | 4 | bus mastering is off |
//!
//! A command is ignored while another one runs. When it ends, `STATUS` is done, its MSI-X vector is raised, and
//! `INTERRUPT_STATUS` is set. The checksum is that of [`registers::checksum`]. A reset (function-level, or the
//! client's) ends the command that runs, clears registers and configuration, and makes all memory of the device zero:
//! nothing goes from one user to the next.

mod config_space;
mod connection;
mod device;
mod engine;
mod guest_memory;
mod interrupts;
pub mod protocol;
pub mod registers;
mod server;
mod video_memory;

pub use config_space::Identity;
pub use device::{BAR0_SIZE, BAR3_SIZE, Device, Error, VIDEO_MEMORY};
pub use guest_memory::MAX_MAPPINGS;
pub use interrupts::VECTORS;
pub use server::{serve, serve_client};
