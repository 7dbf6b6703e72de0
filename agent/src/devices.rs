//! Which devices a container may use: a BPF program on its cgroup (cgroup-v2, "Device controller").
//!
//! libcontainer would do this through libbpf, which brings an ELF loader for a program of a few instructions. The
//! program here is made of the container's rules, last rule first: a rule that matches the device settles the accesses
//! that it names, and what no rule allows is denied, as with runc.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use bpf::Instruction;
use bpf::code::{AND, JUMP, JUMP_IF_ANY_BIT, JUMP_IF_NOT, MOVE, MOVE_REGISTER, SHIFT_RIGHT};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::cgroup::Cgroup;

/// Rules of one container: far below the kernel's limit of a million instructions.
const LIMIT: usize = 4096;

// Accesses and device types of `struct bpf_cgroup_dev_ctx` (linux/bpf.h).
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// One rule, with `None` for "all".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: i32,
}

/// Devices that every container may use, whatever its rules say; the same as runc's: any may be made (not used), and
/// null, zero, full, random, urandom, tty, ptmx and the pseudo terminals may be used.
const ALWAYS: [Rule; 10] = [
    Rule { allow: true, kind: Some(CHARACTER), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(BLOCK), major: None, minor: None, access: MKNOD },
    usable(1, Some(3)),
    usable(1, Some(5)),
    usable(1, Some(7)),
    usable(1, Some(8)),
    usable(1, Some(9)),
    usable(5, Some(0)),
    usable(5, Some(2)),
    usable(136, None),
];

const fn usable(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: MKNOD | READ | WRITE }
}

/// Why the devices of a container could not be restricted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DevicesError {
    #[error("{0} device rules: the limit is {LIMIT}")]
    TooMany(usize),
    #[error("device rule with {what} {value}: {why}")]
    Invalid { what: &'static str, value: String, why: &'static str },
    #[error("cannot restrict the devices of {cgroup}: {source}")]
    Kernel { cgroup: String, source: io::Error },
}

/// Restricts the devices of a container's processes for as long as the cgroup exists.
pub(crate) fn restrict(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup]) -> Result<(), DevicesError> {
    if rules.len() > LIMIT {
        return Err(DevicesError::TooMany(rules.len()));
    }
    let mut parsed = rules.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    parsed.extend(ALWAYS);
    let attach = || attach(&File::open(cgroup.directory())?, &compile(&parsed));
    attach().map_err(|source| DevicesError::Kernel { cgroup: cgroup.directory().display().to_string(), source })
}

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule, DevicesError> {
    let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => return Err(invalid("type", "p", "a FIFO is no device")),
    };
    let access = rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
    let access = access.chars().try_fold(0, |bits, letter| match letter {
        'r' => Ok(bits | READ),
        'w' => Ok(bits | WRITE),
        'm' => Ok(bits | MKNOD),
        _ => Err(invalid("access", access, "expected letters of rwm")),
    })?;
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number("major", rule.major())?,
        minor: number("minor", rule.minor())?,
        access,
    })
}

/// A device number; absent and -1 mean all.
fn number(what: &'static str, number: Option<i64>) -> Result<Option<u32>, DevicesError> {
    match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| invalid(what, &number.to_string(), "expected 0 to 4294967295 or -1")),
    }
}

fn invalid(what: &'static str, value: &str, why: &'static str) -> DevicesError {
    DevicesError::Invalid { what, value: value.to_owned(), why }
}

// Registers: the verdict, the context, what is left to be allowed, and the device.
const VERDICT: u8 = 0;
const CONTEXT: u8 = 1;
const LEFT: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const fn op(code: u8, register: u8, immediate: i32) -> Instruction {
    Instruction::new(code, register, 0, 0, immediate)
}

const fn jump(code: u8, register: u8, immediate: i32, offset: i16) -> Instruction {
    Instruction::new(code, register, 0, offset, immediate)
}

/// The program: 1 allows, 0 denies.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        Instruction::load_word(LEFT, CONTEXT, 0),
        Instruction::new(MOVE_REGISTER, KIND, LEFT, 0, 0),
        op(AND, KIND, 0xffff),
        op(SHIFT_RIGHT, LEFT, 16),
        Instruction::load_word(MAJOR, CONTEXT, 4),
        Instruction::load_word(MINOR, CONTEXT, 8),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(rule));
    }
    program.extend([op(MOVE, VERDICT, 0), Instruction::EXIT]);
    program
}

fn compile_rule(rule: &Rule) -> Vec<Instruction> {
    let verdict = [op(MOVE, VERDICT, i32::from(rule.allow)), Instruction::EXIT];
    let action = if rule.allow {
        // What the rule allows need not be asked of earlier rules.
        vec![op(AND, LEFT, !rule.access & (MKNOD | READ | WRITE)), jump(JUMP_IF_NOT, LEFT, 0, 2)]
    } else {
        vec![jump(JUMP_IF_ANY_BIT, LEFT, rule.access, 1), jump(JUMP, 0, 0, 2)]
    };
    let conditions =
        [(KIND, rule.kind), (MAJOR, rule.major.map(u32::cast_signed)), (MINOR, rule.minor.map(u32::cast_signed))];
    let conditions: Vec<_> = conditions.iter().filter_map(|(register, value)| value.map(|v| (*register, v))).collect();
    let mut program = Vec::with_capacity(7);
    // Each condition skips the rest of the rule: at most the six instructions behind the first condition.
    let mut rest = i16::try_from(conditions.len() + action.len() + verdict.len()).unwrap_or(i16::MAX);
    for (register, value) in conditions {
        rest -= 1;
        program.push(jump(JUMP_IF_NOT, register, value, rest));
    }
    program.extend(action);
    program.extend(verdict);
    program
}

