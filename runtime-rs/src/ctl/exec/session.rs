//! One command, from its request to its exit status.

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use protocols::agent::GuestCommand;
use protocols::containerd::api::{
    CloseIORequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest, WaitRequest,
};
use protocols::containerd::shim_async::TaskClient;
use protocols::containerd::ttrpc;
use protocols::{GUEST, GUEST_COMMAND_TYPE_URL};
use terminal::RawTerminal;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use ttrpc::context::Context;

use super::ExecError;
use super::streams::{Fifos, send_input, take_output};
use crate::ctl::CtlError;

/// What a request may take, but for the one that waits for the command's end.
const DEADLINE: Duration = Duration::from_secs(60);
/// Where the guest image has programs.
const PATH: &str = "PATH=/sbin:/bin";

/// A command of the guest.
pub(super) struct Session {
    client: TaskClient,
    fifos: Fifos,
    exec_id: String,
    terminal: bool,
}

impl Session {
    pub(super) fn new(client: TaskClient, fifos: Fifos, terminal: bool) -> Self {
        Self { client, fifos, exec_id: format!("console-{}", std::process::id()), terminal }
    }

    /// Executes the command to its end; answers its exit status.
    pub(super) async fn execute(&self, command: &[String]) -> Result<u32, CtlError> {
        self.client.exec(deadline(), &self.description(command)?).await.map_err(ExecError::from)?;
        let status = self.follow().await;
        // With it comes the rest of the output.
        let deleted = self.client.delete(deadline(), &self.delete_request()).await;
        let (status, outputs) = status?;
        deleted.map_err(ExecError::from)?;
        for output in outputs {
            // A reader that wants no more has had what it wanted.
            let _ = output.await;
        }
        Ok(status)
    }

    /// Starts the command, passes on what goes in and out, and waits for its exit status.
    async fn follow(&self) -> Result<(u32, Vec<Output>), CtlError> {
        let mut signals = Signals::listen()?;
        self.resize().await;
        let _raw = if self.terminal { RawTerminal::enter()? } else { None };
        let mut outputs = vec![take_output(&self.fifos.stdout, io::stdout())?];
        if let Some(stderr) = &self.fifos.stderr {
            outputs.push(take_output(stderr, io::stderr())?);
        }
        let request = StartRequest { id: GUEST.to_owned(), exec_id: self.exec_id.clone(), ..StartRequest::default() };
        self.client.start(deadline(), &request).await.map_err(ExecError::from)?;
        let mut input = Some(send_input(&self.fifos.stdin)?);
        let ended = self.ended();
        tokio::pin!(ended);
        let mut wanted = true;
        loop {
            tokio::select! {
                status = &mut ended => return Ok((status?, outputs)),
                end = of(&mut input) => {
                    input = None;
                    if end {
                        self.close_input().await;
                    }
                }
                number = signals.next() => match number {
                    Some(number) => self.kill(number).await,
                    None => self.resize().await,
                },
                // As a program of this machine would be told.
                () = refused(&mut outputs), if wanted => {
                    wanted = false;
                    self.kill(libc::SIGPIPE.cast_unsigned()).await;
                }
            }
        }
    }

    fn description(&self, command: &[String]) -> Result<ExecProcessRequest, CtlError> {
        let mut environment = vec![PATH.to_owned(), "HOME=/root".to_owned()];
        if self.terminal {
            let kind = std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned());
            environment.extend([format!("TERM={kind}"), "PS1=guest:\\w # ".to_owned()]);
        }
        let command = GuestCommand { arguments: command.to_vec(), environment, ..GuestCommand::default() };
        let value = command.write_to_bytes().map_err(|error| ExecError::Refused(error.to_string()))?;
        let spec = Any { type_url: GUEST_COMMAND_TYPE_URL.to_owned(), value, ..Any::default() };
        let name = |path: &Path| path.display().to_string();
        Ok(ExecProcessRequest {
            id: GUEST.to_owned(),
            exec_id: self.exec_id.clone(),
            terminal: self.terminal,
            stdin: name(&self.fifos.stdin),
            stdout: name(&self.fifos.stdout),
            stderr: self.fifos.stderr.as_deref().map(name).unwrap_or_default(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        })
    }

    fn delete_request(&self) -> DeleteRequest {
        DeleteRequest { id: GUEST.to_owned(), exec_id: self.exec_id.clone(), ..DeleteRequest::default() }
    }

    fn ended(&self) -> impl Future<Output = Result<u32, ExecError>> + '_ {
        let request = WaitRequest { id: GUEST.to_owned(), exec_id: self.exec_id.clone(), ..WaitRequest::default() };
        async move { Ok(self.client.wait(Context::default(), &request).await?.exit_status) }
    }

    async fn close_input(&self) {
        let request = CloseIORequest {
            id: GUEST.to_owned(),
            exec_id: self.exec_id.clone(),
            stdin: true,
            ..CloseIORequest::default()
        };
        ended_meanwhile(self.client.close_io(deadline(), &request).await);
    }

    async fn kill(&self, signal: u32) {
        let (id, exec_id) = (GUEST.to_owned(), self.exec_id.clone());
        let request = KillRequest { id, exec_id, signal, ..KillRequest::default() };
        ended_meanwhile(self.client.kill(deadline(), &request).await);
    }

    async fn resize(&self) {
        if !self.terminal {
            return;
        }
        let terminal::Size { rows, columns } = terminal::size();
        let (id, exec_id) = (GUEST.to_owned(), self.exec_id.clone());
        let (width, height) = (columns.into(), rows.into());
        let request = ResizePtyRequest { id, exec_id, width, height, ..ResizePtyRequest::default() };
        ended_meanwhile(self.client.resize_pty(deadline(), &request).await);
    }
}

type Output = oneshot::Receiver<io::Result<()>>;

fn deadline() -> Context {
    ttrpc::context::with_duration(DEADLINE)
}

/// Each of these requests can come after the command's end, of which `Wait` tells.
fn ended_meanwhile<T>(answer: ttrpc::Result<T>) {
    if let Err(error) = answer {
        tracing::debug!(%error, "the command has ended");
    }
}

/// Waits for the end of our input; false when the command takes none. For ever when that has been told.
async fn of(input: &mut Option<oneshot::Receiver<()>>) -> bool {
    match input {
        Some(input) => input.await.is_ok(),
        None => std::future::pending().await,
    }
}

/// Waits until somebody who read the output wants no more of it.
async fn refused(outputs: &mut Vec<Output>) {
    while !outputs.is_empty() {
        let (ended, index, _) = futures::future::select_all(outputs.iter_mut()).await;
        outputs.swap_remove(index);
        if matches!(ended, Ok(Err(_))) {
            return;
        }
    }
    std::future::pending().await
}

/// Signals that go to the command, and the one that tells of another size of the terminal.
struct Signals {
    resize: Signal,
    others: Vec<(u32, Signal)>,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let numbers = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];
        let listen = |number: i32| Ok((number.cast_unsigned(), signal(SignalKind::from_raw(number))?));
        let others = numbers.into_iter().map(listen).collect::<io::Result<_>>()?;
        Ok(Self { resize: signal(SignalKind::window_change())?, others })
    }

    /// Waits for the next: its number, or none for another size.
    async fn next(&mut self) -> Option<u32> {
        let others = self.others.iter_mut().map(|(number, signal)| {
            Box::pin(async move {
                signal.recv().await;
                *number
            })
        });
        tokio::select! {
            _ = self.resize.recv() => None,
            (number, _, _) = futures::future::select_all(others) => Some(number),
        }
    }
}
