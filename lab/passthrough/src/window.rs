//! Devices that are memory and little else: shared memory, and large BARs that nothing lies behind.

use crate::Outcome;
use crate::memory::PAGE;
use crate::pci::Function;

/// Writes and reads the last bytes of the memory that `ivshmem` shares, BAR 2.
pub(crate) fn shared(function: &Function) -> Outcome {
    const BAR: usize = 2;
    const VALUE: u64 = 0x0fed_cba9_8765_4321;
    let (length, last) = end(function, BAR)?;
    last.write_64(PAGE - 8, VALUE);
    match last.read_64(PAGE - 8) {
        VALUE => Ok(format!("{} MiB of shared memory to its end", length >> 20)),
        seen => Err(format!("the last bytes of the shared memory are {seen:#x}")),
    }
}

/// Reads the last bytes of the largest BAR of `pci-testdev`, BAR 2, where nothing answers: the machine goes on.
pub(crate) fn empty(function: &Function) -> Outcome {
    const BAR: usize = 2;
    let (length, last) = end(function, BAR)?;
    let seen = last.read(PAGE - 4);
    last.write(PAGE - 4, !seen);
    Ok(format!("a BAR of {} GiB reached to its end ({seen:#x})", length >> 30))
}

/// A display in a group with another function, QEMU's `ati-vga`: its frame buffer keeps what is written, and its registers
/// in BAR 2 tell how long that is.
pub(crate) fn display(function: &Function) -> Outcome {
    const MEMORY_SIZE: usize = 0xf8;
    const VALUE: u32 = 0x1357_9bdf;
    function.enable().map_err(|error| error.to_string())?;
    let frame = function.map("resource0", 0, PAGE)?;
    frame.write(0, VALUE);
    let registers = function.map("resource2", 0, PAGE)?;
    let (seen, size) = (frame.read(0), registers.read(MEMORY_SIZE));
    let (first, last) = function.resource(0).ok_or("it has no BAR 0")?;
    if seen == VALUE && (1..=last - first + 1).contains(&u64::from(size)) {
        Ok(format!("frame buffer of {} MiB, and its registers", size >> 20))
    } else {
        Err(format!("the frame buffer has {seen:#x}, its registers tell of {size:#x} bytes"))
    }
}

/// The length of a BAR, and its last page.
fn end(function: &Function, bar: usize) -> Result<(u64, crate::pci::Registers), String> {
    function.enable().map_err(|error| error.to_string())?;
    let (first, last) = function.resource(bar).ok_or_else(|| format!("it has no BAR {bar}"))?;
    let length = last - first + 1;
    let page = function.map(&format!("resource{bar}"), length - PAGE as u64, PAGE)?;
    Ok((length, page))
}
