//! Files that cannot be written or read, and descriptors that cannot be used: refused before listening or connecting.

use std::{
    ffi::OsStr,
    fs::{self, File},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, PermissionsExt, chown, symlink},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use multifd_testkit::lacks;
use rustix::fs::{CWD, FileType, IFlags, Mode, ioctl_getflags, ioctl_setflags, mknodat};
use tempfile::TempDir;

use super::disks::mounted;
use crate::kit::{
    Ended, Program, as_stdin, assert_left, captured, feed, folder, multifd, multifd_in, path, stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// The time limit of an error that does not depend on a peer.
const SOON: Duration = Duration::from_secs(8);

fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ended {
    Program::start(&mut multifd(arguments)).end_within(SOON)
}

/// Asserts that it was refused before a migration could begin.
#[track_caller]
fn assert_refused(ended: &Ended, code: i32, told: &[&str]) {
    ended.assert_failed(code, told);
    assert!(!ended.stderr.contains("listening on "), "{ended:?}");
}

#[track_caller]
fn assert_receive_refused(options: &[&str], target: &Path, code: i32, told: &[&str]) {
    let options = options.iter().map(OsStr::new);
    let words = [OsStr::new("receive")].into_iter().chain(options);
    let ended = run(words.chain([OsStr::new(LOCAL), target.as_os_str()]));
    assert_refused(&ended, code, told);
}

/// Regression: `receive ADDRESS newdir/` received the whole migration, failed at the rename, and lost the guest if its
/// source had no return path.
#[test]
fn path_that_only_a_folder_can_have_is_wrong_usage() {
    let folder = folder();
    let from = captured(&folder, MIB).display().to_string();
    let inside = |name: &str| format!("{}/{name}", folder.path().display());
    for name in ["new/", ".", "..", "new/.", "new//"] {
        let target = inside(name);
        let told = ["expected the path of a file", "names a folder"];
        assert_receive_refused(&["--force"], Path::new(&target), 2, &told);
        assert_receive_refused(&[], Path::new(&format!("file:{target},offset=1")), 2, &told);
        assert_refused(&run(["inspect", "--extract", "pc.ram", &from, &target]), 2, &told);
        assert_refused(&run(["send", &target, "tcp:127.0.0.1:1"]), 2, &told);
        assert_refused(&run(["inspect", &target]), 2, &told);
    }
    assert_receive_refused(&[], Path::new(""), 2, &["found an empty path"]);
    assert_refused(&run(["inspect", "--extract", "pc.ram", &from, ""]), 2, &["found an empty path"]);
    assert_left(&folder, &["captured"]);
}

/// Every kind of file besides a regular one, with its name.
fn oddities(folder: &TempDir) -> Vec<(PathBuf, &'static str)> {
    let (inner, fifo) = (path(folder, "folder"), path(folder, "fifo"));
    fs::create_dir(&inner).unwrap();
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let socket = path(folder, "socket");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
    vec![
        (inner, "a folder"),
        (fifo, "a FIFO"),
        (socket, "a socket"),
        (PathBuf::from("/dev/null"), "a character device"),
    ]
}

#[test]
fn target_that_is_no_regular_file_is_refused_with_what_it_is() {
    let folder = folder();
    let from = captured(&folder, MIB).display().to_string();
    for (target, kind) in oddities(&folder) {
        let told = ["cannot create", kind, "it exists and is not a regular file"];
        for options in [&[][..], &["--force"]] {
            assert_receive_refused(options, &target, 1, &told);
            let container = format!("file:{},offset=4096", target.display());
            assert_receive_refused(options, Path::new(&container), 1, &told);
        }
        let target = target.display().to_string();
        let ended = run(["inspect", "--force", "--extract", "pc.ram", &from, &target]);
        assert_refused(&ended, 1, &told);
    }
    assert_left(&folder, &["captured", "fifo", "folder", "socket"]);
}

/// Regression: a FIFO was waited for without limit.
#[test]
fn source_file_that_is_no_regular_file_is_refused_with_what_it_is() {
    let folder = folder();
    for (target, kind) in oddities(&folder) {
        let target = target.display().to_string();
        let told = ["cannot read", kind, "expected a regular file"];
        // Nothing listens there; an attempt to connect would be reported.
        for words in [&["send", &target, "tcp:127.0.0.1:1"][..], &["inspect", &target]] {
            let ended = run(words);
            ended.assert_failed(1, &told);
            assert!(!ended.stderr.contains("connect"), "{ended:?}");
        }
    }
    let text = path(&folder, "text");
    fs::write(&text, "no machine").unwrap();
    let ended = run([OsStr::new("send"), text.as_os_str(), OsStr::new("tcp:127.0.0.1:1")]);
    ended.assert_failed(1, &["cannot read"]);
    assert!(!ended.stderr.contains("connect"), "{ended:?}");
}

#[test]
fn folder_that_is_none_is_named() {
    let folder = folder();
    fs::write(path(&folder, "file"), "").unwrap();
    let missing = path(&folder, "missing");
    let told = missing.display().to_string();
    assert_receive_refused(&[], &missing.join("machine"), 1, &[&told, "No such file or directory"]);
    assert_receive_refused(&[], &path(&folder, "file").join("machine"), 1, &["Not a directory"]);
    assert_left(&folder, &["file"]);
}

/// Regression: the temporary name is longer than the file's own, and was too long although the file's own was not.
#[test]
fn longest_name_is_taken_and_a_longer_one_refused() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let name = format!("é{}", "m".repeat(253));
    assert_eq!(name.len(), 255);
    let longest = path(&folder, &name);
    for options in [&[][..], &["--force"]] {
        let (receive, address) = Program::receive(options, LOCAL, &longest);
        feed(&[], &from, &address).done();
        receive.done();
        assert_eq!(stored_memory(&longest), stored_memory(&from));
    }
    fs::remove_file(longest).unwrap();
    assert_receive_refused(&[], &path(&folder, &"m".repeat(256)), 1, &["File name too long"]);
    assert_left(&folder, &["captured"]);
}

