//! A destination that records calls, a connection that plays a recording, and machines to send.

use std::{
    collections::BTreeMap,
    io::{self, Cursor, Read, Write},
    sync::Arc,
    time::Duration,
};

use multifd::{
    Synced,
    channel::{Context, Stop, Stream, Wake, memory},
    live::Verdict,
    ram::{BlockIndex, BlockName, PageBitmap, PageIndex, PageSize},
};
use qemu_stream::{
    Connection, Error,
    format::{
        BlockEntry, BlockList, Configuration, Device, DevicePart, EndFinder, MachineType, SectionId,
        SectionName, SyncMode,
    },
    incoming::Destination,
    outgoing::{Options, Outgoing},
};

/// Two ends of a connection in memory.
pub(crate) fn pair() -> (Stream, Stream) {
    let context = Context::new(&Stop::new());
    let (source, destination) = memory::pair(1 << 16, &context, &context);
    (Stream::new(Box::new(source), &context), Stream::new(Box::new(destination), &context))
}

/// A connection that plays one recording and makes another.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    pub(crate) input: Cursor<Vec<u8>>,
    pub(crate) output: Vec<u8>,
}

impl Tape {
    pub(crate) fn playing(bytes: &[u8]) -> Self {
        Self { input: Cursor::new(bytes.to_vec()), output: Vec::new() }
    }
}

impl Read for Tape {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.input.read(into)
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection for Tape {
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }

    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }

    fn set_read_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// Records the calls; fails at the named call.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) pages: BTreeMap<(usize, u64), Vec<u8>>,
    pub(crate) calls: Vec<&'static str>,
    pub(crate) announced: Option<u8>,
    pub(crate) discarded: Vec<(usize, u64, u64)>,
    pub(crate) fails_at: Option<&'static str>,
    pub(crate) arrived: Vec<PageBitmap>,
}

impl Memory {
    pub(crate) fn syncs(&self) -> usize {
        self.calls.iter().filter(|call| **call == "sync").count()
    }

    fn call(&mut self, name: &'static str) -> Result<(), io::Error> {
        self.calls.push(name);
        if self.fails_at == Some(name) { Err(io::Error::other(format!("no {name}"))) } else { Ok(()) }
    }
}

impl Destination for Memory {
    type Error = io::Error;

    fn configuration(&mut self, _: Option<&Configuration>) -> Result<(), io::Error> {
        self.call("configuration")
    }

    fn channels(&mut self, channels: u8) -> Result<(), io::Error> {
        self.announced = Some(channels);
        self.call("channels")
    }

    fn blocks(&mut self, list: &BlockList) -> Result<(), io::Error> {
        self.arrived = list.entries().iter().map(|entry| PageBitmap::new(entry.used_length / 4096)).collect();
        self.call("blocks")
    }

