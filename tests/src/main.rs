//! End-to-end suites that drive a real containerd.

fn main() {}
