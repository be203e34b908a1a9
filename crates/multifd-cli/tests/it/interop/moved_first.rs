//! A guest that runs in this process switches to post-copy, with a stock QEMU as its destination.
//!
//! ```text
//! a captured machine ─▶ Stand-in: some pages differ until it is stopped ─ Source::run ─ Relay ─▶ QEMU: the guest checks all of its memory
//! ```

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use multifd::{
    Result,
    channel::{Address, Connect, Context, Link, Stop},
    error::chain,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, MigrateOptions, PostcopyWhen, RunState, Status},
    ram::{BlockIndex, DirtyBitmaps, Mapping, Memory, PageIndex, RamBlock, RamBlocks},
};
use multifd_testkit::qemu::{Error, PATIENCE, Qemu};
use qemu_stream::{
    format::Configuration,
    mapped_ram::{MappedRamFile, Restore},
    outgoing::postcopy::{Moved, PostcopyOptions},
    source::{Source, SourceOptions},
};

use super::postcopy::{assert_checks_all, captured, recovering, waiting, with_all};

/// A captured machine in the place of one that runs: until it is stopped, every third page differs from what was captured. Then it has
/// written these pages.
struct StandIn {
    configuration: Configuration,
    blocks: Arc<RamBlocks>,
    devices: Vec<DeviceSection>,
    writes: DirtyBitmaps,
    written: Vec<(BlockIndex, PageIndex, Vec<u8>)>,
    stops: u32,
    resumes: u32,
}

impl StandIn {
    fn load(file: &Path) -> Self {
        let file = MappedRamFile::open(File::open(file).expect("the file"), 0).expect("a machine");
        let blocks = file.blocks().entries().iter().map(|entry| {
            let memory = Memory::Mapped(Mapping::anonymous(entry.used_length).expect("memory"));
            RamBlock::new(entry.name.clone(), entry.used_length, file.blocks().page_size(), memory)
                .expect("a block")
        });
        let blocks = Arc::new(RamBlocks::new(blocks.collect()).expect("blocks"));
        Restore::new(&file).channels(1).run(&blocks, &Stop::new()).expect("restored");
        let mut written = Vec::new();
        for (index, block) in blocks.iter() {
            for page in (0..block.pages()).step_by(3).map(PageIndex) {
                let mut bytes = vec![0; block.page_size().bytes()];
                let slice = block.slice(page, 1).expect("mapped");
                slice.copy_to(&mut bytes);
                slice.copy_from(&vec![0xa5; bytes.len()]);
                written.push((index, page, bytes));
            }
        }
        let part = file.devices();
        let devices = part.sections().iter().filter(|section| section.name.as_bytes() != b"globalstate");
        let devices = devices.map(|section| DeviceSection {
            name: DeviceName::new(String::from_utf8_lossy(section.name.as_bytes())).expect("a name"),
            instance_id: section.instance,
            version: section.version,
            data: part.body(section).expect("in the file").to_vec(),
        });
        Self {
            configuration: file.configuration().expect("a configuration").clone(),
            devices: devices.collect(),
            writes: DirtyBitmaps::new(&blocks),
            blocks,
            written,
            stops: 0,
            resumes: 0,
        }
    }

    fn source(&self, preempt: bool, when: PostcopyWhen) -> Source {
        // A pass takes about a second, and the rest as well.
        let migrate = MigrateOptions::new().postcopy(when).max_bandwidth(Some(20_000_000));
        let postcopy = PostcopyOptions::new().preempt(preempt).max_postcopy_bandwidth(Some(5_000_000));
        let options = SourceOptions::new(self.configuration.clone()).channels(0);
        let options = options.migrate(migrate).postcopy(postcopy);
        Source::new(self.blocks.clone(), options, &Stop::new()).expect("options")
    }
}

/// The first pass takes a second, and nothing else could keep the guest here for another one.
const WITHIN_A_PASS: PostcopyWhen = PostcopyWhen::After(Duration::from_millis(500));

impl Guest for StandIn {
    fn devices(&self) -> Vec<DeviceInfo> {
        let info = |device: &DeviceSection| {
            DeviceInfo::new(device.name.clone(), device.data.len() as u64).instance(device.instance_id)
        };
        self.devices.iter().map(info).collect()
    }

    fn run_state(&mut self) -> RunState {
        RunState::Running
    }

