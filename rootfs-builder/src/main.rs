//! Builds the guest image and OCI archives, reproducibly and without a registry.

fn main() {}
