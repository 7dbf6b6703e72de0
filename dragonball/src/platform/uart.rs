//! The debug UART: a 16550 whose output goes to a file or standard output.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::irq::ioapic::IoApic;
use crate::irq::pins;
use crate::virtio::console::ConsoleTail;

struct Pin(Arc<IoApic>);

impl Trigger for Pin {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse(pins::UART);
        Ok(())
    }
}

/// Output that is kept for error reports on its way.
struct Tee {
    output: Box<dyn Write + Send>,
    tail: ConsoleTail,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.append(bytes);
        self.output.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// The debug UART. A guest that writes to it waits for the host's output to take the byte: it is for debugging only.
pub(crate) struct Uart(Mutex<Serial<Pin, NoEvents, Tee>>);

impl Uart {
    pub(crate) fn new(ioapic: Arc<IoApic>, output: Box<dyn Write + Send>, tail: ConsoleTail) -> Self {
        Self(Mutex::new(Serial::new(Pin(ioapic), Tee { output, tail })))
    }

    /// A UART that goes on where another was saved.
    ///
    /// # Errors
    /// When the state holds more input than a UART has room for.
    #[cfg_attr(not(test), expect(dead_code, reason = "restored with the whole machine, which comes with templates"))]
    pub(crate) fn restore(
        ioapic: Arc<IoApic>,
        output: Box<dyn Write + Send>,
        tail: ConsoleTail,
        saved: &SavedUart,
    ) -> io::Result<Self> {
        let serial = Serial::from_state(&saved.into(), Pin(ioapic), NoEvents, Tee { output, tail });
        serial.map(|serial| Self(Mutex::new(serial))).map_err(|error| io::Error::other(format!("{error:?}")))
    }

    fn serial(&self) -> MutexGuard<'_, Serial<Pin, NoEvents, Tee>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a read of register `offset`, 0 to 7.
    pub(crate) fn read(&self, offset: u8) -> u8 {
        self.serial().read(offset)
    }

    /// Takes a write to register `offset`, 0 to 7. Output that the host does not take is lost.
    pub(crate) fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.serial().write(offset, value) {
            tracing::debug!(?error, "the debug UART's output was not taken");
        }
    }

    /// Hands input to the guest and says how much it took: the UART holds 64 bytes.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        self.serial().enqueue_raw_bytes(bytes).unwrap_or_default()
    }

    /// The state to be saved.
    #[cfg_attr(not(test), expect(dead_code, reason = "saved with the whole machine, which comes with templates"))]
    pub(crate) fn save(&self) -> SavedUart {
        SavedUart::from(&self.serial().state())
    }
}

/// The registers in a form that can be stored; the same names as the 16550's.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct SavedUart {
    registers: [u8; 9],
    input: Vec<u8>,
}

impl From<&SerialState> for SavedUart {
    fn from(state: &SerialState) -> Self {
        Self {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer.clone(),
        }
    }
}

impl From<&SavedUart> for SerialState {
    fn from(saved: &SavedUart) -> Self {
        let [low, high, enable, identification, line_control, line_status, modem_control, modem_status, scratch] =
            saved.registers;
        Self {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: saved.input.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::Message;
    use crate::irq::ioapic::MessageSink;

    struct Nowhere;

    impl MessageSink for Nowhere {
        fn send(&self, _message: Message) {}
        fn watch_end(&self, _pin: u8, _message: Option<Message>) {}
    }

    fn ioapic() -> Arc<IoApic> {
        Arc::new(IoApic::new(Arc::new(Nowhere)))
    }

    fn uart() -> (ConsoleTail, Uart) {
        let tail = ConsoleTail::default();
        (tail.clone(), Uart::new(ioapic(), Box::new(io::sink()), tail))
    }

    fn restored(saved: &SavedUart) -> io::Result<Uart> {
        Uart::restore(ioapic(), Box::new(io::sink()), ConsoleTail::default(), saved)
    }

    #[test]
    fn output_is_kept_and_input_is_read() {
        let (tail, uart) = uart();
        for byte in *b"hello" {
            uart.write(0, byte);
        }
        assert_eq!(tail.text(), "hello");
        assert_eq!(uart.input(b"x"), 1);
        assert_eq!(uart.read(0), b'x');
    }

    #[test]
    fn a_saved_state_comes_back_whole() {
        let (_, uart) = uart();
        uart.write(3, 0x1b);
        uart.write(7, 0x5a);
        uart.input(b"waiting");
        let saved = uart.save();
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let uart = restored(&postcard::from_bytes(&bytes).unwrap()).unwrap();
        assert_eq!(uart.save(), saved);
        assert_eq!([uart.read(3), uart.read(7), uart.read(0), uart.read(0)], [0x1b, 0x5a, b'w', b'a']);
    }

    #[test]
    fn a_state_with_more_input_than_a_uart_holds_is_refused() {
        let (_, uart) = uart();
        let saved = SavedUart { input: vec![0; 65], ..uart.save() };
        assert!(restored(&saved).is_err());
    }
}
