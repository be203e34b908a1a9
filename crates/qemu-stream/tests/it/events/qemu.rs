//! Streams of real QEMUs, read as events and written again: between two of them, and beside channels.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use multifd::{
    ReceiveOptions, Receiver,
    channel::{Listener, Stop, Stream, Wake},
};
use multifd_testkit::{
    guest::Guest,
    qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder},
};
use qemu_stream::{
    Connection,
    format::{Command, Message, SyncMode},
    incoming::{Event, Events, Expected, Incoming, Loader, Outcome},
    outgoing::EventWriter,
};
use serde_json::json;

use super::written::assert_written_alike;

/// A connection whose bytes from the peer are kept.
struct Kept<C> {
    inner: C,
    read: Vec<u8>,
}

impl<C> Kept<C> {
    fn new(inner: C) -> Self {
        Self { inner, read: Vec::new() }
    }
}

impl<C: Read> Read for Kept<C> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into)?;
        self.read.extend(&into[..count]);
        Ok(count)
    }
}

impl<C: Write> Write for Kept<C> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Connection for Kept<Stream> {
    fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.inner.set_read_timeout(limit)
    }

    fn waker(&self) -> Option<Arc<dyn Wake>> {
        Some(self.inner.waker())
    }

    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        Some(self.inner.write_waker())
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn uri(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A running machine whose guest has begun to work, with these capabilities.
fn source(machine: &VmBuilder, capabilities: &[(&str, bool)]) -> Result<Vm, Error> {
    let mut source = machine.clone().start()?;
    source.set_capabilities(capabilities)?;
    source.wait_round(3, PATIENCE)?;
    Ok(source)
}

/// Migrates with a few passes at least, while the guest works.
fn leave(source: &mut Vm, address: &str) -> Result<(), Error> {
    source.set_parameters(json!({ "downtime-limit": 1, "max-bandwidth": 64 << 20 }))?;
    source.migrate(address)?;
    source.wait_passes(4, PATIENCE)?;
    source.set_parameters(json!({ "downtime-limit": 10_000, "max-bandwidth": 4_u64 << 30 }))?;
    source.wait_migration("completed", PATIENCE).map(drop)
}

/// Passes one migration on, event by event: what has come and what has gone, and how many deltas of pages were in it.
fn relay(listener: UnixListener, to: PathBuf) -> thread::JoinHandle<(Vec<u8>, Vec<u8>, u64)> {
    thread::spawn(move || {
        let (from, _) = listener.accept().expect("a source");
        let to = UnixStream::connect(to).expect("a destination");
        let (mut replies, mut back) =
            (to.try_clone().expect("once more"), from.try_clone().expect("once more"));
        let returned = thread::spawn(move || io::copy(&mut replies, &mut back));
        let mut events = Events::new(Kept::new(from));
        let mut out = EventWriter::new(Sent { inner: to, sent: Vec::new() });
        let mut deltas = 0;
        loop {
            let event = events.next().expect("an event");
            deltas += u64::from(matches!(event, Event::Xbzrle { .. }));
            out.write(&event).expect("written");
            if matches!(event, Event::End(_)) {
                break;
            }
        }
        let _ = returned.join().expect("no panic");
        (events.into_inner().read, out.into_inner().sent, deltas)
    })
}

/// A connection whose bytes to the peer are kept.
struct Sent {
    inner: UnixStream,
    sent: Vec<u8>,
}

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.sent.extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[test]
fn a_guest_migrates_between_two_qemus_through_events() -> Result<(), Error> {
    let Some(both) = Qemu::both() else { return Ok(()) };
    for qemu in both {
        for xbzrle in [false, true] {
            let folder = folder();
            let (here, there) = (folder.path().join("relay"), folder.path().join("there"));
            let machine = qemu.vm().guest(&Guest::new());
            let capabilities = [("return-path", true), ("xbzrle", xbzrle)];
            let mut from = source(&machine, &capabilities)?;
            let mut to = machine.clone().incoming().start()?;
            to.set_capabilities(&capabilities)?;
            to.migrate_incoming(&uri(&there))?;
            let relayed = relay(UnixListener::bind(&here).expect("bound"), there);
            leave(&mut from, &uri(&here))?;
            to.wait_migration("completed", PATIENCE)?;
            let (read, sent, deltas) = relayed.join().expect("no panic");
            assert!(read == sent, "QEMU {}: {} bytes", qemu.series(), read.len());
            assert_eq!(deltas > 0, xbzrle, "QEMU {}: deltas", qemu.series());
            // No word of its memory is wrong, or it would say so.
            let at = from.round()?.unwrap_or(0);
            to.wait_round(at + 2, PATIENCE)?;
        }
    }
    Ok(())
}

/// The stream beside channels, in both sync modes.
#[test]
fn what_a_qemu_sends_beside_its_channels_is_written_alike() -> Result<(), Error> {
    let Some(both) = Qemu::both() else { return Ok(()) };
    for (qemu, mode) in both.into_iter().zip([SyncMode::Legacy, SyncMode::Round]) {
        for return_path in [false, true] {
            let folder = folder();
            let here = folder.path().join("here");
            let mut from = source(&qemu.vm().guest(&Guest::new()), &[("return-path", return_path)])?;
            from.set_multifd_channels(2)?;
            let address = uri(&here).parse().expect("an address");
            let listener = Listener::bind(&address).expect("bound");
            let taken = thread::spawn(move || {
                let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
                receiver.listen(Box::new(listener)).expect("listening");
                let mut incoming =
                    Incoming::new(Kept::new(receiver.wait_main().expect("main"))).stall_timeout(None);
                let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| list.in_new_memory());
                let loaded = incoming.run(&mut loader).expect("loaded");
                loader.finish(&loaded).expect("all pages");
                let main = incoming.finish(Outcome::Loaded).expect("told");
                receiver.finish().expect("in order");
                (loaded, main.read)
            });
            leave(&mut from, &uri(&here))?;
            let (loaded, read) = taken.join().expect("no panic");
            assert_eq!((loaded.sync_mode, loaded.return_path), (mode, return_path));
            assert_written_alike(&read, &format!("QEMU {}, return path {return_path}", qemu.series()));
        }
    }
    Ok(())
}

