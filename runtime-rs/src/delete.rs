//! `delete`: undoes whatever is left of a sandbox, and tells containerd how its task ended.

use std::io::Write;
use std::path::Path;

use journal::{JournalError, UndoError};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use protocols::containerd::api::DeleteResponse;

use crate::args::Args;
use crate::paths::{NameError, Paths};

/// What containerd is told of a task whose pod process is gone: killed, as by SIGKILL.
pub const EXIT_KILLED: u32 = 128 + 9;

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The namespace or the id.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Steps that failed; all others are done.
    #[error("{}", list(.0))]
    Left(Vec<UndoError>),
    /// Standard output is closed.
    #[error("could not print the answer: {0}")]
    Output(#[from] std::io::Error),
}

/// Replays the sandbox's journal and prints a `DeleteResponse`. Nothing to undo is success.
///
/// # Errors
///
/// [`DeleteError`]; the journal is kept then, so that a second `delete` can finish.
pub fn run(args: &Args, root: &Path) -> Result<(), DeleteError> {
    undo(&Paths::new(root, &args.namespace, &args.id)?)?;
    let response = DeleteResponse {
        exit_status: EXIT_KILLED,
        exited_at: MessageField::some(Timestamp::now()),
        ..DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().map_err(std::io::Error::other)?;
    Ok(std::io::stdout().write_all(&bytes)?)
}

/// Ends the pod process if it lives, undoes its effects backwards, and removes its state.
///
/// # Errors
///
/// [`DeleteError::Journal`] and [`DeleteError::Left`].
pub fn undo(paths: &Paths) -> Result<(), DeleteError> {
    let replay = journal::replay(&paths.journal())?;
    if !replay.failures.is_empty() {
        return Err(DeleteError::Left(replay.failures));
    }
    paths.remove_empty();
    Ok(())
}

fn list(failures: &[UndoError]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
