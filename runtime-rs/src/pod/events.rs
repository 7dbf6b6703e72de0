//! Events to containerd, in order, without ever delaying the Task API.

use std::time::Duration;

use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageDyn, MessageField};
use protocols::containerd::shim::event::Envelope;
use protocols::containerd::shim::events::ForwardRequest;
use protocols::containerd::shim_async::EventsClient;
use protocols::containerd::ttrpc;
use tokio::sync::{mpsc, oneshot};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

/// Environment variable in which containerd names its ttrpc socket.
pub const ADDRESS_VARIABLE: &str = "TTRPC_ADDRESS";
/// Events that wait for a containerd that is away, at most; later ones are dropped.
const MAX_WAITING: usize = 1024;
/// One event must be taken within this.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
/// An event is tried this often: a containerd that restarts is back after a few seconds, and learns from `Wait` and
/// `State` what it missed.
const ATTEMPTS: u32 = 5;
/// Before the second attempt; doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The way to containerd's event service. Without an address, events go nowhere.
#[derive(Debug, Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Message>,
    namespace: String,
}

#[derive(Debug)]
enum Message {
    Event(Box<Envelope>),
    /// Answered when all events before it are delivered or given up.
    Flush(oneshot::Sender<()>),
}

impl Publisher {
    /// Starts the task that delivers events of this namespace to the ttrpc socket at `address`.
    #[must_use]
    pub fn start(address: Option<String>, namespace: String) -> Self {
        let (queue, messages) = mpsc::channel(MAX_WAITING);
        tokio::spawn(deliver(messages, address.filter(|address| !address.is_empty())));
        Self { queue, namespace }
    }

    /// Queues an event. Never waits: when containerd takes none for long, events are dropped.
    pub fn publish(&self, topic: &'static str, event: &dyn MessageDyn) {
        let value = match event.write_to_bytes_dyn() {
            Ok(value) => value,
            Err(error) => return tracing::warn!(%error, topic, "an event could not be encoded"),
        };
        let event = Any { type_url: event.descriptor_dyn().full_name().to_owned(), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: MessageField::some(Timestamp::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        };
        if self.queue.try_send(Message::Event(Box::new(envelope))).is_err() {
            tracing::warn!(topic, "containerd takes no events; this one is dropped");
        }
    }

    /// Waits until everything that was published is delivered or given up, for at most `deadline`.
    pub async fn flush(&self, deadline: Duration) {
        let (done, flushed) = oneshot::channel();
        let all = async {
            if self.queue.send(Message::Flush(done)).await.is_ok() {
                // An error means that the task is gone, and with it everything that was to be delivered.
                let _ = flushed.await;
            }
        };
        if tokio::time::timeout(deadline, all).await.is_err() {
            tracing::warn!("containerd did not take all events in time");
        }
    }
}

async fn deliver(mut messages: mpsc::Receiver<Message>, address: Option<String>) {
    let mut client = None;
    while let Some(message) = messages.recv().await {
        match message {
            Message::Flush(done) => drop(done.send(())),
            Message::Event(envelope) => {
                if let Some(address) = &address {
                    forward(&mut client, address, *envelope).await;
                }
            }
        }
    }
}

/// Delivers one event over the connection that `client` keeps, or over a new one.
async fn forward(client: &mut Option<EventsClient>, address: &str, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    let mut pause = FIRST_PAUSE;
    for attempt in 1..=ATTEMPTS {
        match attempt_forward(client, address, &request).await {
            Ok(()) => return,
            Err(error) => {
                *client = None;
                tracing::debug!(%error, topic, attempt, "containerd did not take an event");
            }
        }
        if attempt < ATTEMPTS {
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }
    tracing::warn!(topic, "an event was given up");
}

async fn attempt_forward(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => {
            let path = address.strip_prefix("unix://").unwrap_or(address);
            let socket = Socket::connect_unix(path).await.map_err(|error| ttrpc::Error::Socket(error.to_string()))?;
            EventsClient::new(Client::new(socket))
        }
    };
    connected.forward(ttrpc::context::with_duration(FORWARD_DEADLINE), request).await?;
    *client = Some(connected);
    Ok(())
}
