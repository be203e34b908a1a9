//! `cargo xtask api`: the public API of the libraries, as text that is reviewed with every change.
//!
//! ```text
//! cargo rustdoc ─▶ xtask as its rustdoc ─▶ rustdoc with unstable options ─▶ JSON ─▶ lines ◀─▶ crates/*/api.txt
//! ```
//!
//! Rustdoc's JSON is unstable, so its format changes with the compiler. The compiler in use writes it and need not be a
//! nightly one: only the last program of that chain gets unstable options, so that nothing else is rebuilt. If a
//! compiler writes a format other than [`FORMAT`], the step prints this and is skipped; in CI it fails.

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::{
    Failure,
    step::{cargo, output, run, step},
    workspace_root,
};

/// Compares the public API with the recorded one, or records it.
///
/// # Errors
///
/// Lists what was removed and added, or what cannot be read.
pub(crate) fn check(bless: bool) -> Result<(), Failure> {
    LIBRARIES.iter().try_for_each(|library| {
        let Some(shown) = shown(library)? else { return Ok(()) };
        let path = workspace_root().join("crates").join(library).join("api.txt");
        if bless {
            return Ok(fs::write(&path, shown)?);
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        let changes = changes(&written, &shown);
        if changes.is_empty() { Ok(()) } else { Err(changed(library, &changes).into()) }
    })
}

/// Runs the check as a step.
///
/// # Errors
///
/// As [`check`].
pub(crate) fn run_task(bless: bool) -> Result<(), Failure> {
    step("public API", || check(bless))
}

/// Does rustdoc's work for cargo, if this program was started for that.
pub(crate) fn as_rustdoc() -> Option<ExitCode> {
    let rustdoc = env::var_os(REAL)?;
    let failed = Command::new(&rustdoc).args(env::args_os().skip(1)).env("RUSTC_BOOTSTRAP", "1").exec();
    eprintln!("xtask: cannot start {}: {failed}", rustdoc.display());
    Some(ExitCode::FAILURE)
}

/// The lines of a library's API; `None` if this compiler cannot produce them.
fn shown(library: &str) -> Result<Option<String>, Failure> {
    let mut rustdoc = cargo();
    rustdoc.args(["rustdoc", "--quiet", "--locked", "--lib", "--all-features", "-p", library]);
    rustdoc.args(["--", "-Z", "unstable-options", "--output-format", "json", "--cap-lints", "allow"]);
    rustdoc.env("RUSTDOC", env::current_exe()?).env(REAL, real_rustdoc()?);
    run(&mut rustdoc)?;
    let json = target()?.join("doc").join(format!("{}.json", library.replace('-', "_")));
    let found: serde_json::Value = serde_json::from_slice(&fs::read(&json)?)?;
    let found = found.get("format_version").and_then(serde_json::Value::as_u64).unwrap_or(0);
    if found != FORMAT {
        let why = format!(
            "expected rustdoc to write JSON of format {FORMAT}, as Rust {} does, found {found}: use that compiler",
            env!("CARGO_PKG_RUST_VERSION")
        );
        if crate::in_ci() {
            return Err(why.into());
        }
        eprintln!("   SKIPPED, the public API of {library} was not checked: {why}");
        return Ok(None);
    }
    let api = public_api::Builder::from_rustdoc_json(&json).omit_blanket_impls(true).sorted(true).build()?;
    let lines = api.items().map(ToString::to_string).filter(|line| !is_noise(line));
    Ok(Some(lines.map(|line| line + "\n").collect()))
}

/// Whether a line is about an auto trait other than `Send` and `Sync`.
fn is_noise(line: &str) -> bool {
    ["core::marker::Freeze", "core::marker::Unpin", "UnwindSafe", "core::marker::UnsafeUnpin"]
        .iter()
        .any(|name| line.starts_with("impl") && line.contains(name))
}

/// The rustdoc of the compiler in use.
fn real_rustdoc() -> Result<PathBuf, Failure> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let root = output(Command::new(rustc).current_dir(workspace_root()).args(["--print", "sysroot"]))?;
    Ok(Path::new(root.trim_end()).join("bin/rustdoc"))
}

fn target() -> Result<PathBuf, Failure> {
    Ok(crate::deps::metadata()?.target_directory.into_std_path_buf())
}

/// The removed and the added lines, each with its sign.
fn changes(written: &str, shown: &str) -> Vec<String> {
    let (written, shown): (BTreeSet<&str>, BTreeSet<&str>) =
        (written.lines().collect(), shown.lines().collect());
    let gone = written.difference(&shown).map(|line| format!("- {line}"));
    let come = shown.difference(&written).map(|line| format!("+ {line}"));
    gone.chain(come).collect()
}

fn changed(library: &str, changes: &[String]) -> String {
    format!(
        "the public API of {library} differs from crates/{library}/api.txt:\n{}\nIf this is intended, run `cargo xtask \
         api --bless` and add a line to CHANGELOG.md",
        changes.join("\n")
    )
}

/// Those that others build on.
pub(crate) const LIBRARIES: [&str; 3] = ["guest-ram", "multifd", "qemu-stream"];
/// The form of the JSON that can be read: `format_version` of the compiler that `rust-version` names.
const FORMAT: u64 = 57;
/// Set for the program that replaces rustdoc: the path of the real one.
const REAL: &str = "XTASK_REAL_RUSTDOC";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_gone_and_come_is_listed_with_its_sign_wherever_it_stands() {
        let written = "pub fn a::b()\npub struct a::C\n";
        assert_eq!(changes(written, "pub struct a::C\npub fn a::b()\n"), [""; 0]);
        assert_eq!(
            changes(written, "pub fn a::b(u8)\npub struct a::C\n"),
            ["- pub fn a::b()", "+ pub fn a::b(u8)"]
        );
        assert_eq!(changes("", written).len(), 2);
    }

    #[test]
    fn send_and_sync_are_told_and_what_nobody_asks_for_is_not() {
        assert!(!is_noise("impl core::marker::Send for a::B"));
        assert!(is_noise("impl core::panic::unwind_safe::UnwindSafe for a::B"));
        assert!(!is_noise("pub fn a::UnwindSafe::x()"));
    }
}
