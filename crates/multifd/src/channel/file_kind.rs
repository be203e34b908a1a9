//! What a file is, in words, and files that must be regular ones: a FIFO in place of a file would make the open wait for a
//! writer, and a device may never end.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

/// Opens a regular file for reading, without a wait.
///
/// # Errors
/// If it is of another kind, which the error names; the system's error.
#[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "only certificates are read from files"))]
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    // A device can do something when it is opened, so the kind is checked before, too.
    check(&path.metadata()?)?;
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

fn check(found: &Metadata) -> io::Result<()> {
    if found.is_file() {
        return Ok(());
    }
    let why = format!("it is {}, expected a regular file", kind_of(found));
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// The kind of a file.
pub(super) fn kind_of(found: &Metadata) -> &'static str {
    let kind = found.file_type();
    [
        (kind.is_file(), "a regular file"),
        (kind.is_dir(), "a folder"),
        (kind.is_symlink(), "a symbolic link"),
        (kind.is_fifo(), "a FIFO"),
        (kind.is_socket(), "a socket"),
        (kind.is_char_device(), "a character device"),
        (kind.is_block_device(), "a block device"),
    ]
    .into_iter()
    .find_map(|(is, name)| is.then_some(name))
    .unwrap_or("no file of a known kind")
}
