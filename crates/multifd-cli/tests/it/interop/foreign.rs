//! Machines in other forms than a mapped-ram file: streams, compressed ones, images of libvirt. Every verb reads them.

use std::{fs, path::Path, process::Command};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::{
    Program, assert_left, first_difference, folder, machine, machine_in, memory, migrate, migrate_live,
    multifd, path, run, runs_on, send, source, stored_memory,
};

/// Makes a mapped-ram file of a machine in another form.
fn merge(from: &Path, new: &Path) {
    let ended = run([Path::new("merge"), Path::new("--quiet"), from, new]);
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{}", from.display());
}

/// What `inspect` shows of a machine.
fn inspect(file: &Path) -> Value {
    let ended = run([Path::new("inspect"), Path::new("--json"), file]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.json()
}

/// The guest in `file` runs on in another QEMU.
fn is_sent(qemu: &Qemu, from: &multifd_testkit::qemu::Vm, file: &Path) -> Result<(), Error> {
    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    send(&["--multifd-channels", "0"], file, &mut to, "tcp:127.0.0.1:0")?;
    runs_on(from, &mut to)
}

/// Puts libvirt's head, with an XML of an odd length, before a stream.
fn libvirt(stream: &[u8], compression: u8) -> Vec<u8> {
    let xml = format!("{XML}\0").into_bytes();
    let mut image = vec![0; 92];
    image[..16].copy_from_slice(b"LibvirtQemudSave");
    image[16] = 2;
    image[20] = u8::try_from(xml.len()).expect("short");
    image[24] = 1;
    image[28] = compression;
    [&image, &xml[..], stream].concat()
}

const XML: &str = "<domain type='qemu'/>";

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

fn every_form(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let mut from = source(machine(qemu, &qemu.machine()))?;
    let classic = path(&folder, "it's a stream");
    migrate(&mut from, &format!("exec:cat > \"{}\"", classic.display()))?;
    let stream = fs::read(&classic).expect("a stream");
    is_sent(qemu, &from, &classic)?;

    let new = path(&folder, "new");
    merge(&classic, &new);
    assert_eq!(first_difference(&stored_memory(&new), &memory(&mut from)?), None, "page of the source");
    let whole = machine_in(&new);
    let shown = inspect(&classic);
    assert_eq!(shown["form"], "a stream of QEMU");
    assert_eq!(shown["blocks"][0]["pages-present"], inspect(&new)["blocks"][0]["pages-present"]);
    let intact = run([Path::new("verify"), &new]);
    assert_eq!(intact.code, Some(0), "{intact:?}");
    let verify = |words: &[&str], file: &Path| {
        let words = words.iter().map(Path::new);
        run([Path::new("verify")].into_iter().chain(words).chain([file]))
    };
    let found = verify(&[], &classic);
    assert_eq!((found.code, &*found.stdout), (Some(0), ""), "{found:?}");
    for text in ["is complete: a stream of QEMU, ", "not compared: ", "multifd merge FILE NEW"] {
        assert!(found.stderr.contains(text), "{text}: {found:?}");
    }
    let json = verify(&["--json"], &classic).json();
    assert_eq!((&json["status"], &json["compared"]), (&json!("complete"), &json!(false)), "{json}");
    verify(&["--add"], &classic).assert_failed(1, &["cannot add digests", "multifd merge FILE NEW"]);

    for (number, by) in [
        (0, None),
        (1, Some("gzip")),
        (2, Some("bzip2")),
        (3, Some("xz")),
        (4, Some("lzop")),
        (5, Some("zstd")),
    ] {
        let body = match by {
            Some(by) => compressed(by, &folder, &stream),
            None => Some(stream.clone()),
        };
        let Some(body) = body else { continue };
        let (image, plain, new) = (path(&folder, "image"), path(&folder, "packed"), path(&folder, "of-it"));
        fs::write(&image, libvirt(&body, number)).expect("written");
        fs::write(&plain, &body).expect("written");
        for file in [&image, &plain] {
            merge(file, &new);
            assert!(machine_in(&new) == whole, "{by:?}: another guest");
            fs::remove_file(&new).expect("removed");
        }
        let shown = inspect(&image);
        assert_eq!(shown["form"], format!("a save image of libvirt, {}", by.unwrap_or("raw")));
        assert_eq!(shown["libvirt"]["xml"], XML);
        assert_eq!(
            (&shown["libvirt"]["was-running"], &shown["libvirt"]["stream-at"]),
            (&json!(true), &json!(114))
        );
        let found = verify(&[], &image);
        assert!(found.code == Some(0) && found.stderr.contains("is complete: a save image"), "{found:?}");
        assert_eq!(found.stderr.contains("has compared it with the checksums"), by.is_some(), "{found:?}");
        let xml = run([Path::new("inspect"), Path::new("--xml"), &image]);
        assert_eq!(xml.stdout, format!("{XML}\n"));
        // Cut anywhere, it is no machine.
        for left in [body.len() / 2, body.len() - 1] {
            fs::write(&image, libvirt(&body[..left], number)).expect("written");
            run([Path::new("inspect"), &image]).assert_failed(1, &["image"]);
            verify(&[], &image).assert_failed(1, &["cannot read", "image"]);
        }
        fs::write(&image, libvirt(&body, number)).expect("written");
        is_sent(qemu, &from, &image)?;
    }
    assert_left(&folder, &["image", "it's a stream", "new", "packed"]);
    Ok(())
}

#[test]
fn guest_in_a_stream_and_in_every_form_of_libvirt_runs_on_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    every_form(&qemu).unwrap();
}

