//! Files that are not mapped-ram files: `inspect` and `send` name them and print a command, and the command works.

use std::{fs, path::Path, process::Command};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu};
use tempfile::TempDir;

use crate::kit::{
    Ended, assert_left, folder, machine, machine_in, migrate, path, run, runs_on, send, source,
};

/// Runs the command that the program has printed, with NEW replaced by `new`, as a user does.
fn follow(told: &Ended, new: &Path) {
    let (_, command) = told.stderr.split_once("that can be read: ").expect("a command");
    let command = command.lines().next().expect("a line").replace(" NEW", &format!(" '{}'", new.display()));
    let program = Path::new(env!("CARGO_BIN_EXE_multifd"));
    let folder = program.parent().expect("a folder").display();
    let search = format!("{folder}:{}", std::env::var("PATH").expect("PATH"));
    let ended = Command::new("sh").args(["-c", &command]).env("PATH", search).output().expect("a shell");
    assert!(ended.status.success(), "{command}: {ended:?}");
}

/// What both verbs say about a file.
fn told(file: &Path, words: &[&str]) -> Ended {
    let file = file.to_str().expect("text");
    run(["send", file, "tcp:127.0.0.1:1"]).assert_failed(1, words);
    let ended = run(["inspect", file]);
    ended.assert_failed(1, words);
    ended
}

/// Puts libvirt's head, with an XML of an odd length, before a stream.
fn libvirt(stream: &[u8], compression: u8) -> Vec<u8> {
    let xml = b"<domain type='qemu'/>\0";
    let mut image = vec![0; 92];
    image[..16].copy_from_slice(b"LibvirtQemudSave");
    image[16] = 2;
    image[20] = u8::try_from(xml.len()).expect("short");
    image[24] = 1;
    image[28] = compression;
    [&image, &xml[..], stream].concat()
}

/// Compresses with a program; `None` if this machine does not have it.
fn compressed(by: &str, folder: &TempDir, stream: &[u8]) -> Option<Vec<u8>> {
    let plain = path(folder, "plain");
    fs::write(&plain, stream).expect("written");
    let packed = Command::new(by).args(["-1", "-c"]).arg(&plain).output();
    fs::remove_file(&plain).expect("removed");
    match packed {
        Ok(packed) if packed.status.success() => Some(packed.stdout),
        _ => {
            multifd_testkit::lacks(&format!("{by} is not installed"));
            None
        }
    }
}

fn restored(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let mut from = source(machine(qemu, &qemu.machine()))?;
    // The name needs quotes in a shell.
    let classic = path(&folder, "it's a stream");
    migrate(&mut from, &format!("exec:cat > \"{}\"", classic.display()))?;
    let stream = fs::read(&classic).expect("a stream");
    let new = path(&folder, "new");
    follow(&told(&classic, &["capability mapped-ram was off when it was written"]), &new);

    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    send(&["--multifd-channels", "0"], &new, &mut to, "tcp:127.0.0.1:0")?;
    runs_on(&from, &mut to)?;

    let whole = machine_in(&new);
    for (number, by) in [(0, None), (1, Some("gzip")), (2, Some("bzip2")), (3, Some("xz")), (5, Some("zstd"))]
    {
        let body = match by {
            Some(by) => compressed(by, &folder, &stream),
            None => Some(stream.clone()),
        };
        let Some(body) = body else { continue };
        let (image, new) = (path(&folder, "image"), path(&folder, &format!("new-{number}")));
        fs::write(&image, libvirt(&body, number)).expect("written");
        let words = [
            "a save image of libvirt (virsh save)",
            "begins after 114 bytes",
            by.unwrap_or("not compressed"),
        ];
        follow(&told(&image, &words), &new);
        assert!(machine_in(&new) == whole, "{by:?}: another guest");
        fs::remove_file(&new).expect("removed");
    }
    assert_left(&folder, &["image", "it's a stream", "new"]);
    Ok(())
}

#[test]
fn command_for_a_stream_in_a_file_and_for_a_libvirt_image_restores_the_guest_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    restored(&qemu).unwrap();
}

#[test]
fn command_for_a_stream_in_a_file_and_for_a_libvirt_image_restores_the_guest_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    restored(&qemu).unwrap();
}

/// libvirt's format `sparse` has a mapped-ram file behind its head.
#[test]
fn sparse_libvirt_image_is_read_at_the_offset_that_is_named() {
    fn reads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, &qemu.machine()))?;
        let image = path(&folder, "image");
        fs::write(&image, libvirt(&[], 6)).expect("written");
        from.set_capabilities(&[("mapped-ram", true)])?;
        migrate(&mut from, &format!("file:{},offset=114", image.display()))?;
        // QEMU keeps what is before the offset.
        let told = told(&image, &["a save image of libvirt (virsh save), format sparse"]);
        let (_, address) = told.stderr.split_once("as it is, with ").expect("an address");
        let (address, _) = address.split_once(" as the file").expect("an address");
        let ended = run(["inspect", address]);
        assert!(ended.code == Some(0) && ended.stdout.contains("pc.ram"), "{ended:?}");
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    reads(&qemu).unwrap();
}

/// Machine types up to 2.3 send no configuration, which would name the capability.
#[test]
fn stream_of_an_old_machine_type_in_a_file_is_recognised() {
    fn reads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, "pc-i440fx-2.3"))?;
        let classic = path(&folder, "stream");
        migrate(&mut from, &format!("exec:cat > {}", classic.display()))?;
        follow(
            &told(&classic, &["capability mapped-ram was off when it was written"]),
            &path(&folder, "new"),
        );
        Ok(())
    }
    let Some(qemu) = Qemu::v7_2() else { return };
    reads(&qemu).unwrap();
}

/// The guest's devices come after RAM without the end of RAM, and their last one has no end that could be found.
fn background_snapshot(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let mut from = source(machine(qemu, &qemu.machine()))?;
    if let Err(refused) = from.set_capabilities(&[("background-snapshot", true)]) {
        multifd_testkit::lacks(&format!("no background snapshots on this machine: {refused}"));
        return Ok(());
    }
    let stream = path(&folder, "stream");
    from.migrate(&format!("exec:cat > {}", stream.display()))?;
    from.wait_migration("completed", PATIENCE)?;
    let command = format!("exec:cat {}", stream.display());
    let new = path(&folder, "new");
    let ended = run(["receive", &command, new.to_str().expect("text")]);
    ended.assert_failed(
        1,
        &["a background snapshot", "switch capability background-snapshot off at the source"],
    );
    assert_left(&folder, &["stream"]);
    Ok(())
}

#[test]
fn background_snapshot_is_refused_by_name_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    background_snapshot(&qemu).unwrap();
}

#[test]
fn background_snapshot_is_refused_by_name_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    background_snapshot(&qemu).unwrap();
}
