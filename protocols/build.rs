//! Generates the ttrpc code of the agent's own service; needs no protoc.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or_else(|| std::io::Error::other("OUT_DIR"))?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto", "proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // The code generator lists the messages only.
    let mut list = std::fs::OpenOptions::new().append(true).open(out.join("mod.rs"))?;
    std::io::Write::write_all(&mut list, b"pub mod agent_ttrpc;\n")
}
