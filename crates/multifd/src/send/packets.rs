//! A channel that sends packets over a connection.
//!
//! It connects, sends its identity, and sends one packet for each batch and each sync point. It owns its connection,
//! its buffers and its codec. A packet is one call: the head and the pages, adjacent pages as one vector, directly from
//! guest memory. Pages that were not checked yet are checked for zeros here, so that this work is spread over the
//! channels.

use std::{io, mem, sync::atomic::Ordering, time::Duration};

use arrayvec::ArrayVec;
use rustix::io::Errno;

use super::{
    file_pages::{FilePages, fault},
    shared::Shared,
    worker::Carrier,
    zero_copy::{self, InFlight},
};
use crate::{
    batch::Batch,
    channel::{
        Connect, Link, PeerSignal, StallTimer, Watch, WatchedChannel, WatchedChannels, is_of_a_host,
        send_all, send_all_more,
    },
    compress::{Encode, PacketPages},
    error::{Error, Result, Usage},
    options::SendOptions,
    postcopy::Cost,
    ram::{MAX_PARTS, PageIndex, PageSize, Part, RamBlock},
    stats::ChannelCounters,
    sync_types::Instant,
    wire::{ChannelId, HeadBuffer, Initial},
};

/// A connected channel.
pub(super) struct Packets<'a> {
    id: ChannelId,
    shared: &'a Shared,
    counters: &'a ChannelCounters,
    link: Box<dyn Link>,
    head: HeadBuffer,
    file_pages: FilePages,
    encoder: Option<Box<dyn Encode>>,
    /// With `zero-copy-send`.
    zero_copy: Option<InFlight<'a>>,
    options: &'a SendOptions,
    stall_timer: StallTimer,
    /// How long packets were prepared since `cost` was called.
    prepared: Duration,
    /// The descriptor that is watched, if the link has one.
    _signal: Option<PeerSignal>,
    _watched: Option<WatchedChannel>,
    _watch: Watch,
}

impl<'a> Packets<'a> {
    /// Connects channel `id` and sends its initial packet.
    pub(super) fn connect(
        id: ChannelId,
        shared: &'a Shared,
        options: &'a SendOptions,
        connector: &dyn Connect,
        locked: &'a zero_copy::Shared,
        watched: Option<&WatchedChannels>,
    ) -> Result<Self> {
        let target = connector.target();
        tracing::debug!(channel = id.0, %target, "multifd_new_send_channel_async");
        let context = options.context(&shared.stop);
        let mut link = connector
            .connect(&context)
            .map_err(|error| Error::io(format!("connect to {target}{}", hint(&error)), error))?;
        if options.zero_copy_send {
            let enabled = zero_copy::of(&mut *link).and_then(|link| link.enable());
            enabled.map_err(|error| match error.kind() {
                io::ErrorKind::Unsupported => Usage::ZeroCopy("over anything but plain TCP").into(),
                _ => Error::io(format!("switch zero-copy-send on for {target}"), error),
            })?;
            zero_copy::check_limit().map_err(|error| Error::io(format!("send to {target}"), error))?;
        }
        let watching = |error| Error::io(format!("watch the connection to {target}"), error);
        let signal = link.peer_signal().map_err(watching)?;
        let watched = match (watched, &signal) {
            (Some(watched), Some(signal)) => {
                Some(watched.add(id, &link.peer(), link.waker(), &signal.descriptor).map_err(watching)?)
            }
            _ => None,
        };
        let mut packets = Self {
            id,
            _signal: signal,
            _watched: watched,
            shared,
            counters: &shared.counters[usize::from(id.0)],
            _watch: shared.stop.watch_failure(link.waker()),
            link,
            head: HeadBuffer::new(shared.blocks.page_size()),
            file_pages: FilePages::default(),
            encoder: options.method.encoder(options.levels)?,
            zero_copy: options.zero_copy_send.then(|| InFlight::new(locked)),
            options,
            stall_timer: context.stall_timer,
            prepared: Duration::ZERO,
        };
        let initial = Initial { uuid: options.uuid, id }.encode();
        send_all(&mut *packets.link, &mut [Part::from(&initial[..])])
            .map_err(|error| packets.broken("send the initial packet", error))?;
        packets.counters.add_bytes(initial.len() as u64);
        tracing::debug!(channel = id.0, peer = packets.link.peer(), "multifd_send_thread_start");
        Ok(packets)
    }

