//! The frames on a command port, a virtio-serial port between the driver and the machine.
//!
//! A port is a byte pipe without connections: when one driver has gone in the middle of a frame, the next
//! one's first bytes read as the rest of it. So a driver begins with [`PADDING`] zero bytes, which is more than
//! any frame still lacks; between frames, zero bytes mean nothing. Every frame carries the session number that
//! its driver chose, so that late answers to an earlier driver are told apart.
//!
//! Standard input flows by credit: the driver sends no more than [`WINDOW`] bytes ahead of what the command has
//! taken, so that signals are never stuck behind input that nobody reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Largest frame in bytes. The kernel's port driver passes writes up to this size on in one piece, so that a
/// frame to the driver arrives whole or not at all.
pub const MAX_FRAME: usize = 32 * 1024;
/// Bytes before a frame's payload: kind, session (little-endian), length (little-endian).
pub const HEADER: usize = 1 + 8 + 4;
/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = MAX_FRAME - HEADER;
/// Zero bytes that a driver sends first.
pub const PADDING: usize = MAX_FRAME;
/// Bytes of standard input that may be on their way to the command.
pub const WINDOW: usize = 512 * 1024;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Driver: a session begins; an earlier one on this port ends. Answered by [`Kind::Ready`].
    Hello = 1,
    /// Driver: run a command, a [`Command`] as JSON.
    Run = 2,
    /// Driver: bytes for the command's standard input.
    Stdin = 3,
    /// Driver: the standard input ends.
    StdinEnd = 4,
    /// Driver: a signal for the command's process group, a little-endian `i32`.
    Signal = 5,
    /// Driver: the terminal's size, a [`Size`] as JSON.
    Resize = 6,
    /// Driver: set the machine's clock, nanoseconds since 1970 as a little-endian `u64`. Answered by [`Kind::Ready`].
    SetClock = 7,
    /// Machine: done, go on.
    Ready = 16,
    /// Machine: bytes of the command's standard output (of its terminal, if it has one).
    Stdout = 17,
    /// Machine: bytes of the command's standard error.
    Stderr = 18,
    /// Machine: the command took so many bytes of its input, a little-endian `u32`.
    Credit = 19,
    /// Machine: the command ended, its [`Status`] as a little-endian `i32`.
    Exit = 20,
    /// Machine: the request failed, a [`Refusal`] as JSON.
    Refused = 21,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{
            Credit, Exit, Hello, Ready, Refused, Resize, Run, SetClock, Signal, Stderr, Stdin, StdinEnd, Stdout,
        };
        [Hello, Run, Stdin, StdinEnd, Signal, Resize, SetClock, Ready, Stdout, Stderr, Credit, Exit, Refused]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments.
    pub arguments: Vec<String>,
    /// Variables added to the machine's own environment.
    pub environment: BTreeMap<String, String>,
    /// Working directory; `/root` when none is given.
    pub directory: Option<String>,
    /// Gives the command a terminal of this size.
    pub terminal: Option<Size>,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Why the machine did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What went wrong, for a person.
    pub message: String,
    /// The operating system's error number, if it was one.
    pub errno: Option<i32>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It exited with this code (0–255).
    Exited(i32),
    /// This signal ended it.
    Signalled(i32),
}

impl Status {
    /// The code that a shell would report: 128 + n for signal n.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signalled(signal) => 128 + signal,
        }
    }

    /// As it stands in a [`Kind::Exit`] frame: signals are negative.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 4] {
        match self {
            Self::Exited(code) => code,
            Self::Signalled(signal) => -signal,
        }
        .to_le_bytes()
    }

    /// The opposite of [`Self::to_bytes`].
    ///
    /// # Errors
    /// [`WireError::Payload`] unless there are four bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        let number = i32::from_le_bytes(array(Kind::Exit, bytes)?);
        Ok(if number < 0 { Self::Signalled(number.saturating_neg()) } else { Self::Exited(number) })
    }
}

/// The bytes of a number in a payload.
///
/// # Errors
/// [`WireError::Payload`] when there are more or fewer than `N`.
pub fn array<const N: usize>(kind: Kind, bytes: &[u8]) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Payload { kind, length: bytes.len() })
}

