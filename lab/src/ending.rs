//! How a machine's QEMU ended.

use std::io;
use std::process::ExitStatus;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How a process ended, once it has: set by who reaps it, read by who wonders why it does not answer.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    status: Mutex<Option<String>>,
    known: Condvar,
}

impl Ending {
    /// Says how the process ended.
    pub(crate) fn set(&self, status: io::Result<ExitStatus>) {
        let text = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        // A poisoned lock holds a whole value: nothing panics between the two.
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        self.known.notify_all();
    }

    /// How the process ended, for people; none when it still runs after `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> Option<String> {
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let (status, _) = self
            .known
            .wait_timeout_while(status, limit, |status| status.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        status.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn it_is_unknown_until_the_process_has_ended() {
        let ending = Ending::default();
        assert_eq!(ending.wait(Duration::ZERO), None);
        ending.set(Ok(ExitStatus::from_raw(11)));
        assert!(ending.wait(Duration::ZERO).is_some_and(|text| text.contains("SIGSEGV")));
    }
}
