//! Memory of each kind, and accesses to it.
//!
//! UNSAFETY: memory is read by a system call, and advice is given about it, at addresses of blocks that live longer.
#![expect(unsafe_code, reason = "system calls on guest memory")]

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use guest_ram::{
    Access, Armed, BlockIndex, BlockName, FaultError, FaultEvent, FaultsFrom, Features, GuestSlice, Mapping,
    Memory, PageIndex, PageSize, RamBlock, RamBlocks, Userfault,
};
use multifd_testkit::HugePages;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
};

pub(crate) const BLOCK: BlockIndex = BlockIndex(0);
/// The longest time that anything here takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn block(name: &str, len: u64, mapping: Mapping) -> RamBlock {
    let name = BlockName::new(name).expect("a name");
    RamBlock::new(name, len, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block")
}

pub(crate) fn blocks(len: u64, mapping: Mapping) -> Arc<RamBlocks> {
    Arc::new(RamBlocks::new(vec![block("ram", len, mapping)]).expect("one block"))
}

pub(crate) fn anonymous(pages: u64) -> Arc<RamBlocks> {
    blocks(pages << 12, Mapping::anonymous(pages << 12).expect("memory"))
}

pub(crate) fn memfd(len: u64, flags: MemfdFlags) -> io::Result<File> {
    let file = File::from(memfd_create("ram", flags | MemfdFlags::CLOEXEC)?);
    file.set_len(len)?;
    Ok(file)
}

/// Memory of one kind.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) blocks: Arc<RamBlocks>,
    /// Bytes of a host page.
    pub(crate) host_page: u64,
    _reserved: Option<HugePages>,
}

/// Memory of `host_pages` host pages of each kind that this system has.
pub(crate) fn kinds(host_pages: u64) -> Vec<Kind> {
    let mut kinds =
        vec![Kind { name: "anonymous", blocks: anonymous(host_pages), host_page: 4096, _reserved: None }];
    let len = host_pages << 12;
    let file = memfd(len, MemfdFlags::empty()).expect("a memfd");
    let mapping = Mapping::of_file(&file, 0, len, Access::ReadWrite).expect("mapped");
    kinds.push(Kind { name: "shared", blocks: blocks(len, mapping), host_page: 4096, _reserved: None });
    if let Some((blocks, reserved)) = huge(host_pages) {
        kinds.push(Kind { name: "huge", blocks, host_page: HUGE, _reserved: Some(reserved) });
    }
    kinds
}

/// Memory of huge pages of 2 MiB.
pub(crate) fn huge(host_pages: u64) -> Option<(Arc<RamBlocks>, HugePages)> {
    let reserved = HugePages::reserve(host_pages)?;
    let len = host_pages * HUGE;
    let file = memfd(len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).expect("a memfd");
    let mapping = Mapping::of_file(&file, 0, len, Access::ReadWrite).expect("mapped");
    Some((blocks(len, mapping), reserved))
}

pub(crate) const HUGE: u64 = HugePages::BYTES;

