//! Compiles the engine's sources for the model checker, which `sync_types/mod.rs` is told by a `cfg`.
//!
//! Set here, it holds for this package alone, so neither the engine nor anything it depends on is built twice over.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=shuttle");
    // Those of the engine; none of them is on here.
    println!("cargo::rerun-if-changed={ENGINE}");
    let manifest = std::fs::read_to_string(ENGINE).expect("the engine's manifest");
    let features = manifest
        .split_once(
            "[features]
",
        )
        .map_or("", |(_, behind)| behind);
    for line in features.lines().take_while(|line| !line.starts_with('[')) {
        if let Some((feature, _)) = line.split_once(" = ") {
            println!("cargo::rustc-check-cfg=cfg(feature, values({feature:?}))");
        }
    }
}

const ENGINE: &str = "../multifd/Cargo.toml";
