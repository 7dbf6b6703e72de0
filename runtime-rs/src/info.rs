//! `-info`: what this runtime can do.

use std::io::Write;

use protobuf::{Message, MessageField};
use protocols::containerd::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::RUNTIME_TYPE;

/// Prints a `containerd.types.RuntimeInfo`.
///
/// # Errors
///
/// When standard output is closed.
pub fn run() -> std::io::Result<()> {
    let info = RuntimeInfo {
        name: RUNTIME_TYPE.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        ..RuntimeInfo::default()
    };
    let bytes = info.write_to_bytes().map_err(std::io::Error::other)?;
    std::io::stdout().write_all(&bytes)
}
