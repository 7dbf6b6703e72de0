//! A nested test machine for hosts without hardware virtualization.

fn main() {}
