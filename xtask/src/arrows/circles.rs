//! Checks that there are no circles: if a file uses another one, that one must not use it in turn, directly or
//! indirectly.
//!
//! The input is the files of each crate in `crates/`. The output is each circle, with the names that cause it. A parent
//! module is a file like any other, so a parent that uses its child must define nothing that the child uses.

use std::collections::{BTreeSet, HashMap};

use super::imports::{Arrows, arrows};
use crate::Failure;
use crate::sources::{self, Source};

/// Known circles that are still to be removed: the files of each. A file that is no longer in a circle must be removed
/// from the list, so that the list only shrinks.
const ALLOWED: &[&[&str]] = &[];

/// Checks that the files of each crate form no circle but the allowed ones.
///
/// # Errors
///
/// Names each new circle, and each file that is listed and in no circle.
pub(crate) fn check() -> Result<(), Failure> {
    let sources = sources::all()?;
    let files: HashMap<&str, &str> = sources.iter().map(|source| (&*source.path, &*source.text)).collect();
    let mut circles = Vec::new();
    for root in roots(&sources) {
        circles.extend(circles_of(&arrows(root, &files)?));
    }
    for circle in circles.iter().filter(|circle| is_allowed(circle, ALLOWED)) {
        eprintln!("   known {}", circle.text);
    }
    let complaints = complaints(&circles, ALLOWED);
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

/// The root file of each crate in `crates/`. A program next to a library uses it like another crate.
fn roots(sources: &[Source]) -> Vec<&str> {
    let path = |root: &str, source: &Source| {
        let name = source.path.strip_prefix("crates/")?.strip_suffix(root)?;
        (!name.contains('/')).then(|| name.to_owned())
    };
    let libraries: BTreeSet<String> =
        sources.iter().filter_map(|source| path("/src/lib.rs", source)).collect();
    let is_root = |source: &&Source| {
        path("/src/lib.rs", source).is_some()
            || path("/src/main.rs", source).is_some_and(|name| !libraries.contains(&name))
    };
    sources.iter().filter(is_root).map(|source| &*source.path).collect()
}

/// Files that all lead to each other.
struct Circle {
    files: BTreeSet<String>,
    /// What the files use of each other, as text.
    text: String,
}

fn circles_of(arrows: &Arrows) -> Vec<Circle> {
    let reached: HashMap<&str, BTreeSet<&str>> =
        arrows.keys().map(|file| (&**file, reached_from(arrows, file))).collect();
    let leads = |from: &str, to: &str| reached.get(from).is_some_and(|files| files.contains(to));
    let mut circles: Vec<Circle> = Vec::new();
    for file in arrows.keys().filter(|file| leads(file, file)) {
        if circles.iter().any(|circle| circle.files.contains(file)) {
            continue;
        }
        let files: BTreeSet<String> =
            reached[&**file].iter().filter(|other| leads(other, file)).map(ToString::to_string).collect();
        circles.push(Circle { text: text(&files, arrows), files });
    }
    circles
}

/// All files to which `file` leads, by one arrow or more.
fn reached_from<'a>(arrows: &'a Arrows, file: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut ahead = vec![file];
    while let Some(file) = ahead.pop() {
        for target in arrows.get(file).into_iter().flat_map(|targets| targets.keys()) {
            if reached.insert(&**target) {
                ahead.push(target);
            }
        }
    }
    reached
}

fn text(files: &BTreeSet<String>, arrows: &Arrows) -> String {
    let mut text = format!("import cycle of {} files", files.len());
    for file in files {
        let targets = arrows.get(file).into_iter().flatten();
        for (target, names) in targets.filter(|(target, _)| files.contains(*target)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            text += &format!("\n     {file} uses {} of {target}", names.join(", "));
        }
    }
    text
}

fn is_allowed(circle: &Circle, allowed: &[&[&str]]) -> bool {
    allowed.iter().any(|listed| circle.files.iter().all(|file| listed.contains(&&**file)))
}

