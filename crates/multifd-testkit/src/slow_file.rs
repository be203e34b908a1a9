//! A file on a file system that takes its time for each read, as a disk or a network does: FUSE, served by this process.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::sleep,
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use tempfile::TempDir;

use crate::lacks;

/// A slow file, until it is dropped.
#[derive(Debug)]
pub struct SlowFile {
    // Unmounted before its folder is removed.
    _session: BackgroundSession,
    folder: TempDir,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    at_once: AtomicU64,
    most_at_once: AtomicU64,
}

impl SlowFile {
    /// The contents of `file`, of which each read takes `delay`. At most eight are served at once. `None`, and a line in the list of
    /// skipped tests, if this machine has no FUSE.
    ///
    /// # Errors
    /// If `file` cannot be read.
    pub fn of(file: &Path, delay: Duration) -> io::Result<Option<Self>> {
        let (folder, file) = (tempfile::tempdir()?, File::open(file)?);
        let counts = Arc::new(Counts::default());
        let slow = Slow { length: file.metadata()?.len(), file, delay, counts: counts.clone() };
        let mut config = Config::default();
        config.n_threads = Some(8);
        config.mount_options = vec![MountOption::RO, MountOption::FSName("slow".into())];
        match fuser::spawn_mount(slow, folder.path(), &config) {
            Ok(session) => Ok(Some(Self { _session: session, folder, counts })),
            Err(error) => {
                lacks(&format!("no file system in user space: {error}"));
                Ok(None)
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(NAME)
    }

    /// The number of reads.
    pub fn reads(&self) -> u64 {
        self.counts.reads.load(Ordering::Relaxed)
    }

    /// The greatest number of reads at once.
    pub fn most_at_once(&self) -> u64 {
        self.counts.most_at_once.load(Ordering::Relaxed)
    }
}

const NAME: &str = "machine";
const FILE: INodeNo = INodeNo(2);
/// Attributes do not change.
const KEPT: Duration = Duration::from_secs(3600);

struct Slow {
    file: File,
    length: u64,
    delay: Duration,
    counts: Arc<Counts>,
}

impl Slow {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, perm, size) = match inode {
            FILE => (FileType::RegularFile, 0o444, self.length),
            _ => (FileType::Directory, 0o555, 0),
        };
        let time = UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Slow {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == NAME {
            reply.entry(&KEPT, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&KEPT, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Each read of the program is one here.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let now = self.counts.at_once.fetch_add(1, Ordering::Relaxed) + 1;
        self.counts.most_at_once.fetch_max(now, Ordering::Relaxed);
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        sleep(self.delay);
        let mut bytes = vec![0; size as usize];
        let read = self.file.read_at(&mut bytes, offset);
        self.counts.at_once.fetch_sub(1, Ordering::Relaxed);
        match read {
            Ok(count) => reply.data(bytes.get(..count).unwrap_or_default()),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}
