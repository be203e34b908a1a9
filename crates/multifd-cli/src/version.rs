//! `multifd --version -v`: the version, the commit, and what this build can do.

use std::ffi::OsString;

use multifd::Method;

/// Whether the command line is `--version` with `-v`, in any order.
pub(crate) fn is_asked_in_detail(command_line: &[OsString]) -> bool {
    let flags: Vec<_> = command_line.iter().skip(1).map(|word| word.to_string_lossy()).collect();
    let has = |names: [&str; 2]| flags.iter().any(|flag| names.contains(&flag.as_ref()));
    flags.len() == 2 && has(["-V", "--version"]) && has(["-v", "--verbose"])
}

/// One fact in each line.
pub(crate) fn detailed() -> Vec<String> {
    let facts = [
        ("commit", option_env!("MULTIFD_COMMIT").unwrap_or("not recorded in this build")),
        ("compression", &Method::names()),
        ("connections", "TCP, unix sockets, vsock, file descriptors, commands; TLS 1.2 and 1.3"),
        ("stream", "version 3 of QEMU's migration stream, with the capabilities multifd and return-path"),
        ("file", "mapped-ram version 1, as QEMU 9.0 and later write and read it"),
    ];
    let first = format!("multifd {}", env!("CARGO_PKG_VERSION"));
    [first].into_iter().chain(facts.map(|(name, fact)| format!("{name:<13}{fact}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_for_both_flags_alone() {
        let asked = |line: &str| is_asked_in_detail(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        for line in ["multifd --version -v", "multifd -v -V", "multifd --verbose --version"] {
            assert!(asked(line), "{line}");
        }
        for line in ["multifd", "multifd -V", "multifd -v", "multifd -V -V", "multifd -V -v demo"] {
            assert!(!asked(line), "{line}");
        }
    }
}
