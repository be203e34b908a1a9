//! Names that a terminal would execute, or that imitate a line of the program: files, sockets, devices, blocks, words of the
//! command line. They are escaped wherever the program prints them.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::Write,
    net::TcpStream,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    process::Command,
};

use multifd::error::is_executed;
use multifd_testkit::bad_source::{Script, Shape, Target};
use tempfile::TempDir;

use crate::kit::{Ended, Program, captured, folder, multifd, path};

const LOCAL: &str = "tcp:127.0.0.1:0";
/// Sets the title, clears the screen, writes backwards, begins a line of its own, and is not valid UTF-8.
const NAME: &[u8] = b"x\x1b]0;owned\x07\xc2\x9b2J\xe2\x80\xae\xe2\x80\x8b\x7f\r\nmultifd: received ok\xff";
const SHOWN: &str = r"x\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\u{200b}\u{7f}\u{d}\u{a}multifd: received ok\xff";
/// The same as text, for what cannot be other bytes.
const TEXT: &str = "x\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\nmultifd: received ok";

fn hostile(folder: &TempDir) -> PathBuf {
    folder.path().join(OsStr::from_bytes(NAME))
}

/// Starts it with the most detailed log.
fn start<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Program {
    Program::start(multifd(arguments).env("MULTIFD_LOG", "trace"))
}

fn words<'a>(words: impl IntoIterator<Item = &'a OsStr>) -> Vec<OsString> {
    words.into_iter().map(OsStr::to_owned).collect()
}

/// Asserts that a terminal would show the output as it is, and that no line is another's.
#[track_caller]
fn assert_escaped(ended: &Ended) {
    for line in ended.stdout.lines().chain(ended.stderr.lines()) {
        assert!(!line.contains(is_executed), "{line:?}");
        assert!(!line.starts_with("multifd: received ok"), "{ended:?}");
    }
}

#[test]
fn names_of_files_are_escaped_and_each_of_their_bytes_is_shown() {
    let folder = folder();
    let (name, good) = (hostile(&folder), captured(&folder, 1 << 20));
    let name = name.as_os_str();
    let of = |text: &'static str| OsStr::new(text);
    let missing = [
        words([of("inspect"), name]),
        words([of("inspect"), of("--json"), name]),
        words([of("send"), name, of("tcp:127.0.0.1:1")]),
        words([of("send"), of("--json"), name, of("tcp:127.0.0.1:1")]),
    ];
    let check = |arguments: &Vec<OsString>, code: i32| {
        let ended = start(arguments).end();
        assert_escaped(&ended);
        ended.assert_failed(code, &[SHOWN]);
    };
    missing.iter().for_each(|arguments| check(arguments, 1));
    // It exists, and is something else.
    fs::write(name, "something else").unwrap();
    missing.iter().for_each(|arguments| check(arguments, 1));
    check(&words([of("inspect"), of("--extract"), of("pc.ram"), good.as_os_str(), name]), 1);
    check(&words([of("inspect"), of("--extract"), name, good.as_os_str(), of("out")]), 1);
    check(&words([of("receive"), of(LOCAL), name]), 1);
    check(&words([of("receive"), of("--json"), of(LOCAL), name]), 1);
    let mut container = OsString::from("file:");
    container.push(name);
    container.push(",offset=0x1000");
    check(&words([of("send"), &container, of("tcp:127.0.0.1:1")]), 1);
    container.push("0g");
    let refused = start(words([of("inspect"), &container])).end();
    assert_escaped(&refused);
    refused.assert_failed(2, &["expected an offset"]);
}

#[test]
fn name_of_a_received_file_is_escaped_in_every_line_of_a_good_run() {
    let folder = folder();
    for (options, name) in [(&[][..], "plain"), (&["--json"][..], "json")] {
        let mut file = path(&folder, name).into_os_string();
        file.push(OsString::from_vec(NAME.to_vec()));
        let mut command = multifd(["receive"]);
        let receive = Program::start(command.args(options).arg(LOCAL).arg(&file));
        let address = receive.listening();
        let target = Target::Tcp(address.strip_prefix("tcp:").unwrap().parse().unwrap());
        let heard = Script::whole(Shape::default()).play(&target).unwrap();
        let ended = receive.done();
        drop(heard);
        assert_escaped(&ended);
        assert!(Path::new(&file).exists(), "{ended:?}");
        assert!(!options.is_empty() || ended.stderr.contains(&format!("{name}{SHOWN}: ")), "{ended:?}");
    }
}