    fn stop(&mut self) -> io::Result<()> {
        self.stops += 1;
        for (block, page, bytes) in &self.written {
            self.blocks.get(*block).expect("there").slice(*page, 1).expect("mapped").copy_from(bytes);
            self.writes.mark(*block, *page);
        }
        Ok(())
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(self.devices.clone())
    }

    fn resume(&mut self) {
        self.resumes += 1;
    }
}

/// Which connections a relay cuts, and when.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Never,
    /// All of these, when the connection for requested pages has carried this number of bytes.
    After(u64, &'static [usize]),
    /// The connection for requested pages, as soon as it is there.
    AtOnce,
}

/// Connects through relays, which count what each connection carries to the destination.
#[derive(Clone)]
struct Relay {
    to: String,
    cut: Cut,
    sockets: Arc<Mutex<Vec<(TcpStream, TcpStream)>>>,
    carried: Arc<[AtomicU64; 3]>,
}

impl Relay {
    fn new(to: &str, cut: Cut) -> Self {
        let to = to.trim_start_matches("tcp:").to_owned();
        Self { to, cut, sockets: Arc::default(), carried: Arc::default() }
    }

    /// The number of connections, and the bytes over the second one.
    fn found(&self) -> (usize, u64) {
        (self.sockets.lock().expect("whole").len(), self.carried[1].load(Ordering::SeqCst))
    }

