//! The commands that restore a machine from its file.

use std::path::absolute;

use super::About;
use crate::{file_address::FileAddress, remedy::quoted};

/// The commands, to be typed one after the other. If the command line of the captured QEMU is not known, its place has a name.
pub(crate) fn commands(file: &FileAddress, about: &About) -> Vec<String> {
    let mut words = waiting(&about.command_line);
    let socket = match qmp(&words) {
        Some(path) => path,
        None => {
            words.extend(["-qmp".to_owned(), format!("unix:{SOCKET},server=on,wait=off")]);
            SOCKET.to_owned()
        }
    };
    words.extend(["-incoming", "defer"].map(str::to_owned));
    let mut line: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    if about.command_line.is_empty() {
        line.insert(0, "qemu-system-... (options as at the source)".to_owned());
    }
    let path = absolute(file.path()).unwrap_or_else(|_| file.path().to_owned());
    let path = path.to_str().unwrap_or("FILE");
    let file = file.typed(path);
    vec![format!("{} &", line.join(" ")), format!("multifd restore {} {}", quoted(&file), quoted(&socket))]
}

/// The command line of a QEMU that will wait for a migration, without what an earlier one has waited for.
fn waiting(line: &[String]) -> Vec<String> {
    let mut words = line.iter();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-incoming" | "--incoming" => drop(words.next()),
            // It would have gone to the background before its socket was there.
            "-daemonize" | "--daemonize" => {}
            _ => kept.push(word.clone()),
        }
    }
    kept
}

/// The QMP socket of a command line, if it has one at a path.
fn qmp(words: &[String]) -> Option<String> {
    let options = words.iter().zip(words.iter().skip(1));
    let mut found = options.filter(|(option, _)| matches!(option.as_str(), "-qmp" | "--qmp"));
    let path = found.find_map(|(_, value)| value.strip_prefix("unix:"))?;
    Some(path.split(',').next().unwrap_or(path).to_owned())
}

const SOCKET: &str = "/tmp/restored.qmp";

#[cfg(test)]
mod tests {
    use super::*;

    fn commands_of(line: &[&str]) -> Vec<String> {
        let about =
            About { command_line: line.iter().map(|word| (*word).to_owned()).collect(), ..About::default() };
        commands(&FileAddress::parse("/ram/a b".into()).expect("a path"), &about)
    }

    #[test]
    fn recorded_command_line_waits_and_keeps_its_socket() {
        let line = ["qemu", "-incoming", "tcp:0:1", "-qmp", "unix:/run/q,server=on", "-name", "it's"];
        let expected = [
            r"qemu -qmp unix:/run/q,server=on -name 'it'\''s' -incoming defer &",
            "multifd restore '/ram/a b' /run/q",
        ];
        assert_eq!(commands_of(&line), expected);
    }

    #[test]
    fn line_without_a_socket_gets_one_and_an_unknown_line_says_what_is_missing() {
        assert_eq!(
            commands_of(&["qemu"])[0],
            "qemu -qmp unix:/tmp/restored.qmp,server=on,wait=off -incoming defer &"
        );
        assert!(commands_of(&[])[0].starts_with("qemu-system-... (options as at the source) -qmp"));
    }
}