#[test]
fn guest_in_a_stream_and_in_every_form_of_libvirt_runs_on_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    every_form(&qemu).unwrap();
}

/// With xbzrle, a page that changes again is in the stream as a difference.
#[test]
fn differences_of_pages_in_a_stream_are_applied() {
    fn reads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.set_capabilities(&[("xbzrle", true)])?;
        from.set_parameters(json!({ "xbzrle-cache-size": 8 << 20 }))?;
        let classic = path(&folder, "stream");
        let told = migrate_live(&mut from, &format!("exec:cat > {}", classic.display()), 4)?;
        assert!(told["xbzrle-cache"]["pages"].as_u64() > Some(0), "{told}");
        let new = path(&folder, "new");
        merge(&classic, &new);
        assert_eq!(first_difference(&stored_memory(&new), &memory(&mut from)?), None, "page of the source");
        is_sent(qemu, &from, &classic)
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()] {
        let Some(qemu) = qemu else { return };
        reads(&qemu).unwrap();
    }
}

/// A scratch file that cannot be written is named with its folder, and a decompressor that is missing by its name.
#[test]
fn what_a_stream_needs_and_is_missing_is_named() {
    let folder = folder();
    let packed = path(&folder, "packed");
    fs::write(&packed, b"\x28\xb5\x2f\xfd and no more").expect("written");
    let ended = |variable: Option<(&str, &str)>| {
        let mut command = multifd(["inspect"]);
        Program::start(command.arg(&packed).envs(variable)).end()
    };
    ended(None).assert_failed(1, &["zstd cannot decompress it"]);
    ended(Some(("PATH", ""))).assert_failed(1, &["zstd cannot be started", "install it"]);
    ended(Some(("TMPDIR", "/nowhere"))).assert_failed(1, &["/nowhere"]);
}

/// libvirt's format `sparse` has a mapped-ram file after its head.
#[test]
fn sparse_libvirt_image_is_read_in_place() {
    fn reads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, &qemu.machine()))?;
        let image = path(&folder, "image");
        fs::write(&image, libvirt(&[], 6)).expect("written");
        from.set_capabilities(&[("mapped-ram", true)])?;
        migrate(&mut from, &format!("file:{},offset=114", image.display()))?;
        // QEMU keeps what is before the offset.
        let shown = inspect(&image);
        assert_eq!(shown["form"], "a save image of libvirt, sparse");
        assert!(shown["blocks"][0]["pages-offset"].as_u64() > Some(114), "{shown}");
        is_sent(qemu, &from, &image)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    reads(&qemu).unwrap();
}

/// Machine types up to 2.3 send no configuration, which would name the capability.
#[test]
fn stream_of_an_old_machine_type_in_a_file_is_read() {
    fn reads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, "pc-i440fx-2.3"))?;
        let (classic, new) = (path(&folder, "stream"), path(&folder, "new"));
        migrate(&mut from, &format!("exec:cat > {}", classic.display()))?;
        merge(&classic, &new);
        assert_eq!(first_difference(&stored_memory(&new), &memory(&mut from)?), None, "page of the source");
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