fn complaints(circles: &[Circle], allowed: &[&[&str]]) -> Vec<String> {
    let new = circles.iter().filter(|circle| !is_allowed(circle, allowed)).map(|circle| circle.text.clone());
    let is_in_one = |file: &str| circles.iter().any(|circle| circle.files.contains(file));
    let gone = allowed.iter().flat_map(|listed| listed.iter()).filter(|file| !is_in_one(file));
    let gone = gone
        .map(|file| format!("{file}: is in no import cycle: remove it from ALLOWED in arrows/circles.rs"));
    new.chain(gone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<Circle> {
        circles_of(&arrows("src/lib.rs", &files.iter().copied().collect()).unwrap())
    }

    /// The text of the only circle.
    fn circle(files: &[(&str, &str)]) -> String {
        let circles = circles(files);
        assert_eq!(circles.len(), 1);
        circles.into_iter().map(|circle| circle.text).collect()
    }

    #[test]
    fn two_files_that_use_each_other_are_a_circle_with_the_names_that_tie_it() {
        let found = circle(&[
            ("src/lib.rs", "mod a; mod b; mod c;"),
            ("src/a.rs", "use crate::b::{B, Other as Renamed}; pub struct A;"),
            ("src/b.rs", "pub struct B(super::a::A); pub struct Other;"),
            ("src/c.rs", "use crate::{a::A, b};"),
        ]);
        assert_eq!(
            found,
            "import cycle of 2 files\n     src/a.rs uses B, Other of src/b.rs\n     src/b.rs uses A of src/a.rs"
        );
    }

    #[test]
    fn circle_by_way_of_a_third_file_is_one_circle_and_an_open_end_is_outside() {
        let found = circle(&[
            ("src/lib.rs", "mod a; mod b; mod c; mod d;"),
            ("src/a.rs", "use crate::b; pub struct A; fn a() { b::b() }"),
            ("src/b.rs", "pub fn b() { crate::c::C::new() }"),
            ("src/c.rs", "pub struct C; impl C { fn c(self) -> crate::a::A { crate::d::D } }"),
            ("src/d.rs", "pub struct D;"),
        ]);
        assert!(found.starts_with("import cycle of 3 files\n     src/a.rs uses b of src/b.rs"), "{found}");
        assert!(found.ends_with("src/c.rs uses A of src/a.rs"), "{found}");
    }

    #[test]
    fn paths_in_macros_and_through_imported_modules_are_seen() {
        let found = circle(&[
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", "use crate::b; pub struct A; fn a() { b::b() }"),
            ("src/b.rs", "pub fn b() { print!(\"{}\", 1 + vec![crate::a::A]) }"),
        ]);
        assert!(found.contains("src/a.rs uses b of src/b.rs\n     src/b.rs uses A of src/a.rs"), "{found}");
    }

    #[test]
    fn re_export_leads_to_the_definition() {
        let found = circle(&[
            ("src/lib.rs", "mod error; mod live; pub use error::Error;"),
            ("src/error/mod.rs", "mod usage; pub use usage::*; pub use crate::live::{Status as State};"),
            ("src/error/usage.rs", "use super::State; pub enum Usage { Met(State) }"),
            ("src/live/mod.rs", "mod status; pub use self::status::Status;"),
            ("src/live/status.rs", "pub struct Status; fn f() -> crate::error::Usage {}"),
        ]);
        assert!(
            found.starts_with(
                "import cycle of 2 files\n     src/error/usage.rs uses Status of src/live/status.rs"
            ),
            "{found}"
        );
        assert!(found.ends_with("src/live/status.rs uses Usage of src/error/usage.rs"), "{found}");
    }

    #[test]
    fn parent_that_only_declares_its_child_is_in_no_circle() {
        let declares = [
            ("src/lib.rs", "mod a; pub use a::A; pub struct P;"),
            ("src/a.rs", "use crate::P; pub struct A;"),
        ];
        assert!(circles(&declares).is_empty());
        let uses = [("src/lib.rs", "mod a; pub use a::A; pub struct P(A);"), declares[1]];
        assert_eq!(circles(&uses).len(), 1);
    }

    #[test]
    fn code_for_tests_ties_nothing() {
        let files = [
            ("src/lib.rs", "mod a; mod b; #[cfg(shuttle)] mod model;"),
            ("src/a.rs", "use crate::b::B; pub struct A;"),
            (
                "src/b.rs",
                "pub struct B; #[cfg(test)] mod tests { use crate::a::A; }\n#[cfg(test)] use crate::a::A;",
            ),
        ];
        assert!(circles(&files).is_empty());
    }

    #[test]
    fn glob_imports_are_followed_and_may_go_in_circles_themselves() {
        let found = circle(&[
            ("src/lib.rs", "mod a; mod b;"),
            (
                "src/a.rs",
                "use crate::b::*; pub use crate::b::*; use x::x; use std::io::*; pub struct A(B, x::Y);",
            ),
            ("src/b.rs", "use crate::a::*; pub struct B(A); use std::fmt::Debug; struct C(Vec<Unknown>);"),
        ]);
        assert!(found.contains("src/a.rs uses B of src/b.rs\n     src/b.rs uses A of src/a.rs"), "{found}");
    }

    #[test]
    fn only_what_is_listed_passes_and_what_is_gone_must_leave_the_list() {
        let circles = circles(&[
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", "use crate::b::B; pub struct A;"),
            ("src/b.rs", "use crate::a::A; pub struct B;"),
        ]);
        assert!(complaints(&circles, &[]).concat().starts_with("import cycle of 2 files"));
        assert!(complaints(&circles, &[&["src/a.rs"]]).concat().starts_with("import cycle of 2 files"));
        assert!(complaints(&circles, &[&["src/a.rs", "src/b.rs"]]).is_empty());
        let found = complaints(&circles, &[&["src/a.rs", "src/b.rs", "src/c.rs"]]).concat();
        assert!(found.starts_with("src/c.rs: is in no import cycle"), "{found}");
    }

    #[test]
    fn root_is_the_library_or_else_the_program() {
        let source = |path: &str| Source { path: path.into(), text: String::new() };
        let sources = [
            source("crates/a/src/lib.rs"),
            source("crates/a/src/main.rs"),
            source("crates/b/src/main.rs"),
            source("crates/b/src/x/lib.rs"),
            source("xtask/src/main.rs"),
        ];
        assert_eq!(roots(&sources), ["crates/a/src/lib.rs", "crates/b/src/main.rs"]);
    }
}
