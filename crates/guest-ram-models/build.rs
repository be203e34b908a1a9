//! Compiles the sources of `guest-ram` for the model checker, which `sync_types.rs` is told by a `cfg`.
//!
//! Set here, it holds for this package alone, so the library is not built twice for others.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=shuttle");
    // The feature that has models. It is no feature here, so that it is on in every build.
    println!("cargo::rustc-cfg=feature=\"fault\"");
    println!("cargo::rustc-check-cfg=cfg(feature, values(\"fault\", \"kvm\", \"pagemap\", \"vm-memory\"))");
}
