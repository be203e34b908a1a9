//! Opens a stored machine in any form, by looking at its first bytes.
//!
//! ```text
//! FILE ─┬─ mapped-ram ───────────────────────────────────────────────▶ StoredMachine
//!       ├─ libvirt image ─ head, XML ─┬─ sparse ─────────────────────▶ StoredMachine
//!       │                             ├─ raw ────────┐
//!       │                             └─ compressed ─┤
//!       ├─ stream ───────────────────────────────────┼─ unfold ─ scratch file ─▶ StoredMachine
//!       ├─ compressed stream ─ decompressor (a process) ┤
//!       ├─ qcow2 image ─ snapshot ──────────────────────┘
//!       └─ recording ─ received again ─ scratch file ───────────────▶ StoredMachine
//! ```
//!
//! The scratch file has no name, so nothing of it remains when the process ends. The decompressor is a child that ends before the
//! machine is used.

mod decompressor;
mod form;
mod snapshot;
mod within;

use std::{
    env,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Deref,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
};

use multifd::channel::Stop;
use qemu_stream::{
    Error as StreamError,
    format::{Compressor, LibvirtStorage},
    mapped_ram::{self, BaseName, ChainFile, FoundFile, StoredMachine},
    recording::Recording,
    stored::{Pages, Receive, Unfold},
};

use self::{decompressor::Decompressor, form::Found};
pub(crate) use self::{form::Form, within::Within};
use crate::{
    file_address::{Digests, FileAddress},
    output::{
        outcome::{Failure, While},
        outlet::{say, shown},
    },
    remedy,
};

/// A machine that was opened, and the form in which it is stored.
#[derive(Debug)]
pub(crate) struct Opened {
    machine: StoredMachine,
    form: Form,
    on_disk: u64,
}

/// How a machine is opened.
#[derive(Clone, Copy)]
pub(crate) struct Open<'a> {
    pub(crate) digests: Digests,
    /// What is needed of the pages.
    pub(crate) pages: Pages,
    /// Whether the form is not reported.
    pub(crate) quiet: bool,
    pub(crate) stop: &'a Stop,
}

impl Deref for Opened {
    type Target = StoredMachine;

    fn deref(&self) -> &StoredMachine {
        &self.machine
    }
}

impl Opened {
    /// The form in which the machine is stored.
    pub(crate) fn form(&self) -> &Form {
        &self.form
    }

    /// Bytes that the file occupies on the disk, of all that is in it.
    pub(crate) fn on_disk(&self) -> u64 {
        self.on_disk
    }
}

impl<'a> Open<'a> {
    /// With all pages, which are compared with their digests.
    pub(crate) fn new(stop: &'a Stop) -> Self {
        Self { digests: Digests::Compare, pages: Pages::Keep, quiet: false, stop }
    }

    pub(crate) fn quiet(self, quiet: bool) -> Self {
        Self { quiet, ..self }
    }

    pub(crate) fn no_verify(self, no_verify: bool) -> Self {
        Self { digests: Digests::unless(no_verify), ..self }
    }

    pub(crate) fn pages(self, pages: Pages) -> Self {
        Self { pages, ..self }
    }

    /// Opens the machine at an address.
    ///
    /// # Errors
    /// If there is none, it is incomplete or damaged, or a decompressor is missing.
    pub(crate) fn machine(self, at: &FileAddress) -> Result<Opened, Failure> {
        self.machine_with(at, |delta, base| FoundFile::beside(delta.path(), base))
    }

    /// The same; `find` opens the bases of a delta.
    ///
    /// # Errors
    /// As [`machine`](Self::machine).
    pub(crate) fn machine_with(
        self,
        at: &FileAddress,
        find: impl FnMut(&ChainFile, &BaseName) -> io::Result<FoundFile>,
    ) -> Result<Opened, Failure> {
        let found = at.found().map_err(|error| at.unreadable(error))?;
        let on_disk = on_disk(&found.file);
        let digests = mapped_ram::Digests::from(self.digests);
        let error = match StoredMachine::open_with(found, digests, find) {
            Ok(machine) => {
                check_snapshot(at, &Form::MappedRam)?;
                return Ok(Opened { machine, form: Form::MappedRam, on_disk });
            }
            Err(error) => error,
        };
        let found = match Found::of(&error, at).map_err(|error| at.unreadable(error))? {
            Some(found) => found,
            None => return Err(at.unreadable(remedy::of(error, at)).into()),
        };
        let form = found.form();
        check_snapshot(at, &form)?;
        if !self.quiet {
            say(&format!("{at} is {form}"));
        }
        let machine = match found {
            Found::Stream => self.unfold(at, at.offset(), None)?,
            Found::Compressed(by) => self.unfold(at, at.offset(), Some(by))?,
            Found::Snapshot(chosen) => self.read(at, Unfold::new(chosen.state()))?,
            Found::Recording => self.receive(at)?,
            Found::Libvirt(image) => match image.storage {
                LibvirtStorage::Raw => self.unfold(at, image.stream_at, None)?,
                LibvirtStorage::Compressed(by) => self.unfold(at, image.stream_at, Some(by))?,
                LibvirtStorage::Sparse => {
                    let found = at.found().map_err(|error| at.unreadable(error))?;
                    let found = FoundFile { offset: image.stream_at, ..found };
                    let opened = StoredMachine::open_with(found, digests, |delta, base| {
                        FoundFile::beside(delta.path(), base)
                    });
                    opened.map_err(|error| at.unreadable(error))?
                }
                _ => return Err(at.unreadable(error).into()),
            },
        };
        Ok(Opened { machine, form, on_disk })
    }