    fn pages(&mut self, batch: &mut Batch) -> Result<()> {
        let begun = Instant::now();
        let block = self.shared.blocks.block(batch.block)?;
        batch.part(|page| block.is_zero(page));
        let packet_num = self.shared.packet_num.fetch_add(1, Ordering::Relaxed);
        let (normal, zero) = (batch.normal(), batch.zero());
        let plain = normal.len() * block.page_size().bytes();
        let read = self.file_pages.read(block, normal)?;
        let payload = match &mut self.encoder {
            Some(encoder) if !normal.is_empty() => {
                let pages = match read {
                    Some(bytes) => PacketPages::Private(bytes, block.page_size()),
                    None => PacketPages::Mapped(block, normal),
                };
                Some(encoder.encode(&pages)?)
            }
            _ => read,
        };
        let payload_len = payload.map_or(plain, <[u8]>::len);
        tracing::trace!(
            channel = self.id.0,
            packet_num,
            normal = normal.len(),
            zero = zero.len(),
            next_packet_size = payload_len,
            block = %block.name(),
            "multifd_send"
        );
        let length = u32::try_from(payload_len).expect("a payload stays below 1 MiB");
        let method = self.options.method.flags();
        let head = self.head.pages(method, packet_num, block.name(), normal, zero, length);
        let bytes = head.len() + payload_len;
        self.prepared += begun.elapsed();
        let sent = {
            let mut parts: ArrayVec<Part<'_>, MAX_PARTS> = ArrayVec::new();
            match (&mut self.zero_copy, payload) {
                (Some(in_flight), None) if !normal.is_empty() => {
                    parts.extend(in_place(block, normal));
                    send_all_more(&mut *self.link, Part::from(head))
                        .and_then(|()| in_flight.send(&mut *self.link, &mut parts))
                }
                (in_flight, payload) => {
                    parts.push(Part::from(head));
                    match payload {
                        Some(payload) => parts.push(Part::from(payload)),
                        None => parts.extend(in_place(block, normal)),
                    }
                    if let (Some(in_flight), Some(_)) = (in_flight, payload) {
                        in_flight.copied();
                    }
                    send_all(&mut *self.link, &mut parts)
                }
            }
        };
        let read_in_place = payload.is_none();
        sent.map_err(|error| {
            if read_in_place && Errno::from_io_error(&error) == Some(Errno::FAULT) {
                fault(block, normal, error).at(format_args!("packet {packet_num}"))
            } else {
                self.broken(format_args!("send packet {packet_num}"), error)
            }
        })?;
        self.counters.add_packet(normal.len(), zero.len(), bytes as u64);
        self.stall_timer.moved();
        Ok(())
    }

    fn broken(&self, doing: impl std::fmt::Display, error: io::Error) -> Error {
        Error::io(format!("{doing} to {}{}", self.link.peer(), hint(&error)), error)
    }
}

impl Carrier for Packets<'_> {
    fn carry(&mut self, mut batch: Batch) -> Result<Option<Batch>> {
        self.pages(&mut batch)?;
        match &mut self.zero_copy {
            Some(in_flight) => in_flight
                .carried(&mut *self.link, batch)
                .map_err(|error| self.broken("wait for what was sent", error)),
            None => Ok(Some(batch)),
        }
    }

    fn sync(&mut self) -> Result<()> {
        if let Some(in_flight) = &mut self.zero_copy {
            let settled = in_flight.settle(&mut *self.link);
            let copied = settled.map_err(|error| self.broken("wait for what was sent", error))?;
            self.counters.add_missed_zero_copy(copied);
        }
        let packet_num = self.shared.packet_num.fetch_add(1, Ordering::Relaxed);
        tracing::trace!(channel = self.id.0, packet_num, "multifd_send_sync");
        let head = self.head.sync(packet_num);
        let bytes = head.len() as u64;
        let sent = send_all(&mut *self.link, &mut [Part::from(head)]);
        sent.map_err(|error| self.broken(format_args!("send SYNC packet {packet_num}"), error))?;
        self.counters.add_packet(0, 0, bytes);
        Ok(())
    }

    fn limit_backlog(&mut self, limit: Option<u64>) {
        self.link.limit_backlog(limit);
    }

    fn cost(&mut self) -> Cost {
        Cost { prepared: mem::take(&mut self.prepared), round_trip: self.link.round_trip() }
    }

    fn end(mut self) {
        if self.shared.stop.error().is_none() {
            // Everything was sent and the destination has confirmed it. An error while closing changes nothing.
            let _ = self.link.close_send();
        }
    }
}

/// Sent instead of pages that are known to be zero, regardless of the bytes in their memory. Never freed: the system
/// may still send it after the channel has ended.
static ZEROS: [u8; PageSize::KIB_64.bytes()] = [0; PageSize::KIB_64.bytes()];

/// Pages in their memory, adjacent pages as one part. A page that is [known to be zero](RamBlock::is_present) is a
/// separate part.
fn in_place<'b>(block: &'b RamBlock, pages: &'b [PageIndex]) -> impl Iterator<Item = Part<'b>> {
    let present = |page: &PageIndex| block.is_present(*page);
    let mut pages = pages.iter().copied().peekable();
    std::iter::from_fn(move || {
        let first = pages.next()?;
        if !present(&first) {
            return Some(ZEROS[..block.page_size().bytes()].into());
        }
        let mut count = 1;
        while pages.next_if(|page| page.0 == first.0 + count && present(page)).is_some() {
            count += 1;
        }
        Some(block.slice(first, count).expect("queued pages were found in their block").into())
    })
}

/// The error of a channel that the destination has closed before it had all of RAM.
pub(super) fn closed(peer: &str) -> Error {
    Error::io(format!("use the connection to {peer}{CLOSED}"), io::ErrorKind::ConnectionReset.into())
}

/// The likely causes are in the order of how often they lead to a closed channel.
const CLOSED: &str = ": the destination closed the connection; its own log has the reason; likely causes, the likeliest first: \
                      another multifd-compression, another multifd-channels (or multifd off there), TLS on one side only, \
                      another UUID, another machine type";

/// What to do when a destination closes a channel, or accepts no more connections after main. It never sends a reason.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        // A TLS alert contains the reason.
        io::ErrorKind::ConnectionRefused if error.get_ref().is_some() => "",
        // The connection was closed before its peer could be queried.
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::NotConnected
        | io::ErrorKind::BrokenPipe => CLOSED,
        io::ErrorKind::TimedOut if is_of_a_host(error) => {
            ": its host does not answer, or the network is interrupted"
        }
        io::ErrorKind::TimedOut => {
            ": its program makes no progress, or waits for something that this side does not send: more channels \
             (multifd-channels), or the other sync mode (machine types up to 8.0 use legacy, later ones round)"
        }
        _ => "",
    }
}
