//! A destination that accepts connections and reads nothing: a source of the public entry point fails after its
//! `stall_timeout`, for every kind of main connection and every number of channels. And a source that does not connect.

use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error, Fault, ReceiveOptions, SendOptions,
    channel::{
        Connect, Context, Listen, Stop,
        tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
    },
    error::Usage,
    live::MigrateOptions,
    ram::{BlockIndex, NeverDirty, PageIndex, PartMut},
};
use multifd_testkit::certificates;
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    format::{Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};

use crate::hops::kit::{Told, blocks, listening};

#[test]
fn a_destination_that_reads_nothing_is_given_up() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates::write_both(folder.path()).expect("certificates");
    let client = ClientCredentials::load(folder.path(), "127.0.0.1").expect("credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    for (tls, channels) in [(false, 0), (false, 4), (true, 0), (true, 4)] {
        let (listener, address) = listening();
        let stop = Stop::new();
        let _watch = stop.watch(listener.waker());
        let listener: Box<dyn Listen> = match tls {
            true => Box::new(TlsListener::new(Box::new(listener), server.clone())),
            false => Box::new(listener),
        };
        let silent = thread::spawn({
            let stop = stop.clone();
            move || accept_and_hold(listener, &stop)
        });
        let connector: Arc<dyn Connect> = match tls {
            true => Arc::new(TlsConnector::new(Arc::new(address), client.clone())),
            false => Arc::new(address),
        };
        let source = blocks(&[("ram", 16 << 10)]);
        let memory = source.block(BlockIndex(0)).expect("there");
        memory.slice(PageIndex(0), memory.pages()).expect("mapped").copy_from(&vec![7; 64 << 20]);
        let options = SourceOptions::new(Configuration::new(MachineType::new("silent-1").expect("a name")))
            .channels(channels)
            .send(SendOptions::new())
            .migrate(MigrateOptions::new())
            .stall_timeout(Some(Duration::from_secs(1)));
        let (mut guest, begun) = (Told::default(), Instant::now());
        let leaving = Source::new(source, options, &Stop::new()).expect("options");
        let error = leaving.migrate(connector, &mut NeverDirty, &mut guest).expect_err("given up");
        let case = format!("TLS {tls}, {channels} channels: {error:?}");
        assert_eq!(error.fault(), Fault::Stalled, "{case}");
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}, {case}", begun.elapsed());
        assert_eq!((guest.stops, guest.resumes), (0, 0), "{case}");
        stop.cancel();
        silent.join().expect("no panic");
    }
}

/// Regression: the method was accepted, and nothing was compressed.
#[test]
fn options_of_channels_are_refused_without_channels() {
    let zstd = "zstd".parse().expect("built in");
    for (send, refused) in [
        (SendOptions::new().method(zstd), Usage::WithoutChannels("multifd-compression")),
        (SendOptions::new().zero_copy_send(true), Usage::ZeroCopy("with multifd-channels 0")),
    ] {
        let machine = || Configuration::new(MachineType::new("silent-1").expect("a name"));
        let options = |channels| SourceOptions::new(machine()).channels(channels).send(send.clone());
        let made = |channels| Source::new(blocks(&[("ram", 16)]), options(channels), &Stop::new());
        let error = made(0).map(drop).expect_err("refused");
        assert!(matches!(error.kind(), Error::Usage(usage) if *usage == refused), "{error}");
        made(1).map(drop).expect("options");
    }
}

/// Accepts connections, reads the first byte of each, which includes the TLS handshake, and then nothing more until the
/// end.
fn accept_and_hold(mut listener: Box<dyn Listen>, stop: &Stop) {
    let (links, context) = (Mutex::new(Vec::new()), Context::new(stop));
    thread::scope(|scope| {
        while !stop.is_stopped() {
            let Some(mut link) = listener.accept(&context).expect("a connection") else { continue };
            let links = &links;
            scope.spawn(move || {
                let _watch = stop.watch(link.waker());
                let _ = link.recv(&mut [PartMut::from(&mut [0][..])]);
                links.lock().expect("whole").push(link);
            });
        }
    });
}

/// A destination waits for days; its embedder limits the wait, and sees whom it has refused.
#[test]
fn a_source_that_does_not_connect_is_waited_for_within_the_limits() {
    let limited = |receive: ReceiveOptions| {
        let options = ArrivalOptions::new(Expected::AnyMachine).receive(receive);
        let (listener, address) = listening();
        (Arrival::listen(listener, options, &Stop::new()).expect("listening"), address)
    };
    let limit = Duration::from_millis(100);
    let (listening, _address) = limited(ReceiveOptions::new().accept_timeout(Some(limit)));
    let error = listening.accept().expect_err("nobody connects");
    assert!(
        matches!(error.kind(), Error::NoSource { limit: found, refused: 0 } if *found == limit),
        "{error}"
    );
    assert_eq!(error.fault(), Fault::Connection);

    let (listening, address) = limited(ReceiveOptions::new().max_refused(Some(1)));
    let progress = listening.progress();
    assert_eq!((progress.has_source(), progress.refused()), (false, 0));
    let mut stranger = address.connect(&Context::new(&Stop::new())).expect("connected");
    stranger.send(&[[b'x'; 64][..].into()]).expect("sent");
    let error = listening.accept().expect_err("it is refused");
    assert!(matches!(error.kind(), Error::TooManyRefused { refused: 1, .. }), "{error}");
    assert_eq!((progress.has_source(), progress.refused()), (false, 1));
}
