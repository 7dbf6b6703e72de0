//! The shim that containerd starts for every pod.

fn main() {}
