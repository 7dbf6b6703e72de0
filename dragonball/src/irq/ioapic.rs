//! The I/O APIC: a few pins whose interrupts become messages to the local APICs, which KVM emulates.
//!
//! Source: Intel 82093AA data sheet; version 0x20 with its EOI register (Intel ICH9 data sheet, §13.5.1). It has fewer
//! pins than a PC's because the guest's kernel programs each one at boot, which costs an exit per register.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Message;
use super::pin::LevelSource;
use super::router::IrqRouter;

/// How many pins there are.
pub(crate) const PINS: u8 = 8;
/// The version that has an EOI register.
const VERSION: u32 = 0x20;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const REGISTER_TABLE: u8 = 0x10;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// Bits that exist: vector, modes, status, polarity, mask; destination.
const IMPLEMENTED: u64 = 0xff00_0000_0001_ffff;

/// Where messages go: the local APICs behind KVM, or a list in tests.
pub(crate) trait MessageSink: Send + Sync {
    /// Raises an interrupt.
    fn send(&self, message: Message);
    /// The message of a level-triggered pin, whose end of interrupt is wanted; nothing when it is no such pin.
    fn watch_end(&self, pin: u8, message: Option<Message>);
}

impl MessageSink for IrqRouter {
    fn send(&self, message: Message) {
        if let Err(error) = Self::send(self, message) {
            tracing::warn!(%error, ?message, "KVM did not take an interrupt");
        }
    }

    fn watch_end(&self, pin: u8, message: Option<Message>) {
        if let Err(error) = self.route_pin(pin, message) {
            tracing::warn!(%error, pin, "KVM did not take the route of a pin");
        }
    }
}

/// The registers: what the guest programmed, and what is pending.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct IoApicState {
    select: u8,
    id: u8,
    entries: [u64; PINS as usize],
    /// The level of each pin, one bit per pin.
    levels: u8,
}

impl Default for IoApicState {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS as usize], levels: 0 }
    }
}

/// The I/O APIC.
pub(crate) struct IoApic {
    sink: Arc<dyn MessageSink>,
    state: Mutex<IoApicState>,
    /// Pins and the sources that share them. Never held while the state is waited for.
    sources: Mutex<Vec<(u8, Weak<dyn LevelSource>)>>,
}

impl IoApic {
    pub(crate) fn new(sink: Arc<dyn MessageSink>) -> Self {
        Self { sink, state: Mutex::default(), sources: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, IoApicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a read at `offset` of the register page.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let state = self.state();
        match offset {
            SELECT => u32::from(state.select),
            WINDOW => state.register(),
            _ => 0,
        }
    }

    /// Takes a write at `offset` of the register page.
    pub(crate) fn write(&self, offset: u64, value: u32) {
        let mut state = self.state();
        let low_byte = value.to_le_bytes()[0];
        match offset {
            SELECT => state.select = low_byte,
            WINDOW => {
                if let Some(pin) = state.set_register(value) {
                    self.changed(&mut state, pin);
                }
            }
            EOI => {
                drop(state);
                self.end_of_interrupt(low_byte);
            }
            _ => {}
        }
    }

    /// An edge on `pin`.
    pub(crate) fn pulse(&self, pin: u8) {
        let state = self.state();
        if let Some(entry) = state.entries.get(usize::from(pin))
            && entry & (MASKED | LEVEL) == 0
        {
            self.sink.send(message_of(*entry));
        }
    }

    /// The level of `pin` is now `high`. Only a level-triggered pin listens.
    pub(crate) fn set_level(&self, pin: u8, high: bool) {
        let mut state = self.state();
        if pin >= PINS {
            return;
        }
        state.set_level(pin, high);
        self.deliver_level(&mut state, pin);
    }

    /// Lets `source` share `pin`, as long as it lives.
    pub(crate) fn connect(&self, pin: u8, source: Weak<dyn LevelSource>) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.retain(|(_, source)| source.strong_count() > 0);
        sources.push((pin, source));
    }

    /// The sources that share `pin`.
    fn sources(&self, pin: u8) -> Vec<Arc<dyn LevelSource>> {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.iter().filter(|(of, _)| *of == pin).filter_map(|(_, source)| source.upgrade()).collect()
    }

    /// The level of one of the sources of `pin` has changed.
    pub(crate) fn update(&self, pin: u8) {
        let sources = self.sources(pin);
        let mut state = self.state();
        state.set_level(pin, sources.iter().any(|source| source.is_high()));
        self.deliver_level(&mut state, pin);
    }

