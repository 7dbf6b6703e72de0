//! Takes the uncompressed kernel out of a bzImage: QEMU then starts it by PVH, and no emulated CPU has to unpack it.
//!
//! Source: the kernel's `Documentation/arch/x86/boot.rst` (`setup_sects`, `payload_offset`, `payload_length`).

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use tool::io;

use crate::error::Error;
use crate::tools::Tools;

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// After the compressed data the kernel's build appends the unpacked size, except in formats that hold it.
const SIZE_APPENDED: usize = 4;

/// Writes the ELF kernel in `image` to `target`.
pub(crate) fn extract_vmlinux(tools: &Tools, image: &Path, target: &Path) -> Result<(), Error> {
    let bytes = fs::read(image).map_err(io("read", image))?;
    let bad = |problem: &str| Error::Format { path: image.to_owned(), problem: problem.to_owned() };
    let payload = payload(&bytes).ok_or_else(|| bad("is no bzImage"))?;
    let program = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "usr/bin/zstd",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "usr/bin/xz",
        _ => return Err(bad("is compressed neither by zstd nor by xz")),
    };
    let compressed = target.with_extension("compressed");
    fs::write(&compressed, payload).map_err(io("write", &compressed))?;
    let input = File::open(&compressed).map_err(io("open", &compressed))?;
    let output = File::create(target).map_err(io("create", target))?;
    let child = tools.command(program).arg("-dc").stdin(input).stdout(output).stderr(Stdio::piped()).spawn();
    let result = child.and_then(std::process::Child::wait_with_output).map_err(tool::start(program))?;
    fs::remove_file(&compressed).map_err(io("remove", &compressed))?;
    let start = fs::read(target).map_err(io("read", target))?;
    if !result.status.success() || !start.starts_with(b"\x7fELF") {
        return Err(bad(&format!("holds no ELF kernel: {}", String::from_utf8_lossy(&result.stderr))));
    }
    Ok(())
}

/// The compressed kernel in a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let number = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    // Zero means four, for kernels from before the field.
    let setup_sectors = match image.get(SETUP_SECTS)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let start = (setup_sectors + 1) * SECTOR + number(PAYLOAD_OFFSET)?;
    let length = number(PAYLOAD_LENGTH)?.checked_sub(SIZE_APPENDED)?;
    image.get(start..start.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_found_by_the_header() {
        let mut image = vec![0; 4096];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 16;
        image[PAYLOAD_LENGTH] = 10;
        let start = 2 * SECTOR + 16;
        image[start..start + 6].copy_from_slice(b"kernel");
        assert_eq!(payload(&image), Some(b"kernel".as_slice()));
    }

    #[test]
    fn what_is_no_whole_bzimage_has_no_payload() {
        let mut image = vec![0; 4096];
        assert_eq!(payload(&image), None, "no magic");
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        assert_eq!(payload(&image), None, "no length");
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None, "longer than the file");
        assert_eq!(payload(&image[..100]), None, "cut off");
    }
}
