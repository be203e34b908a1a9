//! A guest with Linux: what is exported of it, in the tools that people use on dumps of a kernel.
//!
//! The kernel is started without a disk, so it ends with a panic, which is on its console. Tools that are not installed are
//! listed as skipped.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};
use tempfile::TempDir;

use super::{
    look::look,
    tools::{export, tool},
};
use crate::kit::{folder, migrate, path};

/// A kernel that has ended, and the stream of its machine.
struct Linux {
    stream: PathBuf,
    /// Such as `6.1.0-50-cloud-amd64`.
    release: String,
    folder: TempDir,
}

impl Linux {
    /// `None`, and listed as skipped, without a QEMU or a kernel.
    fn start() -> Option<Self> {
        let (qemu, kernel) = (Qemu::v10_0()?, kernel()?);
        Some(Self::boot(&qemu, &kernel).unwrap())
    }

    fn boot(qemu: &Qemu, kernel: &Path) -> Result<Self, Error> {
        let folder = folder();
        let console = path(&folder, "console");
        let mut vm = qemu
            .vm()
            .machine(&qemu.machine())
            .memory(512 << 20)
            .args(["-cpu", "max", "-smp", "2", "-append", "console=ttyS1 panic=0"])
            .args(["-kernel".as_ref(), kernel.as_os_str()])
            .args(["-serial".to_owned(), format!("file:{}", console.display())])
            .start()?;
        let text = wait_panic(&vm, &console);
        let (_, release) = text.split_once("Linux version ").expect("a banner");
        let release = release.split_whitespace().next().expect("a release").to_owned();
        vm.stop()?;
        let stream = path(&folder, "stream");
        migrate(&mut vm, &format!("exec:cat > {}", stream.display()))?;
        Ok(Self { stream, release, folder })
    }

    /// Exports it.
    fn export(&self, format: &str) -> PathBuf {
        let out = path(&self.folder, format);
        export(format, &self.stream, &out);
        out
    }
}

/// A kernel of Linux for x86: the one that the task has fetched, or that of this machine.
fn kernel() -> Option<PathBuf> {
    let given = env::var_os("MULTIFD_KERNEL").map(PathBuf::from);
    let fetched = || {
        let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kernel");
        home.join("stamp").exists().then(|| home.join("vmlinuz"))
    };
    let of_this_machine = || {
        let mut entries = fs::read_dir("/boot").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        entries
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
    };
    let found = given.or_else(fetched).or_else(of_this_machine);
    if found.is_none() {
        multifd_testkit::skip(
            "no kernel of Linux: not fetched (`cargo xtask qemu` does), and no /boot/vmlinuz-*",
        );
    }
    found
}

/// Its symbols; `None`, and listed as skipped, without them.
fn symbols() -> Option<PathBuf> {
    let found = env::var_os("MULTIFD_VMLINUX").map(PathBuf::from);
    if found.is_none() {
        multifd_testkit::lacks(
            "no symbols of the kernel: MULTIFD_FETCH_SYMBOLS=1 cargo xtask test downloads 280 MB",
        );
    }
    found
}

/// Waits until the kernel has found that it has no disk to start from.
fn wait_panic(vm: &Vm, console: &Path) -> String {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        let text = fs::read_to_string(console).unwrap_or_default();
        if text.contains("end Kernel panic") {
            return text;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("the kernel did not end: {}", vm.stderr());
}

/// What drgn prints for a script, of the file; `None`, and listed as skipped, if it is not installed.
fn drgn(script: &str, file: &Path) -> Option<String> {
    let imported = Command::new("python3").args(["-c", "import drgn"]).output();
    if !imported.is_ok_and(|output| output.status.success()) {
        multifd_testkit::lacks("drgn is not installed for python3");
        return None;
    }
    let script = format!("import drgn, sys\np = drgn.Program()\np.set_core_dump(sys.argv[1])\n{script}");
    tool("python3", &["-c", &script], file)
}

#[test]
fn linux_is_found_without_its_symbols() {
    let Some(linux) = Linux::start() else { return };
    let release = &*linux.release;
    let banner = format!("Linux version {release}");
    let found = look("find", &["--json", "--text", &banner], &linux.stream);
    let places = found.json()["addresses"].as_array().map(Vec::len);
    assert!(places > Some(0), "{found:?}");
    for format in ["elf", "lime", "kdump"] {
        let out = linux.export(format);
        // Its options come before the name of a plugin.
        let words = ["-q", "-f", out.to_str().expect("text")];
        if format != "kdump"
            && let Some(text) = tool("vol", &words, Path::new("banners.Banners"))
        {
            assert!(text.contains(&banner), "{format}: {text}");
        }
        if format == "lime" {
            continue;
        }
        let script = "print(p.flags, p['UTS_RELEASE'].string_().decode())";
        if let Some(text) = drgn(script, &out) {
            assert!(text.contains("IS_LINUX_KERNEL") && text.contains(release), "{format}: {text}");
        }
        // What it needs of the kernel is in VMCOREINFO.
        if let Some(text) = tool("crash", &["--osrelease"], &out) {
            assert_eq!(text.trim(), release, "{format}");
        }
    }
}

#[test]
fn linux_is_debugged_with_its_symbols() {
    let Some(symbols) = symbols() else { return };
    let Some(linux) = Linux::start() else { return };
    for format in ["elf", "kdump"] {
        let out = linux.export(format);
        let commands = path(&linux.folder, "commands");
        fs::write(&commands, "sys\nps\nbt -c 0\nbt -c 1\nexit\n").expect("written");
        let words = ["-s", "-i", commands.to_str().expect("text"), symbols.to_str().expect("text")];
        if let Some(text) = tool("crash", &words, &out) {
            for expected in
                [&*linux.release, "CPUS: 2", "Unable to mount root fs", "swapper/1", "mount_block_root"]
            {
                assert!(text.contains(expected), "{format}: no {expected}: {text}");
            }
        }
        let script = format!(
            "p.load_debug_info([{:?}])\nfrom drgn.helpers.linux.pid import for_each_task\n\
             print(sorted(t.comm.string_().decode() for t in for_each_task(p)))\nprint(p.stack_trace(1))",
            symbols.display().to_string()
        );
        if let Some(text) = drgn(&script, &out) {
            assert!(text.contains("'swapper/0'") && text.contains("mount_block_root"), "{format}: {text}");
        }
    }
}