    /// A local APIC has finished the interrupt `vector`.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        let ended =
            |entry: &u64| *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && entry.to_le_bytes()[0] == vector;
        let pins: Vec<u8> = {
            let state = self.state();
            (0..PINS).filter(|pin| ended(&state.entries[usize::from(*pin)])).collect()
        };
        for pin in pins {
            // They may call the host: not under the lock. The pin delivers nothing meanwhile.
            let sources = self.sources(pin);
            sources.iter().for_each(|source| source.ended());
            let mut state = self.state();
            if !sources.is_empty() {
                state.set_level(pin, sources.iter().any(|source| source.is_high()));
            }
            state.entries[usize::from(pin)] &= !REMOTE_IRR;
            self.deliver_level(&mut state, pin);
        }
    }

    /// The guest programmed `pin`.
    fn changed(&self, state: &mut IoApicState, pin: u8) {
        let entry = &mut state.entries[usize::from(pin)];
        if *entry & LEVEL == 0 {
            // Going to edge and back is how kernels clear a stuck interrupt.
            *entry &= !REMOTE_IRR;
        }
        // Masked or not: kernels mask a pin before they end its interrupt.
        let watched = *entry & LEVEL != 0;
        self.sink.watch_end(pin, watched.then(|| message_of(*entry)));
        self.deliver_level(state, pin);
    }

    fn deliver_level(&self, state: &mut IoApicState, pin: u8) {
        let high = state.levels & 1 << pin != 0;
        let entry = &mut state.entries[usize::from(pin)];
        if high && *entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL {
            *entry |= REMOTE_IRR;
            self.sink.send(message_of(*entry));
        }
    }

    /// The state to be saved.
    #[cfg_attr(
        not(any(test, feature = "testing")),
        expect(dead_code, reason = "saved with the whole machine, which comes with templates")
    )]
    pub(crate) fn save(&self) -> IoApicState {
        *self.state()
    }

    /// Takes a saved state, before the vCPUs run.
    #[cfg_attr(
        not(any(test, feature = "testing")),
        expect(dead_code, reason = "restored with the whole machine, which comes with templates")
    )]
    pub(crate) fn restore(&self, saved: &IoApicState) {
        let mut state = self.state();
        *state = *saved;
        for pin in 0..PINS {
            state.entries[usize::from(pin)] &= IMPLEMENTED;
            self.changed(&mut state, pin);
        }
    }
}

impl IoApicState {
    fn set_level(&mut self, pin: u8, high: bool) {
        self.levels = if high { self.levels | 1 << pin } else { self.levels & !(1 << pin) };
    }

    /// Which pin the selected register is of, and whether it is the upper half of the pin's entry.
    fn selected_entry(&self) -> Option<(u8, bool)> {
        let index = self.select.checked_sub(REGISTER_TABLE)?;
        (index / 2 < PINS).then_some((index / 2, index % 2 == 1))
    }

    fn register(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.id) << 24,
            REGISTER_VERSION => VERSION | u32::from(PINS - 1) << 16,
            _ => self.selected_entry().map_or(0, |(pin, upper)| {
                let bytes = self.entries[usize::from(pin)].to_le_bytes();
                let at = if upper { 4 } else { 0 };
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }),
        }
    }

    /// Writes the selected register; gives the pin when it was one of an entry.
    fn set_register(&mut self, value: u32) -> Option<u8> {
        if self.select == REGISTER_ID {
            self.id = value.to_le_bytes()[3] & 0x0f;
            return None;
        }
        let (pin, upper) = self.selected_entry()?;
        let entry = &mut self.entries[usize::from(pin)];
        let (mask, value) =
            if upper { (0xffff_ffff_u64 << 32, u64::from(value) << 32) } else { (0xffff_ffff, u64::from(value)) };
        let writable = mask & IMPLEMENTED & !READ_ONLY;
        *entry = *entry & !writable | value & writable;
        Some(pin)
    }
}

