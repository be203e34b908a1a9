//! Exported files in the tools that they are for. Each tool is skipped if it is not installed.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use multifd_testkit::qemu::{Error, Qemu, Vm};

use super::look::{Dumped, dumped, look, read};
use crate::kit::{folder, machine, migrate, path};

/// Runs a tool; `None`, and listed as skipped, if it is not installed.
fn tool(program: &str, words: &[&str], file: &Path) -> Option<String> {
    match Command::new(program).args(words).arg(file).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Some(String::from_utf8_lossy(&text).into_owned())
        }
        Err(_) => {
            multifd_testkit::lacks(&format!("{program} is not installed"));
            None
        }
    }
}

fn export(format: &str, stream: &Path, out: &Path) {
    let ended = look("export", &["--quiet", "--format", format, stream.to_str().expect("text")], out);
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{ended:?}");
}

#[test]
fn exported_core_file_opens_in_readelf_and_gdb() {
    fn opens(qemu: &Qemu) -> Result<(), Error> {
        let builder = machine(qemu, &qemu.machine()).args(["-smp", "2"]);
        let Dumped { stream, folder, .. } = dumped(builder, true)?;
        let elf = path(&folder, "elf");
        export("elf", &stream, &elf);
        if let Some(text) = tool("readelf", &["-hlnW"], &elf) {
            assert!(text.contains("CORE (Core file)") && text.matches("NT_PRSTATUS").count() == 2, "{text}");
            assert!(!text.to_lowercase().contains("warning") && !text.contains("Error"), "{text}");
        }
        let digits: String =
            read(&[], &stream, 0x20_0000, 8).iter().rev().map(|byte| format!("{byte:02x}")).collect();
        let words = ["-nx", "-batch", "-ex", "info threads", "-ex", "x/1gx 0x200000", "-c"];
        if let Some(text) = tool("gdb", &words, &elf) {
            assert!(text.contains("LWP 2") && text.contains(&format!("0x{digits}")), "{text}");
        }
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    opens(&qemu).unwrap();
}

/// A kernel of Linux for x86; `None`, and listed as skipped, without one.
fn kernel() -> Option<PathBuf> {
    let given = env::var_os("MULTIFD_KERNEL").map(PathBuf::from);
    let found = given.or_else(|| {
        let mut entries = fs::read_dir("/boot").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        entries
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
    });
    if found.is_none() {
        multifd_testkit::lacks("no kernel of Linux: neither MULTIFD_KERNEL nor /boot/vmlinuz-*");
    }
    found
}

/// Waits until the kernel has found that it has no disk to start from.
fn wait_panic(vm: &Vm, console: &Path) -> String {
    for _ in 0..600 {
        let text = fs::read_to_string(console).unwrap_or_default();
        if text.contains("end Kernel panic") {
            return text;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the kernel did not end: {}", vm.stderr());
}

/// A guest with Linux: the kernel and its release are found where it has put them.
#[test]
fn linux_is_found_by_volatility_and_drgn() {
    fn is_found(qemu: &Qemu, kernel: &Path) -> Result<(), Error> {
        let folder = folder();
        let console = path(&folder, "console");
        let mut vm = qemu
            .vm()
            .machine(&qemu.machine())
            .memory(512 << 20)
            .args(["-cpu", "max", "-append", "console=ttyS1 panic=0"])
            .args(["-kernel".as_ref(), kernel.as_os_str()])
            .args(["-serial".to_owned(), format!("file:{}", console.display())])
            .start()?;
        let text = wait_panic(&vm, &console);
        let (_, release) = text.split_once("Linux version ").expect("a banner");
        let release = release.split_whitespace().next().expect("a release");
        vm.stop()?;
        let stream = path(&folder, "stream");
        migrate(&mut vm, &format!("exec:cat > {}", stream.display()))?;

        let banner = format!("Linux version {release}");
        let found = look("find", &["--json", "--text", &banner], &stream);
        let places = found.json()["addresses"].as_array().map(Vec::len);
        assert!(places > Some(0), "{found:?}");
        for format in ["elf", "lime", "kdump"] {
            let out = path(&folder, format);
            export(format, &stream, &out);
            // Its options come before the name of a plugin.
            let words = ["-q", "-f", out.to_str().expect("text")];
            if format != "kdump"
                && let Some(text) = tool("vol", &words, Path::new("banners.Banners"))
            {
                assert!(text.contains(&banner), "{format}: {text}");
            }
            if format != "lime" && has_drgn() {
                let script = "import drgn, sys; p = drgn.Program(); p.set_core_dump(sys.argv[1]); \
                              print(p.flags, p['UTS_RELEASE'].string_().decode())";
                let text = tool("python3", &["-c", script], &out).expect("python3");
                assert!(text.contains("IS_LINUX_KERNEL") && text.contains(release), "{format}: {text}");
            }
        }
        Ok(())
    }
    let (Some(qemu), Some(kernel)) = (Qemu::v10_0(), kernel()) else { return };
    is_found(&qemu, &kernel).unwrap();
}

fn has_drgn() -> bool {
    let imported = Command::new("python3").args(["-c", "import drgn"]).output();
    let has = imported.is_ok_and(|output| output.status.success());
    if !has {
        multifd_testkit::lacks("drgn is not installed for python3");
    }
    has
}

/// What a libvirt without a service needs to run a guest as this user.
const LIBVIRT: &str = r#"user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
seccomp_sandbox = 0
stdio_handler = "file"
"#;

/// Images that libvirt has made, in each format that it has: memory, devices and definition are those of the guest.
#[test]
fn images_of_a_real_virsh_save_are_read() {
    fn are_read(qemu: &Qemu) -> Result<(), Error> {
        // The paths of its sockets are short.
        let root = tempfile::Builder::new().prefix("lv").tempdir_in("/tmp").expect("a folder");
        let domain = path(&root, "domain.xml");
        let emulator = qemu.program().display();
        let xml = format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>saved</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' \
             machine='{}'>hvm</type></os><devices><emulator>{emulator}</emulator></devices><qemu:commandline><qemu:arg \
             value='-device'/><qemu:arg value='loader,addr=0x200000,data=0x0123456789abcdef,data-len=8'/></qemu:commandline></domain>",
            qemu.machine()
        );
        fs::write(&domain, xml).expect("written");
        for format in ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"] {
            fs::create_dir_all(root.path().join("etc")).expect("a folder");
            let settings = format!("{LIBVIRT}save_image_format = \"{format}\"\n");
            fs::write(root.path().join("etc/qemu.conf"), settings).expect("written");
            let (image, memory) = (path(&root, format), path(&root, "memory"));
            let commands = format!(
                "create {}; suspend saved; qemu-monitor-command saved --hmp 'pmemsave 0x100000 0x3f00000 \"{}\"'; save saved {}",
                domain.display(),
                memory.display(),
                image.display()
            );
            let connection = format!("qemu:///embed?root={}", root.path().display());
            let ended = Command::new("virsh").args(["-c", &connection, &commands]).output();
            let Ok(ended) = ended else {
                multifd_testkit::lacks("virsh is not installed");
                return Ok(());
            };
            let text = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
            let _ = Command::new("virsh").args(["-c", &connection, "destroy saved"]).output();
            if text.contains("Invalid save image format") {
                multifd_testkit::lacks(&format!("this libvirt has no format {format}"));
                continue;
            }
            if !text.contains("saved to") {
                multifd_testkit::lacks(&format!("libvirt cannot run a guest here: {text}"));
                return Ok(());
            }
            let shown = look("inspect", &["--json"], &image).json();
            assert_eq!(shown["form"], format!("a save image of libvirt, {format}"));
            assert!(
                shown["libvirt"]["xml"].as_str().is_some_and(|xml| xml.contains("<name>saved</name>")),
                "{shown}"
            );
            assert!(shown["devices"].as_array().map(Vec::len) > Some(5), "{shown}");
            let expected = fs::read(&memory).expect("what QEMU has shown");
            assert!(read(&[], &image, 0x10_0000, 0x3f0_0000) == expected, "{format}: another memory");
            assert!(expected.iter().any(|byte| *byte != 0), "a device has written to memory");
        }
        Ok(())
    }
    let Some(qemu) = Qemu::v7_2() else { return };
    are_read(&qemu).unwrap();
}