    fn cuts(&self, which: &[usize]) {
        for (from, to) in which.iter().filter_map(|at| {
            let sockets = self.sockets.lock().expect("whole");
            let (from, to) = sockets.get(*at)?;
            Some((from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor")))
        }) {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
    }

    fn forward(&self, number: usize, mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let got = from.read(&mut buffer)?;
            if got == 0 {
                return to.shutdown(Shutdown::Write);
            }
            to.write_all(&buffer[..got])?;
            let carried = self.carried[number].fetch_add(got as u64, Ordering::SeqCst) + got as u64;
            if let (1, Cut::After(bytes, which)) = (number, self.cut)
                && carried >= bytes
            {
                self.cuts(which);
            }
        }
    }
}

impl Connect for Relay {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        // QEMU 7.2 takes the first connection for main.
        let to = TcpStream::connect(&self.to)?;
        let link = address.parse::<Address>().expect("an address").connect(context)?;
        let (from, _) = listener.accept()?;
        let mut sockets = self.sockets.lock().expect("whole");
        let number = sockets.len();
        sockets.push((from.try_clone()?, to.try_clone()?));
        drop(sockets);
        let (this, back) = (self.clone(), (to.try_clone()?, from.try_clone()?));
        thread::spawn(move || {
            let _ = this.forward(number, from, to);
        });
        thread::spawn(move || {
            let (mut to, mut from) = back;
            let _ = io::copy(&mut to, &mut from);
            let _ = from.shutdown(Shutdown::Write);
        });
        if let (1, Cut::AtOnce) = (number, self.cut) {
            self.cuts(&[1]);
        }
        Ok(link)
    }

    fn target(&self) -> String {
        format!("tcp:{}", self.to)
    }
}

/// Moves the machine in `file`, and returns how the source has ended.
fn leave(guest: &mut StandIn, source: Source, relay: &Relay) -> Result<Moved> {
    let mut log = guest.writes.reader().expect("the only one");
    source.run(relay.clone(), &mut log, guest)
}

/// Moves a machine over connections that hold, and checks all of it at its destination.
fn arrives(
    qemu: &Qemu,
    preempt: bool,
    when: PostcopyWhen,
) -> std::result::Result<(StandIn, Moved, Relay), Error> {
    let (_folder, file, _from) = captured(qemu)?;
    let (mut to, address) = waiting(qemu, preempt)?;
    let mut guest = StandIn::load(&file);
    let relay = Relay::new(&address, Cut::Never);
    let source = guest.source(preempt, when);
    let moved = leave(&mut guest, source, &relay);
    let moved = moved.unwrap_or_else(|error| panic!("{}, {}", chain(&error), to.stderr()));
    to.wait_migration("completed", PATIENCE)?;
    assert_checks_all(&mut to)?;
    Ok((guest, moved, relay))
}

#[test]
fn guest_moves_before_its_ram_and_its_requests_have_a_connection() {
    with_all(|qemu, preempt| {
        let (guest, moved, relay) = arrives(qemu, preempt, WITHIN_A_PASS)?;
        let Moved::Completed { postcopy: Some(postcopy), .. } = moved else { panic!("{moved:?}") };
        let (connections, over_preempt) = relay.found();
        println!("QEMU {}, preempt {preempt}: {postcopy:?}, {over_preempt} bytes", qemu.series());
        assert_eq!((postcopy.over_channels, postcopy.remaining, guest.resumes), (false, Some(0), 0));
        assert!(postcopy.requests > postcopy.late_requests, "{postcopy:?}");
        assert_eq!(connections, 1 + usize::from(preempt));
        if preempt {
            // At most a page, its head and the name of its block for each request, and EOS.
            assert!(over_preempt > 4096 && over_preempt <= postcopy.requests * (4096 + 64) + 8);
        }
        Ok(())
    });
}

#[test]
fn guest_that_converges_leaves_the_connection_for_requests_idle() {
    with_all(|qemu, preempt| {
        let (_, moved, relay) = arrives(qemu, preempt, PostcopyWhen::Request)?;
        assert!(matches!(moved, Moved::Completed { postcopy: None, .. }), "{moved:?}");
        assert_eq!(relay.found(), (1 + usize::from(preempt), 0));
        Ok(())
    });
}

#[test]
fn guest_whose_connections_break_is_completed_over_new_ones() {
    with_all(|qemu, preempt| {
        // Main, the connection for requests, both.
        for which in [&[0_usize][..], &[1], &[0, 1]].into_iter().filter(|_| preempt) {
            let (_folder, file, _from) = captured(qemu)?;
            let (mut to, address) = waiting(qemu, preempt)?;
            let mut guest = StandIn::load(&file);
            let source = guest.source(preempt, WITHIN_A_PASS);
            let relay = Relay::new(&address, Cut::After(32 << 10, which));
            let mut log = guest.writes.reader().expect("the only one");
            let progress = source.progress();
            let moved = source.run(relay.clone(), &mut log, &mut guest);
            let moved = moved.unwrap_or_else(|error| panic!("{which:?}: {}", chain(&error)));
            let Moved::Interrupted(interrupted) = moved else { panic!("{which:?}: {moved:?}") };
            println!("QEMU {}, {which:?}: {}", qemu.series(), chain(interrupted.error()));
            assert!(interrupted.is_confirmed());
            assert_eq!(progress.status(), Status::PostcopyPaused);
            let again = Relay::new(&recovering(&mut to)?, Cut::Never);
            let moved = interrupted.resume(again.clone(), &Stop::new(), &mut log, &mut guest);
            let moved = moved.unwrap_or_else(|error| panic!("{which:?}: {}, {}", chain(&error), to.stderr()));
            let Moved::Completed { postcopy: Some(postcopy), .. } = moved else { panic!("{moved:?}") };
            assert_eq!((postcopy.recoveries, again.found().0), (1, 2), "{postcopy:?}");
            to.wait_migration("completed", PATIENCE)?;
            assert_checks_all(&mut to)?;
            assert_eq!((guest.stops, guest.resumes), (1, 0));
        }
        Ok(())
    });
}

#[test]
fn guest_stays_if_the_connection_for_requests_breaks_before_the_switch() {
    with_all(|qemu, preempt| {
        if !preempt {
            return Ok::<_, Error>(());
        }
        let (_folder, file, _from) = captured(qemu)?;
        let (_to, address) = waiting(qemu, preempt)?;
        let mut guest = StandIn::load(&file);
        let relay = Relay::new(&address, Cut::AtOnce);
        let source = guest.source(preempt, WITHIN_A_PASS);
        let error = leave(&mut guest, source, &relay).expect_err("it has no connection for requests");
        assert_stays(&guest, &error);
        Ok(())
    });
}

#[test]
fn guest_stays_if_its_destination_has_no_preempt() {
    with_all(|qemu, preempt| {
        if preempt {
            return Ok(());
        }
        let (_folder, file, _from) = captured(qemu)?;
        let (to, address) = waiting(qemu, false)?;
        let mut guest = StandIn::load(&file);
        let relay = Relay::new(&address, Cut::Never);
        let source = guest.source(true, WITHIN_A_PASS);
        let error = leave(&mut guest, source, &relay).expect_err("it has no connection for requests");
        assert!(to.stderr().contains("Extra incoming migration connection"), "{}", to.stderr());
        assert_stays(&guest, &error);
        Ok(())
    });
}

#[track_caller]
fn assert_stays(guest: &StandIn, error: &multifd::Error) {
    let error = chain(error).to_string();
    assert_eq!((guest.stops, guest.resumes), (1, 1), "{error}");
    assert!(error.contains("closed the connection for requested pages (postcopy-preempt)"), "{error}");
}
