//! Measures parts of the engine: `cargo xtask bench --micro`, or with a name only those whose names contain it.
//!
//! The sending side is measured over links that accept everything at once. What remains is the engine's own work:
//! filling batches, handing them over, combining adjacent pages, writing heads.

use std::{hint::black_box, io, sync::Arc, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
#[cfg(feature = "compression")]
use multifd::Method;
use multifd::{
    SendOptions, Sender,
    channel::{Connect, Context, Host, Link, PeerSignal, Stop, Wake},
    ram::{
        BlockIndex, BlockName, GuestSlice, Mapping, Memory, PageBitmap, PageIndex, PageSize, Part, PartMut,
        RamBlock, RamBlocks,
    },
    wire::{Flags, HeadBuffer, Packet},
};

const PAGE: PageSize = PageSize::KIB_4;
/// Of a packet.
const PACKET: u64 = 128;

/// The bitmap sync of 8 GiB: words that are clear, sparse, full.
fn dirty_walk(c: &mut Criterion) {
    const PAGES: u64 = 2 << 20;
    let mut group = c.benchmark_group("dirty walk of 8 GiB");
    for (name, every) in [("clear", None), ("a page in 1024", Some(1024)), ("every second page", Some(2))] {
        let marked = PageBitmap::new(PAGES);
        (0..PAGES).step_by(every.unwrap_or(usize::MAX)).skip(1).for_each(|page| {
            marked.set(PageIndex(page));
        });
        let words: Vec<u64> = marked.words().collect();
        let (log, pending) = (PageBitmap::new(PAGES), PageBitmap::new(PAGES));
        group.throughput(Throughput::Elements(PAGES));
        group.bench_function(BenchmarkId::new("take", name), |b| {
            b.iter_batched(
                || log.merge(words.iter().copied()),
                |()| log.take(&pending),
                criterion::BatchSize::PerIteration,
            );
        });
        group.bench_function(BenchmarkId::new("count", name), |b| b.iter(|| black_box(&marked).count()));
    }
    group.finish();
}

/// Pages that are zero, and pages whose first byte is not, in the caches and in memory.
fn zero_test(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero test");
    for (place, pages) in [("cache", PACKET), ("memory", 1 << 16)] {
        for zero in [true, false] {
            let memory = Mapping::anonymous(pages * PAGE.bytes() as u64).expect("memory");
            let slices: Vec<GuestSlice<'_>> = (0..pages)
                .map(|page| memory.slice(page * PAGE.bytes() as u64, PAGE.bytes()).expect("inside"))
                .collect();
            for slice in &slices {
                slice.copy_from(&[u8::from(!zero); PAGE.bytes()]);
            }
            let kind = if zero { "zero" } else { "not zero" };
            group.throughput(Throughput::Elements(pages));
            let name = format!("{kind}, in {place}");
            group.bench_function(BenchmarkId::from_parameter(&name), |b| {
                b.iter(|| slices.iter().filter(|slice| slice.is_zero()).count());
            });
        }
    }
    group.finish();
}

/// A head that lists 128 pages.
fn heads(c: &mut Criterion) {
    let name = BlockName::new("pc.ram").expect("a name");
    let pages: Vec<PageIndex> = (0..PACKET).map(PageIndex).collect();
    let length = 128 << 12;
    let mut buffer = HeadBuffer::new(PAGE);
    let mut group = c.benchmark_group("packet head");
    group.bench_function("encode", |b| {
        b.iter(|| buffer.pages(Flags::default(), 7, &name, black_box(&pages), &[], length).len());
    });
    let bytes = buffer.pages(Flags::default(), 7, &name, &pages, &[], length).to_vec();
    group.bench_function("decode", |b| {
        b.iter(|| {
            Packet::decode(black_box(&bytes), PAGE).expect("valid").normal().map(|page| page.0).sum::<u64>()
        });
    });
    group.finish();
}

/// A batch from the collector through a channel and back, with adjacent and scattered pages.
fn hand_over(c: &mut Criterion) {
    let mut group = c.benchmark_group("hand-over of a packet");
    for (name, stride) in [("neighbours, one vector", 1), ("every second page, 128 vectors", 2)] {
        for channels in [1, 4] {
            let mut sender = sender(channels);
            let mut at = 0;
            group.bench_function(BenchmarkId::new(name, format!("{channels} channels")), |b| {
                b.iter(|| {
                    for page in (0..PACKET).map(|page| page * stride) {
                        sender.queue(BlockIndex(0), PageIndex((at + page) % PAGES)).expect("running");
                    }
                    at += PACKET * stride;
                });
            });
            sender.sync().expect("running");
        }
    }
    group.finish();
}

/// A SYNC on every channel.
fn sync(c: &mut Criterion) {
    let mut group = c.benchmark_group("channel sync");
    for channels in [1, 2, 4, 8, 16, 32, 64] {
        let mut sender = sender(channels);
        group.bench_function(BenchmarkId::from_parameter(channels), |b| {
            b.iter(|| sender.sync().expect("running").channels());
        });
    }
    group.finish();
}

/// A packet packed by one channel, at level 1, of what memory may hold. The program that runs stands for programs.
#[cfg(feature = "compression")]
fn pack(c: &mut Criterion) {
    let program = std::fs::read(std::env::current_exe().expect("a path")).expect("a file");
    let mut random = fastrand::Rng::with_seed(1);
    let mut fill = |kind: &str, at: usize, page: &mut [u8]| match kind {
        "a quarter of each page noise" => {
            page.fill(0xa5);
            random.fill(&mut page[..PAGE.bytes() / 4]);
        }
        "noise" => random.fill(page),
        "zeros and a few addresses" => {
            page.fill(0);
            for _ in 0..32 {
                let address = 0xffff_8880_0000_0000 | random.u64(..1 << 30);
                page.as_chunks_mut::<8>().0[random.usize(..512)] = address.to_be_bytes();
            }
        }
        _ => page.copy_from_slice(&program[at % (program.len() - page.len())..][..page.len()]),
    };
    let mut group = c.benchmark_group("packing of a packet");
    group.throughput(Throughput::Bytes(PACKET * PAGE.bytes() as u64));
    for kind in ["a quarter of each page noise", "noise", "zeros and a few addresses", "a program"] {
        let memory = Mapping::anonymous(PAGES * PAGE.bytes() as u64).expect("memory");
        let mut page = [0; PAGE.bytes()];
        for at in 0..PAGES {
            fill(kind, usize::try_from(at).expect("small") * page.len(), &mut page);
            memory.slice(at * PAGE.bytes() as u64, page.len()).expect("inside").copy_from(&page);
        }
        let blocks = one_block(memory);
        for method in [Method::Zlib, Method::Zstd] {
            let options = SendOptions::new().channels(1).method(method);
            let mut sender = sender_of(blocks.clone(), options);
            let mut at = 0;
            group.bench_function(BenchmarkId::new(method.as_str(), kind), |b| {
                b.iter(|| {
                    for page in 0..PACKET {
                        sender.queue(BlockIndex(0), PageIndex((at + page) % PAGES)).expect("running");
                    }
                    at += PACKET;
                });
            });
            sender.sync().expect("running");
        }
    }
    group.finish();
}

#[cfg(not(feature = "compression"))]
fn pack(_: &mut Criterion) {}

/// Pages of the sender's block.
const PAGES: u64 = 1 << 14;

fn sender(channels: u8) -> Sender {
    let memory = Mapping::anonymous(PAGES * PAGE.bytes() as u64).expect("memory");
    sender_of(one_block(memory), SendOptions::new().channels(channels))
}

fn one_block(memory: Mapping) -> Arc<RamBlocks> {
    let name = BlockName::new("pc.ram").expect("a name");
    let length = PAGES * PAGE.bytes() as u64;
    let block = RamBlock::new(name, length, PAGE, Memory::Mapped(memory)).expect("a block");
    Arc::new(RamBlocks::new(vec![block]).expect("one block"))
}

fn sender_of(blocks: Arc<RamBlocks>, options: SendOptions) -> Sender {
    let mut sender = Sender::new(options, blocks, Stop::new()).expect("a sender");
    sender.set_up(Arc::new(Nowhere)).expect("set up");
    sender.wait_connected().expect("connected");
    sender
}

/// Takes everything at once.
struct Nowhere;

impl Connect for Nowhere {
    fn connect(&self, _: &Context) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self))
    }
    fn target(&self) -> String {
        "nowhere".into()
    }
}

impl Link for Nowhere {
    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(false)
    }
    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(None)
    }
    fn host(&self) -> Option<Host> {
        None
    }
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        Ok(parts.iter().map(Part::len).sum())
    }
    fn recv(&mut self, _: &mut [PartMut<'_>]) -> io::Result<usize> {
        Ok(0)
    }
    fn set_recv_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Self)
    }
    fn send_waker(&self) -> Arc<dyn Wake> {
        Arc::new(Self)
    }
    fn recv_waker(&self) -> Arc<dyn Wake> {
        Arc::new(Self)
    }
    fn peer(&self) -> String {
        "nowhere".into()
    }
    fn close_send(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wake for Nowhere {
    fn wake(&self) {}
}

criterion_group!(parts, dirty_walk, zero_test, heads, hand_over, sync, pack);
criterion_main!(parts);
