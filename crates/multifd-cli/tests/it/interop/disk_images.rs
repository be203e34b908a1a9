//! Machines that QEMU has saved inside disk images, with `savevm`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use multifd_testkit::qemu::{Error, Qemu, Vm};
use serde_json::json;
use tempfile::TempDir;

use super::look::{look, read};
use crate::kit::{
    PAGE, assert_left, first_difference, folder, machine, memory, migrate, path, run, runs_on, send, source,
    stored_memory,
};

/// Creates an empty image; `None`, and listed as skipped, if this machine cannot.
fn image(folder: &TempDir, name: &str, options: &str, size: &str) -> Option<PathBuf> {
    let image = path(folder, name);
    let words = ["create", "-q", "-f", "qcow2", "-o", options];
    match Command::new("qemu-img").args(words).arg(&image).arg(size).output() {
        Ok(made) if made.status.success() => Some(image),
        Ok(refused) => panic!("{}", String::from_utf8_lossy(&refused.stderr)),
        Err(_) => {
            multifd_testkit::lacks("qemu-img is not installed");
            None
        }
    }
}

fn drive(image: &Path) -> [String; 2] {
    ["-drive".to_owned(), format!("file={},if=virtio,format=qcow2", image.display())]
}

fn save(vm: &mut Vm, name: &str) -> Result<(), Error> {
    let said = vm.execute("human-monitor-command", json!({ "command-line": format!("savevm {name}") }))?;
    assert_eq!(said, json!(""));
    Ok(())
}

fn at(image: &Path, snapshot: &str) -> PathBuf {
    format!("file:{},snapshot={snapshot}", image.display()).into()
}

/// Two moments in one image, beside the stream and the memory that QEMU shows of the second one.
fn snapshots_are_read(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let Some(image) = image(&folder, "image", "cluster_size=64k", "64M") else { return Ok(()) };
    let mut vm = source(machine(qemu, &qemu.machine()).args(drive(&image)))?;
    vm.stop()?;
    save(&mut vm, "first")?;
    let at_first = vm.pmemsave(0x10_0000, 39 << 20)?;
    let only = look("inspect", &["--json"], &image).json();
    assert_eq!(only["form"], "a snapshot in a qcow2 image, first");

    let round = vm.round()?.unwrap_or_default();
    vm.cont()?;
    vm.wait_round(round + 1, multifd_testkit::qemu::PATIENCE)?;
    vm.stop()?;
    save(&mut vm, "second")?;
    let stream = path(&folder, "stream");
    migrate(&mut vm, &format!("exec:cat > {}", stream.display()))?;

    // QEMU uses the image meanwhile.
    look("inspect", &[], &image).assert_failed(1, &["several snapshots", "snapshot=NAME", "first second"]);
    look("inspect", &[], &at(&image, "third")).assert_failed(1, &["no snapshot \"third\"", "first second"]);
    assert!(read(&[], &at(&image, "first"), 0x10_0000, 39 << 20) == at_first, "memory of the first one");
    let equal = run([Path::new("diff"), &at(&image, "second"), &stream]);
    assert_eq!(equal.code, Some(0), "{equal:?}");
    let differ = run([Path::new("diff"), &at(&image, "first"), &at(&image, "second")]);
    assert_eq!(differ.code, Some(1), "{differ:?}");

    let new = path(&folder, "new");
    let merged = run([Path::new("merge"), Path::new("--quiet"), &at(&image, "second"), &new]);
    assert_eq!((merged.code, &*merged.stderr), (Some(0), ""), "{merged:?}");
    assert_eq!(first_difference(&stored_memory(&new), &memory(&mut vm)?), None, "page of the source");
    // It runs on where it was saved, with the disk of that moment.
    let disk = path(&folder, "disk");
    fs::copy(&image, &disk).expect("copied");
    let mut to = machine(qemu, &qemu.machine()).args(drive(&disk)).incoming().start()?;
    send(&["--multifd-channels", "0"], &at(&image, "second"), &mut to, "tcp:127.0.0.1:0")?;
    // It was saved while it was paused.
    to.cont()?;
    runs_on(&vm, &mut to)?;
    look("inspect", &[], &at(&stream, "first"))
        .assert_failed(1, &["a stream of QEMU, which has no snapshots"]);
    assert_left(&folder, &["disk", "image", "new", "stream"]);
    Ok(())
}

#[test]
fn machine_in_a_disk_image_is_read_like_any_other_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    snapshots_are_read(&qemu).unwrap();
}

#[test]
fn machine_in_a_disk_image_is_read_like_any_other_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    snapshots_are_read(&qemu).unwrap();
}

/// Clusters of every size, old images, extended entries, a state behind a large disk; and what is refused.
#[test]
fn state_is_found_in_images_of_every_layout() {
    fn is_found(qemu: &Qemu, folder: &TempDir, options: &str, size: &str) -> Result<(), Error> {
        let Some(image) = image(folder, "image", options, size) else { return Ok(()) };
        let other = image_of_another_disk(folder);
        let loaded = "loader,addr=0x200000,data=0x0123456789abcdef,data-len=8";
        let vm = qemu.vm().machine(&qemu.machine()).memory(32 << 20).args(["-device", loaded]);
        let mut vm = vm.args(drive(&image)).args(drive(&other)).paused().start()?;
        save(&mut vm, "one")?;
        let shown = look("inspect", &["--json"], &image).json();
        assert_eq!(shown["form"], "a snapshot in a qcow2 image, one", "{options}");
        let bytes = read(&[], &image, 0x20_0000, 8);
        assert_eq!(bytes, [0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 1], "{options}");
        // The other disk has the snapshot, and no machine.
        look("inspect", &[], &other).assert_failed(1, &["no machine"]);
        look("inspect", &[], &at(&other, "one")).assert_failed(1, &["has no machine", "first disk"]);
        assert_eq!(vm.pmemsave(0x20_0000, PAGE as u64)?.len(), PAGE);
        drop(vm);
        fs::remove_file(image).expect("removed");
        fs::remove_file(other).expect("removed");
        Ok(())
    }
    fn image_of_another_disk(folder: &TempDir) -> PathBuf {
        image(folder, "other", "cluster_size=64k", "1M").expect("qemu-img is installed")
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    let folder = folder();
    for (options, size) in [
        ("cluster_size=512", "1M"),
        ("cluster_size=4k", "20G"),
        ("cluster_size=2M", "1T"),
        ("compat=0.10", "100M"),
        ("extended_l2=on", "64M"),
        ("compression_type=zstd,lazy_refcounts=on", "64M"),
    ] {
        is_found(&qemu, &folder, options, size).unwrap_or_else(|error| panic!("{options}: {error:?}"));
    }
    let Some(empty) = image(&folder, "empty", "cluster_size=64k", "1M") else { return };
    look("inspect", &[], &empty).assert_failed(1, &["without snapshots"]);
    let data = format!("data_file={}", path(&folder, "data").display());
    let outside = image(&folder, "outside", &data, "1M").expect("qemu-img is installed");
    look("inspect", &[], &outside).assert_failed(1, &["data is in another file"]);
}
