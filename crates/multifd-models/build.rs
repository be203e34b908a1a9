//! Compiles the engine's sources for the model checker, which `sync_types/mod.rs` is told by a `cfg`.
//!
//! Set here, it holds for this package alone, so neither the engine nor anything it depends on is built twice over.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=shuttle");
    // Those of the engine; none of them is on here.
    for feature in ["kvm", "pagemap", "serde", "tls", "vm-memory", "zlib", "zstd"] {
        println!("cargo::rustc-check-cfg=cfg(feature, values({feature:?}))");
    }
}
