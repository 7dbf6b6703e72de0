//! Standard input for the debug UART.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use crate::platform::uart::Uart;

/// Forwards what is typed.
pub(crate) struct Input {
    uart: Arc<Uart>,
}

/// Whether there will be more input.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Flow {
    /// Maybe.
    Open,
    /// No: it has ended or failed.
    Ended,
}

impl Input {
    pub(crate) fn new(uart: Arc<Uart>) -> Self {
        Self { uart }
    }

    /// Hands what can be read now to the UART. What its buffer has no room for is lost, as on a serial line.
    pub(crate) fn forward(&mut self) -> Flow {
        let mut buffer = [0; 32];
        // SAFETY: the buffer is valid for its length. Standard input is not owned, only read.
        let count = unsafe { libc::read(libc::STDIN_FILENO, buffer.as_mut_ptr().cast(), buffer.len()) };
        match usize::try_from(count) {
            Ok(0) | Err(_) => Flow::Ended,
            Ok(count) => {
                self.uart.input(&buffer[..count]);
                Flow::Open
            }
        }
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        libc::STDIN_FILENO
    }
}