#[test]
fn words_of_the_command_line_and_addresses_are_escaped() {
    let folder = folder();
    let file = captured(&folder, 1 << 20);
    let (file, new) = (file.to_str().unwrap(), path(&folder, "new"));
    let socket = format!("unix:{}/none/{TEXT}", folder.path().display());
    for (arguments, code) in [
        (&[TEXT][..], 2),
        (&["inspect", &format!("--{TEXT}")], 2),
        (&["send", "--uuid", TEXT, file, "tcp:127.0.0.1:1"], 2),
        (&["send", "--max-bandwidth", TEXT, file, "tcp:127.0.0.1:1"], 2),
        (&["send", file, &format!("tcp:{TEXT}")], 2),
        (&["send", file, "tcp:x\u{1b}]0;owned\u{7}\n:1"], 2),
        (&["send", "--connect-timeout=1", file, &socket], 1),
        (&["send", "--tls-creds", TEXT, "--tls-hostname", TEXT, file, "tcp:127.0.0.1:1"], 1),
        (&["send", "--multifd-channels=0", file, &format!("exec:exit 7 #{TEXT}")], 1),
        (&["send", file, &format!("exec:true #{TEXT}")], 2),
        (&["receive", "--stall-timeout=1", &format!("exec:true #{TEXT}"), new.to_str().unwrap()], 1),
        (&["receive", &socket, new.to_str().unwrap()], 1),
        (&["receive", "--tls-creds", TEXT, LOCAL, new.to_str().unwrap()], 1),
        (&["receive", "--channels-from", TEXT, LOCAL, new.to_str().unwrap()], 2),
    ] {
        let ended = start(arguments).end();
        assert_escaped(&ended);
        assert_eq!(ended.code, Some(code), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains(r"x\u{1b}]0;owned") || ended.stderr.contains("none"), "{ended:?}");
    }
}

/// The name of the program is the caller's, too.
#[test]
fn help_does_not_show_the_name_by_which_the_program_was_started() {
    let folder = folder();
    let link = hostile(&folder);
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_multifd"), &link).unwrap();
    for (arguments, code) in [(&["--help"][..], 0), (&["send", "--help"], 0), (&["--nonsense"], 2), (&[], 2)]
    {
        let ended = Program::start(Command::new(&link).args(arguments)).end();
        assert_escaped(&ended);
        assert_eq!(ended.code, Some(code), "{ended:?}");
    }
}

/// A main stream whose description of the devices has a name that sets the title, clears the screen and imitates a line. It
/// was printed as it came.
#[test]
fn name_of_a_device_is_escaped() {
    const STREAM: &[u8] = include_bytes!("device-name-with-escapes.bin");
    let folder = folder();
    for options in [&[][..], &["--json"]] {
        let file = path(&folder, "machine");
        let mut command = multifd(["receive"]);
        command.args(options).arg(LOCAL).arg(&file).env("MULTIFD_LOG", "trace");
        let receive = Program::start(&mut command);
        let mut line = receive.next_line();
        while !line.starts_with("listening on ") {
            line = receive.next_line();
        }
        let mut main = TcpStream::connect(line.strip_prefix("listening on tcp:").unwrap()).unwrap();
        main.write_all(STREAM).unwrap();
        drop(main);
        let ended = receive.end();
        assert_escaped(&ended);
        ended.assert_failed(1, &[r"\u{1b}]0;OWNED\u{7}\u{1b}[2J\u{a}multifd: received ok"]);
        if !options.is_empty() {
            let told = ended.json()["error-desc"].as_str().unwrap().to_owned();
            assert!(told.contains("OWNED") && !told.contains(is_executed), "{told:?}");
        }
    }
}
