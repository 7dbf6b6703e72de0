//! Memory types as small guests find them in their registers, and as they leave them there.

#![expect(clippy::unwrap_used, reason = "a test fails by panics")]

use std::time::Duration;

use dragonball::manage::MemoryTypesInfo;
use dragonball::start;
use memory_types::{MemoryType, Mtrrs, VariableRange};

use crate::guest::{Code, kvm, machine, run, wait_for_boot, wait_for_end};

/// Long enough for a guest that answers, on any machine.
const LONG: Duration = Duration::from_secs(20);
/// `IA32_MTRRCAP`, `IA32_MTRR_DEF_TYPE`, the third variable range.
const CAPABILITIES: u32 = 0xfe;
const DEFAULT_TYPE: u32 = 0x2ff;
const BASE: u32 = 0x204;
const MASK: u32 = 0x205;
/// The hot-plug registers of vCPUs.
const CPU_SELECT: u32 = 0xc000_1020;
const CPU_EVENT: u32 = 0xc000_1028;
const CPU_OST_EVENT: u32 = 0xc000_1030;
const CPU_OST_STATUS: u32 = 0xc000_1034;

/// `mov ecx, index; rdmsr`
fn read_register(code: Code, index: u32) -> Code {
    code.raw(&[0xb9]).raw(&index.to_le_bytes()).raw(&[0x0f, 0x32])
}

/// `mov ecx, index; mov eax, low; mov edx, high; wrmsr`
fn write_register(code: Code, index: u32, value: u64) -> Code {
    let [low, high] = [0, 32].map(|shift| u32::try_from(value >> shift & u64::from(u32::MAX)).unwrap());
    let code = code.raw(&[0xb9]).raw(&index.to_le_bytes()).raw(&[0xb8]).raw(&low.to_le_bytes());
    code.raw(&[0xba]).raw(&high.to_le_bytes()).raw(&[0x0f, 0x30])
}

/// What a guest writes and every vCPU then has: 1 GiB from 3 GiB uncached. Its mask fits the narrowest processor.
fn written() -> Mtrrs {
    let mut mtrrs = Mtrrs::BOOT;
    mtrrs.variable[2] = VariableRange::new(0xC000_0000, 1 << 30, MemoryType::Uncached, 36).unwrap();
    mtrrs
}

#[test]
fn the_first_vcpu_starts_with_everything_write_back() {
    if !kvm() {
        return;
    }
    let code = read_register(Code::new(), CAPABILITIES).print_eax();
    let code = read_register(code, DEFAULT_TYPE).print_eax();
    let code = read_register(code, MASK).print_eax().power_off();
    assert_eq!(run(&code).words(), [0x508, 0x806, 0], "8 variable ranges, fixed ones, write-combining");
}

/// In real mode at 0x8000: `mov ecx, index; rdmsr; mov [target], eax` for each register, then `hlt` for ever.
fn trampoline(registers: &[(u32, u16)]) -> Code {
    let mut bytes = Vec::new();
    for (index, target) in registers {
        bytes.extend([0x66, 0xb9]);
        bytes.extend(index.to_le_bytes());
        bytes.extend([0x0f, 0x32, 0x31, 0xdb, 0x8e, 0xdb, 0x66, 0xa3]);
        bytes.extend(target.to_le_bytes());
    }
    bytes.extend([0xf4, 0xeb, 0xfd]);
    bytes.resize(bytes.len().next_multiple_of(4), 0xf4);
    let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    words.zip((0x8000..).step_by(4)).fold(Code::new(), |code, (word, at)| code.store(at, word))
}

/// A guest that writes a range, waits for a vCPU to come, and lets it read its registers.
fn guest_that_writes_a_range_and_lets_a_new_vcpu_read() -> Code {
    let code = trampoline(&[(BASE, 0x9000), (MASK, 0x9004), (DEFAULT_TYPE, 0x9008)]);
    let range = written().variable[2];
    let code = write_register(write_register(code, BASE, range.base), MASK, range.mask).store_byte(0xc000_0000, 123);
    let code = code.wait_for(CPU_EVENT, 1 << 8 | 1).store(CPU_SELECT, 1);
    let code = code.store(0xfee0_00f0, 0x1ff).store(0xfee0_0300, 0xc_4500).store(0xfee0_0300, 0xc_4608);
    let code = code.wait_for(0x9008, 0x806).load(0x9000).print_eax().load(0x9004).print_eax();
    code.store(CPU_OST_EVENT, 1).store(CPU_OST_STATUS, 0x80).store(CPU_OST_STATUS, 0)
}

#[test]
fn a_new_vcpu_has_what_the_guest_wrote_on_the_first() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    // It ends when a second one has come too.
    let code = guest_that_writes_a_range_and_lets_a_new_vcpu_read().wait_for(CPU_EVENT, 2 << 8 | 1);
    let mut config = machine(&directory, &code.power_off());
    (config.hot_plug, config.boot_timer, config.vcpus_max) = (true, true, Some(3));
    let vm = start(config).unwrap();
    let manager = vm.manager();
    wait_for_boot(&vm);
    assert_eq!(manager.resize_vcpus(2, LONG).unwrap().present, 2);
    let types = manager.memory_types().unwrap();
    assert!(types.equal);
    assert!(types.vcpus.values().all(|vcpu| vcpu.mtrrs == written()), "{types:?}");
    manager.pause().unwrap();
    assert_eq!(manager.memory_types().unwrap().vcpus, types.vcpus, "vCPUs that stand still answer too");
    manager.resume().unwrap();
    assert_eq!(type_of(&types, "32-bit PCI window"), Some(MemoryType::Uncached));
    assert_eq!(type_of(&types, "RAM"), Some(MemoryType::WriteBack));
    assert_eq!(type_of(&types, "64-bit PCI window"), Some(MemoryType::WriteBack));

    let _ended = manager.resize_vcpus(3, LONG);
    wait_for_end(&vm);
    let output = std::fs::read(directory.path().join("output")).unwrap();
    let words: Vec<u32> = output.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [0xc000_0000, 0xc000_0800], "the lower halves of what it wrote");
}

fn type_of(types: &MemoryTypesInfo, what: &str) -> Option<MemoryType> {
    types.ranges.iter().find(|typed| typed.range.what == what)?.memory_type
}