#[test]
fn offset_that_leaves_no_room_is_refused() {
    let folder = folder();
    let target = format!("file:{},offset=0x7ffffffffffff000", path(&folder, "machine").display());
    let told = ["offset 0x7ffffffffffff000 leaves no room for a guest"];
    assert_receive_refused(&[], Path::new(&target), 1, &told);
    let target = format!("file:{},offset=1M", path(&folder, "machine").display());
    // In units of 512 or 1024 bytes.
    let mut command = multifd_in(&[], "ulimit -f 1500", &["receive", LOCAL, &target]);
    let ended = Program::start(&mut command).end_within(SOON);
    assert_refused(&ended, 1, &["offset 0x100000 leaves no room for a guest", "File too large"]);
    assert_left(&folder, &[]);
}

/// Regression: such a file cannot be replaced. This was detected only at the rename.
#[test]
fn file_that_is_mounted_on_its_own_is_refused() {
    let folder = folder();
    let (target, other) = (path(&folder, "machine"), path(&folder, "other"));
    fs::write(&target, "old").unwrap();
    fs::write(&other, "mounted").unwrap();
    let words = format!("--bind {}", other.display());
    let arguments = ["receive", "--force", LOCAL, target.to_str().unwrap()];
    let Some(mut command) = mounted(&words, &target, &arguments, "") else { return };
    let ended = Program::start(&mut command).end_within(SOON);
    assert_refused(&ended, 1, &["cannot create", "it is a mount point"]);
    assert_left(&folder, &["machine", "other"]);
}

#[test]
fn file_that_is_immutable_is_refused() {
    let folder = folder();
    let target = path(&folder, "machine");
    let file = File::create_new(&target).unwrap();
    let set = ioctl_getflags(&file).and_then(|flags| ioctl_setflags(&file, flags | IFlags::IMMUTABLE));
    if set.is_err() {
        return lacks("no immutable files here");
    }
    let ended = run(["receive", "--force", LOCAL, target.to_str().unwrap()]);
    ioctl_setflags(&file, ioctl_getflags(&file).unwrap() - IFlags::IMMUTABLE).unwrap();
    assert_refused(&ended, 1, &["cannot create", "immutable or append-only"]);
    assert_left(&folder, &["machine"]);
}