    fn sync(&mut self) -> Result<(), io::Error> {
        self.call("sync")
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<(), io::Error> {
        self.pages.insert((block.0, page.0), vec![0; 4096]);
        self.arrived[block.0].set_run(page, 1);
        self.call("zero_page")
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<(), io::Error> {
        self.pages.insert((block.0, page.0), bytes.to_vec());
        self.arrived[block.0].set_run(page, 1);
        self.call("page")
    }

    fn read_page(&mut self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<(), io::Error> {
        match self.pages.get(&(block.0, page.0)) {
            Some(bytes) => into.copy_from_slice(bytes),
            None => into.fill(0),
        }
        self.call("read_page")
    }

    fn postcopy_advised(&mut self) -> Result<(), io::Error> {
        self.call("postcopy_advised")
    }

    fn discard(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<(), io::Error> {
        self.discarded.push((block.0, first.0, count));
        self.arrived[block.0].clear_run(first, count);
        self.call("discard")
    }

    fn postcopy_run(&mut self) -> Result<(), io::Error> {
        self.call("postcopy_run")
    }

    fn arrived(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.arrived.get(block.0)
    }

    fn postcopy_resumed(&mut self) -> Result<(), io::Error> {
        self.call("postcopy_resumed")
    }

    fn end_of_ram(&mut self) -> Result<(), io::Error> {
        self.call("end_of_ram")
    }
}

pub(crate) fn q35(version: &str) -> Configuration {
    Configuration::new(MachineType::new(format!("pc-q35-{version}")).unwrap())
}

pub(crate) fn blocks() -> BlockList {
    let entry = |name, length| BlockEntry::new(BlockName::new(name).unwrap(), length);
    BlockList::new(vec![entry("pc.ram", 1 << 20), entry("pc.rom", 0x2000)], PageSize::KIB_4).unwrap()
}

pub(crate) fn devices() -> DevicePart {
    let device = |name, instance, state: &[u8]| Device {
        name: SectionName::new(name).unwrap(),
        instance,
        version: 2,
        state: state.to_vec(),
    };
    let devices = [
        device("timer", 0, &[1; 24]),
        device("vcpu", 0, &[2; 700]),
        device("vcpu", 1, b"\x7e\0\0\0\0\0\x06"),
    ];
    DevicePart::build(&devices, 4096, SectionId(2)).unwrap()
}

/// The devices of a machine type up to 2.3: one, without a footer.
pub(crate) fn devices_without_footers() -> DevicePart {
    let json = br#"{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": 2}]}]}"#;
    let mut bytes = b"\x04\0\0\0\x05\x01d\0\0\0\0\0\0\0\x01\xaa\xaa\0\x06\0\0\0".to_vec();
    bytes.push(u8::try_from(json.len()).unwrap());
    bytes.extend(json);
    EndFinder::new(false).find(&mut bytes).unwrap().unwrap()
}

/// The devices that fit such options.
pub(crate) fn devices_of(options: &Options) -> DevicePart {
    if options.machine().is_some() { devices() } else { devices_without_footers() }
}

/// The proof of a sync point that a stream of two channels needs. These streams have no real channels.
pub(crate) fn synced() -> Option<Synced<'static>> {
    Some(Synced::asserted(2))
}

/// Sends a machine: a live pass, a last pass, devices. With multifd off its pages are on main.
pub(crate) fn send<C: Connection>(out: &mut Outgoing<C>, multifd: bool) -> Result<(), Error> {
    let after = || multifd.then(synced).flatten();
    out.begin(if multifd { 2 } else { 0 })?;
    out.setup(blocks(), after())?;
    out.begin_part()?;
    out.zero_page(BlockIndex(0), PageIndex(3))?;
    if !multifd {
        out.page(BlockIndex(0), PageIndex(4), &[7; 4096])?;
        out.page_with(BlockIndex(1), PageIndex(1), |page| page.fill(8))?;
    }
    out.end_part(after())?;
    out.switchover()?;
    out.begin_end()?;
    out.zero_page(BlockIndex(1), PageIndex(0))?;
    out.end_part(after())?;
    let devices = devices_of(out.options());
    out.devices(&devices)
}

/// Waits for the destination's reply.
pub(crate) fn complete<C: Connection>(
    out: &mut Outgoing<C>,
    end: Option<Duration>,
) -> Result<(), multifd::Error> {
    match out.complete(&Stop::new(), end, Duration::from_secs(10)) {
        Verdict::Taken => Ok(()),
        Verdict::Refused(error) | Verdict::Unknown(error) => Err(error),
    }
}

/// The error of this library within it.
pub(crate) fn cause(error: &multifd::Error) -> &Error {
    let multifd::Error::Other { source, .. } = error.kind() else { panic!("{error}") };
    source.downcast_ref().expect("an error of the stream")
}

/// The whole stream of such a machine.
pub(crate) fn stream(options: Options) -> Vec<u8> {
    let multifd = options != options.clone().sync_mode(None);
    let mut out = Outgoing::new(Tape::default(), options).unwrap();
    send(&mut out, multifd).unwrap();
    let bytes = out.bytes();
    let output = out.into_inner().output;
    assert_eq!(output.len() as u64, bytes);
    output
}

/// Every way to write a stream.
pub(crate) fn all_options() -> Vec<Options> {
    let mut all = vec![Options::without_configuration(), Options::without_configuration().sync_mode(None)];
    for version in ["7.2", "8.1", "10.0"] {
        for mode in [None, Some(SyncMode::Legacy), Some(SyncMode::Round)] {
            for return_path in [false, true] {
                let options = Options::new(q35(version)).sync_mode(mode);
                all.push(if return_path { options } else { options.unconfirmed() });
            }
        }
    }
    all
}