    /// Reads the stream that begins at `from` into a scratch file.
    fn unfold(
        self,
        at: &FileAddress,
        from: u64,
        compressor: Option<Compressor>,
    ) -> Result<StoredMachine, Failure> {
        let found = at.found().map_err(|error| at.unreadable(error))?;
        let mut file = found.file;
        match compressor {
            None => {
                let stream = Unfold::in_file(Arc::new(file), from).map_err(|error| at.unreadable(error))?;
                self.read(at, stream)
            }
            Some(by) => {
                file.seek(SeekFrom::Start(from)).map_err(|error| at.unreadable(error))?;
                let mut child = Decompressor::start(by, file, scratch_file(&scratch_folder())?)
                    .map_err(|error| at.unreadable(error))?;
                match self.read(at, Unfold::new(child.output())) {
                    Ok(machine) => {
                        child.finish().map_err(|error| at.unreadable(error))?;
                        Ok(machine)
                    }
                    Err(Failure::Interrupted) => Err(Failure::Interrupted),
                    // What the program reports explains why the stream is incomplete.
                    Err(failure) => Err(match child.failure() {
                        Some(reported) => at.unreadable(reported).into(),
                        None => failure,
                    }),
                }
            }
        }
    }

    /// Receives the migration of a recording again.
    fn receive(self, at: &FileAddress) -> Result<StoredMachine, Failure> {
        let file = Within::open(at).map_err(|error| at.unreadable(error))?;
        let recording = Recording::open(file).map_err(|error| at.unreadable(error))?;
        let scratch = Arc::new(scratch_file(&scratch_folder())?);
        let received = Receive::new(recording).run(&scratch, &Arc::default(), self.stop);
        received.map_err(|error| match self.stop.is_stopped() {
            true => Failure::Interrupted,
            false => at.unreadable(error).into(),
        })
    }

    fn read<R: Read>(self, at: &FileAddress, stream: Unfold<R>) -> Result<StoredMachine, Failure> {
        let folder = scratch_folder();
        let scratch = Arc::new(scratch_file(&folder)?);
        let read = AtomicU64::new(0);
        let machine = stream.pages(self.pages).run(&scratch, &read, self.stop);
        machine.map_err(|error| {
            if self.stop.is_stopped() {
                return Failure::Interrupted;
            }
            match error {
                StreamError::Io { doing, source, .. } if doing.contains("scratch") => {
                    let why = format!(
                        "cannot {doing} in {}, which needs as much room as the guest has memory with data; TMPDIR names \
                         another folder",
                        shown(&folder)
                    );
                    at.unreadable(While::new(why, source)).into()
                }
                error => at.unreadable(error).into(),
            }
        })
    }
}

/// Refuses the name of a snapshot for what has none.
fn check_snapshot(at: &FileAddress, form: &Form) -> Result<(), Failure> {
    match form {
        Form::Snapshot(_) => Ok(()),
        _ if at.snapshot().is_none() => Ok(()),
        _ => Err(at.unreadable(format!("it is {form}, which has no snapshots")).into()),
    }
}

/// The bytes that a file occupies. A file that cannot be asked has no size that could be shown.
pub(crate) fn on_disk(file: &File) -> u64 {
    file.metadata().map_or(0, |found| found.blocks().saturating_mul(512))
}

/// The folder of scratch files. Not `/tmp`, which is often memory.
fn scratch_folder() -> PathBuf {
    env::var_os("TMPDIR").filter(|folder| !folder.is_empty()).map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// A file without a name, readable by nobody else.
fn scratch_file(folder: &Path) -> Result<File, While> {
    tempfile::tempfile_in(folder).map_err(|error| {
        let doing = format!("cannot create a scratch file in {}; TMPDIR names another folder", shown(folder));
        While::new(doing, error)
    })
}