#[test]
fn file_of_another_user_in_a_sticky_folder_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return lacks("not the superuser, who can give files away");
    }
    let folder = folder();
    let target = path(&folder, "machine");
    fs::write(&target, "old").unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    chown(&target, Some(12345), None).unwrap();
    chown(folder.path(), Some(12346), None).unwrap();
    let launcher = ["setpriv", "--bounding-set=-fowner"];
    let arguments = ["receive", "--force", LOCAL, target.to_str().unwrap()];
    let ended = Program::start(&mut multifd_in(&launcher, "true", &arguments)).end_within(SOON);
    assert_refused(&ended, 1, &["cannot create", "it belongs to another user"]);
    assert_left(&folder, &["machine"]);
}

/// The socket would be at the file's path when the file is to get its name.
#[test]
fn socket_in_the_place_of_the_file_is_wrong_usage() {
    let folder = folder();
    let target = path(&folder, "machine");
    let link = path(&folder, "link");
    symlink(folder.path(), &link).unwrap();
    for socket in [&target, &link.join("machine")] {
        let listen = format!("unix:{}", socket.display());
        let ended = run(["receive", &listen, target.to_str().unwrap()]);
        assert_refused(
            &ended,
            2,
            &["cannot listen at unix:", "the socket and the file to write have the same path"],
        );
    }
    assert_left(&folder, &["link"]);
}

fn with_stdin(arguments: &[&str], stdin: impl Into<OwnedFd>) -> Ended {
    Program::start(multifd(arguments).stdin(as_stdin(stdin))).end_within(SOON)
}

#[test]
fn descriptor_that_carries_nothing_is_wrong_usage_and_told_what_it_is() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine").display().to_string());
    let send = ["send", "--multifd-channels", "0", from.to_str().unwrap(), "fd:0"];
    for words in [&["receive", "fd:0", &file][..], &send] {
        let (pipe, _end) = std::io::pipe().unwrap();
        assert_refused(&with_stdin(words, File::open("/dev/null").unwrap()), 2, &["fd:0", "(/dev/null)"]);
        assert_refused(&with_stdin(words, File::open(&from).unwrap()), 2, &["fd:0 is a regular file ("]);
        assert_refused(&with_stdin(words, pipe), 2, &["fd:0 is a pipe (", "expected a "]);
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_refused(&with_stdin(words, datagrams), 2, &["fd:0 is a datagram socket"]);
    }
    let closed = run(["receive", "fd:77", &file]);
    assert_refused(&closed, 2, &["fd:77 is not open in this process"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let told = ["fd:0 is a listening socket, expected a connected stream socket"];
    assert_refused(&with_stdin(&send, listener), 2, &told);
    assert_left(&folder, &["captured"]);
}

#[test]
fn channels_over_one_inherited_connection_are_refused_before_anything_is_said() {
    let folder = folder();
    let file = path(&folder, "machine").display().to_string();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let ended = with_stdin(&["receive", "--multifd-channels", "2", "fd:0", &file], connection);
    assert_refused(&ended, 2, &["fd:0 is a single connection"]);
    assert_left(&folder, &[]);
}

/// Regression: a shell that ignores the signal passes that on, and a command that had succeeded counted as failed.
#[test]
fn command_is_waited_for_though_the_parent_ignores_the_ends_of_children() {
    let folder = folder();
    let from = captured(&folder, MIB).display().to_string();
    let arguments =
        |command: &'static str| ["send", "--multifd-channels", "0", &from, command].map(str::to_owned);
    for (command, code) in [("exec:cat >/dev/null", 0), ("exec:cat >/dev/null; exit 4", 1)] {
        let arguments = arguments(command);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let ended = Program::start(&mut multifd_in(&[], "trap '' CHLD", &arguments)).end_within(SOON);
        assert_eq!(ended.code, Some(code), "{ended:?}");
    }
}

#[test]
fn demo_of_more_memory_than_there_can_be_is_wrong_usage() {
    for size in ["18446744073709551615", "1P"] {
        let ended = run(["demo", "--size", size]);
        ended.assert_failed(2, &["expected size 0 to 70368744177664, found "]);
    }
}
