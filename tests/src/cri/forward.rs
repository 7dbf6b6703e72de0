//! Ports of pods, as `kubectl port-forward` reaches them: channel 0 of a WebSocket is the connection, channel 1 tells errors,
//! and the first message of each is the port's number.

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use k8s_cri::v1::PortForwardRequest;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::client::Cri;
use super::pod::Pod;
use super::stream::open;

/// The channels.
const DATA: u8 = 0;
const ERROR: u8 = 1;

/// A connection to a port of a pod.
#[derive(Debug)]
pub struct Forwarded<'a> {
    cri: &'a Cri,
    socket: WebSocketStream<TcpStream>,
    port: u16,
    /// Channels that have told their port.
    begun: [bool; 2],
}

impl Pod<'_> {
    /// Connects to its port.
    ///
    /// # Errors
    /// When containerd refuses or nobody answers at the address that it says.
    pub fn forward(&self, port: u16) -> Result<Forwarded<'_>> {
        let request = PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![port.into()] };
        let url = self.cri.call("PortForward", self.cri.service().port_forward(request))?.url;
        Ok(Forwarded { cri: self.cri, socket: open(self.cri, &url)?, port, begun: [false; 2] })
    }
}

impl Forwarded<'_> {
    /// Sends bytes.
    ///
    /// # Errors
    /// When the session is over.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let message = Message::binary([&[DATA], bytes].concat());
        self.cri.within(async { Ok(self.socket.send(message).await?) })
    }

    /// Receives as many bytes, or what comes before the connection ends.
    ///
    /// # Errors
    /// What the error channel tells, or when it takes longer than the patience.
    pub fn read(&mut self, count: usize) -> Result<Vec<u8>> {
        let Self { cri, socket, port, begun } = self;
        cri.within(async {
            let mut bytes = Vec::new();
            while bytes.len() < count {
                let Some(Ok(message)) = socket.next().await else { break };
                if !message.is_binary() {
                    continue;
                }
                let message = message.into_data();
                let (channel, rest) = message.split_first().context("A message without a channel")?;
                match begun.get_mut(usize::from(*channel)) {
                    Some(begun) if !*begun && rest == port.to_le_bytes() => *begun = true,
                    Some(true) if *channel == DATA => bytes.extend_from_slice(rest),
                    Some(true) if *channel == ERROR => bail!("{}", String::from_utf8_lossy(rest)),
                    _ => bail!("A message of channel {channel} that was not to come: {rest:?}"),
                }
            }
            Ok(bytes)
        })
    }
}
