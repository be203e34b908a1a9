//! Exported files in the tools that they are for. Each tool is skipped if it is not installed.

use std::{
    env, fs, io,
    path::Path,
    process::{Command, Output},
};

use multifd_testkit::qemu::{Error, Qemu};

use super::look::{Dumped, dumped, look, read};
use crate::kit::{machine, path};

/// Runs a tool; `None`, and listed as skipped, if it is not installed.
pub(super) fn tool(program: &str, words: &[&str], file: &Path) -> Option<String> {
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

pub(super) fn export(format: &str, stream: &Path, out: &Path) {
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

/// Runs `virsh`: the installed one, or that of `$MULTIFD_LIBVIRT`. Packages are unpacked in that folder, which is laid over `/usr` for
/// this process alone.
fn virsh(arguments: &[&str]) -> io::Result<Output> {
    let Some(unpacked) = env::var_os("MULTIFD_LIBVIRT") else {
        return Command::new("virsh").args(arguments).output();
    };
    let script = "mount -t overlay overlay -o \"lowerdir=$0/usr:/usr\" /usr && exec virsh \"$@\"";
    Command::new("unshare").args(["--mount", "sh", "-c", script]).arg(unpacked).args(arguments).output()
}

/// Images that libvirt has made, in each format that it has: memory, devices and definition are those of the guest.
#[test]
fn images_of_a_real_virsh_save_are_read() {
    fn are_read(qemus: [&Qemu; 2]) -> Result<(), Error> {
        // The paths of its sockets are short.
        let root = tempfile::Builder::new().prefix("lv").tempdir_in("/tmp").expect("a folder");
        let domain = path(&root, "domain.xml");
        for format in ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"] {
            // Only the newer one has mapped-ram.
            let qemu = qemus[usize::from(format == "sparse")];
            let emulator = qemu.program().display();
            let xml = format!(
                "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>saved</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' \
                 machine='{}'>hvm</type></os><features><acpi/></features><devices><emulator>{emulator}</emulator></devices><qemu:commandline><qemu:arg \
                 value='-device'/><qemu:arg value='loader,addr=0x200000,data=0x0123456789abcdef,data-len=8'/></qemu:commandline></domain>",
                qemu.machine()
            );
            fs::write(&domain, xml).expect("written");
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
            let Ok(ended) = virsh(&["-c", &connection, &commands]) else {
                multifd_testkit::lacks("virsh is not installed");
                return Ok(());
            };
            let text = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
            let _ = virsh(&["-c", &connection, "destroy saved"]);
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
    let Some([old, new]) = Qemu::both() else { return };
    are_read([&old, &new]).unwrap();
}
