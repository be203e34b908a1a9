//! What every fuzz target is held to, beside not to fail: a small input may not take much memory.
//!
//! What Rust code allocates is counted. Guest memory that is mapped is not, nor is what a library in C takes (zstd): for that
//! there is libFuzzer's limit of one allocation, which it can keep to with the address sanitizer alone.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    error::Error,
    fs::File,
    io::{self, Cursor, Read, Seek, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    panic,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use multifd::{
    channel::Wake,
    error::{chain, is_executed},
};
use qemu_stream::Connection;

/// Runs a target on an input.
///
/// # Panics
/// If an input of up to 1 KiB had more than 64 MiB allocated at one time.
pub fn bounded(input: &[u8], target: impl FnOnce(&[u8])) {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    target(input);
    let taken = PEAK.load(Ordering::SeqCst).saturating_sub(before);
    assert!(
        input.len() > SMALL || taken <= MOST,
        "{} bytes of input had {taken} bytes allocated",
        input.len()
    );
}

/// The value, or `None` after a check of the error: what somebody else chose may not reach a terminal as it came.
///
/// # Panics
/// If the text of the error or of a cause has a character that a terminal executes.
pub fn shown<T, E: Error + 'static>(result: Result<T, E>) -> Option<T> {
    let error = match result {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    for cause in chain(&error) {
        let text = cause.to_string();
        assert!(!text.contains(is_executed), "{text:?}");
    }
    None
}

/// An empty file in memory, which may become longer than on most disks.
///
/// # Panics
/// If the system has none.
pub fn file() -> File {
    rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory").into()
}

/// Writes the input to a file. If its last byte is not 0, what is behind the first mark of the input, such as the end of a
/// machine, is 2^n MiB further back: RAM of terabytes needs a hole of that length for its pages. Returns whether there is a hole.
///
/// # Panics
/// If the file cannot be written.
pub fn write_sparse(bytes: &[u8], mut file: &File) -> bool {
    let hole = bytes.last().map_or(0, |byte| u32::from(byte % 27));
    let mark = bytes.windows(MARK.len()).position(|at| at == MARK).filter(|_| hole > 0);
    let (head, tail) = bytes.split_at(mark.unwrap_or(bytes.len()));
    file.write_all(head).expect("written");
    if let Some(tail) = tail.get(MARK.len()..) {
        file.write_all_at(tail, 1 << (20 + hole)).expect("written");
    }
    mark.is_some()
}

const MARK: &[u8] = b"~~hole~~";

/// Runs a program with its standard output and error in a file in memory, and checks that a terminal would show all of it as it
/// is.
///
/// # Panics
/// If something is printed that is not UTF-8, or that a terminal executes. A line break is no such character.
pub fn printed(program: impl FnOnce()) {
    static BEFORE: OnceLock<[OwnedFd; 2]> = OnceLock::new();
    let before = BEFORE.get_or_init(|| {
        let copies = [io::stdout().as_fd(), io::stderr().as_fd()]
            .map(|fd| fd.try_clone_to_owned().expect("a copy of a descriptor"));
        let report = panic::take_hook();
        // A finding must be seen.
        panic::set_hook(Box::new(move |panic| {
            if let Some(before) = BEFORE.get() {
                restore(before);
            }
            report(panic);
        }));
        copies
    });
    let mut output = file();
    rustix::stdio::dup2_stdout(&output).expect("redirected");
    rustix::stdio::dup2_stderr(&output).expect("redirected");
    program();
    restore(before);
    let mut text = Vec::new();
    output.rewind().expect("a file");
    output.read_to_end(&mut text).expect("read");
    let text = str::from_utf8(&text).expect("what is printed is UTF-8");
    let executed = text.lines().find(|line| line.contains(is_executed));
    assert!(executed.is_none(), "{executed:?}");
}

fn restore([out, err]: &[OwnedFd; 2]) {
    rustix::stdio::dup2_stdout(out).expect("restored");
    rustix::stdio::dup2_stderr(err).expect("restored");
}

/// Gives the input, takes whatever is answered.
pub struct Source<'a>(Cursor<&'a [u8]>);

impl<'a> Source<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Cursor::new(bytes))
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Source<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Nothing here waits for a peer.
impl Connection for Source<'_> {
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

/// A target, and the fuzzer's entry to it.
#[macro_export]
macro_rules! target {
    ($target:expr) => {
        libfuzzer_sys::fuzz_target!(|input: &[u8]| $crate::bounded(input, $target));
    };
}

/// The system's allocator, with what is allocated counted.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator does the work, and is asked for exactly what was asked here; that `realloc` of the trait
// allocates, copies and frees by these two keeps the count right.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the pointer came from `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

const SMALL: usize = 1 << 10;
const MOST: usize = 64 << 20;
