//! Events of the guest, kept until the host asks for them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs;
use std::rc::Rc;

use protocols::agent::{Event, OutOfMemory};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};

use crate::cgroup::{Cgroup, FileWatch, flat_value};
use crate::guest::Guest;

/// Events that wait at most; a host that does not ask loses the oldest.
const LIMIT: usize = 256;

#[derive(Default)]
pub(crate) struct Events {
    queue: RefCell<VecDeque<Event>>,
    added: Notify,
}

impl Events {
    fn push(&self, event: Event) {
        let mut queue = self.queue.borrow_mut();
        if queue.len() >= LIMIT {
            queue.pop_front();
        }
        queue.push_back(event);
        self.added.notify_one();
    }

    /// The next event, when there is one. Nothing is lost when this is dropped while it waits.
    pub(crate) async fn next(&self) -> Event {
        loop {
            let next = self.queue.borrow_mut().pop_front();
            match next {
                Some(event) => return event,
                None => self.added.notified().await,
            }
        }
    }
}

/// Reports each time that the kernel kills a process of a container for lack of memory (cgroup-v2, `memory.events`).
/// `None` where the kernel has no memory controller.
pub(crate) fn watch_memory(guest: &Rc<Guest>, container: &str, cgroup: &Cgroup) -> Option<AbortHandle> {
    let path = cgroup.directory().join("memory.events");
    let watch = match FileWatch::new(&path) {
        Ok(watch) => watch,
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), "out-of-memory events cannot be seen");
            return None;
        }
    };
    let kills = move || {
        fs::read_to_string(&path)
            .ok()
            .and_then(|text| flat_value(&text, "oom_kill").and_then(|n| n.parse::<u64>().ok()))
    };
    let (guest, container_id) = (Rc::downgrade(guest), container.to_owned());
    let task = spawn_local(async move {
        let mut seen = kills().unwrap_or(0);
        while watch.changed().await.is_ok() {
            let (Some(now), Some(guest)) = (kills(), guest.upgrade()) else { return };
            if now > seen {
                seen = now;
                let mut event = Event::new();
                event.set_out_of_memory(OutOfMemory { container_id: container_id.clone(), ..Default::default() });
                guest.events.push(event);
            }
        }
    });
    Some(task.abort_handle())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::Reaper;
    use crate::timeline::Timeline;
    use crate::transport::Endpoint;
    use tokio::task::LocalSet;

    /// In a local set, with a guest and a directory that stands for a cgroup.
    async fn with_guest(test: impl AsyncFnOnce(Rc<Guest>, &std::path::Path)) {
        let directory = tempfile::tempdir().expect("a directory");
        let guest = Guest::new(Endpoint::default(), Rc::new(Reaper::default()), Timeline::default());
        LocalSet::new().run_until(test(guest, directory.path())).await;
    }

    #[tokio::test]
    async fn each_kill_for_lack_of_memory_is_one_event() {
        with_guest(async |guest, directory| {
            let file = directory.join("memory.events");
            let write = |oom, kills| fs::write(&file, format!("low 0\noom {oom}\noom_kill {kills}\n"));
            write(0, 0).expect("a file");
            let watch = watch_memory(&guest, "c1", &Cgroup::at(directory)).expect("a watch");
            tokio::task::yield_now().await;
            // Memory was short, but nobody died of it: no event. Then somebody did.
            write(1, 0).expect("a file");
            tokio::task::yield_now().await;
            write(1, 1).expect("a file");
            let event = guest.events.next().await;
            assert_eq!(event.out_of_memory().container_id, "c1");
            assert!(guest.events.queue.borrow().is_empty());
            watch.abort();
        })
        .await;
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_takes_no_event_with_it() {
        with_guest(async |guest, _| {
            let waiter = tokio::time::timeout(std::time::Duration::ZERO, guest.events.next());
            assert!(waiter.await.is_err(), "there is no event yet");
            guest.events.push(Event::default());
            guest.events.next().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_host_that_never_asks_costs_a_bounded_number_of_events() {
        with_guest(async |guest, _| {
            (0..2 * LIMIT).for_each(|_| guest.events.push(Event::default()));
            assert_eq!(guest.events.queue.borrow().len(), LIMIT);
        })
        .await;
    }
}