/// Takes one stream, replies as a destination does, and keeps it; says whether an event was `odd`.
fn keep(listener: UnixListener, odd: fn(&Event<'_>) -> bool) -> thread::JoinHandle<(Vec<u8>, bool)> {
    thread::spawn(move || {
        let (from, _) = listener.accept().expect("a source");
        let mut replies = from.try_clone().expect("once more");
        let mut say = |message: Message| {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            replies.write_all(&bytes).expect("said");
        };
        let mut events = Events::new(Kept::new(from)).suppress_vmdesc(true);
        let (mut return_path, mut was_odd) = (false, false);
        loop {
            let event = events.next().expect("an event");
            was_odd |= odd(&event);
            match event {
                Event::Command(Command::OpenReturnPath) => return_path = true,
                Event::Command(Command::Ping(value)) => say(Message::Pong(*value)),
                Event::End(_) => break,
                _ => {}
            }
        }
        if return_path {
            say(Message::Shut(0));
        }
        (events.into_inner().read, was_odd)
    })
}

/// No configuration, no footers; no description; a device sent early; shared memory that is left out.
#[test]
fn streams_of_odd_machines_are_written_alike() -> Result<(), Error> {
    let Some([old, new]) = Qemu::both() else { return Ok(()) };
    let memory = folder();
    let ram = memory.path().join("ram");
    let grows = |vm: VmBuilder| {
        vm.arg("-m")
            .arg("96M,maxmem=256M")
            .args(["-object", "memory-backend-ram,id=more,size=64M"])
            .args(["-device", "virtio-mem-pci,id=grows,memdev=more,requested-size=8M"])
    };
    let shared = |vm: VmBuilder| {
        let backend = format!("memory-backend-file,id=shared,size=96M,mem-path={},share=on", ram.display());
        vm.arg("-object").arg(backend).args(["-machine", "memory-backend=shared"])
    };
    let ignored: &[(&str, bool)] = &[("x-ignore-shared", true)];
    type Odd = fn(&Event<'_>) -> bool;
    let is_shared: Odd = |event| matches!(event, Event::Configuration(Some(found)) if found.ignore_shared);
    let machines: [(_, _, _, Odd); 5] = [
        ("no configuration", old.vm().machine("pc-i440fx-2.3"), &[][..], |event| {
            matches!(event, Event::Configuration(None))
        }),
        (
            "no description",
            old.vm().machine("pc-i440fx-2.2"),
            &[],
            |event| matches!(event, Event::End(devices) if devices.description().is_none()),
        ),
        ("an early device", grows(new.vm()), &[], |event| matches!(event, Event::OtherSection { .. })),
        ("shared memory, 7.2", shared(old.vm()), ignored, is_shared),
        ("shared memory, 10.0", shared(new.vm()), ignored, is_shared),
    ];
    for (what, machine, capabilities, odd) in machines {
        for return_path in [false, true] {
            if return_path && what == "no description" {
                // Nothing but a time limit tells the end.
                continue;
            }
            let folder = folder();
            let here = folder.path().join("here");
            let mut from = machine.clone().paused().start()?;
            from.set_capabilities(capabilities)?;
            from.set_capabilities(&[("return-path", return_path)])?;
            let kept = keep(UnixListener::bind(&here).expect("bound"), odd);
            from.migrate(&uri(&here))?;
            from.wait_migration("completed", PATIENCE)?;
            let (kept, was_odd) = kept.join().expect("no panic");
            assert!(was_odd, "{what}");
            assert_written_alike(&kept, &format!("{what}, return path {return_path}"));
        }
    }
    Ok(())
}