// `enum bpf_prog_type`, `enum bpf_attach_type`, and a flag that leaves programs of others in place.
const CGROUP_DEVICE_PROGRAM: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

fn attach(cgroup: &File, program: &[Instruction]) -> io::Result<()> {
    let program = bpf::load(CGROUP_DEVICE_PROGRAM, 0, program)?;
    bpf::attach(cgroup.as_fd(), &program, CGROUP_DEVICE, ALLOW_MULTI)
}

#[cfg(test)]
mod tests {
    use bpf::code::{EXIT, LOAD_WORD};

    use super::*;

    /// Executes a program as the kernel would, for the instructions that are used here.
    fn run(program: &[Instruction], context: [u32; 3]) -> u32 {
        let mut registers = [0u32; 6];
        let mut at = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, value) = (usize::from(pair & 15), immediate.cast_unsigned());
            let skip = match code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(offset).expect("an offset") / 4];
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[usize::from(pair >> 4)];
                    false
                }
                MOVE => {
                    registers[to] = value;
                    false
                }
                AND => {
                    registers[to] &= value;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= value;
                    false
                }
                JUMP => true,
                JUMP_IF_NOT => registers[to] != value,
                JUMP_IF_ANY_BIT => registers[to] & value != 0,
                EXIT => return registers[0],
                code => panic!("unknown instruction {code:#x}"),
            };
            at += 1 + if skip { usize::try_from(offset).expect("forward") } else { 0 };
        }
    }

    /// What the rules mean, bit by bit: the last rule that matches decides.
    fn meaning(rules: &[Rule], kind: i32, major: u32, minor: u32, access: i32) -> bool {
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            let matches = |rule: &&Rule| {
                rule.kind.is_none_or(|k| k == kind)
                    && rule.major.is_none_or(|m| m == major)
                    && rule.minor.is_none_or(|m| m == minor)
                    && rule.access & bit != 0
            };
            rules.iter().rev().find(matches).is_some_and(|rule| rule.allow)
        })
    }

    #[test]
    fn the_program_decides_as_the_rules_mean() {
        let any = Rule { allow: false, kind: None, major: None, minor: None, access: 7 };
        let rule_sets: [&[Rule]; 6] = [
            &[],
            &[any],
            &[Rule { allow: true, ..any }],
            &[any, Rule { allow: true, kind: Some(BLOCK), major: Some(8), access: READ, ..any }],
            &[
                Rule { allow: true, ..any },
                Rule { kind: Some(CHARACTER), major: Some(1), minor: Some(u32::MAX), access: WRITE, ..any },
            ],
            &[
                any,
                Rule { allow: true, kind: Some(CHARACTER), access: READ | WRITE, ..any },
                Rule { minor: Some(3), access: WRITE, ..any },
                Rule { allow: true, major: Some(8), minor: Some(3), ..any },
            ],
        ];
        for rules in rule_sets.map(|rules| [rules, &ALWAYS].concat()).iter().map(Vec::as_slice).chain(rule_sets) {
            let program = compile(rules);
            for kind in [BLOCK, CHARACTER] {
                for (major, minor) in [(1, 3), (1, u32::MAX), (8, 3), (8, 0), (136, 9), (5, 2), (200, 200)] {
                    for access in 1..=7 {
                        let context = [(access << 16 | kind).cast_unsigned(), major, minor];
                        let expected = u32::from(meaning(rules, kind, major, minor, access));
                        assert_eq!(run(&program, context), expected, "{rules:?} {kind} {major}:{minor} {access}");
                    }
                }
            }
        }
    }

    #[test]
    fn rules_are_read_as_the_specification_writes_them() {
        let rule = |json: &str| parse(&serde_json::from_str(json).expect("a rule")).ok();
        let all = Rule { allow: false, kind: None, major: None, minor: None, access: 7 };
        assert_eq!(rule(r#"{"allow": false, "access": "rwm"}"#), Some(all));
        assert_eq!(rule(r#"{"allow": false, "type": "a", "major": -1, "minor": -1}"#), Some(all));
        let disk = Rule { allow: true, kind: Some(BLOCK), major: Some(8), minor: Some(0), access: READ };
        assert_eq!(rule(r#"{"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"}"#), Some(disk));
        assert_eq!(rule(r#"{"allow": true, "type": "p"}"#), None);
        assert_eq!(rule(r#"{"allow": true, "access": "x"}"#), None);
        assert_eq!(rule(r#"{"allow": true, "major": 4294967296}"#), None);
    }
}
