//! Standard input, output and error: a pipe as the source, a reader that has gone, a terminal's colours.

use std::{
    fs,
    io::Write,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use multifd_testkit::skip;

use crate::kit::{Program, captured, feed, folder, multifd, multifd_in, path, run, stored_memory};

/// A pipe whose reader has gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

/// The stream of a migration, as a command receives it.
fn stream(folder: &tempfile::TempDir) -> Vec<u8> {
    let (from, to) = (captured(folder, 1 << 20), path(folder, "stream"));
    let options = ["--multifd-channels=0", "--return-path=off"];
    feed(&options, &from, &format!("exec:cat >'{}'", to.display())).done();
    fs::read(&to).expect("the stream")
}

/// Regression: `… | multifd receive exec:cat FILE` waited without a word, because `cat` reads the connection.
#[test]
fn guest_is_received_from_a_pipe_and_from_a_file_on_standard_input() {
    let folder = folder();
    let stream = stream(&folder);
    let file = path(&folder, "machine");
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let mut command = multifd(["receive", "-"]);
    let receive = Program::start(command.arg(&file).stdin(reader));
    assert_eq!(receive.listening(), "standard input");
    writer.write_all(&stream).expect("taken");
    drop(writer);
    receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&path(&folder, "captured")));

    let again = path(&folder, "again");
    let mut command = multifd(["receive", "-"]);
    let input = fs::File::open(path(&folder, "stream")).expect("the stream");
    Program::start(command.arg(&again).stdin(input)).done();
    assert_eq!(stored_memory(&again), stored_memory(&file));
}

#[test]
fn standard_input_that_ends_or_cannot_be_a_source_is_an_error() {
    let folder = folder();
    let file = path(&folder, "machine");
    let with = |input: Stdio| {
        let mut command = multifd(["receive", "-"]);
        Program::start(command.arg(&file).stdin(input)).end()
    };
    with(Stdio::null()).assert_failed(1, &["no migration into ", "has begun"]);
    with(fs::File::open(folder.path()).expect("a folder").into()).assert_failed(2, &["it is a folder"]);
    let channels = run(["receive", "--channels", "2", "-", file.to_str().expect("text")]);
    channels.assert_failed(2, &["standard input is a single connection and cannot carry channels"]);
    assert!(!file.exists());
}

#[test]
fn pipe_that_a_command_cannot_read_is_noted() {
    let folder = folder();
    let file = path(&folder, "machine");
    let noted =
        "note: the command cannot read the pipe on standard input; to receive from it, use - as the address";
    let with = |options: &[&str], input: Stdio| {
        let mut command = multifd(["receive"]);
        Program::start(command.args(options).args(["exec:true"]).arg(&file).stdin(input)).end()
    };
    let pipe = || Stdio::from(std::io::pipe().expect("a pipe").0);
    assert!(with(&[], pipe()).stderr.contains(noted));
    assert!(!with(&["--quiet"], pipe()).stderr.contains(noted));
    assert!(!with(&[], Stdio::null()).stderr.contains(noted));
}

/// Regression: `multifd inspect FILE | true` reported a broken pipe and ended with exit code 1.
#[test]
fn closed_standard_output_is_no_error_for_any_verb() {
    let folder = folder();
    let from = captured(&folder, 4 << 20);
    let file = from.to_str().expect("text");
    for arguments in [
        &["inspect", file][..],
        &["inspect", "--json", file],
        &["inspect", "--extract", "pc.ram", file, "-"],
        &["--help"],
        &["help", "send"],
        &["--version"],
        &["demo", "--size", "8M", "--dirty-rate", "1M"],
        &["demo", "--size", "8M", "--dirty-rate", "1M", "--json"],
    ] {
        let ended = Program::start_with_output(&mut multifd(arguments), closed()).end();
        assert_eq!(ended.code, Some(0), "{arguments:?}: {ended:?}");
        assert!(!ended.stderr.contains("roken pipe"), "{arguments:?}: {ended:?}");
    }
    let to = path(&folder, "machine");
    let mut command = multifd(["receive", "--json", "tcp:127.0.0.1:0"]);
    let receive = Program::start_with_output(command.arg(&to), closed());
    let address = receive.listening();
    let send = Program::start_with_output(&mut multifd(["send", "--json", file, &address]), closed());
    for ended in [send.end(), receive.end()] {
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(!ended.stderr.contains("roken pipe"), "{ended:?}");
    }
    let failed =
        Program::start_with_output(&mut multifd(["send", "--json", file, "tcp:127.0.0.1:1"]), closed());
    failed.end().assert_failed(1, &["onnection refused"]);
}

#[test]
fn full_standard_output_is_an_error() {
    let folder = folder();
    let from = captured(&folder, 1 << 20);
    let file = from.to_str().expect("text");
    for arguments in [&["inspect", file][..], &["inspect", "--extract", "pc.ram", file, "-"]] {
        let full = fs::File::options().write(true).open("/dev/full").expect("a device");
        let ended = Program::start_with_output(&mut multifd(arguments), full).end();
        ended.assert_failed(1, &["standard output", "No space left on device"]);
    }
}

