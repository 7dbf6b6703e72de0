//! What the project promises, measured and reported.

fn main() {}
