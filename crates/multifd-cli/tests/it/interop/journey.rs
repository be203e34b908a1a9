//! The path of a guest: source → `receive` → file → `send` → destination.
//!
//! A guest's memory at its stop is compared with the file; the memory of a guest that was stopped before is also
//! compared with the destination's. Then the guest runs, as a running one does at once, and checks all of its memory.

use std::path::Path;

use multifd_testkit::{
    certificates::write_both,
    qemu::{Error, Qemu, Vm, VmBuilder},
};
use serde_json::{Value, json};

use crate::kit::{
    Program, first_difference, folder, leave, machine, memory, path, runs_on, send, source, stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";

/// The parameters of a guest's path.
#[derive(Debug, Clone)]
pub(super) struct Journey {
    /// The source and the destination, and the type of each one's machine.
    pub(super) ends: [(Qemu, &'static str); 2],
    /// 0 with multifd off.
    pub(super) channels: u8,
    /// Migrated while it runs, in at least four passes.
    pub(super) live: bool,
    /// The source's capability, and the option of `send`.
    pub(super) return_path: bool,
    pub(super) tls: bool,
    /// Further options of QEMU's credentials.
    pub(super) tls_more: &'static str,
    /// At both sources.
    pub(super) zero_copy: bool,
    pub(super) method: &'static str,
    /// The source's `zero-page-detection`, if it has this parameter.
    pub(super) zero_there: Option<&'static str>,
    /// The same of `send`.
    pub(super) zero_back: &'static str,
}

/// The reports of the program about it.
pub(super) struct Reports {
    pub(super) received: Value,
    pub(super) sent: Value,
}

impl Journey {
    /// The path of a stopped guest, between two machines of a type.
    pub(super) fn new(qemu: &Qemu, machine: &'static str) -> Self {
        Self {
            ends: [(qemu.clone(), machine), (qemu.clone(), machine)],
            channels: 3,
            live: false,
            return_path: true,
            tls: false,
            tls_more: "",
            zero_copy: false,
            method: "none",
            zero_there: None,
            zero_back: "auto",
        }
    }

    /// Makes it.
    pub(super) fn take(&self) -> Result<Reports, Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        write_both(folder.path()).expect("certificates");
        let mut from = source(self.machine(0, folder.path(), "client"))?;
        self.set_up(&mut from)?;
        from.set_capabilities(&[("return-path", self.return_path), ("zero-copy-send", self.zero_copy)])?;
        if let Some(mode) = self.zero_there {
            from.set_parameters(json!({ "zero-page-detection": mode }))?;
        }
        let (receive, address) = Program::receive(&self.receive_options(folder.path()), LOCAL, &file);
        let before = leave(&mut from, &address, self.live.then_some(4))?;
        let received = receive.done().json();

        let mut to = self.machine(1, folder.path(), "server").incoming().start()?;
        self.set_up(&mut to)?;
        let channels = self.channels.to_string();
        let sent = send(&self.send_options(&channels, folder.path()), &file, &mut to, LOCAL)?.json();
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        if !self.live {
            assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
            to.cont()?;
        }
        runs_on(&from, &mut to)?;
        Ok(Reports { received, sent })
    }

    /// How zero pages are sent by `send` in this mode.
    pub(super) fn mode_back<'a>(&self, mode: &'a str) -> &'a str {
        // The file of a source that did not detect them has every page, and `send` does not detect them either.
        if self.zero_there == Some("none") { "none" } else { mode }
    }

    fn machine(&self, end: usize, certificates: &Path, endpoint: &str) -> VmBuilder {
        let (qemu, kind) = &self.ends[end];
        let builder = machine(qemu, kind);
        if self.tls { with_tls_and(builder, certificates, endpoint, self.tls_more) } else { builder }
    }

    fn set_up(&self, vm: &mut Vm) -> Result<(), Error> {
        vm.set_multifd_channels(self.channels)?;
        vm.set_parameters(json!({ "multifd-compression": self.method }))?;
        if self.tls { vm.set_parameters(json!({ "tls-creds": "tls0" })) } else { Ok(()) }
    }

    /// Parameters that the stream contains are configured in some tests and detected in others.
    fn receive_options<'a>(&self, certificates: &'a Path) -> Vec<&'a str> {
        let mut options = vec!["--json"];
        if self.channels == 4 {
            options.extend(["--multifd-channels", "4"]);
        }
        if !self.live {
            options.extend(["--multifd-compression", self.method]);
        }
        if self.tls {
            options.extend(["--tls-creds", text(certificates), "--tls-authz", "O=Test,CN=source"]);
        }
        options
    }

    fn send_options<'a>(&self, channels: &'a str, certificates: &'a Path) -> Vec<&'a str> {
        let mut options = vec!["--multifd-channels", channels, "--multifd-compression", self.method];
        options.extend(["--zero-page-detection", self.zero_back]);
        options.extend(["--return-path", if self.return_path { "on" } else { "off" }]);
        if self.zero_copy {
            options.push("--zero-copy-send");
        }
        if self.tls {
            options.extend(["--tls-creds", text(certificates), "--tls-hostname", "localhost"]);
        }
        options
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// A machine with the certificates of a folder.
pub(super) fn with_tls(builder: VmBuilder, folder: &Path, endpoint: &str) -> VmBuilder {
    with_tls_and(builder, folder, endpoint, "")
}

/// The same, with further options.
pub(super) fn with_tls_and(builder: VmBuilder, folder: &Path, endpoint: &str, more: &str) -> VmBuilder {
    let folder = folder.display();
    let object = format!("tls-creds-x509,id=tls0,dir={folder},endpoint={endpoint},verify-peer=on{more}");
    builder.arg("-object").arg(object)
}

/// The counts of a side: zero pages in all, and those of them that went over channels.
fn zeros(report: &Value) -> (u64, u64) {
    let count = |name: &str| report["ram"][name].as_u64().expect("a number");
    let listed = report["channels"].as_array().expect("channels");
    let pages: u64 = listed.iter().filter_map(|channel| channel["pages"].as_u64()).sum();
    (count("duplicate"), pages.saturating_sub(count("normal")))
}

/// Asserts that zero pages were sent according to `mode`.
#[track_caller]
pub(super) fn assert_mode(report: &Value, mode: &str) {
    let (zero, on_channels) = zeros(report);
    match mode {
        "none" => assert_eq!((zero, on_channels), (0, 0), "{report}"),
        "legacy" => assert!(zero > 0 && on_channels == 0, "{report}"),
        _ => assert!(zero > 0 && on_channels == zero, "{report}"),
    }
}