/// A warning in a thread must not end the migration because nobody reads it.
#[test]
fn closed_standard_error_is_no_error() {
    let folder = folder();
    let (from, to) = (captured(&folder, 1 << 20), path(&folder, "machine"));
    let socket = path(&folder, "socket");
    let mut command = multifd(["receive"]);
    command.env("MULTIFD_LOG", "trace").arg(format!("unix:{}", socket.display())).arg(&to);
    let mut receive = command.stdout(Stdio::null()).stderr(closed()).spawn().expect("started");
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it listens");
        sleep(Duration::from_millis(5));
    }
    sleep(Duration::from_millis(200));
    feed(&[], &from, &format!("unix:{}", socket.display())).done();
    assert_eq!(receive.wait().expect("ended").code(), Some(0));
    assert_eq!(stored_memory(&to), stored_memory(&from));
}

/// What the program with these arguments shows on a terminal of its own, in an environment with `NO_COLOR` of this text;
/// `None` if there is no `script` (util-linux), which makes a terminal.
fn on_a_terminal(arguments: &str, no_color: Option<&str>) -> Option<String> {
    let program = env!("CARGO_BIN_EXE_multifd");
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &format!("'{program}' {arguments}"), "/dev/null"]);
    command.env("MULTIFD_LOG", "debug").stdin(Stdio::null());
    match no_color {
        Some(text) => command.env("NO_COLOR", text),
        None => command.env_remove("NO_COLOR"),
    };
    let Ok(output) = command.output() else {
        skip("there is no `script` (util-linux), which makes a terminal");
        return None;
    };
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The log has colours on a terminal, but not with `NO_COLOR`.
#[test]
fn no_color_is_obeyed_by_the_log() {
    let folder = folder();
    let file = captured(&folder, 1 << 20);
    for (no_color, colours) in [(Some("1"), false), (None, true), (Some(""), true)] {
        // With --json there is no bar.
        let arguments = format!("send --json '{}' tcp:127.0.0.1:1", file.display());
        let Some(text) = on_a_terminal(&arguments, no_color) else { return };
        assert!(text.contains("DEBUG"), "{text:?}");
        assert_eq!(text.contains('\x1b'), colours, "{no_color:?}: {text:?}");
    }
}

/// The colours are the program's alone, and a bar draws itself.
#[test]
fn terminal_gets_no_sequence_of_a_name() {
    let folder = folder();
    let file = path(&folder, "a\u{1b}]0;owned\u{7}\u{9b}2J");
    fs::rename(captured(&folder, 1 << 20), &file).expect("renamed");
    for arguments in ["send 'FILE' tcp:127.0.0.1:1", "inspect x y 'FILE'", "inspect 'FILE'/x"] {
        let arguments = arguments.replace("FILE", file.to_str().expect("text"));
        let Some(text) = on_a_terminal(&arguments, None) else { return };
        assert!(
            !text.contains("\u{1b}]0") && !text.contains('\u{9b}') && !text.contains('\u{7}'),
            "{text:?}"
        );
        assert!(text.contains(r"a\u{1b}]0;owned\u{7}\u{9b}2J"), "{text:?}");
    }
}

/// The RAM of a guest contains anything.
#[test]
fn ram_is_not_written_to_a_terminal() {
    let folder = folder();
    let file = captured(&folder, 1 << 20);
    let arguments = format!("inspect --extract pc.ram '{}' -", file.display());
    let Some(text) = on_a_terminal(&arguments, None) else { return };
    assert!(text.len() < 1 << 10 && text.contains("standard output is a terminal"), "{text:?}");
}

/// Regression: the socket of another process that listened there was removed, and that process waited without end.
#[test]
fn second_receive_at_a_unix_socket_is_refused_and_the_first_still_gets_its_guest() {
    let folder = folder();
    let (from, one, other) = (captured(&folder, 1 << 20), path(&folder, "one"), path(&folder, "other"));
    let at = format!("unix:{}", path(&folder, "socket").display());
    let (first, address) = Program::receive(&[], &at, &one);
    let second = run(["receive", &at, other.to_str().expect("text")]);
    second.assert_failed(1, &["cannot listen at unix:", "the address is in use: another process listens"]);
    feed(&[], &from, &address).done();
    first.done();
    assert_eq!(stored_memory(&one), stored_memory(&from));

    // A process that was killed leaves its socket, which is replaced.
    let (first, _) = Program::receive(&[], &at, &other);
    first.signal(rustix::process::Signal::KILL);
    first.end();
    assert!(path(&folder, "socket").exists());
    let (again, address) = Program::receive(&[], &at, &other);
    feed(&[], &from, &address).done();
    again.done();
    assert!(!path(&folder, "socket").exists(), "it is removed at the end");
}

#[test]
fn unix_socket_is_its_owners_alone_with_any_umask() {
    let folder = folder();
    for umask in ["0000", "0022", "0277", "0777"] {
        let socket = path(&folder, &format!("socket-{umask}"));
        let at = format!("unix:{}", socket.display());
        // The file to write has a folder that is open before.
        let to = path(&folder, "machine");
        let mut command =
            multifd_in(&[], &format!("umask {umask}"), &["receive", &at, to.to_str().expect("text")]);
        let receive = Program::start(&mut command);
        receive.listening();
        let found = fs::symlink_metadata(&socket).expect("it listens");
        assert!(found.file_type().is_socket());
        assert_eq!(found.permissions().mode() & 0o7777, 0o600, "umask {umask}");
        drop(receive);
    }
}
