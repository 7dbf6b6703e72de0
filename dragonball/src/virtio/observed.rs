//! A value of a device that others watch: what the guest has really reached of what it was asked for.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

type Watcher<T> = Box<dyn Fn(T) + Send>;

/// A value with its watchers.
pub(crate) struct Observed<T> {
    value: Mutex<T>,
    changed: Condvar,
    watchers: Mutex<Vec<Watcher<T>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one assignment, so a holder that panicked left something whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Copy + PartialEq> Observed<T> {
    /// A value that nobody watches yet.
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Condvar::new(), watchers: Mutex::default() }
    }

    /// The value now.
    pub(crate) fn get(&self) -> T {
        *lock(&self.value)
    }

    /// Changes the value and tells the watchers if it is another one then.
    pub(crate) fn update(&self, change: impl FnOnce(&mut T)) {
        let mut value = lock(&self.value);
        let before = *value;
        change(&mut value);
        let after = *value;
        drop(value);
        if before != after {
            self.changed.notify_all();
            lock(&self.watchers).iter().for_each(|watcher| watcher(after));
        }
    }

    /// Calls `watcher` with each new value from now on, on the thread that changes it: it must be quick, and must not add
    /// watchers.
    pub(crate) fn watch(&self, watcher: impl Fn(T) + Send + 'static) {
        lock(&self.watchers).push(Box::new(watcher));
    }

    /// Waits until `reached` is true of the value, at most until `deadline`; returns the value then.
    pub(crate) fn wait(&self, deadline: Instant, mut reached: impl FnMut(T) -> bool) -> T {
        let mut value = lock(&self.value);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if reached(*value) || left.is_zero() {
                return *value;
            }
            value = self.changed.wait_timeout(value, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_change_is_told_to_watchers_and_waiters_and_no_change_is_not() {
        let observed = Arc::new(Observed::new(0));
        let (sender, receiver) = channel();
        observed.watch(move |value| sender.send(value).unwrap());
        let waiter = {
            let observed = Arc::clone(&observed);
            std::thread::spawn(move || observed.wait(Instant::now() + Duration::from_secs(20), |value| value == 2))
        };
        for value in [1, 1, 2] {
            observed.update(|current| *current = value);
        }
        assert_eq!(waiter.join().unwrap(), 2);
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_wait_for_what_never_comes_ends_with_what_is_there() {
        assert_eq!(Observed::new(5).wait(Instant::now(), |value| value == 6), 5);
    }
}
