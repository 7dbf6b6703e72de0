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
