//! Arrows point one way inside the crates: checks which modules a folder must not use.
//!
//! The check reads the text, not the language: it removes comments and strings, then looks at every path that starts
//! with `crate`, `super` or another crate's name, including groups in braces. A rule names the first module of the
//! path. This is coarse and fast, and prefers false complaints to missed ones.
//!
//! `circles` finds circles between files, from the arrows that `imports` reads.

pub(crate) mod circles;
mod imports;

use crate::Failure;
use crate::sources::{self, Source};

/// Sources below `folder` (a file of that name with `.rs` counts) must not name any of `forbidden`.
struct Rule {
    folder: &'static str,
    forbidden: &'static [&'static str],
    why: &'static str,
}

const RULES: [Rule; 7] = [
    Rule {
        folder: "crates/multifd/src/wire",
        forbidden: &["batch", "channel", "compress", "live", "options", "recv", "send", "stats"],
        why: "`wire` must not depend on the stages that use it",
    },
    Rule {
        folder: "crates/guest-ram/src",
        forbidden: &["multifd", "qemu_stream", "multifd_cli"],
        why: "guest RAM must not depend on migrations",
    },
    Rule {
        folder: "crates/multifd/src/send",
        forbidden: &["live", "recv"],
        why: "the sending side must depend neither on the passes nor on the receiving side",
    },
    Rule {
        folder: "crates/multifd/src/recv",
        forbidden: &["live", "send"],
        why: "the receiving side must not depend on the source",
    },
    Rule {
        folder: "crates/multifd/src",
        forbidden: &["qemu_stream", "multifd_cli"],
        why: "the engine must depend neither on the main stream nor on the program",
    },
    Rule {
        folder: "crates/qemu-stream/src/format",
        forbidden: &["incoming", "outgoing", "mapped_ram"],
        why: "`format` must not depend on the drivers that read and write it",
    },
    Rule {
        folder: "crates/qemu-stream/src",
        forbidden: &["multifd_cli"],
        why: "a library must not depend on the program",
    },
];

/// Checks every source file against every rule.
///
/// # Errors
///
/// Names each file and line that violates a rule.
pub(crate) fn check() -> Result<(), Failure> {
    let complaints: Vec<String> = sources::all()?.iter().flat_map(complaints).collect();
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

fn complaints(source: &Source) -> Vec<String> {
    let rules: Vec<&Rule> = RULES.iter().filter(|rule| rule.covers(&source.path)).collect();
    if rules.is_empty() {
        return Vec::new();
    }
    let words = words(&source.text);
    let mut found = Vec::new();
    for (line, name) in paths(&words) {
        for rule in rules.iter().filter(|rule| rule.forbidden.contains(&name)) {
            found.push(format!("{}:{line}: names `{name}`: {}", source.path, rule.why));
        }
    }
    // A member of a group that continues with `::` is found twice.
    found.dedup();
    found
}

impl Rule {
    fn covers(&self, path: &str) -> bool {
        path.strip_prefix(self.folder).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    }
}

/// A word or a sign of the text, with its line.
type Word<'a> = (usize, &'a str);

/// Splits a text into names, `::` and single signs, without comments, strings and characters.
fn words(text: &str) -> Vec<Word<'_>> {
    let mut words = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let taken = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |at| at + 2)
        } else if first == '"' {
            string_length(rest)
        } else if first == '\'' {
            // A character, or the tick of a lifetime.
            let character = rest.chars().nth(2) == Some('\'') || rest.starts_with("'\\");
            if character { rest[2..].find('\'').map_or(rest.len(), |at| at + 3) } else { 1 }
        } else if is_name(first) {
            let length = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            words.push((line, &rest[..length]));
            length
        } else {
            let length = if rest.starts_with("::") { 2 } else { first.len_utf8() };
            if !first.is_whitespace() {
                words.push((line, &rest[..length]));
            }
            length
        };
        let (passed, left) = rest.split_at(taken);
        line += passed.matches('\n').count();
        rest = left;
    }
    words
}

/// The length of the string literal at the beginning of `text`.
pub(crate) fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The first module of each path: the name after `crate::` or `super::`, the members of a group there, and a single
/// name before `::`.
fn paths<'a>(words: &[Word<'a>]) -> Vec<Word<'a>> {
    let at = |index: usize| words.get(index).map_or("", |word| word.1);
    let mut found = Vec::new();
    for index in 0..words.len() {
        let rooted = matches!(at(index), "crate" | "super") && at(index + 1) == "::";
        if rooted && at(index + 2) == "{" {
            found.extend(group(&words[index + 3..]));
        } else if rooted {
            found.extend(words.get(index + 2).copied());
        } else if at(index + 1) == "::" && (index == 0 || !matches!(at(index - 1), "::" | ".")) {
            found.push(words[index]);
        }
    }
    found
}

/// The first names of the members of a group, after its opening brace.
fn group<'a>(words: &[Word<'a>]) -> Vec<Word<'a>> {
    let mut found = Vec::new();
    let (mut depth, mut first) = (1, true);
    for word in words {
        match word.1 {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," if depth == 1 => first = true,
            _ if first && depth == 1 => {
                found.push(*word);
                first = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints_of(path: &str, text: &str) -> Vec<String> {
        complaints(&Source { path: path.into(), text: text.into() })
    }

    #[test]
    fn stage_named_by_the_wire_is_met_in_every_spelling() {
        for text in [
            "use crate::send::Sender;",
            "use crate::{error::Error, send::{self, x}};",
            "fn f() { crate::recv::go() }",
            "use super::super::channel::Channel;",
            "use super::{stats};",
        ] {
            assert_eq!(complaints_of("crates/multifd/src/wire/packet.rs", text).len(), 1, "{text}");
        }
    }

    #[test]
    fn words_in_comments_strings_and_members_are_no_paths() {
        let text = "// crate::send::x\n/* crate::recv */ const A: &str = \"crate::send::x \\\" crate::recv\";\n\
                    use crate::error::{send, recv};\nfn f<'a>(send: &'a u8) -> char { 'x' }\nlet a = b.send::<u8>();";
        assert_eq!(complaints_of("crates/multifd/src/wire/packet.rs", text), [""; 0]);
    }

    #[test]
    fn line_of_the_wrong_arrow_is_named() {
        let found =
            complaints_of("crates/multifd/src/send/packets.rs", "//! x\n\nuse qemu_stream::format;\n");
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with("crates/multifd/src/send/packets.rs:3: names `qemu_stream`"),
            "{}",
            found[0]
        );
    }

    #[test]
    fn stages_may_use_the_wire() {
        assert!(
            complaints_of("crates/multifd/src/send/packets.rs", "use crate::{wire::Packet, ram, batch};")
                .is_empty()
        );
    }

    #[test]
    fn folder_of_a_like_name_is_another() {
        assert!(complaints_of("crates/multifd/src/wired.rs", "use crate::send;").is_empty());
        assert_eq!(complaints_of("crates/multifd/src/wire.rs", "use crate::send;").len(), 1);
    }
}