/// Why bytes are no frame.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The kind is unknown.
    #[error("Frame of unknown kind {0}: driver and machine are of different versions; build the machine anew")]
    Kind(u8),
    /// The length is above the limit.
    #[error("Frame of {0} bytes, more than {MAX_PAYLOAD}: the port carries something else than frames")]
    Length(u32),
    /// A payload has the wrong size.
    #[error("{kind:?} frame with {length} bytes of payload")]
    Payload {
        /// The frame's kind.
        kind: Kind,
        /// Its payload's length.
        length: usize,
    },
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Whose it is.
    pub session: u64,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The frame's bytes.
    ///
    /// # Errors
    /// [`WireError::Length`] when the payload is longer than [`MAX_PAYLOAD`].
    pub fn encode(kind: Kind, session: u64, payload: &[u8]) -> Result<Vec<u8>, WireError> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if payload.len() > MAX_PAYLOAD {
            return Err(WireError::Length(length));
        }
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        bytes.push(kind as u8);
        bytes.extend(session.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(payload);
        Ok(bytes)
    }
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Forgets what has come so far.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.start = 0;
    }

    /// The next whole frame, or none yet.
    ///
    /// # Errors
    /// [`WireError`] when the bytes are no frame; what was pushed is forgotten then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        self.start += self.buffer[self.start..].iter().take_while(|byte| **byte == 0).count();
        let rest = &self.buffer[self.start..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let (kind, session, length) = match parse_header(header) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.clear();
                return Err(error);
            }
        };
        if rest.len() < length {
            return Ok(None);
        }
        let payload = rest[..length].to_vec();
        self.start += HEADER + length;
        Ok(Some(Frame { kind, session, payload }))
    }
}

fn parse_header(header: &[u8; HEADER]) -> Result<(Kind, u64, usize), WireError> {
    let [kind, session @ .., l0, l1, l2, l3] = *header;
    let kind = Kind::from_byte(kind).ok_or(WireError::Kind(kind))?;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    match usize::try_from(length) {
        Ok(size) if size <= MAX_PAYLOAD => Ok((kind, u64::from_le_bytes(session), size)),
        _ => Err(WireError::Length(length)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(decoder: &mut Decoder) -> Vec<Frame> {
        std::iter::from_fn(|| decoder.next_frame().unwrap()).collect()
    }

    #[test]
    fn frames_survive_any_fragmentation() {
        let mut bytes = Frame::encode(Kind::Hello, 7, b"").unwrap();
        bytes.extend(Frame::encode(Kind::Stdin, 7, &[0; 100]).unwrap());
        bytes.extend([0; 40]);
        bytes.extend(Frame::encode(Kind::StdinEnd, 7, b"").unwrap());
        for size in [1, 2, 3, 12, 13, 14, 500] {
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for part in bytes.chunks(size) {
                decoder.push(part);
                found.extend(frames(&mut decoder));
            }
            let kinds: Vec<_> = found.iter().map(|frame| (frame.kind, frame.payload.len())).collect();
            assert_eq!(kinds, [(Kind::Hello, 0), (Kind::Stdin, 100), (Kind::StdinEnd, 0)], "in parts of {size}");
        }
    }

    #[test]
    fn a_driver_that_left_in_the_middle_of_a_frame_does_not_disturb_the_next() {
        let whole = Frame::encode(Kind::Stdin, 1, &[b'x'; MAX_PAYLOAD]).unwrap();
        for sent in [1, 5, HEADER - 1, HEADER, 1000, MAX_FRAME - 1, MAX_FRAME] {
            let mut decoder = Decoder::default();
            decoder.push(&whole[..sent]);
            let mut found = frames(&mut decoder);
            decoder.push(&[0; PADDING]);
            decoder.push(&Frame::encode(Kind::Hello, 2, b"").unwrap());
            found.extend(frames(&mut decoder));
            let last = found.pop().unwrap();
            assert_eq!((last.kind, last.session), (Kind::Hello, 2), "after {sent} bytes");
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(&[99; HEADER]);
        assert_eq!(decoder.next_frame(), Err(WireError::Kind(99)));
        decoder.push(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(decoder.next_frame(), Err(WireError::Length(u32::MAX)));
        assert!(matches!(Frame::encode(Kind::Stdin, 1, &[0; MAX_PAYLOAD + 1]), Err(WireError::Length(_))));
    }

    #[test]
    fn a_status_survives_the_wire() {
        for (status, code) in [(Status::Exited(0), 0), (Status::Exited(255), 255), (Status::Signalled(9), 137)] {
            assert_eq!(Status::from_bytes(&status.to_bytes()), Ok(status));
            assert_eq!(status.code(), code);
        }
    }
}
