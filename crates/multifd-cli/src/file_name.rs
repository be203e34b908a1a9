//! The names of the files of `receive --dir`: a template of the operator, filled with what is known of a machine.
//!
//! A part of a name may come from a peer. So the filled name is checked: it is one name in the folder, visible, and without
//! control characters.

use multifd::{error::is_executed, wire::VmUuid};

use crate::output::log::time_of_day;

/// A template, with its placeholders found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NameTemplate(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Name,
    Number,
    Time,
    Uuid,
}

/// What is known of a machine.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) uuid: Option<VmUuid>,
    /// It counts the machines of this process, from 1.
    pub(crate) number: u64,
    pub(crate) time: String,
}

impl Known {
    /// A machine that arrives now.
    pub(crate) fn now(number: u64) -> Self {
        Self { uuid: None, number, time: time_of_day().replace(['-', ':'], "") }
    }

    fn uuid(&self) -> Option<String> {
        self.uuid.filter(|uuid| !uuid.is_nil()).map(|uuid| uuid.to_string())
    }
}

impl NameTemplate {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once('{') {
            parts.extend((!before.is_empty()).then(|| Part::Text(before.to_owned())));
            let (name, behind) = behind.split_once('}').ok_or("expected } after {")?;
            parts.push(match name {
                "name" => Part::Name,
                "number" => Part::Number,
                "time" => Part::Time,
                "uuid" => Part::Uuid,
                _ => {
                    return Err(format!(
                        "expected {{name}}, {{uuid}}, {{number}} or {{time}}, found {{{name}}}"
                    ));
                }
            });
            rest = behind;
        }
        parts.extend((!rest.is_empty()).then(|| Part::Text(rest.to_owned())));
        let template = Self(parts);
        // A template whose names are all refused is wrong usage, not the failure of a migration.
        template.name(&Known {
            uuid: Some(VmUuid([0xff; 16])),
            number: u64::MAX,
            time: Known::now(0).time,
        })?;
        Ok(template)
    }

    /// The name of a machine's file.
    ///
    /// # Errors
    /// If it is no usable name.
    pub(crate) fn name(&self, known: &Known) -> Result<String, String> {
        let mut name = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => name += text,
                Part::Name => name += &known.uuid().unwrap_or_else(|| format!("machine-{}", known.number)),
                Part::Number => name += &known.number.to_string(),
                Part::Time => name += &known.time,
                Part::Uuid => name += &known.uuid().unwrap_or_else(|| "no-uuid".into()),
            }
        }
        checked(name)
    }
}

/// Refuses what is not one visible name in a folder.
fn checked(name: String) -> Result<String, String> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.contains('/') {
        "it contains /; all files are in the folder itself"
    } else if name.starts_with('.') {
        "it begins with a dot: such files are hidden, and this program uses them for incomplete ones"
    } else if name.contains(is_executed) || name.contains('\0') {
        "it contains control characters"
    } else if name.len() > LONGEST {
        "it is too long"
    } else {
        return Ok(name);
    };
    Err(format!("{name:?} cannot be the name of a file: {why}"))
}

/// The name with a number before its extension: `a.ram` becomes `a-2.ram`.
pub(crate) fn numbered(name: &str, number: u32) -> String {
    match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() => format!("{stem}-{number}.{extension}"),
        _ => format!("{name}-{number}"),
    }
}

/// Less than a file system allows (255), because a number may be added.
const LONGEST: usize = 240;

#[cfg(test)]
mod tests {
    use super::*;

    fn known(uuid: Option<[u8; 16]>) -> Known {
        Known { uuid: uuid.map(VmUuid), number: 7, time: "20260131T235959Z".into() }
    }

    #[test]
    fn placeholders_are_filled_and_an_unknown_uuid_is_replaced() {
        let uuid = Some([0x11; 16]);
        for (template, with, without) in [
            ("{name}.ram", "11111111-1111-1111-1111-111111111111.ram", "machine-7.ram"),
            ("vm-{uuid}", "vm-11111111-1111-1111-1111-111111111111", "vm-no-uuid"),
            ("{number}-{time}", "7-20260131T235959Z", "7-20260131T235959Z"),
            ("plain", "plain", "plain"),
        ] {
            let parsed = NameTemplate::parse(template).unwrap();
            assert_eq!(parsed.name(&known(uuid)).unwrap(), with);
            assert_eq!(parsed.name(&known(None)).unwrap(), without);
            assert_eq!(
                parsed.name(&known(Some([0; 16]))).unwrap(),
                without,
                "guests without -uuid send zeros"
            );
        }
    }

    #[test]
    fn template_that_is_no_file_name_is_refused_with_the_reason() {
        let long = "x".repeat(LONGEST + 1);
        for (template, why) in [
            ("", "it is empty"),
            ("a/{name}", "it contains /"),
            ("..", "begins with a dot"),
            (".{name}", "begins with a dot"),
            ("a\nb", "control characters"),
            ("a\u{1b}[2J", "control characters"),
            ("a\0b", "control characters"),
            ("a\u{202e}b", "control characters"),
            ("{name", "expected } after {"),
            ("{host}", "expected {name}, {uuid}, {number} or {time}, found {host}"),
            ("{}", "found {}"),
            (&long, "too long"),
        ] {
            let refused = NameTemplate::parse(template).expect_err(template);
            assert!(refused.contains(why), "{template:?}: {refused}");
        }
    }

    #[test]
    fn number_is_added_before_the_extension() {
        assert_eq!(numbered("a.b.ram", 2), "a.b-2.ram");
        assert_eq!(numbered("a", 3), "a-3");
    }
}
