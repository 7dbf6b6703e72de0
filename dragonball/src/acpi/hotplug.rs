//! Hot-plug in AML: an event device whose method asks the hot-plug registers what happened, and the PCI slots and vCPUs
//! that it notifies.
//!
//! Sources: ACPI 6.5, §5.6.9 (generic event device), §6.3 (device insertion and removal), §8.4 (processor containers);
//! PCI firmware specification 3.3, §4.6.5 (`_DSM` function 5).

use acpi_tables::aml::{
    Acquire, And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, Interrupt, Local, Method, MethodCall, Mutex, Name, NotEqual, Notify, ONE, OpRegion,
    OpRegionSpace, Path, Release, ResourceTemplate, Return, Scope, ShiftRight, Store, Uuid, While, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};

use crate::irq::pins;
use crate::memory::layout::HOT_PLUG;
use crate::platform::hotplug::registers;

/// Waits for a mutex without a limit (§19.6.2).
const FOREVER: u16 = 0xffff;

fn path(name: &str) -> Path {
    Path::new(name)
}

/// AML that was made already.
struct Made(Vec<u8>);

impl Aml for Made {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn made(object: &dyn Aml) -> Made {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    Made(bytes)
}

fn with_all(children: &[Made]) -> Vec<&dyn Aml> {
    children.iter().map(|child| child as &dyn Aml).collect()
}

/// Everything for hot-plug: `slots` of the PCI bus, and as many vCPUs as there may ever be.
pub(super) fn build(sink: &mut dyn AmlSink, slots: &[u8], vcpus: u8, vcpus_max: u8) {
    registers_device(sink);
    pci_slots(sink, slots);
    if vcpus_max > vcpus {
        processors(sink, vcpus_max);
    }
    power_button(sink);
    event_device(sink, vcpus_max > vcpus);
}

/// The registers, as fields that all methods here can name.
fn registers_device(sink: &mut dyn AmlSink) {
    let fields = [
        (registers::EVENTS, *b"EVTS"),
        (registers::PCI_UP, *b"PCIU"),
        (registers::PCI_DOWN, *b"PCID"),
        (registers::PCI_EJECT, *b"PCIE"),
        (registers::PCI_SETTLED, *b"PCIS"),
        (registers::CPU_SELECT, *b"CSEL"),
        (registers::CPU_STATUS, *b"CSTS"),
        (registers::CPU_EVENT, *b"CEVT"),
        (registers::CPU_EJECT, *b"CEJE"),
        (registers::CPU_OST_EVENT, *b"COSE"),
        (registers::CPU_OST_STATUS, *b"COSS"),
    ];
    const BITS: usize = 32;
    let mut entries = Vec::new();
    let mut end = 0;
    for (offset, name) in fields {
        if offset > end {
            entries.push(FieldEntry::Reserved(usize::try_from(offset - end).unwrap_or_default() * 8));
        }
        entries.push(FieldEntry::Named(name, BITS));
        end = offset + 4;
    }
    let (start, length) = (HOT_PLUG.start, end);
    let region = OpRegion::new(path("HPRG"), OpRegionSpace::SystemMemory, &start, &length);
    let field = Field::new(
        path("HPRG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        entries,
    );
    Scope::new(path("_SB_"), vec![&region, &field]).to_aml_bytes(sink);
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:03}")
}

/// The slots that devices come to and go from, and the method that tells each what it is about.
fn pci_slots(sink: &mut dyn AmlSink, slots: &[u8]) {
    let mut children: Vec<Made> = slots.iter().map(|slot| pci_slot(*slot)).collect();
    children.push(scan_slots(slots));
    children.push(preserve_resources());
    Scope::new(path("_SB_.PCI0"), with_all(&children)).to_aml_bytes(sink);
}

/// A slot. Its `_OST` is called when all that follows from a notification is done: for a new device, when a driver of the
/// guest has taken it, or none would.
fn pci_slot(slot: u8) -> Made {
    let bit = 1_u32 << slot;
    let register = path("\\_SB_.PCIS");
    let settled = Store::new(&register, &bit);
    let is_new = Equal::new(&Arg(0), &registers::NOTIFY_BUS_CHECK);
    made(&Device::new(
        path(&slot_name(slot)),
        vec![
            &Name::new(path("_ADR"), &(u32::from(slot) << 16)),
            &Name::new(path("_SUN"), &slot),
            &Method::new(path("_EJ0"), 1, false, vec![&Store::new(&path("\\_SB_.PCIE"), &bit)]),
            &Method::new(path("_OST"), 3, false, vec![&If::new(&is_new, vec![&settled])]),
        ],
    ))
}

/// Slots that are asked about together: of a method, an interpreter pays for what it looks at, and skips the rest.
const SLOT_GROUP: usize = 8;

/// `PCNT`: reads which slots something is asked of, and notifies them.
///
/// A slot that has got a device is told of its bus, not of its device: of a device, Linux goes on to look at all slots of
/// the bus, the empty ones too (`drivers/pci/hotplug/acpiphp_glue.c`), and each look leaves the guest.
fn scan_slots(slots: &[u8]) -> Made {
    let mut body = Vec::new();
    for (register, notification) in
        [("\\_SB_.PCIU", registers::NOTIFY_BUS_CHECK), ("\\_SB_.PCID", registers::NOTIFY_EJECT)]
    {
        body.push(made(&Store::new(&Local(0), &path(register))));
        let in_groups: Vec<Made> = slots.chunks(SLOT_GROUP).map(|group| notify_group(group, notification)).collect();
        body.push(made(&If::new(&Local(0), with_all(&in_groups))));
    }
    made(&Method::new(path("PCNT"), 0, true, with_all(&body)))
}

/// Notifies the slots of `group` whose bits are set in `Local0`.
fn notify_group(group: &[u8], notification: u8) -> Made {
    let notify = |slot: &u8| {
        let (device, bit) = (path(&slot_name(*slot)), 1_u32 << slot);
        made(&If::new(&And::new(&ZERO, &Local(0), &bit), vec![&Notify::new(&device, &notification)]))
    };
    let children: Vec<Made> = group.iter().map(notify).collect();
    let bits = group.iter().fold(0_u32, |bits, slot| bits | 1 << slot);
    made(&If::new(&And::new(&ZERO, &Local(0), &bits), with_all(&children)))
}

/// `_DSM` function 5: the guest keeps the addresses that devices come with.
fn preserve_resources() -> Made {
    const PRESERVE: u8 = 5;
    let uuid = Uuid::new("E5C937D0-3553-4D7A-9117-EA4D19C3434D");
    // Function 0 tells which functions there are.
    let functions = BufferData::new(vec![1 | 1 << PRESERVE]);
    let of_function =
        |number: u8, answer: &dyn Aml| made(&If::new(&Equal::new(&Arg(2), &number), vec![&Return::new(answer)]));
    let answers = [of_function(0, &functions), of_function(PRESERVE, &ZERO)];
    made(&Method::new(
        path("_DSM"),
        4,
        true,
        vec![&If::new(&Equal::new(&Arg(0), &uuid), with_all(&answers)), &Return::new(&BufferData::new(vec![0]))],
    ))
}

fn processor_name(id: u8) -> String {
    format!("C{id:03}")
}

/// All vCPUs that may ever be there, in a processor container.
fn processors(sink: &mut dyn AmlSink, count: u8) {
    let mut children = vec![
        made(&Name::new(path("_HID"), &"ACPI0010")),
        made(&Name::new(path("_CID"), &EISAName::new("PNP0A05"))),
        made(&Mutex::new(path("CPLK"), 0)),
        cpu_status(),
        cpu_eject(),
        cpu_report(),
        notify_cpu(count),
        scan_cpus(),
    ];
    children.extend((0..count).map(processor));
    Device::new(path("_SB_.CPUS"), with_all(&children)).to_aml_bytes(sink);
}

/// A body that runs with the registers of the vCPU `Arg0` selected.
fn selected(name: &str, arguments: u8, body: &[&dyn Aml]) -> Made {
    let acquire = Acquire::new(path("CPLK"), FOREVER);
    let selector = path("\\_SB_.CSEL");
    let select = Store::new(&selector, &Arg(0));
    let release = Release::new(path("CPLK"));
    let mut all: Vec<&dyn Aml> = vec![&acquire, &select];
    all.extend(body);
    all.push(&release);
    let result = Return::new(&Local(0));
    all.push(&result);
    made(&Method::new(path(name), arguments, true, all))
}

/// `CSTA (id)`: what `_STA` says, all or nothing.
fn cpu_status() -> Made {
    const PRESENT_AND_WORKING: u8 = 0xf;
    selected(
        "CSTA",
        1,
        &[
            &Store::new(&Local(0), &ZERO),
            &If::new(&Equal::new(&path("\\_SB_.CSTS"), &ONE), vec![&Store::new(&Local(0), &PRESENT_AND_WORKING)]),
        ],
    )
}

/// `CEJ0 (id)`.
fn cpu_eject() -> Made {
    selected("CEJ0", 1, &[&Store::new(&path("\\_SB_.CEJE"), &ONE), &Store::new(&Local(0), &ZERO)])
}

/// `COST (id, event, status)`.
fn cpu_report() -> Made {
    selected(
        "COST",
        3,
        &[
            &Store::new(&path("\\_SB_.COSE"), &Arg(1)),
            &Store::new(&path("\\_SB_.COSS"), &Arg(2)),
            &Store::new(&Local(0), &ZERO),
        ],
    )
}

/// `CTFY (id, notification)`.
fn notify_cpu(count: u8) -> Made {
    let body: Vec<Made> = (0..count)
        .map(|id| {
            let device = path(&processor_name(id));
            made(&If::new(&Equal::new(&Arg(0), &id), vec![&Notify::new(&device, &Arg(1))]))
        })
        .collect();
    made(&Method::new(path("CTFY"), 2, true, with_all(&body)))
}

/// `CSCN`: takes one event after the other.
fn scan_cpus() -> Made {
    const NOTIFICATION: u8 = 0xff;
    const NUMBER_SHIFT: u8 = 8;
    let event = path("\\_SB_.CEVT");
    let next = Store::new(&Local(0), &event);
    made(&Method::new(
        path("CSCN"),
        0,
        true,
        vec![
            &next,
            &While::new(
                &NotEqual::new(&Local(0), &ZERO),
                vec![
                    &And::new(&Local(1), &Local(0), &NOTIFICATION),
                    &ShiftRight::new(&Local(2), &Local(0), &NUMBER_SHIFT),
                    &MethodCall::new(path("CTFY"), vec![&Local(2), &Local(1)]),
                    &next,
                ],
            ),
        ],
    ))
}

fn processor(id: u8) -> Made {
    let mut apic = Vec::new();
    ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut apic);
    let status = MethodCall::new(path("CSTA"), vec![&id]);
    let eject = MethodCall::new(path("CEJ0"), vec![&id]);
    let report = MethodCall::new(path("COST"), vec![&id, &Arg(0), &Arg(1)]);
    let eject = Method::new(path("_EJ0"), 1, true, vec![&eject]);
    let mut children: Vec<&dyn Aml> = Vec::new();
    let parts = [
        made(&Name::new(path("_HID"), &"ACPI0007")),
        made(&Name::new(path("_UID"), &id)),
        made(&Method::new(path("_STA"), 0, true, vec![&Return::new(&status)])),
        made(&Method::new(path("_MAT"), 0, true, vec![&Return::new(&BufferData::new(apic))])),
        made(&Method::new(path("_OST"), 3, true, vec![&report])),
    ];
    children.extend(with_all(&parts));
    // The first vCPU stays: kernels cannot do without it.
    if id > 0 {
        children.push(&eject);
    }
    made(&Device::new(path(&processor_name(id)), children))
}

