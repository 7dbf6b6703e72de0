//! Codes of instructions: those that the programs of this repository have.

/// `target = *(u32 *)(source + offset)`
pub const LOAD_WORD: u8 = 0x61;
/// `target = *(u64 *)(source + offset)`
pub const LOAD_DOUBLE: u8 = 0x79;
/// `target = immediate`, of two instructions; of a map where the source register is [`IS_MAP`].
pub const LOAD_IMMEDIATE_DOUBLE: u8 = 0x18;
/// The immediate is the descriptor of a map, whose address is loaded.
pub const IS_MAP: u8 = 1;
/// `*(u32 *)(target + offset) = immediate`
pub const STORE_WORD: u8 = 0x62;
/// `*(u64 *)(target + offset) = immediate`
pub const STORE_DOUBLE: u8 = 0x7a;
/// `target += immediate`
pub const ADD_64: u8 = 0x07;
/// `target = immediate`
pub const MOVE_64: u8 = 0xb7;
/// `target = source`
pub const MOVE_REGISTER_64: u8 = 0xbf;
/// `target = immediate`, 32 bits
pub const MOVE: u8 = 0xb4;
/// `target = source`, 32 bits
pub const MOVE_REGISTER: u8 = 0xbc;
/// `target &= immediate`, 32 bits
pub const AND: u8 = 0x54;
/// `target >>= immediate`, 32 bits
pub const SHIFT_RIGHT: u8 = 0x74;
/// Skips as many instructions as the offset says.
pub const JUMP: u8 = 0x05;
/// The same if `target == immediate`
pub const JUMP_IF: u8 = 0x15;
/// The same if `target != immediate`
pub const JUMP_IF_NOT_64: u8 = 0x55;
/// The same if `target != immediate`, 32 bits
pub const JUMP_IF_NOT: u8 = 0x56;
/// The same if `target & immediate`, 32 bits
pub const JUMP_IF_ANY_BIT: u8 = 0x46;
/// A helper of the kernel.
pub const CALL: u8 = 0x85;
/// The end.
pub const EXIT: u8 = 0x95;
