//! `multifd inspect`, its command line and the file that it looks at, `--extract` included.
//!
//! The input's first line is the command line, words separated by blanks; what follows is the file, which may have a long hole.
//! The word FILE stands for that file, OUT for one beside it that may be written, HOSTILE for the same file under a name with
//! control characters, FIFO, SOCKET, FOLDER and DEVICE for what is no regular file: it must not be waited for.
#![no_main]

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::{ffi::OsStrExt, fs::symlink, net::UnixListener},
    path::Path,
    sync::OnceLock,
};

use multifd_fuzz::{printed, write_sparse};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

multifd_fuzz::target!(|bytes: &[u8]| {
    let folder = folder();
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if line.len() > LONGEST_LINE {
        return;
    }
    let words = line.split(|byte| *byte == b' ').map(|word| match word {
        b"FILE" => folder.join("file").into_os_string(),
        b"OUT" => folder.join("out").into_os_string(),
        b"HOSTILE" => folder.join(OsStr::from_bytes(HOSTILE)).into_os_string(),
        b"FIFO" => folder.join("fifo").into_os_string(),
        b"SOCKET" => folder.join("socket").into_os_string(),
        b"FOLDER" => folder.to_owned().into_os_string(),
        b"DEVICE" => folder.join("device").into_os_string(),
        // Whatever the words are, nothing outside the folder is to be written.
        _ if word.contains(&b'/') => OsString::from("elsewhere"),
        _ => OsStr::from_bytes(word).to_owned(),
    });
    let command_line: Vec<OsString> =
        ["multifd", "inspect"].into_iter().map(OsString::from).chain(words).collect();
    let file = File::create(folder.join("file")).expect("created");
    let has_hole = write_sparse(bytes.get(line.len() + 1..).unwrap_or_default(), &file);
    fs::hard_link(folder.join("file"), folder.join(OsStr::from_bytes(HOSTILE))).expect("linked");
    mknodat(CWD, folder.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    symlink("/dev/zero", folder.join("device")).expect("a link");
    let _socket = UnixListener::bind(folder.join("socket")).expect("a socket");
    // RAM goes to standard output as it is, and a hole of terabytes as zeros.
    if command_line.iter().any(|word| word == "-") {
        if !has_hole {
            multifd_cli::run(command_line);
        }
    } else {
        printed(|| {
            multifd_cli::run(command_line);
        });
    }
    for left in fs::read_dir(folder).expect("a folder").flatten() {
        let _ = fs::remove_file(left.path());
    }
});

const HOSTILE: &[u8] = b"x\x1b]0;owned\x07\xc2\x9b2J\xe2\x80\xae\nmultifd: received ok\xff";
/// What is refused is written to the terminal, with or without colours, which takes its time.
const LONGEST_LINE: usize = 1 << 12;

/// A folder for this process, which the first input makes and enters.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let folder = tempfile::tempdir().expect("a folder");
            env::set_current_dir(folder.path()).expect("entered");
            folder
        })
        .path()
}
