//! The log contains an event for every channel and packet, with QEMU's event names.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

use multifd::{
    live::MigrateOptions,
    ram::{NeverDirty, PageSize},
};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};

use crate::kit::{StoppedGuest, fresh, migrate, write};

/// Counts events by their message.
#[derive(Clone, Default)]
struct Counts(Arc<Mutex<BTreeMap<String, u64>>>);

impl Subscriber for Counts {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("multifd")
    }
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn event(&self, event: &Event<'_>) {
        struct Message(Option<String>);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                if field.name() == "message" {
                    self.0 = Some(format!("{value:?}"));
                }
            }
        }
        let mut message = Message(None);
        event.record(&mut message);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(message.0.unwrap_or_default()).or_default() += 1;
    }
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

/// Other tests of this process run at the same time, so an event is counted at least as often as it happens here.
#[test]
fn every_channel_and_packet_is_told_of() {
    let counts = Counts::default();
    tracing::subscriber::set_global_default(counts.clone()).expect("the only one in this process");
    let ram = &[("pc.ram", 4 << 20)];
    let (source, destination) = (fresh(PageSize::KIB_4, ram), fresh(PageSize::KIB_4, ram));
    (0..1024).for_each(|page| write(&source, 0, page, 1));
    let outcome = migrate(
        &source,
        &destination,
        3,
        MigrateOptions::new(),
        &mut NeverDirty,
        &mut StoppedGuest::default(),
    );
    let sent = outcome.sent.expect("sent");
    outcome.received.expect("received");
    let packets: u64 = sent.channels.iter().map(|channel| channel.packets).sum();

    let counts = counts.0.lock().expect("whole");
    let told = |event: &str| counts.get(event).copied().unwrap_or_default();
    for (event, least) in [
        ("multifd_new_send_channel_async", 3),
        ("multifd_send_thread_start", 3),
        ("multifd_send", 8),
        ("multifd_send_sync_main", 3),
        ("multifd_send_thread_end", 3),
        ("multifd_recv_new_channel", 3),
        ("multifd_recv_thread_start", 3),
        ("multifd_recv", packets),
        ("multifd_recv_sync_main", 3),
        ("multifd_recv_thread_end", 3),
        ("migrate_set_state", 4),
    ] {
        assert!(told(event) >= least, "{event}: {} of {least}; {counts:?}", told(event));
    }
}