/// Opens a `userfaultfd`; `None` if this process may not.
pub(crate) fn open(needs: Features) -> Option<Userfault> {
    match Userfault::open(needs, FaultsFrom::Everything) {
        Ok(userfault) => Some(userfault),
        Err(
            error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. } | FaultError::NoUserfaultfd),
        ) => {
            multifd_testkit::lacks(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Waits until an event can be read.
pub(crate) fn readable(armed: &Armed) {
    let limit = Timespec::try_from(LIMIT).expect("short");
    assert_eq!(poll(&mut [PollFd::new(armed, PollFlags::IN)], Some(&limit)).expect("polled"), 1, "no event");
}

/// Waits for events, at least one.
pub(crate) fn events(armed: &Armed) -> Vec<FaultEvent> {
    let mut events = Vec::new();
    while events.is_empty() {
        readable(armed);
        armed.read_events(&mut events).expect("read");
    }
    for event in &mut events {
        if let FaultEvent::Fault { thread, .. } = event {
            // Its number differs in each run.
            let named = thread.take();
            assert_eq!(named.is_some(), armed.features().contains(Features::THREAD), "{event:?}");
        }
    }
    events
}

/// The bytes of a page that a test places.
pub(crate) fn pattern(page: u64) -> u8 {
    u8::try_from(page % 250).expect("small") + 1
}

pub(crate) fn page_of(blocks: &RamBlocks, page: u64) -> GuestSlice<'_> {
    blocks.block(BLOCK).expect("there").slice(PageIndex(page), 1).expect("there")
}

/// Reads a page, as a thread of the guest would. Waits if it is missing.
pub(crate) fn read_page(blocks: &RamBlocks, page: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    page_of(blocks, page).copy_to(&mut bytes);
    bytes
}

/// Reads a page in a thread.
pub(crate) fn reader(blocks: &Arc<RamBlocks>, page: u64) -> Access1 {
    let blocks = blocks.clone();
    Access1::start(move || read_page(&blocks, page))
}

/// An access in a thread.
pub(crate) struct Access1(JoinHandle<()>, mpsc::Receiver<[u8; 4096]>);

impl Access1 {
    pub(crate) fn start(access: impl FnOnce() -> [u8; 4096] + Send + 'static) -> Self {
        let (done, result) = mpsc::channel();
        Self(thread::spawn(move || done.send(access()).expect("awaited")), result)
    }

    /// The result. It is an error if there is none within the limit.
    pub(crate) fn result(self) -> [u8; 4096] {
        let result = self.1.recv_timeout(LIMIT).expect("the access ends");
        self.0.join().expect("no panic");
        result
    }

    pub(crate) fn is_waiting(&self) -> bool {
        !self.0.is_finished()
    }
}

/// Reads bytes of a page with a system call, which fails where a thread would get a signal. Waits if the page is missing.
pub(crate) fn peek(blocks: &RamBlocks, page: u64) -> io::Result<[u8; 64]> {
    let (mut bytes, slice) = ([0; 64], page_of(blocks, page));
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: bytes.len() };
    let id = i32::try_from(std::process::id()).expect("a process");
    // SAFETY: the buffer has that length; the other address belongs to this process, which the system checks.
    let read = unsafe { libc::process_vm_readv(id, &raw const local, 1, &raw const remote, 1, 0) };
    if read == 64 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// Fills a page with bytes of a file, by a system call that writes to the memory.
pub(crate) fn read_into(file: &File, offset: u64, blocks: &RamBlocks, page: u64) {
    let slice = page_of(blocks, page);
    let offset = i64::try_from(offset).expect("small");
    // SAFETY: the page belongs to guest memory, to which no reference exists.
    let read = unsafe { libc::pread(file.as_raw_fd(), slice.as_ptr().cast(), 4096, offset) };
    assert_eq!(read, 4096, "{}", io::Error::last_os_error());
}

/// The bytes of the first block that are in huge pages which the kernel has chosen itself.
pub(crate) fn huge_bytes(blocks: &RamBlocks) -> u64 {
    let (from, bytes) = (page_of(blocks, 0).as_ptr().addr() as u64, blocks.total());
    let text = std::fs::read_to_string("/proc/self/smaps").expect("readable");
    let (mut is_inside, mut found) = (false, 0);
    for line in text.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        if let Some((start, end)) = range
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            is_inside = start < from + bytes && end > from;
        } else if is_inside && let Some(size) = line.strip_prefix("AnonHugePages:") {
            let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok());
            found += kib.expect("a number") << 10;
        }
    }
    found
}

/// Discards pages.
pub(crate) fn discard(blocks: &RamBlocks, first: u64, count: u64, advice: i32) {
    let slice = blocks.block(BLOCK).expect("there").slice(PageIndex(first), count).expect("there");
    // SAFETY: the range is guest memory, to which no reference exists.
    let result = unsafe { libc::madvise(slice.as_ptr().cast(), slice.len(), advice) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Maps new memory over a page, as an embedder must not.
pub(crate) fn map_over(blocks: &RamBlocks, page: u64) {
    let slice = page_of(blocks, page);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the page belongs to guest memory, to which no reference exists.
    let at = unsafe { libc::mmap(slice.as_ptr().cast(), 4096, rights, flags, -1, 0) };
    assert_eq!(at.addr(), slice.as_ptr().addr());
}
