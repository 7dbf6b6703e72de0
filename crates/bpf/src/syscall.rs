//! bpf(2).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::Instruction;
use crate::code;

// `enum bpf_cmd`
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const PROGRAM_LOAD: libc::c_long = 5;
const PROGRAM_ATTACH: libc::c_long = 8;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const LINK_CREATE: libc::c_long = 28;

/// The helper that finds an element of a map (`enum bpf_func_id`).
const MAP_LOOKUP: i32 = 1;
/// What programs say of their licence; helpers that only GPL programs may call are not for this one.
const LICENCE: &CStr = c"Apache-2.0";

/// The beginning of `union bpf_attr` for each command; the kernel takes what is missing behind it as zero.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Default)]
#[repr(C)]
struct ProgramAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct TracepointAttributes {
    name: u64,
    program: u32,
    padding: u32,
}

/// A map from numbers of 32 bits to numbers of 64 bits.
#[derive(Debug)]
pub struct Map(OwnedFd);

impl Map {
    /// A map of this kind (`enum bpf_map_type`) for so many entries.
    ///
    /// # Errors
    /// When the kernel does not know the kind, or the caller may not make any.
    pub fn new(kind: u32, entries: u32) -> io::Result<Self> {
        let attributes = MapAttributes { kind, key_size: 4, value_size: 8, entries };
        // SAFETY: the attributes point to nothing.
        unsafe { made(MAP_CREATE, &attributes) }.map(Self)
    }

    /// Sets the value of `key`; in a map of sockets it is a descriptor.
    ///
    /// # Errors
    /// When the map has no room for the key, or the value is not of its kind.
    pub fn put(&self, key: u32, value: u64) -> io::Result<()> {
        let attributes = ElementAttributes {
            map: number(self.0.as_raw_fd())?,
            padding: 0,
            key: (&raw const key).addr() as u64,
            value: (&raw const value).addr() as u64,
            flags: 0,
        };
        // SAFETY: key and value have the sizes that the map was made with, and outlive the call.
        unsafe { bpf(MAP_UPDATE, &attributes) }.map(drop)
    }

    /// The instructions that put the address of the value of `key` into register 0, or 0 when there is none. They use the
    /// last four bytes of the stack and registers 1 to 5.
    #[must_use]
    pub fn find(&self, key: i32) -> [Instruction; 6] {
        [
            Instruction::new(code::STORE_WORD, 10, 0, -4, key),
            Instruction::new(code::LOAD_IMMEDIATE_DOUBLE, 1, code::IS_MAP, 0, self.0.as_raw_fd()),
            // The second half of the former.
            Instruction::new(0, 0, 0, 0, 0),
            Instruction::copy(2, 10),
            Instruction::new(code::ADD_64, 2, 0, 0, -4),
            Instruction::call(MAP_LOOKUP),
        ]
    }
}

/// Hands a program of this kind (`enum bpf_prog_type`) to the kernel, which checks it. `attach_type`
/// (`enum bpf_attach_type`) is 0 for kinds that need none here.
///
/// # Errors
/// When the kernel refuses the program, or the caller may not load any.
pub fn load(kind: u32, attach_type: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = ProgramAttributes {
        kind,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        licence: LICENCE.as_ptr().addr() as u64,
        attach_type,
        ..ProgramAttributes::default()
    };
    // SAFETY: instructions and licence are as long as said, and outlive the call.
    unsafe { made(PROGRAM_LOAD, &attributes) }
}

/// Attaches a program to a cgroup, for as long as that exists.
///
/// # Errors
/// When the target does not take it.
pub fn attach(target: BorrowedFd<'_>, program: &OwnedFd, attach_type: u32, flags: u32) -> io::Result<()> {
    let (target, program) = (number(target.as_raw_fd())?, number(program.as_raw_fd())?);
    let attributes = AttachAttributes { target, program, attach_type, flags };
    // SAFETY: the attributes point to nothing.
    unsafe { bpf(PROGRAM_ATTACH, &attributes) }.map(drop)
}

/// Attaches a program to `target`, for as long as the answer is open.
///
/// # Errors
/// When the target does not take it.
pub fn link(target: BorrowedFd<'_>, program: &OwnedFd, attach_type: u32) -> io::Result<OwnedFd> {
    let (target, program) = (number(target.as_raw_fd())?, number(program.as_raw_fd())?);
    let attributes = LinkAttributes { program, target, attach_type, flags: 0 };
    // SAFETY: the attributes point to nothing.
    unsafe { made(LINK_CREATE, &attributes) }
}

/// Lets `program` run at each passage of a tracepoint, for as long as the answer is open.
///
/// # Errors
/// When there is no such tracepoint.
pub fn raw_tracepoint(name: &CStr, program: &OwnedFd) -> io::Result<OwnedFd> {
    let program = number(program.as_raw_fd())?;
    let attributes = TracepointAttributes { name: name.as_ptr().addr() as u64, program, padding: 0 };
    // SAFETY: the name ends with a zero and outlives the call.
    unsafe { made(RAW_TRACEPOINT_OPEN, &attributes) }
}

fn number(descriptor: i32) -> io::Result<u32> {
    u32::try_from(descriptor).map_err(io::Error::other)
}

/// A command that answers a new descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn made<Attributes>(command: libc::c_long, attributes: &Attributes) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let answer = unsafe { bpf(command, attributes) }?;
    let descriptor = i32::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// # Safety
/// What the attributes point to must be valid for the command.
unsafe fn bpf<Attributes>(command: libc::c_long, attributes: &Attributes) -> io::Result<libc::c_long> {
    // SAFETY: the size is the attributes'. The rest is the caller's promise.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<Attributes>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}