/// The message of an entry (82093AA §3.2.4; Intel SDM vol. 3, §11.11).
fn message_of(entry: u64) -> Message {
    const LOCAL_APICS: u64 = 0xfee0_0000;
    const ASSERT: u64 = 1 << 14;
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let vector_and_mode = entry & 0x7ff;
    let data = vector_and_mode | ASSERT | entry & LEVEL;
    // At most 16 bits are set.
    let data = u32::try_from(data).unwrap_or_default();
    Message { address: LOCAL_APICS | destination << 12 | logical << 2, data }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What was sent, and whose ends are watched.
    #[derive(Default)]
    struct Sent(Mutex<Vec<Message>>, Mutex<std::collections::BTreeSet<u8>>);

    impl MessageSink for Sent {
        fn send(&self, message: Message) {
            self.0.lock().unwrap().push(message);
        }
        fn watch_end(&self, pin: u8, message: Option<Message>) {
            let mut watched = self.1.lock().unwrap();
            if message.is_some() {
                watched.insert(pin)
            } else {
                watched.remove(&pin)
            };
        }
    }

    fn ioapic() -> (Arc<Sent>, IoApic) {
        let sent = Arc::new(Sent::default());
        (Arc::clone(&sent), IoApic::new(sent))
    }

    fn program(ioapic: &IoApic, pin: u8, entry: u64) {
        for (register, half) in [(0, entry & 0xffff_ffff), (1, entry >> 32)] {
            ioapic.write(SELECT, u32::from(REGISTER_TABLE + 2 * pin + register));
            ioapic.write(WINDOW, u32::try_from(half).unwrap());
        }
    }

    fn count(sent: &Sent) -> usize {
        sent.0.lock().unwrap().len()
    }

    #[test]
    fn it_says_how_many_pins_it_has() {
        let (_, ioapic) = ioapic();
        ioapic.write(SELECT, 1);
        assert_eq!(ioapic.read(WINDOW), 0x0007_0020);
    }

    #[test]
    fn an_edge_goes_to_the_programmed_vector_and_processor() {
        let (sent, ioapic) = ioapic();
        program(&ioapic, 4, 3 << 56 | 0x41);
        ioapic.pulse(4);
        ioapic.pulse(5);
        assert_eq!(*sent.0.lock().unwrap(), [Message { address: 0xfee0_3000, data: 0x4041 }]);
    }

    #[test]
    fn a_masked_pin_is_silent() {
        let (sent, ioapic) = ioapic();
        program(&ioapic, 4, MASKED | 0x41);
        ioapic.pulse(4);
        assert_eq!(count(&sent), 0);
    }

    #[test]
    fn a_level_is_delivered_again_after_its_end_while_it_stays_high() {
        let (sent, ioapic) = ioapic();
        program(&ioapic, 5, LEVEL | 0x51);
        ioapic.set_level(5, true);
        ioapic.set_level(5, true);
        assert_eq!(count(&sent), 1, "not before its end");
        ioapic.end_of_interrupt(0x51);
        assert_eq!(count(&sent), 2);
        ioapic.set_level(5, false);
        ioapic.write(EOI, 0x51);
        assert_eq!(count(&sent), 2);
    }

    #[test]
    fn a_level_that_rose_while_masked_is_delivered_when_unmasked() {
        let (sent, ioapic) = ioapic();
        program(&ioapic, 5, LEVEL | MASKED | 0x51);
        ioapic.set_level(5, true);
        assert_eq!(count(&sent), 0);
        program(&ioapic, 5, LEVEL | 0x51);
        assert_eq!(count(&sent), 1);
    }

    #[test]
    fn the_end_of_an_interrupt_is_seen_whose_pin_was_masked_meanwhile() {
        let (sent, ioapic) = ioapic();
        program(&ioapic, 5, LEVEL | 0x51);
        ioapic.set_level(5, true);
        program(&ioapic, 5, LEVEL | MASKED | 0x51);
        assert!(sent.1.lock().unwrap().contains(&5));
        ioapic.end_of_interrupt(0x51);
        program(&ioapic, 5, LEVEL | 0x51);
        assert_eq!(count(&sent), 2, "the level is still high");
        program(&ioapic, 5, 0x51);
        assert!(sent.1.lock().unwrap().is_empty());
    }

    #[test]
    fn a_saved_state_continues_where_it_was() {
        let (_, first) = ioapic();
        program(&first, 5, LEVEL | 0x51);
        first.set_level(5, true);
        let bytes = postcard::to_stdvec(&first.save()).unwrap();
        let (sent, second) = ioapic();
        second.restore(&postcard::from_bytes(&bytes).unwrap());
        assert_eq!(second.save(), first.save());
        second.end_of_interrupt(0x51);
        assert_eq!(count(&sent), 1, "the level is still high");
    }

    proptest! {
        #[test]
        fn no_access_panics_and_status_bits_are_read_only(accesses in prop::collection::vec((0_u64..0x50, any::<u32>()), 0..64)) {
            let (_, ioapic) = ioapic();
            for (offset, value) in accesses {
                ioapic.write(offset & !0xf, value);
                ioapic.read(offset & !0xf);
            }
            prop_assert!(ioapic.save().entries.iter().all(|entry| entry & READ_ONLY == 0));
        }
    }
}
