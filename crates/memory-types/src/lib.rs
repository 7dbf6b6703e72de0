//! The memory types of x86: what the memory type range registers (MTRR) say of an address, what a page table entry says
//! by the page attribute table (PAT), and what the processor makes of both.
//!
//! Pure arithmetic: who reads the registers, and where, is the caller's concern. Sources: Intel SDM vol. 3A, §12.11
//! (MTRR) and §12.12 (PAT); Linux's `arch/x86/include/uapi/asm/mtrr.h` for what `/proc/mtrr` calls the types.

mod memory_type;
mod registers;
mod runs;
mod variable;

pub use memory_type::{MemoryType, effective};
pub use registers::{InvalidRegister, MTRR_REGISTERS, Mtrrs, overlap};
pub use runs::{RUN_STEPS_MAX, Run};
pub use variable::{VARIABLE_RANGES, VariableRange};
