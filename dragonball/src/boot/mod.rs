//! How a kernel gets into guest memory and what it is told there.

pub(crate) mod cmdline;
