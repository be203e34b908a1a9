//! Plain words in what users and developers read: the Markdown pages for people, the doc comments of the sources in
//! `crates`, which include the guide and the help texts, and the messages of the program, the libraries, the benchmark, the
//! examples and xtask. `xtask/words.txt` has the words that are not plain, each with a replacement.
//!
//! The check reads the text, not the language. In Markdown and in doc comments, code is skipped: fences, lines indented
//! by four spaces, and text between backticks. In the sources with messages, all string literals count, except in tests.

use std::{collections::BTreeSet, fs};

use crate::{
    Failure,
    arrows::string_length,
    sources::{self, Source},
    workspace_root,
};

/// Checks every text that users or developers read.
///
/// # Errors
///
/// Names each place with a word of the list, and the replacement.
pub(crate) fn check() -> Result<(), Failure> {
    let list = list(LIST)?;
    let mut complaints = Vec::new();
    for page in pages()? {
        complaints.extend(found(&list, &page.path, &prose(page.text.lines().zip(1..))));
    }
    for source in sources::all()? {
        if has_checked_messages(&source.path) {
            complaints.extend(found(&list, &source.path, &messages(&source.text)));
        }
        if has_checked_docs(&source.path) {
            complaints.extend(found(&list, &source.path, &prose(doc_comments(&source.text))));
        }
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

/// A word or a phrase, in lower case, and what to write instead.
struct Entry {
    phrase: Vec<String>,
    instead: String,
}

/// A piece of text, with its line.
type Piece<'a> = (usize, &'a str);

fn list(text: &str) -> Result<Vec<Entry>, Failure> {
    let mut seen = BTreeSet::new();
    let mut entries = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (phrase, instead) =
            line.split_once('#').ok_or(format!("words.txt: {line:?} has no replacement"))?;
        let phrase: Vec<String> = phrase.split_whitespace().map(str::to_lowercase).collect();
        if !seen.insert(phrase.clone()) {
            return Err(format!("words.txt: {:?} is listed twice", phrase.join(" ")).into());
        }
        entries.push(Entry { phrase, instead: instead.trim().to_owned() });
    }
    Ok(entries)
}

/// The Markdown pages for users.
fn pages() -> Result<Vec<Source>, Failure> {
    let root = workspace_root();
    let mut paths: Vec<String> = PAGES.map(str::to_owned).to_vec();
    for folder in FOLDERS {
        for entry in fs::read_dir(root.join(folder))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".md") {
                paths.push(format!("{folder}/{name}"));
            }
        }
    }
    paths.sort();
    let read = |path: String| Ok(Source { text: fs::read_to_string(root.join(&path))?, path });
    paths.into_iter().map(read).collect()
}

/// The occurrences of the listed phrases in a text.
fn found(list: &[Entry], path: &str, text: &[Piece<'_>]) -> Vec<String> {
    let words: Vec<(usize, String)> = text
        .iter()
        .flat_map(|(line, text)| tokens(text).map(move |word| (*line, word.to_lowercase())))
        .collect();
    let mut complaints = Vec::new();
    for at in 0..words.len() {
        for Entry { phrase, instead } in list {
            let here = words.iter().skip(at).take(phrase.len()).map(|(_, word)| word);
            if here.eq(phrase.iter()) {
                let line = words[at].0;
                complaints.push(format!("{path}:{line}: \"{}\": write {instead}", phrase.join(" ")));
            }
        }
    }
    complaints
}

/// The words of a text, and each other sign by itself, so that no phrase extends over the end of a sentence.
fn tokens(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let first = rest.chars().next()?;
        let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '\'');
        let length =
            if is_word(first) { rest.find(|c| !is_word(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        let (token, after) = rest.split_at(length);
        rest = after;
        Some(token)
    })
}

/// Whether the doc comments of a source are checked.
fn has_checked_docs(path: &str) -> bool {
    path.starts_with("crates/") && path.contains("/src/")
}

/// Whether the string literals of a source are checked. Those of a file that contains only tests or models are not.
fn has_checked_messages(path: &str) -> bool {
    let is_for_tests = path.ends_with("/tests.rs") || path.contains("/tests/") || path.ends_with("/model.rs");
    MESSAGES.iter().any(|listed| path.starts_with(listed)) && !is_for_tests && path != OWN
}

/// The lines of all doc comments.
fn doc_comments(text: &str) -> impl Iterator<Item = (&str, usize)> {
    text.lines().zip(1..).filter_map(|(line, number)| {
        let line = line.trim_start();
        let doc = line.strip_prefix("//!").or_else(|| line.strip_prefix("///"))?;
        Some((doc.strip_prefix(' ').unwrap_or(doc), number))
    })
}

/// Lines of Markdown without their code.
fn prose<'a>(lines: impl Iterator<Item = (&'a str, usize)>) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let mut fenced = false;
    for (line, number) in lines {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            // Every second part of a line is between backticks. A code span that continues in the next line is rare.
            pieces.extend(line.split('`').step_by(2).map(|part| (number, part)));
        }
    }
    pieces
}

/// String literals of a source up to its module of tests.
fn messages(text: &str) -> Vec<Piece<'_>> {
    let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    let (mut rest, mut line, mut pieces) = (&text[..end], 1, Vec::new());
    while let Some(first) = rest.chars().next() {
        let taken = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(length) = literal_length(rest) {
            let inner = rest[..length].trim_matches(['r', '#', '"']);
            pieces.extend(inner.lines().zip(line..).flat_map(|(part, at)| literal(part, at)));
            length
        } else if first == '\'' {
            // A character, or the tick of a lifetime.
            let character = rest.chars().nth(2) == Some('\'') || rest.starts_with("'\\");
            if character { rest[2..].find('\'').map_or(rest.len(), |at| at + 3) } else { 1 }
        } else {
            first.len_utf8()
        };
        line += rest[..taken].matches('\n').count();
        rest = &rest[taken..];
    }
    pieces
}

