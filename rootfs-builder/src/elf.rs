//! Checks that an executable can run with no other file beside it.
//!
//! Field offsets: System V ABI, "Object Files" (ELF-64), and its x86-64 supplement.

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Answers whether `file` is an x86-64 Linux executable that needs no dynamic loader.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub fn check_static(file: &[u8]) -> Result<(), &'static str> {
    if file.len() < HEADER_LEN || !file.starts_with(b"\x7fELF") {
        return Err("it is no ELF file");
    }
    if file[4] != CLASS_64 || file[5] != LITTLE_ENDIAN || u16_at(file, 18) != Some(MACHINE_X86_64) {
        return Err("it is not for x86-64");
    }
    if !matches!(u16_at(file, 16), Some(TYPE_EXECUTABLE | TYPE_SHARED)) {
        return Err("it is no executable");
    }
    let damaged = "its program headers are damaged";
    let table = u64_at(file, 32).and_then(|at| usize::try_from(at).ok()).ok_or(damaged)?;
    let entry_len = usize::from(u16_at(file, 54).ok_or(damaged)?);
    let entries = usize::from(u16_at(file, 56).ok_or(damaged)?);
    if entries == 0 || entry_len != PROGRAM_HEADER_LEN {
        return Err(damaged);
    }
    for entry in 0..entries {
        let at = table.checked_add(entry * entry_len).ok_or(damaged)?;
        if u32_at(file, at).ok_or(damaged)? == PT_INTERP {
            return Err("it needs a dynamic loader");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executable(segment: u32) -> Vec<u8> {
        let mut file = vec![0; HEADER_LEN + PROGRAM_HEADER_LEN];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', CLASS_64, LITTLE_ENDIAN]);
        file[16] = 2;
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64..68].copy_from_slice(&segment.to_le_bytes());
        file
    }

    #[test]
    fn a_static_executable_is_accepted() {
        assert_eq!(check_static(&executable(1)), Ok(()));
    }

    #[test]
    fn files_that_cannot_be_the_only_one_of_an_image_are_refused() {
        let mut script = executable(1);
        script[..2].copy_from_slice(b"#!");
        let mut arm = executable(1);
        arm[18] = 183;
        let mut object = executable(1);
        object[16] = 1;
        let mut far_table = executable(1);
        far_table[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut many = executable(1);
        many[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
        let cases = [
            (executable(PT_INTERP), "it needs a dynamic loader"),
            (script, "it is no ELF file"),
            (Vec::new(), "it is no ELF file"),
            (arm, "it is not for x86-64"),
            (object, "it is no executable"),
            (far_table, "its program headers are damaged"),
            (many, "its program headers are damaged"),
        ];
        for (file, reason) in cases {
            assert_eq!(check_static(&file), Err(reason));
        }
    }
}
