//! `multifd inspect`, its command line and the file that it looks at, `--extract` included.
//!
//! The input's first line is the command line, words separated by blanks; what follows is the file. The word FILE stands for
//! that file, OUT for one beside it that may be written.
#![no_main]

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::OnceLock,
};

use tempfile::TempDir;

multifd_fuzz::target!(|bytes: &[u8]| {
    let folder = folder();
    let (file, out) = (folder.join("file"), folder.join("out"));
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if line.len() > LONGEST_LINE {
        return;
    }
    let words = line.split(|byte| *byte == b' ').map(|word| match word {
        b"FILE" => file.clone().into_os_string(),
        b"OUT" => out.clone().into_os_string(),
        // Whatever the words are, nothing outside the folder is to be written.
        _ if word.contains(&b'/') => OsString::from("elsewhere"),
        _ => OsStr::from_bytes(word).to_owned(),
    });
    let command_line = ["multifd", "inspect"].into_iter().map(OsString::from).chain(words);
    fs::write(&file, bytes.get(line.len() + 1..).unwrap_or_default()).expect("written");
    multifd_cli::run(command_line);
    for left in fs::read_dir(folder).expect("a folder").flatten() {
        let _ = fs::remove_file(left.path());
    }
});

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