fn power_button(sink: &mut dyn AmlSink) {
    Device::new(path("_SB_.PWRB"), vec![&Name::new(path("_HID"), &EISAName::new("PNP0C0C"))]).to_aml_bytes(sink);
}

/// The generic event device: its interrupt runs `_EVT`.
fn event_device(sink: &mut dyn AmlSink, with_vcpus: bool) {
    const POWER_BUTTON_PRESSED: u8 = 0x80;
    let interrupt = Interrupt::new(true, false, false, false, u32::from(pins::HOT_PLUG));
    let on = |event: u32, action: &dyn Aml| made(&If::new(&And::new(&ZERO, &Local(0), &event), vec![action]));
    let mut body = vec![
        made(&Store::new(&Local(0), &path("\\_SB_.EVTS"))),
        on(registers::EVENT_PCI, &MethodCall::new(path("\\_SB_.PCI0.PCNT"), vec![])),
    ];
    if with_vcpus {
        body.push(on(registers::EVENT_CPU, &MethodCall::new(path("\\_SB_.CPUS.CSCN"), vec![])));
    }
    let button = path("\\_SB_.PWRB");
    body.push(on(registers::EVENT_POWER_BUTTON, &Notify::new(&button, &POWER_BUTTON_PRESSED)));
    Device::new(
        path("_SB_.GED_"),
        vec![
            &Name::new(path("_HID"), &"ACPI0013"),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(path("_EVT"), 1, true, with_all(&body)),
        ],
    )
    .to_aml_bytes(sink);
}
