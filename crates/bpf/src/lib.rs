//! BPF programs of a few instructions, made where their data is known, and the calls of bpf(2) that put them in place.
//!
//! A loader of compiled programs would bring an ELF library for what fits on a page. Constants and layouts are those of
//! Linux's `include/uapi/linux/bpf.h` and `Documentation/bpf/standardization/instruction-set.rst`.

pub mod code;
mod syscall;

pub use syscall::{Map, attach, link, load, raw_tracepoint};

/// One instruction (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Instruction {
    /// What it does: see [`code`].
    pub code: u8,
    /// Source register in the upper four bits, target in the lower.
    pub registers: u8,
    /// Of a jump or a memory access.
    pub offset: i16,
    /// A value.
    pub immediate: i32,
}

impl Instruction {
    /// The end of the program; its answer is in register 0.
    pub const EXIT: Self = Self::new(code::EXIT, 0, 0, 0, 0);

    /// An instruction of all its parts.
    #[must_use]
    pub const fn new(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: source << 4 | target, offset, immediate }
    }

    /// `target = value`, for all 64 bits.
    #[must_use]
    pub const fn set(target: u8, value: i32) -> Self {
        Self::new(code::MOVE_64, target, 0, 0, value)
    }

    /// `target = source`, for all 64 bits.
    #[must_use]
    pub const fn copy(target: u8, source: u8) -> Self {
        Self::new(code::MOVE_REGISTER_64, target, source, 0, 0)
    }

    /// `target = *(u32 *)(source + offset)`
    #[must_use]
    pub const fn load_word(target: u8, source: u8, offset: i16) -> Self {
        Self::new(code::LOAD_WORD, target, source, offset, 0)
    }

    /// Calls a helper of the kernel (`enum bpf_func_id`): arguments in registers 1 to 5, the answer in 0; 6 to 9 stay.
    #[must_use]
    pub const fn call(function: i32) -> Self {
        Self::new(code::CALL, 0, 0, 0, function)
    }
}