/// The length of the string literal at the beginning of `text`, if there is one.
fn literal_length(text: &str) -> Option<usize> {
    let Some(raw) = text.strip_prefix('r') else { return text.starts_with('"').then(|| string_length(text)) };
    let signs = raw.len() - raw.trim_start_matches('#').len();
    let inner = raw[signs..].strip_prefix('"')?;
    let end = format!("\"{}", &raw[..signs]);
    Some(inner.find(&end).map_or(text.len(), |at| text.len() - inner.len() + at + end.len()))
}

/// A line of a literal without the names in `{}` and the sign that continues it.
fn literal(text: &str, line: usize) -> impl Iterator<Item = Piece<'_>> {
    let parts = text.trim_end_matches('\\').split('{').enumerate();
    parts.map(move |(index, part)| {
        let after = if index == 0 { part } else { part.split_once('}').map_or("", |(_, after)| after) };
        (line, after)
    })
}

const LIST: &str = include_str!("../words.txt");
/// Pages outside of these folders.
const PAGES: [&str; 6] = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "crates/guest-ram/README.md",
    "docs/README.md",
];
/// Folders with pages for people.
const FOLDERS: [&str; 4] = ["docs/decisions", "docs/develop", "docs/embed", "docs/use"];
/// Folders of the sources whose messages users or developers read.
const MESSAGES: [&str; 7] = [
    "crates/guest-ram/src/",
    "crates/multifd-bench/src/",
    "crates/multifd-cli/src/",
    "crates/multifd/src/",
    "crates/qemu-stream/src/",
    "examples/",
    "xtask/src/",
];
/// The source of this check, whose tests have such words.
const OWN: &str = "xtask/src/words.rs";

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(text: &[Piece<'_>]) -> Vec<String> {
        let list = list("told # reported\ncome about # connect\n").unwrap();
        found(&list, "x", text)
    }

    #[test]
    fn word_is_found_in_any_case_with_its_line_and_replacement() {
        assert_eq!(complaints(&[(7, "It is Told.")]), ["x:7: \"told\": write reported"]);
        assert_eq!(complaints(&[(7, "retold, toldo, told-you, come, about")]), [""; 0]);
    }

    #[test]
    fn phrase_is_found_over_the_end_of_a_line_and_not_over_that_of_a_sentence() {
        assert_eq!(complaints(&[(1, "connections come"), (2, "about")]).len(), 1);
        assert_eq!(complaints(&[(1, "connections come."), (2, "About")]).len(), 0);
    }

    #[test]
    fn code_in_a_page_is_not_read() {
        let page = "as `told` before\n\n    told\n\n```text\ntold\n```\ntold\n";
        assert_eq!(complaints(&prose(page.lines().zip(1..))), ["x:8: \"told\": write reported"]);
    }

    #[test]
    fn doc_comments_are_read_without_their_code_and_other_comments_are_not_read() {
        let source = "//! # A\n//! ```\n//! // told\n//! ```\n//! is told\n// told\nfn f() {\n    /// `told`, told\n}\n";
        assert_eq!(
            complaints(&prose(doc_comments(source))),
            ["x:5: \"told\": write reported", "x:8: \"told\": write reported"]
        );
    }

    #[test]
    fn phrase_in_a_doc_comment_is_found_over_the_end_of_a_line() {
        assert_eq!(complaints(&prose(doc_comments("/// they come\n    /// about\n"))).len(), 1);
    }

    #[test]
    fn doc_comments_are_checked_in_the_sources_of_the_crates_alone() {
        assert!(has_checked_docs("crates/multifd/src/send/mod.rs"));
        assert!(!has_checked_docs("crates/multifd/tests/it/main.rs"));
        assert!(!has_checked_docs("xtask/src/main.rs"));
    }

    #[test]
    fn literals_are_read_without_their_names_and_tests_are_not_read() {
        let source = "/// told\nfn f() { g('\"', \"a {told} \\\n  told {b}\"); } // told\n#[cfg(test)]\nmod tests { \"told\" }";
        assert_eq!(complaints(&messages(source)), ["x:3: \"told\": write reported"]);
    }

    #[test]
    fn raw_literals_are_read_up_to_their_end() {
        let source = "f(r#\"a \"quote\", \"told\"#, r\"told\\\");\nr(\"told\")";
        let lines: Vec<_> = complaints(&messages(source)).iter().map(|text| text[..4].to_owned()).collect();
        assert_eq!(lines, ["x:1:", "x:1:", "x:2:"]);
    }

    #[test]
    fn literals_after_a_function_for_tests_are_read() {
        let source = "#[cfg(test)]\nfn f() {}\nfn g() { \"told\" }";
        assert_eq!(complaints(&messages(source)), ["x:3: \"told\": write reported"]);
    }

    #[test]
    fn messages_of_the_libraries_are_checked_and_those_of_their_tests_are_not() {
        assert!(has_checked_messages("crates/multifd/src/error/mod.rs"));
        assert!(has_checked_messages("examples/microvm/src/main.rs"));
        assert!(!has_checked_messages("crates/multifd/tests/it/main.rs"));
        assert!(!has_checked_messages("crates/multifd/src/compress/tests.rs"));
        assert!(!has_checked_messages("crates/multifd-testkit/src/guest.rs"));
        assert!(!has_checked_messages(OWN));
    }

    #[test]
    fn list_is_whole() {
        assert!(list(LIST).unwrap().len() > 20);
        assert!(list("told").is_err() && list("told # a\nTold # b").is_err());
    }
}
