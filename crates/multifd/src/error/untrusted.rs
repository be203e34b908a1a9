//! Text from outside (a peer, a file, the file system, a certificate), made safe to show to a person.
//!
//! A terminal executes control characters: such text could clear the screen, set the title or imitate another message.
//! Characters that change the direction of text could do the latter as well.

use std::fmt::{self, Write};

/// Text that somebody else chose. When shown, it is escaped as [`Printable`] does, and at most 512 of its characters are
/// shown.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct UntrustedText(String);

impl UntrustedText {
    /// Text of these bytes. Each byte that is not valid UTF-8 becomes `\x` and its value in hex.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut text = String::new();
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            for byte in chunk.invalid() {
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
        Self(text)
    }

    /// The text as it came, not escaped.
    pub fn as_raw(&self) -> &str {
        &self.0
    }
}

impl<T: Into<String>> From<T> for UntrustedText {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for UntrustedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(MOST_SHOWN) {
            None => write!(f, "{}", Printable(&self.0)),
            Some((end, _)) => write!(f, "{}…", Printable(self.0.get(..end).unwrap_or_default())),
        }
    }
}

impl fmt::Debug for UntrustedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Text that is escaped when it is shown: each character that a terminal [would execute](is_executed) becomes `\u{1b}`, its
/// number in hex. These are control characters, and the characters that change the direction or the end of a line or are
/// invisible.
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escape(f).write_str(self.0)
    }
}

/// Whether a terminal would do something else with this character than show it: execute it, change the direction or the end
/// of the line, or show nothing.
pub fn is_executed(character: char) -> bool {
    character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') || is_ignorable(character)
}

/// Whether Unicode has the character among those that are shown as nothing (`Default_Ignorable_Code_Point`), or as marks of
/// interlinear annotations. The marks, embeddings, overrides and isolates of direction are among them. Two names that differ
/// in such a character look the same.
fn is_ignorable(character: char) -> bool {
    matches!(
        character,
        '\u{ad}'
            | '\u{34f}'
            | '\u{61c}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

/// Escapes what is written to the formatter.
pub(super) struct Escape<'a, 'b>(pub(super) &'a mut fmt::Formatter<'b>);

impl Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(is_executed) {
            let (shown, from) = rest.split_at(at);
            self.0.write_str(shown)?;
            let mut characters = from.chars();
            if let Some(character) = characters.next() {
                write!(self.0, "\\u{{{:x}}}", u32::from(character))?;
            }
            rest = characters.as_str();
        }
        self.0.write_str(rest)
    }
}

/// Enough for every name of the protocol, which has at most 255 bytes, and for the reason of a destination, which has at most
/// 512.
const MOST_SHOWN: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_a_terminal_executes_are_escaped() {
        let hostile = "a\u{1b}]0;x\u{7}b\nc\u{9b}2Jd\u{202e}e\u{2028}f\u{7f}";
        let shown = r"a\u{1b}]0;x\u{7}b\u{a}c\u{9b}2Jd\u{202e}e\u{2028}f\u{7f}";
        assert_eq!(Printable(hostile).to_string(), shown);
        assert_eq!(UntrustedText::from(hostile).to_string(), shown);
        assert_eq!(format!("{:?}", UntrustedText::from(hostile)), format!("\"{shown}\""));
        assert_eq!(UntrustedText::from(hostile).as_raw(), hostile);
    }

    #[test]
    fn invisible_characters_are_escaped() {
        let hidden = "vm\u{200b}\u{200d}\u{ad}\u{2066}\u{fe0f}\u{3164}\u{e0041}";
        let shown = r"vm\u{200b}\u{200d}\u{ad}\u{2066}\u{fe0f}\u{3164}\u{e0041}";
        assert_eq!(Printable(hidden).to_string(), shown);
    }

    #[test]
    fn text_of_any_language_is_shown_as_it_is() {
        for text in ["pc.ram", "größe", "メモリ", "/a b/\"c\"", ""] {
            assert_eq!(UntrustedText::from(text).to_string(), text);
        }
    }

    #[test]
    fn invalid_bytes_are_shown_in_hex() {
        assert_eq!(UntrustedText::from_bytes(b"a\xff\xc3b\x1b").to_string(), r"a\xff\xc3b\u{1b}");
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let shown = UntrustedText::from("ö".repeat(1 << 20)).to_string();
        assert_eq!(shown, format!("{}…", "ö".repeat(MOST_SHOWN)));
        assert_eq!(UntrustedText::from("x".repeat(MOST_SHOWN)).to_string(), "x".repeat(MOST_SHOWN));
    }
}
