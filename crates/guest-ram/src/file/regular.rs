//! Opens files that must be regular ones: the open of a FIFO would wait for a writer, and a device may never end.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

/// Opens a regular file for reading, without a wait. For a file of another kind, `remedy` is appended to the error.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] if it is of another kind, which the error names; the system's error.
pub fn open_regular(path: &Path, remedy: impl Fn(&Metadata) -> &'static str) -> io::Result<File> {
    let check = |found: &Metadata| {
        if found.is_file() {
            return Ok(());
        }
        let why = format!("it is {}, expected a regular file{}", kind_of_file(found), remedy(found));
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    };
    // A device can do something when it is opened, so its kind is checked before, too.
    check(&path.metadata()?)?;
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// The kind of a file, with an article: `a regular file`, `a FIFO`.
pub fn kind_of_file(found: &Metadata) -> &'static str {
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

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "an interpreter has no FIFOs")]
    fn what_is_no_regular_file_is_refused_by_its_kind_without_a_wait() {
        let folder = tempfile::tempdir().expect("a folder");
        let fifo = folder.path().join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("made");
        let remedy = |found: &Metadata| if found.is_dir() { ": name a file in it" } else { "" };
        for (path, why) in [
            (folder.path(), "it is a folder, expected a regular file: name a file in it"),
            (&fifo, "it is a FIFO, expected a regular file"),
            (Path::new("/dev/null"), "it is a character device, expected a regular file"),
        ] {
            let refused = open_regular(path, remedy).expect_err("refused");
            assert_eq!((refused.kind(), refused.to_string()), (io::ErrorKind::InvalidInput, why.to_owned()));
        }
        let file = folder.path().join("file");
        File::create(&file).expect("made");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).expect("made");
        open_regular(&link, remedy).expect("a regular file behind a link");
    }
}
